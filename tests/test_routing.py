"""Procedure 1, Eqs. 2-3."""

from functools import cache

import pytest
import reference
import torch
from helpers import TOLERANCE, Recorder, each_dtype, leaf, normal, relative_error

import net

EXAMPLES, CHILDREN, PARENTS, D, E = 3, 5, 4, 2, 6  # all different: no axis passes for another
U = normal(EXAMPLES, CHILDREN, D, seed=0)
WEIGHT = normal(PARENTS, CHILDREN, D, E, seed=1)
COTANGENT = normal(EXAMPLES, PARENTS, E, seed=2)  # gradients are those of (v * COTANGENT).sum()

each_r = pytest.mark.parametrize("r", [1, 2, 3, 5])


def values(r, u=U, weight=WEIGHT):
    """The oracle's v and c, example by example."""
    v, c = zip(*(reference.routing(x, weight.tolist(), r) for x in u.tolist()), strict=True)
    return torch.tensor(v, dtype=torch.float64), torch.tensor(c, dtype=torch.float64)


@cache
def gradients(r, stopped=False):
    """The oracle's gradients in u and weight; stopped holds the last couplings constant."""
    grad_u, grad_weight = [], 0
    for u, g in zip(U.tolist(), COTANGENT.tolist(), strict=True):
        constant = reference.routing(u, WEIGHT.tolist(), r)[1]

        def loss(x, g=g, constant=constant):
            u = reference.nest(x[: CHILDREN * D], CHILDREN, D)
            weight = reference.nest(x[CHILDREN * D :], PARENTS, CHILDREN, D, E)
            if stopped:
                u_hat = reference.predictions(u, weight)
                sums = [reference.weighted_sum(constant, u_hat, j) for j in range(PARENTS)]
                v = [reference.squash(s) for s in sums]
            else:
                v, _ = reference.routing(u, weight, r)
            return sum(reference.dot(*pair) for pair in zip(v, g, strict=True))

        x = torch.tensor(u).flatten().tolist() + WEIGHT.flatten().tolist()
        gradient = torch.tensor(reference.derivative(loss, x), dtype=torch.float64)
        grad_u.append(gradient[: CHILDREN * D].view(CHILDREN, D))
        grad_weight += gradient[CHILDREN * D :].view_as(WEIGHT)
    return torch.stack(grad_u), grad_weight


def run(r, dtype=torch.float64):
    """net's v and c, and the gradients in u and weight."""
    u, weight = leaf(U, dtype), leaf(WEIGHT, dtype)
    v, c = net.routing(u, weight, r)
    (v * COTANGENT.to(dtype)).sum().backward()
    return v, c, u.grad, weight.grad


@pytest.mark.parametrize(("r", "other"), [(1, 2), (2, 3), (3, 4), (5, 6)])
def test_data_tell_one_number_of_iterations_from_another(r, other):
    for a, b in zip(values(r), values(other), strict=True):
        assert relative_error(a, b) > 1e-2


@each_dtype
@each_r
def test_parents_equal_the_oracle(r, dtype):
    assert relative_error(run(r, dtype)[0], values(r)[0]) < TOLERANCE[dtype]


@each_dtype
@each_r
def test_couplings_equal_the_oracle(r, dtype):
    assert relative_error(run(r, dtype)[1], values(r)[1]) < TOLERANCE[dtype]


@each_dtype
@each_r
def test_gradient_in_the_children_equals_the_oracle(r, dtype):
    assert relative_error(run(r, dtype)[2], gradients(r)[0]) < TOLERANCE[dtype]


