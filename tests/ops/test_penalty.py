"""Penalty sums over positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from spd_fast import UserError
from spd_fast.ops import Penalty, penalty_sums
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, normal, unit

PENALTIES = [
    Penalty("lp", 1.0),
    Penalty("lp", 2.0),
    Penalty("lp", 0.7),
    Penalty("lp", 2.0, 0.1),
    Penalty("smooth_l0", 1.0),
    Penalty("smooth_l0", 0.1),
]
penalties = pytest.mark.parametrize("penalty", PENALTIES, ids=str)


@penalties
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 1), (37, 11)])
def test_sums_and_gradient_are_the_oracles(penalty, dtype, shape):
    assert_matches_oracle(
        lambda t: {"sums": penalty_sums(t["upper"], penalty)},
        lambda t: {
            "sums": oracle.penalty_sums(t["upper"], penalty.kind, penalty.power, penalty.eps)
        },
        {"upper": unit(1, *shape)},
        {"sums": normal(2, shape[1])},
        dtype,
    )


def test_without_a_penalty_the_sums_are_zero():
    assert torch.equal(penalty_sums(unit(1, 4, 3), Penalty()), torch.zeros(3).double())


@penalties
def test_gradcheck(penalty):
    upper = (0.2 + unit(1, 4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: penalty_sums(t, penalty), upper)


@penalties
def test_no_positions_sum_to_zero(penalty):
    assert torch.equal(penalty_sums(torch.empty(0, 3), penalty), torch.zeros(3))


@penalties
def test_gradient_is_finite_at_importance_zero(penalty):
    upper = torch.zeros(2, 3, requires_grad=True)
    penalty_sums(upper, penalty).sum().backward()
    assert upper.grad.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@penalties
def test_memory_layout_does_not_matter(penalty, layout):
    upper = unit(1, 9, 5)
    torch.testing.assert_close(
        penalty_sums(LAYOUTS[layout](upper), penalty), penalty_sums(upper, penalty)
    )


@penalties
def test_input_is_not_written_to(penalty):
    upper = unit(1, 9, 5)
    before = upper.clone()
    penalty_sums(upper, penalty)
    assert torch.equal(upper, before)


@penalties
def test_compiled_is_eager(penalty):
    compiled = torch.compile(
        lambda t: penalty_sums(t, penalty), fullgraph=True, backend="aot_eager"
    )
    upper = unit(1, 9, 5)
    torch.testing.assert_close(compiled(upper), penalty_sums(upper, penalty))


@given(gamma=st.floats(1e-3, 1), g=st.floats(0, 1))
def test_smooth_l0_of_one_position_is_a_fraction(gamma, g):
    value = penalty_sums(torch.tensor([[g]]), Penalty("smooth_l0", gamma))
    assert 0 <= value.item() <= 1


def test_unknown_kind_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="unknown penalty 'l1'; known: 'none', 'lp', 'smooth_l0'"):
        Penalty("l1")


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_power_must_be_positive(power):
    with pytest.raises(UserError, match="penalty 'lp' needs a power above 0"):
        Penalty("lp", power)


@penalties
def test_opcheck(penalty):
    upper = unit(1, 9, 5).requires_grad_()
    arguments = (upper, penalty.kind, penalty.power, penalty.eps)
    library.opcheck(torch.ops.spd_fast.penalty_sums.default, arguments)


@penalties
def test_expanded_importances_are_their_copies(penalty):
    row = unit(1, 1, 5).expand(9, 5)
    expected = penalty_sums(row.contiguous(), penalty)
    torch.testing.assert_close(penalty_sums(row, penalty), expected, rtol=1e-12, atol=0)
