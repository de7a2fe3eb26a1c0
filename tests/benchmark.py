"""Time and memory of training and testing, beside a plain version of the same network.

    python tests/benchmark.py                                  on MNIST in data/
    python tests/benchmark.py --rounds 9 --json FILE           longer, results kept

It needs Linux or macOS. "direct" is net.py with PyTorch's own convolution in place of that by
spectra (on a CPU). The plain version is what most implementations do, done with care: float32,
eager, NCHW, that convolution, every u_hat made and kept (by one batched product, without copies of
W), Adam as it comes, and a DataLoader that shifts PIL images one by one. Every contestant has a
process of its own, and they take turns, one at a time, in a round forwards and in the next one
back, so that a noisy machine disturbs all alike; the medians' ratios count. The clock covers the
whole training loop (data, forward, backward, Adam), or a test of 1,000 images, but for the loading
of the files and the first two rounds, which hold the compilation.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import net

WARM_UP = 2  # rounds
TESTED = 1000  # images
NEVER = Namespace(signal=0, agreed=lambda: 0)


class PlainDigitCaps(net.DigitCaps):
    """Routing as most write it: u_hat (B, J, I, E) is made once and kept."""

    def forward(self, u):
        u_hat = torch.einsum("bid,jide->bjie", u, self.weight)
        b = u.new_zeros(u_hat.shape[:3])
        for iteration in range(self.routing_iterations):
            c = b.softmax(dim=1)
            v = net.squash((c.unsqueeze(-1) * u_hat).sum(dim=2))
            if iteration < self.routing_iterations - 1:
                b = b + (u_hat * v.unsqueeze(2)).sum(dim=-1)
        return v, c.transpose(1, 2)


class Ours:
    """net.py's own training loop."""

    def __init__(self, device, data, tested, batch, r, precision, compile):
        net.keep_freed_memory()
        arguments = dict(lr=1e-3, lr_decay=0.05, warm_up=100, epochs=1, seed=1, log_interval=10**9)
        options = dict(batch_size=batch, precision=precision, compile=compile)
        model = net.CapsNet(routing_iterations=r, with_reconstruction=True).to(device)
        self.data, self.tested = data.to(device), tested.to(device)
        steps = -(-len(data) // batch)
        self.run = net.Run(Path("unused"), Namespace(**arguments, **options), model, steps)

    def train(self):
        self.run.step = 0
        net.train_epoch(self.run, self.data, NEVER)

    def test(self):
        net.evaluate(self.run.model, self.tested, TESTED).tolist()

    def load(self):
        for _ in net.batches(self.data, self.run.args.batch_size, net.draw_epoch(self.data, 1, 0)):
            pass


def direct_conv2d(images, weight, stride):
    """PyTorch's convolution, in the place of net.spectral_conv2d."""
    return F.conv2d(images, weight.permute(3, 2, 0, 1), stride=stride)


def lay_as_conv2d(primary_caps, memory_format):
    """Have the weight lie in memory as nn.Conv2d's does; its shape stays."""
    weight = primary_caps.weight.data.permute(3, 2, 0, 1).contiguous(memory_format=memory_format)
    primary_caps.weight.data = weight.permute(2, 3, 1, 0)


class Plain:
    """The plain version."""

    def __init__(self, device, data, tested, batch, r, folder, workers=0):
        self.device = device
        self.tested = tested.to(device)
        net.spectral_conv2d = direct_conv2d
        self.model = net.CapsNet(routing_iterations=r, with_reconstruction=True)
        self.model.digit_caps.__class__ = PlainDigitCaps
        self.model.to(device, memory_format=torch.contiguous_format)
        lay_as_conv2d(self.model.primary_caps, torch.contiguous_format)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        steps = [transforms.Pad(2), transforms.RandomCrop(28), transforms.ToTensor()]
        shifted = torchvision.datasets.MNIST(folder, transform=transforms.Compose(steps))
        part = Subset(shifted, range(len(data)))
        how = dict(num_workers=workers, persistent_workers=workers > 0)
        how |= dict(pin_memory=device.type == "cuda")
        self.loader = DataLoader(part, batch, shuffle=True, **how)

    def train(self):
        self.model.train()
        for images, labels in self.loader:
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True).unsqueeze(1)
            output = self.model(images, labels)
            loss = self.model.losses(output, images.unsqueeze(1), labels)[0].mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        loss.item()

    def test(self):
        net.evaluate(self.model, self.tested, TESTED).tolist()

    def load(self):
        for _ in self.loader:
            pass


