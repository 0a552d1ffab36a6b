"""The gate of given inner activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from spd_fast.ops import Penalty, gate, gate_inner
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal
from tests.ops import test_gate as cases

LP = cases.LP


def make_inputs(rows: int, components: int, hidden: tuple[int, ...]) -> dict[str, Tensor]:
    t = cases.make_inputs(rows, 1, components, hidden)
    return {
        "inner": normal(1, rows, components),
        **{k: v for k, v in t.items() if k not in ("x", "V")},
    }


def incoming(rows: int, components: int) -> dict[str, Tensor]:
    return {"lower": normal(4, rows, components), "penalty_sum": normal(5, components)}


def runner(sigmoid: str, penalty: Penalty, backend: str | None) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        out = gate_inner(
            t["inner"], cases.layers(t, "W"), cases.layers(t, "b"), sigmoid=sigmoid,
            penalty=penalty, backend=backend,
        )  # fmt: skip
        return out._asdict()

    return run


def truth(sigmoid: str, penalty: Penalty) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        s = oracle.gate_logits(t["inner"], cases.layers(t, "W"), cases.layers(t, "b"))
        upper = oracle.upper_importance(s, sigmoid)
        psi = (penalty.kind, penalty.power, penalty.eps)
        return {
            "lower": oracle.lower_importance(s, sigmoid),
            "penalty_sum": oracle.penalty_sums(upper, *psi),
        }

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmoid", ["paper", "2026", "normal"])
@pytest.mark.parametrize("hidden", [(), (4,), (3, 2)])
def test_results_and_gradients_are_the_oracles(hidden, sigmoid, dtype):
    assert_matches_oracle(
        runner(sigmoid, LP, None), truth(sigmoid, LP), make_inputs(9, 5, hidden), incoming(9, 5),
        dtype,
    )  # fmt: skip


def test_gradcheck():
    t = make_inputs(4, 2, (3,))
    leaves = [v.requires_grad_() for v in t.values()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(runner("paper", LP, None)(dict(zip(t, tensors, strict=True))).values())

    assert torch.autograd.gradcheck(run, leaves)


def test_opcheck():
    t = make_inputs(4, 2, (3,))
    layers = [t["W0"], t["W1"]], [t["b0"], t["b1"]]
    op = torch.ops.spd_fast.gate_inner.default
    library.opcheck(op, (t["inner"].requires_grad_(), *layers, "2026", "lp", 2.0, 1e-12))


def test_it_is_the_gate_without_its_product():
    t = cases.make_inputs(9, 4, 5, (6,))
    layers = cases.layers(t, "W"), cases.layers(t, "b")
    whole = gate(t["x"], t["V"], *layers, sigmoid="paper", penalty=LP, backend="reference")
    part = gate_inner(whole.inner, *layers, sigmoid="paper", penalty=LP)
    assert torch.equal(part.lower, whole.lower)
    assert torch.equal(part.penalty_sum, whole.penalty_sum)


def test_sequences_are_rows():
    t = make_inputs(6, 5, (4,))
    flat = runner("paper", LP, None)(t)
    got = runner("paper", LP, None)({**t, "inner": t["inner"].reshape(2, 3, 5)})
    assert torch.equal(got["lower"].reshape(6, 5), flat["lower"])
    assert torch.equal(got["penalty_sum"], flat["penalty_sum"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    run, inputs, grads = runner("2026", LP, None), make_inputs(6, 5, (4,)), incoming(6, 5)
    expected = evaluate(run, inputs, grads)
    got = evaluate(lambda t: run({**t, "inner": LAYOUTS[layout](t["inner"])}), inputs, grads)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_every_backend_of_a_cpu_is_torchs_own(backend):
    t = make_inputs(6, 5, (4,))
    got, expected = (runner("paper", LP, b)(t) for b in (backend, "reference"))
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_layers_that_do_not_fit_are_named():
    t = make_inputs(6, 5, (4,))
    with pytest.raises(ValueError, match=r"gate layer 0: need W \[3, 1, out\]"):
        gate_inner(t["inner"][:, :3], [t["W0"], t["W1"]], [t["b0"], t["b1"]], sigmoid="paper")
