"""The Triton gate of given inner activations against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import Penalty, gate_inner
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate
from tests.ops import test_gate_inner as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
@pytest.mark.parametrize("hidden", [(), (5,), (17,)])
def test_results_and_gradients_are_the_oracles(hidden, sigmoid):
    assert_matches_oracle(
        cases.runner(sigmoid, cases.LP, "triton"), cases.truth(sigmoid, cases.LP),
        cases.make_inputs(35, 34, hidden), cases.incoming(35, 34), torch.float32,
    )  # fmt: skip


def test_a_wide_gate_is_the_oracles():
    assert_matches_oracle(
        cases.runner("paper", cases.LP, "triton"), cases.truth("paper", cases.LP),
        cases.make_inputs(3, 2, (130,)), cases.incoming(3, 2), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_sums_over_several_row_tiles_are_the_oracles(monkeypatch, hidden):
    from spd_fast.kernels import gate as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    assert kernels.backward_groups(150, 16, 32, 16) == (2, 3)
    assert_matches_oracle(
        cases.runner("paper", cases.LP, "triton"), cases.truth("paper", cases.LP),
        cases.make_inputs(150, 16, hidden), cases.incoming(150, 16), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("needed", ["lower", "penalty_sum"])
def test_each_output_alone_has_the_oracles_gradients(needed):
    assert_matches_oracle(
        cases.runner("paper", cases.LP, "triton"), cases.truth("paper", cases.LP),
        cases.make_inputs(7, 5, (3,)), {needed: cases.incoming(7, 5)[needed]}, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    run, inputs = cases.runner("2026", cases.LP, "triton"), cases.make_inputs(9, 5, (3,))
    inputs = {k: v.float() for k, v in inputs.items()}
    grads = {k: v.float() for k, v in cases.incoming(9, 5).items()}
    expected = evaluate(run, inputs, grads)
    got = evaluate(lambda t: run({k: LAYOUTS[layout](v) for k, v in t.items()}), inputs, grads)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape):
    t = {k: v.float().requires_grad_() for k, v in cases.make_inputs(*shape, (2,)).items()}
    out = gate_inner(t["inner"], [t["W0"], t["W1"]], [t["b0"], t["b1"]], sigmoid="paper",
                     penalty=Penalty("lp", 1.0))  # fmt: skip
    assert out.lower.shape == shape
    grads = torch.autograd.grad(out.lower.sum() + out.penalty_sum.sum(), list(t.values()))
    assert [g.shape for g in grads] == [leaf.shape for leaf in t.values()]
    assert not any(g.any() for g in grads)