def make(name, device, data, tested, batch, r, folder):
    """The contestant of this name."""
    torch.manual_seed(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = "TF32" in name
    torch.backends.cudnn.deterministic = not name.startswith("plain")  # as net.py has it
    if "memory kept" in name:  # what Ours always does
        net.keep_freed_memory()
    if name.startswith("plain"):
        workers = 8 if "workers" in name else 0
        return Plain(device, data, tested, batch, r, folder, workers)
    if "direct" in name:
        net.spectral_conv2d = direct_conv2d
    ours = Ours(device, data, tested, batch, r, name.split()[0], "compile" in name)
    if "direct" in name:
        lay_as_conv2d(ours.run.model.primary_caps, torch.channels_last)
    return ours


def serve(pipe, name, device, count, batch, r, folder):
    """In a process of its own: do what the pipe says, answer with (seconds, MiB at the peak)."""
    digits = net.load_data("MNIST", folder, train=True)
    data, tested = net.Digits(*digits[:count]), net.Digits(*digits[:TESTED])
    contestant = make(name, device, data, tested, batch, r, folder)
    pipe.send("ready")
    while action := pipe.recv():
        started = time.perf_counter()
        getattr(contestant, action)()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":
            peak *= 1024  # macOS tells bytes, Linux KiB
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        pipe.send((seconds, peak // 2**20))


class Contestant:
    """A process that trains or tests when told, and else does nothing."""

    def __init__(self, *description):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *description))
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it is ready

    def do(self, action):
        """(seconds, MiB at the peak so far)."""
        self.pipe.send(action)
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipe.send(None)
        self.process.join()


def race(contestants, action, rounds):
    """{name: [seconds, ...]} of contestants that take turns, with those of the warm-up."""
    times = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(WARM_UP + rounds):
        for name in order:
            times[name].append(contestants[name].do(action)[0])
        order.reverse()
    return times


def table(rows):
    """The results as Markdown, each beside the first, the plain version."""
    lines = ["| what | batch | r | version | ms | times as fast | first ms |", "|" + "---|" * 7]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['batch']} | {row['r']} | {row['name']} | {row['ms']:.0f} "
            f"| {row['ratio']:.2f} | {row['first_ms']:.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="time and memory beside a plain version")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=6, help="an even number, for both orders")
    parser.add_argument("--steps", type=int, help="training steps in a turn (4; on a GPU 100)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128])
    parser.add_argument("--r", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--names", nargs="+", help="which versions (all without it)")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.no_cuda
    device = torch.device("cuda" if cuda else "cpu")
    args.steps = args.steps or (100 if cuda else 4)
    net.load_data("MNIST", args.data_dir, train=True)  # fetched once, before all
    others = ["8 workers", "TF32, 8 workers"] if cuda else ["memory kept"]
    names = ["plain", *(f"plain, {other}" for other in others)]
    for precision in ["fp32"] + ["bf16"] * net.has_bf16(device):
        if not cuda:
            names += [f"{precision} direct"]
        names += [precision]
        if cuda or shutil.which(os.environ.get("CXX", "g++")):
            names += [f"{precision} compile"]
    names = args.names or names
    found = {**net.environment(device), "rounds": args.rounds, "steps": args.steps}
    rows, peaks = [], []
    found |= {"times": rows, "peaks": peaks}

    def keep():
        """Write what has been found so far."""
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n")

    for batch, r in itertools.product(args.batches, args.r):
        with contextlib.ExitStack() as stack:
            racers = {}
            for name in names:
                what = (name, device, args.steps * batch, batch, r, args.data_dir)
                racers[name] = stack.enter_context(Contestant(*what))
            for action in ("train", "test", "load"):
                times = race(racers, action, args.rounds)
                images, unit = batch, 1000 / args.steps
                if action == "test":
                    images, unit = TESTED, 1000
                medians = {key: statistics.median(taken[WARM_UP:]) for key, taken in times.items()}
                new = [
                    dict(what=action, batch=images, r=r, name=name, ms=median * unit)
                    | dict(ratio=medians[names[0]] / median, first_ms=times[name][0] * 1000)
                    | dict(all_ms=[round(taken * unit, 1) for taken in times[name][WARM_UP:]])
                    for name, median in medians.items()
                ]
                print(table(new), flush=True)
                rows += new
                keep()
    for action, images in (("train", 128), ("test", TESTED)):
        for name in names:
            found_mib = []
            for _ in range(3):
                with Contestant(name, device, 512, 128, 3, args.data_dir) as contestant:
                    found_mib.append(contestant.do(action)[1])
            peak = statistics.median(found_mib)
            new = dict(what=action, batch=images, r=3, name=name, mib=peak, all_mib=found_mib)
            peaks.append(new)
            print(f"peak memory  {action}  batch {images}  {name}  {peak} MiB", flush=True)
            keep()


if __name__ == "__main__":
    main()
