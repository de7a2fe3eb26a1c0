"""Eq. 1."""

import pytest
import reference
import torch
from helpers import TOLERANCE, each_dtype, leaf, normal, relative_error

import net

# Lengths from about 0.01 to about 100: the cubic, the bending and the saturated part of the curve.
S = normal(5, 4) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]).double().unsqueeze(1)


@each_dtype
def test_squash_equals_the_oracle(dtype):
    for s in S.to(dtype):
        assert relative_error(net.squash(s), reference.squash(s.tolist())) < TOLERANCE[dtype]


@each_dtype
def test_gradient_of_squash_equals_the_oracle(dtype):
    weights = normal(4, seed=1)
    for row in S:
        s = leaf(row, dtype)
        (net.squash(s) * weights.to(dtype)).sum().backward()
        expected = reference.derivative(
            lambda x: reference.dot(reference.squash(x), weights.tolist()), s.tolist()
        )
        assert relative_error(s.grad, expected) < TOLERANCE[dtype]


@each_dtype
def test_zero_vector_stays_zero(dtype):
    assert torch.equal(net.squash(torch.zeros(2, 4, dtype=dtype)), torch.zeros(2, 4, dtype=dtype))


@each_dtype
def test_zero_vector_has_zero_gradient(dtype):
    s = leaf(torch.zeros(2, 4), dtype)
    net.squash(s).sum().backward()
    assert torch.equal(s.grad, torch.zeros_like(s))


@pytest.mark.parametrize(("before", "after"), [(0.5, 1 / 5), (1, 1 / 2), (3, 9 / 10)])
def test_length_n_becomes_n2_over_1_plus_n2(before, after):
    s = torch.nn.functional.normalize(S, dim=-1) * before
    expected = torch.full((5,), after, dtype=torch.float64)
    assert relative_error(net.squash(s).norm(dim=-1), expected) < 1e-9


def test_direction_is_kept():
    cosines = torch.cosine_similarity(net.squash(S), S, dim=-1)
    assert relative_error(cosines, torch.ones(5)) < 1e-9


def test_any_dimension_can_hold_the_vectors_the_last_by_default():
    s = normal(2, 3, 4)
    expected = net.squash(s.movedim(1, -1)).movedim(-1, 1)
    assert relative_error(net.squash(s, dim=1), expected) < 1e-9


def test_bfloat16_is_squashed_in_float32():
    s = S.bfloat16()
    v = net.squash(s)
    assert v.dtype == torch.float32
    assert relative_error(v, net.squash(s.double())) < TOLERANCE[torch.float32]