@each_dtype
@each_r
def test_gradient_in_the_weight_equals_the_oracle(r, dtype):
    assert relative_error(run(r, dtype)[3], gradients(r)[1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("r", [2, 3, 5])
def test_gradient_flows_through_the_couplings(r):
    for gradient, stopped in zip(run(r)[2:], gradients(r, stopped=True), strict=True):
        assert relative_error(gradient, stopped) > 1e-2


@each_dtype
@each_r
def test_couplings_of_a_child_sum_to_one_over_its_parents(r, dtype):
    c = net.routing(U.to(dtype), WEIGHT.to(dtype), r)[1]
    assert relative_error(c.sum(2), torch.ones(EXAMPLES, CHILDREN)) < TOLERANCE[dtype]


def test_one_iteration_couples_every_child_equally_to_every_parent():
    c = net.routing(U, WEIGHT, 1)[1]
    assert relative_error(c, torch.full((EXAMPLES, CHILDREN, PARENTS), 1 / PARENTS)) < 1e-9


@each_r
def test_r_iterations_take_r_softmaxes_over_the_parents(r):
    with Recorder() as recorder:
        net.routing(U, WEIGHT, r)
    softmaxes = [
        args[0].size(args[1])
        for operator, args, _ in recorder.calls
        if operator.overloadpacket == torch.ops.aten._softmax
    ]
    assert softmaxes == [PARENTS] * r


@each_r
def test_example_alone_gives_the_same_as_in_a_batch(r):
    together = net.routing(U, WEIGHT, r)
    alone = zip(*(net.routing(U[n : n + 1], WEIGHT, r) for n in range(EXAMPLES)), strict=True)
    for a, b in zip(together, alone, strict=True):
        assert relative_error(a, torch.cat(b)) < 1e-9


def test_permuting_the_children_permutes_only_their_couplings():
    order = torch.tensor([3, 0, 4, 1, 2])
    v, c = net.routing(U, WEIGHT, 3)
    permuted_v, permuted_c = net.routing(U[:, order], WEIGHT[:, order], 3)
    assert relative_error(permuted_v, v) < 1e-9
    assert relative_error(permuted_c, c[:, order]) < 1e-9


def test_permuting_the_parents_permutes_parents_and_couplings():
    order = torch.tensor([2, 0, 3, 1])
    v, c = net.routing(U, WEIGHT, 3)
    permuted_v, permuted_c = net.routing(U, WEIGHT[order], 3)
    assert relative_error(permuted_v, v[:, order]) < 1e-9
    assert relative_error(permuted_c, c[:, :, order]) < 1e-9


@pytest.mark.parametrize(("u", "weight"), [(0, 1), (1, 0), (0, 0)])
def test_zero_children_or_weights_give_zero_parents_and_finite_gradients(u, weight):
    u, weight = leaf(u * U), leaf(weight * WEIGHT)
    v, c = net.routing(u, weight, 3)
    (v * COTANGENT).sum().backward()
    assert torch.equal(v, torch.zeros_like(v))
    assert all(x.isfinite().all() for x in (c, u.grad, weight.grad))


@pytest.mark.parametrize(("children", "parents"), [(1, PARENTS), (CHILDREN, 1), (1, 1)])
def test_one_child_or_one_parent_equals_the_oracle(children, parents):
    u, weight = U[:, :children], WEIGHT[:parents, :children]
    for a, b in zip(net.routing(u, weight, 3), values(3, u, weight), strict=True):
        assert relative_error(a, b) < 1e-9


def test_empty_batch_gives_empty_results_and_a_zero_gradient():
    weight = leaf(WEIGHT)
    v, c = net.routing(U[:0], weight, 3)
    v.sum().backward()
    assert v.shape == (0, PARENTS, E) and c.shape == (0, CHILDREN, PARENTS)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_predictions_are_never_stored():
    u, weight = normal(16, CHILDREN, D), leaf(WEIGHT)  # 16 examples: u_hat is the largest by far

    def largest(f, *args):
        with Recorder() as recorder:
            f(*args)
        results = [x for *_, x in recorder.calls if isinstance(x, torch.Tensor)]
        return max(x.untyped_storage().nbytes() // x.element_size() for x in results)

    stored = largest(torch.einsum, "bid,jide->bije", u, weight)
    assert stored >= 16 * CHILDREN * PARENTS * E
    assert largest(net.routing, u, weight, 3) < stored


def test_logits_of_bfloat16_products_are_summed_in_float32():
    with Recorder() as recorder:
        net.routing(U.bfloat16(), WEIGHT.bfloat16(), 3)
    sums = [x.dtype for f, _, x in recorder.calls if f.overloadpacket == torch.ops.aten.add]
    assert sums.count(torch.float32) >= 2 and torch.bfloat16 not in sums


def test_bfloat16_is_routed_into_float32():
    v, c = net.routing(U.bfloat16(), WEIGHT.bfloat16(), 3)
    assert v.dtype == c.dtype == torch.float32
    for a, b in zip((v, c), net.routing(U.float(), WEIGHT.float(), 3), strict=True):
        assert relative_error(a, b) < 0.05
