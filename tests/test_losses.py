"""Eq. 4 and Sec. 4.1."""

import pytest
import reference
import torch
from helpers import TOLERANCE, each_dtype, leaf, normal, relative_error

import net

# Every class is somewhere in each of the three zones: below 0.1, between, and above 0.9.
LENGTHS = torch.tensor(
    [[0.05, 0.50, 0.95, 0.20], [0.93, 0.04, 0.60, 0.97], [0.40, 0.99, 0.02, 0.03]]
).double()
LABELS = {1: torch.tensor([[1], [0], [2]]), 2: torch.tensor([[1, 3], [2, 0], [2, 1]])}
each_number_of_digits = pytest.mark.parametrize("K", LABELS)


def images(K, seed):
    """Three images of K digits, each digit by itself: (B, K, C, H, W)."""
    return normal(3, K, 2, 5, 4, seed=seed)


def one_example(*lengths, label=0):
    """The margin loss of one example."""
    return net.margin_loss(torch.tensor([lengths]).double(), torch.tensor([[label]])).item()


@each_dtype
@each_number_of_digits
def test_margin_loss_equals_the_oracle(K, dtype):
    lengths = LENGTHS.to(dtype)
    examples = zip(lengths.tolist(), LABELS[K].tolist(), strict=True)
    expected = [reference.margin_loss(*example) for example in examples]
    assert relative_error(net.margin_loss(lengths, LABELS[K]), expected) < TOLERANCE[dtype]


@each_dtype
@each_number_of_digits
def test_gradient_of_the_margin_loss_equals_the_oracle(K, dtype):
    lengths = leaf(LENGTHS, dtype)
    net.margin_loss(lengths, LABELS[K]).sum().backward()
    expected = [
        reference.derivative(lambda x, labels=labels: reference.margin_loss(x, labels), row)
        for row, labels in zip(lengths.tolist(), LABELS[K].tolist(), strict=True)
    ]
    assert relative_error(lengths.grad, expected) < TOLERANCE[dtype]


def test_hinge_of_the_present_class_is_squared():
    assert one_example(0.4, 0, 0) == pytest.approx(0.5**2)


def test_hinge_of_an_absent_class_is_squared_and_halved():
    assert one_example(1, 0.4, 0) == pytest.approx(0.5 * 0.3**2)


def test_margin_loss_is_summed_over_the_classes():
    assert one_example(*10 * [0.0]) == pytest.approx(0.9**2)
    assert one_example(*10 * [1.0]) == pytest.approx(9 * 0.5 * 0.9**2)


@pytest.mark.parametrize("present", [0.91, 1.0])
@pytest.mark.parametrize("absent", [0.0, 0.09])
def test_lengths_within_their_margins_cost_nothing(present, absent):
    assert one_example(absent, present, absent, label=1) == 0


def test_lengths_within_their_margins_have_zero_gradient():
    lengths = leaf(torch.tensor([[0.05, 0.95, 0.0]]))
    net.margin_loss(lengths, torch.tensor([[1]])).backward()
    assert torch.equal(lengths.grad, torch.zeros_like(lengths))


def test_two_present_classes_have_a_hinge_each():
    loss = net.margin_loss(torch.tensor([[0.4, 0.6, 0.3]]), torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx(0.5**2 + 0.3**2 + 0.5 * 0.2**2)


@each_dtype
@each_number_of_digits
def test_reconstruction_loss_equals_the_oracle(K, dtype):
    digits, reconstructions = images(K, seed=0).to(dtype), images(K, seed=1).to(dtype)
    pixels = digits.flatten(2).tolist(), reconstructions.flatten(2).tolist()
    expected = [reference.reconstruction_loss(*example) for example in zip(*pixels, strict=True)]
    loss = net.reconstruction_loss(digits, reconstructions)
    assert relative_error(loss, expected) < TOLERANCE[dtype]


@each_dtype
@each_number_of_digits
def test_gradient_of_the_reconstruction_loss_equals_the_oracle(K, dtype):
    digits, reconstructions = images(K, seed=0), images(K, seed=1)
    drawn = leaf(reconstructions, dtype)
    net.reconstruction_loss(digits.to(dtype), drawn).sum().backward()
    expected = [
        reference.derivative(lambda x, y=y: reference.reconstruction_loss([y], [x]), x)
        for x, y in zip(
            reconstructions.flatten(0, 1).flatten(1).tolist(),
            digits.flatten(0, 1).flatten(1).tolist(),
            strict=True,
        )
    ]
    assert relative_error(drawn.grad.flatten(0, 1).flatten(1), expected) < TOLERANCE[dtype]


def test_reconstruction_loss_is_summed_over_digits_channels_and_pixels():
    ones = torch.ones(1, 2, 3, 28, 28)
    assert net.reconstruction_loss(ones, 0 * ones).item() == 2 * 3 * 28 * 28


def test_losses_of_no_examples_are_none():
    lengths, digits = torch.zeros(0, 10), torch.zeros(0, 2, 1, 36, 36)
    assert net.margin_loss(lengths, torch.zeros(0, 2, dtype=torch.int64)).shape == (0,)
    assert net.reconstruction_loss(digits, digits).shape == (0,)


@each_dtype
@each_number_of_digits
def test_masked_capsules_equal_the_oracle(K, dtype):
    capsules = normal(3, 4, 5).to(dtype)
    examples = zip(capsules.tolist(), LABELS[K].tolist(), strict=True)
    expected = [[reference.mask(v, label) for label in labels] for v, labels in examples]
    assert relative_error(net.mask_capsules(capsules, LABELS[K]), expected) == 0
