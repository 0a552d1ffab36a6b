"""Logits → importances and penalty sums in Triton, against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import importances
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal
from tests.kernels.bf16 import assert_right_in_bf16
from tests.ops import test_importances as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
@pytest.mark.parametrize("penalty", cases.PENALTIES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 67)])
def test_results_and_gradients_are_the_oracles(sigmoid, penalty, shape):
    assert_matches_oracle(
        cases.runner(sigmoid, penalty, "triton"),
        cases.truth(sigmoid, penalty),
        cases.make_inputs(*shape),
        cases.incoming(*shape, penalty=penalty),
        torch.float32,
    )


@pytest.mark.parametrize("needed", ["lower", "penalty_sum"])
def test_each_gradient_may_be_missing(needed):
    assert_matches_oracle(
        cases.runner("2026", cases.LP, "triton"),
        cases.truth("2026", cases.LP),
        cases.make_inputs(5, 6),
        {needed: cases.incoming(5, 6)[needed]},
        torch.float32,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_logits_and_gradient(layout):
    lay_out = LAYOUTS[layout]
    run = cases.runner("paper", cases.LP, "triton")
    inputs = {k: v.float() for k, v in cases.make_inputs(9, 5).items()}
    grads = {k: v.float() for k, v in cases.incoming(9, 5).items()}
    expected = evaluate(run, inputs, grads)
    got = evaluate(
        lambda t: run({"logits": lay_out(t["logits"])}),
        inputs,
        {**grads, "lower": lay_out(grads["lower"])},
    )
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_expanded_logits_and_gradient():
    row = (normal(1, 1, 6).float() + 0.4).requires_grad_()
    grads = []
    for logits in (row.expand(5, 6), row.expand(5, 6).contiguous()):
        out = importances(logits, sigmoid="paper", penalty=cases.LP)
        total = out.lower.sum() + out.penalty_sum.sum()  # gradients of stride 0
        grads.append(torch.autograd.grad(total, row)[0])
    assert torch.equal(*grads)


def test_errors_in_bf16_are_at_most_twice_the_eager_ones():
    assert_right_in_bf16(
        cases.runner("paper", cases.LP, "triton"), cases.runner("paper", cases.LP, "reference"),
        cases.make_inputs(40, 20), cases.incoming(40, 20),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty_logits_give_empty_importances(shape):
    logits = torch.zeros(shape, requires_grad=True)
    out = importances(logits, sigmoid="paper", penalty=cases.LP)
    assert out.lower.shape == shape
    assert torch.equal(out.penalty_sum, torch.zeros(shape[1]))
    (grad,) = torch.autograd.grad(out.lower.sum() + out.penalty_sum.sum(), logits)
    assert grad.shape == shape
