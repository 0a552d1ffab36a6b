"""Squared error and KL in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import divergence
from tests import oracle
from tests.checks import assert_matches_oracle, assert_right, normal

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


@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_kls_gradient_of_offset_logits_is_at_most_twice_as_far_off_as_torchs(offset):
    q, p = (normal(seed, 4, 3000, scale=3).float() + offset for seed in (1, 2))
    found = {}
    for backend in ("triton", "reference"):
        leaf = q.clone().requires_grad_()
        (found[backend],) = torch.autograd.grad(divergence(leaf, p, "kl", backend=backend), leaf)
    truth = (q.double().softmax(1) - p.double().softmax(1)) / 4
    assert_right(found["triton"], found["reference"], truth, "grad", floor=0.0)


def test_kl_of_equal_logits_is_zero_with_zero_gradient():
    logits = normal(1, 4, 33).float().requires_grad_()
    loss = divergence(logits, logits.detach(), "kl")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.abs() < 1e-6
    assert not grad.any()


NAN, INF = float("nan"), float("inf")
FINITE = [0.5, -1.0, 2.0]


def of_both_backends(q, p):
    """(value, gradient) of each, for logits with ``q`` and ``p`` as the last of three rows."""
    prediction, target = normal(1, 3, len(q)).float(), normal(2, 3, len(p)).float()
    prediction[2], target[2] = torch.tensor(q), torch.tensor(p)
    found = {}
    for backend in ("triton", "reference"):
        leaf = prediction.clone().requires_grad_()
        loss = divergence(leaf, target, "kl", backend=backend)
        (grad,) = torch.autograd.grad(loss, leaf)
        found[backend] = loss.detach(), grad
    return found


def widened(row, before, after):
    """``row`` amid finite logits, or more of the same where it has none."""
    if not any(value in FINITE for value in row):
        return row * (1 + (before + after) // 3)
    return FINITE * (before // 3) + row + FINITE * (after // 3)


@pytest.mark.parametrize("width", [3, 2100])
@pytest.mark.parametrize(
    ("q", "p"),
    [
        ([0.5, NAN, 2.0], FINITE), (FINITE, [0.5, NAN, 2.0]), ([NAN] * 3, FINITE),
        ([0.5, -INF, 2.0], FINITE), ([-INF, -INF, 2.0], FINITE), ([-INF, NAN, 2.0], FINITE),
        ([0.5, INF, 2.0], FINITE), (FINITE, [0.5, INF, 2.0]), ([-INF] * 3, FINITE),
        (FINITE, [-INF] * 3), ([-INF, 0.5, INF], FINITE),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_torchs_value_and_gradient(q, p, width):
    # In a wide row it comes before or after what its lane sees of the other block.
    for before in {0, width - 3}:
        rows = [widened(row, before, width - 3 - before) for row in (q, p)]
        found = of_both_backends(*rows)
        (loss, grad), (expected, expected_grad) = found["triton"], found["reference"]
        assert not expected.isfinite()
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(grad, expected_grad, equal_nan=True)
        assert grad[:2].isfinite().all()


@pytest.mark.parametrize("ruled_out", [[-INF], [-INF] * 2100])
def test_classes_that_the_target_rules_out_take_no_part(ruled_out):
    seen, q = normal(2, 2, 9).float(), normal(1, 2, 9).float().requires_grad_()
    expected = divergence(q, seen, "kl", backend="reference")
    (expected_grad,) = torch.autograd.grad(expected, q)
    none = torch.tensor([ruled_out]).expand(2, -1)
    for parts in ((none, q), (q, none)):
        of_target = [none if part is none else seen for part in parts]
        loss = divergence(torch.cat(parts, 1), torch.cat(of_target, 1), "kl")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, q)[0], expected_grad)


def test_a_class_that_the_target_alone_rules_out_still_has_a_gradient():
    q = torch.zeros(1, 3, requires_grad=True)
    loss = divergence(q, torch.tensor([[0.0, 0.0, -INF]]), "kl")
    loss.backward()
    # P = (½, ½, 0), Q = ⅓ each.
    torch.testing.assert_close(loss.detach(), torch.tensor(1.5).log())
    torch.testing.assert_close(q.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3]]))


@pytest.mark.parametrize("value", [NAN, INF])
def test_squared_error_keeps_what_is_not_finite(value):
    q = torch.tensor([[0.5, value, 2.0]], requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        loss = divergence(q, torch.zeros(1, 3), "mse", backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, q)))
    torch.testing.assert_close(*found, equal_nan=True)
