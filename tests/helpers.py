"""What several tests share: one measure of error, its thresholds, and a record of operators."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
