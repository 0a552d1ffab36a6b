"""Chunked linear-KL in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import linear_kl
from tests.checks import assert_matches_oracle, assert_right
from tests.ops import test_linear_kl as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("chunk", [40, 2**20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "d", "vocabulary"), cases.SIZES)
def test_loss_and_gradient_are_the_oracles(shape, d, vocabulary, bias, chunk, monkeypatch):
    from spd_fast.kernels import linear_kl as kernels

    monkeypatch.setattr(kernels, "LOGITS", chunk)
    assert_matches_oracle(
        cases.runner("triton", bias), cases.truth(bias), cases.make_inputs(shape, d, vocabulary),
        cases.GRAD, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("offset", [-100.0, 1000.0])
def test_the_gradient_of_offset_logits_is_at_most_twice_as_far_off_as_torchs(offset):
    t = cases.make_inputs((7,), 5, 1900)
    t = {k: v.float() for k, v in t.items()}
    t["bias"] += offset
    found = []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        x, *rest = (v.to(dtype or v.dtype) for v in t.values())
        leaf = x.clone().requires_grad_()
        loss = linear_kl(leaf, *rest, backend=backend)
        found.append(torch.autograd.grad(loss, leaf)[0])
    assert_right(*found, "grad", floor=0.0)


def test_no_more_logits_exist_than_a_chunk(monkeypatch):
    from spd_fast.kernels import linear_kl as kernels

    seen = []
    whole = kernels.kl_forward
    monkeypatch.setattr(kernels, "kl_forward", lambda q, p: (seen.append(q.shape), whole(q, p))[1])
    monkeypatch.setattr(kernels, "LOGITS", 40)
    t = {k: v.float() for k, v in cases.make_inputs((7,), 5, 19).items()}
    linear_kl(*t.values())
    assert seen == [(2, 19), (2, 19), (2, 19), (1, 19)]


def test_without_a_gradient_none_is_made(monkeypatch):
    from spd_fast.kernels import linear_kl as kernels

    monkeypatch.setattr(kernels, "kl_gradient", None)
    t = {k: v.float() for k, v in cases.make_inputs((7,), 5, 19).items()}
    assert linear_kl(*t.values()).isfinite()


def test_no_positions_give_zero_and_no_gradient():
    x = torch.zeros(0, 5, requires_grad=True)
    loss = linear_kl(x, torch.zeros(0, 5), torch.ones(9, 5))
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0
    assert grad.shape == (0, 5)


def test_inputs_are_not_written_to():
    t = {k: v.float() for k, v in cases.make_inputs((7,), 5, 19).items()}
    before = {k: v.clone() for k, v in t.items()}
    linear_kl(t["prediction"].requires_grad_(), t["target"], t["head"], t["bias"]).backward()
    assert all(torch.equal(t[k].detach(), before[k]) for k in t)


@pytest.mark.parametrize("chunk", [40, 2**20])
def test_a_nan_is_torchs_value_and_gradient(chunk, monkeypatch):
    from spd_fast.kernels import linear_kl as kernels

    monkeypatch.setattr(kernels, "LOGITS", chunk)
    t = {k: v.float() for k, v in cases.make_inputs((7,), 5, 19).items()}
    t["prediction"][4, 1] = torch.nan
    found = []
    for backend in ("triton", "reference"):
        x = t["prediction"].clone().requires_grad_()
        loss = linear_kl(x, t["target"], t["head"], t["bias"], backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*found, equal_nan=True)
    assert found[0][0].isnan()
    assert found[0][1].isnan().any(1).tolist() == [row == 4 for row in range(7)]


def test_a_class_that_the_heads_bias_rules_out_takes_no_part():
    t = {k: v.float() for k, v in cases.make_inputs((7,), 5, 19).items()}
    x = t["prediction"].requires_grad_()
    expected = linear_kl(x, t["target"], t["head"][:18], t["bias"][:18], backend="reference")
    (expected_grad,) = torch.autograd.grad(expected, x)
    t["bias"][18] = -torch.inf
    loss = linear_kl(x, t["target"], t["head"], t["bias"])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected_grad)
