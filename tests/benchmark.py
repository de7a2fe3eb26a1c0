"""Time and memory of training and testing, beside a plain version of the same network.

    python tests/benchmark.py                    the table of README, on MNIST in data/
    python tests/benchmark.py --rounds 3 --json results/benchmark.json

The plain version is what most implementations do, done with care: float32, eager, NCHW, every
u_hat made and kept (by one batched product, without copies of W), Adam as it comes, and a
DataLoader that shifts PIL images one by one. All contestants take turns in one process, so that
a noisy machine disturbs all alike; the medians' ratios count. The clock covers the whole training
loop (data, forward, backward, Adam) but for compilation, the first round and loading the files.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import net

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

    def __init__(self, device, data, batch, r, precision, compile):
        arguments = dict(lr=1e-3, lr_decay=0.005, epochs=1, seed=1, log_interval=10**9)
        options = dict(batch_size=batch, precision=precision, compile=compile)
        torch.manual_seed(1)
        model = net.CapsNet(routing_iterations=r, with_reconstruction=True).to(device)
        self.data = TensorDataset(*(tensor.to(device) for tensor in data.tensors))
        steps = -(-len(data) // batch)
        self.run = net.Run(Path("unused"), Namespace(**arguments, **options), model, steps)

    def train(self):
        self.run.step = 0
        with contextlib.redirect_stdout(io.StringIO()):
            net.train_epoch(self.run, self.data, NEVER)

    def test(self):
        net.evaluate(self.run.model, self.data, 1000).tolist()

    def load(self):
        order, shifts = net.draw_epoch(len(self.data), 1, 0)
        for _ in net.batches(self.data, self.run.args.batch_size, order, shifts):
            pass


class Plain:
    """The plain version."""

    def __init__(self, device, data, batch, r, folder, workers=0):
        torch.manual_seed(1)
        self.device = device
        self.model = net.CapsNet(routing_iterations=r, with_reconstruction=True)
        digits = self.model.digit_caps
        digits.__class__ = PlainDigitCaps
        self.model = self.model.to(device).to(memory_format=torch.contiguous_format)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.to(memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        shift = transforms.Compose(
            [transforms.Pad(2), transforms.RandomCrop(28), transforms.ToTensor()]
        )
        images = torchvision.datasets.MNIST(folder, train=True, transform=shift)
        self.loader = DataLoader(
            Subset(images, range(len(data))), batch, shuffle=True, num_workers=workers
        )
        self.data = TensorDataset(*(tensor.to(device) for tensor in data.tensors))

    def train(self):
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            loss = self.model.losses(self.model(images, labels), images, labels)[0]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        loss.item()

    def test(self):
        net.evaluate(self.model, self.data, 1000).tolist()

    def load(self):
        for _ in self.loader:
            pass


def make(name, device, data, batch, r, folder):
    """The contestant of this name."""
    if name.startswith("plain"):
        return Plain(device, data, batch, r, folder, workers=8 if "workers" in name else 0)
    return Ours(device, data, batch, r, name.split()[0], "compile" in name)


def seconds(action, device):
    """How long an action takes, the device's work included."""
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def race(contestants, what, rounds, device):
    """Median seconds of each contestant's `what`, taking turns; a first round is not counted."""
    times = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            times[name].append(seconds(getattr(contestant, what), device))
    firsts = {name: taken[0] for name, taken in times.items()}
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}, firsts


def peak_memory(arguments, name, what, batch, r):
    """MiB that a fresh process needs at its peak: of the GPU's memory, or all of its own."""
    command = [sys.executable, __file__, "--peak-of", name, what, str(batch), str(r)]
    command += ["--data-dir", arguments.data_dir] + ["--no-cuda"] * arguments.no_cuda
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name, what, batch, r, data, device, folder):
    """What peak_memory asks its child for."""
    data = TensorDataset(*data[:1000] if what == "test" else data[: 4 * int(batch)])
    contestant = make(name, device, data, int(batch), int(r), folder)
    getattr(contestant, what)()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() // 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def table(rows):
    """The results as Markdown, each beside the plain version of its group."""
    lines = ["| what | batch | r | version | ms | times plain | first ms |", "|" + "---|" * 7]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['batch']} | {row['r']} | {row['name']} | {row['ms']:.0f} "
            f"| {row['ratio']:.2f} | {row['first_ms']:.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="time and memory beside a plain version")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps in a turn")
    parser.add_argument("--batches", type=int, nargs="+", default=[128])
    parser.add_argument("--r", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--names", nargs="+", help="which versions (all without it)")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.no_cuda
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    data = net.load_data("MNIST", args.data_dir, train=True)
    if args.peak_of:
        return print_peak(*args.peak_of, data, device, args.data_dir)
    names = ["plain", "fp32", "bf16", "fp32 compile", "bf16 compile"]
    names = args.names or names + ["plain, 8 workers"] * cuda
    rows, peaks = [], []
    for batch in args.batches:
        for r in args.r:
            part = TensorDataset(*data[: args.steps * batch])
            racers = {name: make(name, device, part, batch, r, args.data_dir) for name in names}
            for what in ("train", "test", "load"):
                medians, firsts = race(racers, what, args.rounds, device)
                unit = 1000 / (1 if what == "test" else args.steps)
                rows += [
                    dict(what=what, batch=batch, r=r, name=name, ms=median * unit)
                    | dict(ratio=medians[names[0]] / median, first_ms=firsts[name] * 1000)
                    for name, median in medians.items()
                ]
                print(table(rows[-len(names) :]), flush=True)
    for what, batch in (("train", 128), ("test", 1000)):
        for name in names:
            peak = peak_memory(args, name, what, batch, 3)
            peaks.append(dict(what=what, batch=batch, name=name, mib=peak))
            print(f"peak memory  {what}  batch {batch}  {name}  {peak} MiB", flush=True)
    found = {**net.environment(device), "rounds": args.rounds, "steps": args.steps}
    found |= {"times": rows, "peaks": peaks}
    print("\n" + table(rows) + "\n\n" + json.dumps(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
