"""The convolution by spectra, beside PyTorch's direct one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Recorder, leaf, normal, relative_error
from torch.utils.flop_counter import FlopCounterMode

import net

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
CASES = [  # kernel, stride, size of the image, channels in and out
    (9, 2, 20, 5, 6),  # PrimaryCaps on 28 x 28 pixels
    (9, 2, 24, 3, 4),  # on 32 x 32
    (9, 2, 28, 2, 3),  # on 36 x 36
    (9, 2, 21, 3, 2),  # a row and a column are left over
    (9, 2, 9, 4, 3),  # one place
    (9, 2, 10, 1, 1),
    (5, 1, 11, 3, 4),
    (4, 3, 17, 2, 3),
    (3, 2, 10, 2, 5),
    (5, 2, 12, 3, 2),
    (6, 4, 23, 2, 2),
    (2, 3, 12, 3, 3),  # taps lie further apart than the kernel is wide
    (1, 1, 5, 2, 2),
    (1, 2, 6, 2, 3),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def direct_conv2d(images, weight, stride):
    """PyTorch's, with the taps of the weight first, as net.py has them."""
    return F.conv2d(images, weight.permute(3, 2, 0, 1), stride=stride)


def both(case, dtype):
    """[(value, gradient of the image, gradient of the weight)] of the spectra and directly."""
    kernel, stride, size, channels, out = case
    results = []
    for convolve in (net.spectral_conv2d, direct_conv2d):
        images = leaf(normal(3, channels, size, size), dtype)
        weight = leaf(normal(kernel, kernel, channels, out, seed=1), dtype)
        value = convolve(images, weight, stride=stride)
        value.backward(normal(*value.shape, seed=2).to(dtype))
        results.append((value, images.grad, weight.grad))
    return results


@each_dtype
@each_case
def test_spectra_give_the_values_of_the_direct_convolution(case, dtype):
    spectral, direct = both(case, dtype)
    assert relative_error(spectral[0], direct[0]) < TOLERANCE[dtype]


@each_dtype
@each_case
def test_spectra_give_the_gradients_of_the_direct_convolution(case, dtype):
    spectral, direct = both(case, dtype)
    assert relative_error(spectral[1], direct[1]) < TOLERANCE[dtype]
    assert relative_error(spectral[2], direct[2]) < TOLERANCE[dtype]


def test_phases_are_what_a_stride_tells_apart():
    x = normal(5, 5, 3, 2)
    parts = net.phases(x, stride=2, size=2).unflatten(0, (2, 2)).unflatten(3, (2, 2, 2))
    for p, q, a, b in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
        assert torch.equal(parts[p, q, :, a, b], x[2 * p + a, 2 * q + b])


def test_missing_places_of_a_phase_are_zero():
    parts = net.phases(torch.ones(3, 3, 1, 1), stride=2, size=2)
    assert parts.sum() == 9 and parts.numel() == 16


def test_primary_capsules_need_624_multiplications_instead_of_2916():
    images, weight = normal(1, 1, 20, 20), normal(9, 9, 1, 1)
    multiplications = []
    for convolve, operator in (
        (net.spectral_conv2d, torch.ops.aten.bmm),
        (direct_conv2d, torch.ops.aten.convolution),
    ):
        with FlopCounterMode(display=False) as flops:
            convolve(images, weight, stride=2)
        multiplications.append(flops.get_flop_counts()["Global"][operator] / 2)
    assert multiplications == [624, 2916]


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda")


def test_primary_capsules_are_the_same_by_spectra_and_on_a_gpu_without():
    layer = net.PrimaryCaps(in_channels=8, types=3, dim=5).double()
    features = normal(2, 8, 20, 20)
    found = []
    for images in (features, features.as_subclass(Elsewhere)):
        with Recorder() as recorder:
            found.append(layer(images).as_subclass(torch.Tensor))
        operators = [operator for operator, *_ in recorder.calls]
        convolves = torch.ops.aten.convolution.default in operators
        assert convolves == isinstance(images, Elsewhere)
    assert relative_error(*found) < 1e-12


def test_bfloat16_is_within_one_percent():
    features, weight = normal(4, 64, 20, 20).relu(), normal(9, 9, 64, 32, seed=1)
    spectral = net.spectral_conv2d(features.bfloat16(), weight.bfloat16(), 2).double()
    direct = direct_conv2d(features, weight, stride=2)
    assert (spectral - direct).norm() / direct.norm() < 0.01  # 0.006


def test_initial_weights_are_those_of_a_convolution():
    torch.manual_seed(1)
    layer = net.PrimaryCaps(in_channels=4, types=2, dim=3)
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(4, 6, 9)
    assert torch.equal(layer.weight, conv.weight.permute(2, 3, 1, 0))
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.bias, conv.bias)
