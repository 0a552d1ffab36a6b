"""Logits → lower importances and penalty sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from spd_fast import UserError
from spd_fast.ops import SIGMOIDS, Penalty, importances
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal

LP = Penalty("lp", 2.0)
PENALTIES = [Penalty(), Penalty("lp", 1.0), LP, Penalty("lp", 0.7, 0.01), Penalty("smooth_l0", 0.3)]


def make_inputs(*shape: int) -> dict[str, Tensor]:
    """Logits spread over both kinks."""
    return {"logits": normal(1, *shape) + 0.4}


def incoming(*shape: int, penalty: Penalty = LP) -> dict[str, Tensor]:
    grads = {"lower": normal(2, *shape), "penalty_sum": normal(3, shape[-1])}
    return {"lower": grads["lower"]} if penalty.kind == "none" else grads


def runner(sigmoid: str, penalty: Penalty, backend: str | None) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        out = importances(t["logits"], sigmoid=sigmoid, penalty=penalty, backend=backend)
        return out._asdict()

    return run


def truth(sigmoid: str, penalty: Penalty) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        s = t["logits"]
        upper = oracle.upper_importance(s, sigmoid).reshape(-1, s.shape[-1])
        psi = (penalty.kind, penalty.power, penalty.eps)
        sums = oracle.penalty_sums(upper, *psi)
        return {"lower": oracle.lower_importance(s, sigmoid), "penalty_sum": sums}

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmoid", SIGMOIDS)
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_results_and_gradients_are_the_oracles(sigmoid, penalty, dtype):
    if sigmoid == "normal" and penalty.power == 0.7:
        pytest.skip("the logistic's powers are those of the other sigmoids")
    assert_matches_oracle(
        runner(sigmoid, penalty, None), truth(sigmoid, penalty), make_inputs(9, 7),
        incoming(9, 7, penalty=penalty), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (4,)])
def test_any_number_of_dimensions(shape):
    assert_matches_oracle(
        runner("paper", LP, None), truth("paper", LP), make_inputs(*shape), incoming(*shape),
        torch.float64,
    )  # fmt: skip


def test_gradcheck():
    logits = make_inputs(5, 4)["logits"].requires_grad_()
    assert min(logits.abs().min(), (logits - 1).abs().min()) > 1e-3, "a point sits on a kink"
    assert torch.autograd.gradcheck(
        lambda s: tuple(importances(s, sigmoid="paper", penalty=LP)), logits
    )


def test_opcheck():
    logits = make_inputs(5, 4)["logits"].requires_grad_()
    library.opcheck(torch.ops.spd_fast.importances.default, (logits, "2026", "lp", 2.0, 1e-12))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    run = runner("2026", LP, None)
    expected = evaluate(run, make_inputs(6, 5), incoming(6, 5))
    got = evaluate(
        lambda t: run({"logits": LAYOUTS[layout](t["logits"])}), make_inputs(6, 5), incoming(6, 5)
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_no_positions_give_zero_sums():
    out = importances(torch.zeros(0, 3), sigmoid="paper", penalty=LP)
    assert out.lower.shape == (0, 3)
    assert torch.equal(out.penalty_sum, torch.zeros(3))


def test_sums_of_bfloat16_logits_are_made_in_float32():
    # 1000 positions of ψ(1) = 1: in bfloat16 a running sum of ones stops at 256.
    out = importances(torch.ones(1000, 2).bfloat16(), sigmoid="paper", penalty=Penalty("lp", 1.0))
    assert out.lower.dtype == torch.bfloat16
    assert out.penalty_sum.dtype == torch.float32
    assert torch.equal(out.penalty_sum, torch.full((2,), 1000.0))


def test_meta_tensors_give_meta_results():
    out = importances(torch.empty(4, 3, device="meta"), sigmoid="paper", penalty=LP)
    assert out.lower.shape == (4, 3)
    assert out.penalty_sum.device.type == "meta"


def test_compiled_is_eager():
    run = runner("2026", LP, None)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = (evaluate(r, make_inputs(6, 5), incoming(6, 5)) for r in (compiled, run))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_every_backend_of_a_cpu_is_torchs_own(backend):
    run, same = runner("paper", LP, backend), runner("paper", LP, "reference")
    got, expected = (evaluate(r, make_inputs(6, 5), incoming(6, 5)) for r in (run, same))
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="unknown sigmoid 'papre'"):
        importances(torch.zeros(2, 3), sigmoid="papre")
    with pytest.raises(ValueError, match=r"need \[\.\.\., C\]"):
        importances(torch.zeros(()), sigmoid="paper")
    with pytest.raises(UserError, match="unknown backend 'tritn'"):
        importances(torch.zeros(2, 3), sigmoid="paper", backend="tritn")
