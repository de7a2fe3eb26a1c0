"""What several tests share: a measure of error, a record of operators, small data, a tiny net."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import net

REPOSITORY = Path(__file__).parent.parent
TINY = {"conv_channels": 16, "primary_types": 4, "digit_dim": 8, "decoder_widths": (32, 64)}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


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


def start_net(*args, **kwargs):
    """Start `python net.py ARGS` with a tiny CapsNet in a child; kwargs are Popen's, like cwd."""
    code = "import sys, net; net.CapsNet.__init__.__kwdefaults__.update({}); {}"
    command = [sys.executable, "-c", code.format(TINY, "sys.exit(net.main(sys.argv[1:]))")]
    environment = {"PYTHONPATH": str(Path(net.__file__).parent), "OMP_NUM_THREADS": "1"}
    kwargs["env"] = {**os.environ, **environment, **kwargs.get("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, args)], **{**pipes, **kwargs})


def run_net(*args, timeout=120, **kwargs):
    """Like start_net, but waits: a CompletedProcess with stdout and stderr as text."""
    with start_net(*args, **kwargs) as child:
        try:
            output = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    return subprocess.CompletedProcess(child.args, child.returncode, *output)
