"""Squared error and KL in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import divergence
from tests import oracle
from tests.checks import assert_matches_oracle, normal

pytestmark = pytest.mark.usefixtures("triton_ops")
ORACLE = {"mse": oracle.mse, "kl": oracle.kl}


def check(kind, inputs):
    target = inputs["target"].float()

    def run(t):
        return {"loss": divergence(t["prediction"], target.to(t["prediction"].dtype), kind)}

    def truth(t):
        return {"loss": ORACLE[kind](t["prediction"], target.to(t["prediction"].dtype))}

    assert_matches_oracle(
        run,
        truth,
        {"prediction": inputs["prediction"]},
        {"loss": torch.tensor(1.7, dtype=torch.float64)},
        torch.float32,
    )


@pytest.mark.parametrize("kind", ORACLE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 2100)])
def test_loss_and_gradient_are_the_oracles(kind, shape):
    check(kind, {"prediction": normal(1, *shape, scale=3), "target": normal(2, *shape, scale=3)})


def test_a_program_takes_several_blocks_in_turn(monkeypatch):
    from spd_fast.kernels import divergence as kernels

    monkeypatch.setattr(kernels, "SEGMENTS", 2)
    check("mse", {"prediction": normal(1, 5, 2100), "target": normal(2, 5, 2100)})


def test_kl_survives_large_logits():
    shift = torch.tensor([[300.0], [-4000.0]], dtype=torch.float64)
    check("kl", {"prediction": normal(1, 2, 9) + shift, "target": normal(2, 2, 9) - shift})


def test_kl_of_equal_logits_is_zero_with_zero_gradient():
    logits = normal(1, 4, 33).float().requires_grad_()
    loss = divergence(logits, logits.detach(), "kl")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.abs() < 1e-6
    assert not grad.any()
