"""What several tests share: texts, measures, small data and networks, commands, children.

The tests need a system that forks processes: Linux or macOS.
"""

import itertools
import json
import multiprocessing
import os
import shlex
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import net

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
LIST = (REPOSITORY / "results" / "README.md").read_text(encoding="utf-8")
TINY = {"conv_channels": 16, "primary_types": 4, "digit_dim": 8, "decoder_widths": (32, 64)}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def section(page, title):
    """What stands in a page under a heading that begins like this."""
    return page.split(f"\n## {title}")[1].split("\n## ")[0]


def cells(line):
    """The cells of a Markdown table's line."""
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def table(text):
    """The lines of the first table in a text, in cells, without its head."""
    lines = "\n".join(text.splitlines()).partition("\n|---")[2].splitlines()[1:]
    return [cells(line) for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]


def parameters(model, *args, **kwargs):
    """How many numbers a model learns."""
    with torch.device("meta"):
        return sum(p.numel() for p in model(*args, **kwargs).parameters())


def relative_error(a, b):
    """max|a - b| / max|b|, in double precision."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return ((a - b).abs().max() / b.abs().max()).item()


def normal(*sizes, seed=0):
    """Normal numbers that are exact in float32, so that every precision starts from the same."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).double()


def leaf(x, dtype=torch.float64):
    """A copy of x that collects its gradient."""
    return x.detach().to(dtype, copy=True).requires_grad_()


class Recorder(TorchDispatchMode):
    """Records every operator that runs inside `with`: calls holds (operator, arguments, result)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, result))
        return result


def write_idx(file, numbers):
    """Write a uint8 tensor in the format of MNIST's files."""
    header = struct.pack(f">4B{numbers.ndim}i", 0, 0, 8, numbers.ndim, *numbers.shape)
    file.write_bytes(header + numbers.numpy().tobytes())


def write_fashion(folder, train=64, test=40):
    """Make `folder` a data folder with a small FashionMNIST, and return it.

    Image n is of class n % 10 and shows a bright bar, whose place is its class, on dim noise.
    """
    raw = Path(folder) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (prefix, count) in enumerate((("train", train), ("t10k", test))):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 64, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for image, label in zip(images, labels.tolist(), strict=True):
            top, left = 2 + 14 * (label // 5), 2 + 5 * (label % 5)
            image[top : top + 10, left : left + 4] += 180
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
    return Path(folder)


def shrink_nets(patch):
    """Make every CapsNet tiny unless it says otherwise."""
    for name, width in TINY.items():
        patch.setitem(net.CapsNet.__init__.__kwdefaults__, name, width)


QUICK = "--dataset FashionMNIST --epochs 1 --batch-size 16 --precision fp32 --warm-up 1"  # 4 steps


def argv(*parts):
    """A command line: a string is split as a shell would, anything else is one argument."""
    words = [shlex.split(part) if isinstance(part, str) else [str(part)] for part in parts]
    return list(itertools.chain(*words))


def main(*parts):
    """The exit status of `python net.py --no-cuda PARTS`, in this process."""
    return net.main(["--no-cuda", *argv(*parts)])


def log(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint(folder):
    """What a run saved."""
    return torch.load(folder / "last.pt", weights_only=True)


def files_in(folder):
    """The content of each file in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


NEVER = SimpleNamespace(signal=0, agreed=lambda: 0)  # a Stop without a signal


class SmallBaseline(net.BaselineCNN):
    """The baseline's losses and dropout, with one layer."""

    def __init__(self, in_channels, image_size, num_classes):
        nn.Module.__init__(self)
        pixels = in_channels * image_size**2
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(pixels, num_classes))


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# Children are forked from a process that has imported torch once and has no threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["net", "pytest"])
LONG = 900  # seconds that nothing takes, on the slowest machine


def fork(function, *args):
    """Start a process that calls a function."""
    child = FORKS.Process(target=function, args=args, daemon=True)  # it ends with these tests
    with pytest.MonkeyPatch.context() as patch:  # for the first one, that all are forked from
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
        child.start()
    return child


def print_to(output):
    """Have all that this process prints go to a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def run_child(arguments, output, environment, prepare):
    """What a child does: net.main with a tiny CapsNet, its output in a file."""
    print_to(output)
    os.environ.update(environment)
    torch.set_num_threads(1)
    net.CapsNet.__init__.__kwdefaults__.update(TINY)
    sys.argv = ["net.py"]
    if prepare:
        prepare()
    sys.exit(net.main(arguments))


def start_child(output, *parts, prepare=None, **environment):
    """Start `python net.py --no-cuda PARTS` with a tiny CapsNet in a process of its own.

    `output` is the file for what it prints; `prepare` is called in it first.
    """
    arguments = ["--no-cuda", *argv(*parts)]
    return fork(run_child, arguments, output, environment, prepare)


def finish(*children):
    """Wait for processes; their exit statuses. Those that do not end are killed: None."""
    for child in children:
        child.join(LONG)
    statuses = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return statuses


def wait_for(condition, *children):
    """Wait until something is so, while these processes live."""
    ends = time.monotonic() + LONG
    while not condition():
        assert all(child.is_alive() for child in children) and time.monotonic() < ends
        time.sleep(0.02)
