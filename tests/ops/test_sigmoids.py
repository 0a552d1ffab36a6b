"""The pairs of leaky hard sigmoids, above all at their kinks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from spd_fast import UserError
from spd_fast.ops import SIGMOIDS, lower_importance, upper_importance
from tests import oracle
from tests.checks import normal

TINY = 1e-9
# On, just beside and away from the kinks.
POINTS = [-2.0, -0.5, -TINY, 0.0, TINY, 0.5, 1 - TINY, 1.0, 1 + TINY, 3.0]


def value_and_derivative(function, s: float, kind: str, grad: float = 1.0) -> tuple[float, float]:
    point = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    value = function(point, kind)
    value.backward(torch.tensor(grad, dtype=torch.float64))
    return value.item(), point.grad.item()


@pytest.mark.parametrize(
    ("s", "value", "derivative"),
    [
        (-2.0, -0.02, 0.01),
        (-TINY, -0.01 * TINY, 0.01),
        (0.0, 0.0, 0.01),
        (TINY, TINY, 1.0),
        (0.5, 0.5, 1.0),
        (1.0, 1.0, 1.0),
        (1 + TINY, 1.0, 0.0),
        (3.0, 1.0, 0.0),
    ],
)
def test_lower_of_the_paper_leaks_below_zero(s, value, derivative):
    assert value_and_derivative(lower_importance, s, "paper") == (value, derivative)


@pytest.mark.parametrize(
    ("s", "value", "towards_larger", "towards_smaller"),
    [
        (-2.0, 0.0, 0.01, 0.0),
        (-TINY, 0.0, 0.01, 0.0),
        (0.0, 0.0, 0.01, 0.0),
        (TINY, TINY, 1.0, 1.0),
        (0.5, 0.5, 1.0, 1.0),
        (1.0, 1.0, 1.0, 1.0),
        (1 + TINY, 1.0, 0.0, 0.0),
        (3.0, 1.0, 0.0, 0.0),
    ],
)
def test_lower_of_2026_leaks_only_towards_larger_importances(
    s, value, towards_larger, towards_smaller
):
    # Descent moves against the gradient: a negative one asks for a larger importance.
    assert value_and_derivative(lower_importance, s, "2026", -1.0) == (value, -towards_larger)
    assert value_and_derivative(lower_importance, s, "2026", 1.0) == (value, towards_smaller)


@pytest.mark.parametrize("kind", ["paper", "2026"])
@pytest.mark.parametrize(
    ("s", "value", "derivative"),
    [
        (-2.0, 0.0, 0.0),
        (-TINY, 0.0, 0.0),
        (0.0, 0.0, 1.0),
        (TINY, TINY, 1.0),
        (1.0, 1.0, 1.0),
        (3.0, 1.02, 0.01),
    ],
)
def test_upper_leaks_above_one(s, value, derivative, kind):
    assert value_and_derivative(upper_importance, s, kind) == (value, derivative)


@pytest.mark.parametrize("function", ["lower_importance", "upper_importance"])
@pytest.mark.parametrize("kind", SIGMOIDS)
@pytest.mark.parametrize("grad", [-0.7, 0.0, 0.7])
def test_value_and_derivative_are_the_oracles(function, kind, grad):
    ours, truth = globals()[function], getattr(oracle, function)
    for s in POINTS:
        expected = value_and_derivative(truth, s, kind, grad)
        assert value_and_derivative(ours, s, kind, grad) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_float32_is_the_oracle_to_a_rounding(kind):
    s = normal(1, 500).float()
    for ours, truth in [
        (lower_importance, oracle.lower_importance),
        (upper_importance, oracle.upper_importance),
    ]:
        torch.testing.assert_close(
            ours(s, kind).double(), truth(s.double(), kind), rtol=0, atol=1.2e-7
        )


@pytest.mark.parametrize("kind", SIGMOIDS)
@pytest.mark.parametrize("function", [lower_importance, upper_importance])
def test_gradcheck_between_the_kinks(function, kind):
    s = torch.tensor([-1.3, -0.2, 0.2, 0.8, 1.4], dtype=torch.float64, requires_grad=True)
    if (function, kind) == (lower_importance, "2026"):
        # Below zero its backward is not the derivative of its forward, by design.
        s = s.detach()[2:].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: function(t, kind), s)


@given(st.floats(-1e6, 1e6), st.sampled_from(SIGMOIDS))
def test_lower_is_at_most_one_and_at_most_upper(s, kind):
    point = torch.tensor(s, dtype=torch.float64)
    lower, upper = lower_importance(point, kind), upper_importance(point, kind)
    assert lower <= 1
    assert lower <= upper


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_empty_input_gives_empty_output(kind):
    s = torch.empty(0, 3, requires_grad=True)
    lower_importance(s, kind).sum().backward()
    assert s.grad.shape == (0, 3)


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_not_a_number_stays(kind):
    s = torch.tensor(math.nan)
    assert lower_importance(s, kind).isnan()
    assert upper_importance(s, kind).isnan()


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_input_and_incoming_gradient_are_not_written_to(kind):
    s, grad = normal(1, 4, 5), normal(2, 4, 5)
    leaf, incoming = s.clone().requires_grad_(), grad.clone()
    torch.autograd.grad(lower_importance(leaf, kind), leaf, incoming)
    assert torch.equal(leaf, s)
    assert torch.equal(incoming, grad)


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_transposed_and_expanded_inputs(kind):
    s = normal(1, 4, 5)
    assert torch.equal(lower_importance(s.T, kind), lower_importance(s, kind).T)
    row = s[:1].expand(3, 5)
    assert torch.equal(lower_importance(row, kind), lower_importance(row.contiguous(), kind))


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_meta_tensors_keep_their_shape(kind):
    assert lower_importance(torch.empty(2, 3, device="meta"), kind).shape == (2, 3)


@pytest.mark.parametrize("kind", SIGMOIDS)
def test_compiled_is_eager(kind):
    def both(s):
        return lower_importance(s, kind) + 2 * upper_importance(s, kind)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for function in (both, compiled):
        s = normal(1, 20).requires_grad_()
        y = function(s)
        (grad,) = torch.autograd.grad(y, s, normal(2, 20))
        results.append((y.detach(), grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-15, atol=0)


@pytest.mark.parametrize("function", [lower_importance, upper_importance])
def test_unknown_kind_is_an_error_with_the_nearest(function):
    with pytest.raises(UserError, match="unknown sigmoid 'papr'; nearest: 'paper'"):
        function(torch.zeros(1), "papr")


@pytest.mark.parametrize("kind", SIGMOIDS)
@pytest.mark.parametrize("name", ["lower_importance", "upper_importance"])
def test_opcheck(name, kind):
    s = normal(1, 4, 3).requires_grad_()
    library.opcheck(getattr(torch.ops.spd_fast, name).default, (s, kind))
