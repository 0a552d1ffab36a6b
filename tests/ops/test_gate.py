"""The per-component gate: inner activations, lower importances, penalty sums, every gradient."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from spd_fast import UserError
from spd_fast.ops import (
    SIGMOIDS,
    Penalty,
    _fused,
    gate,
    gate_logits,
    lower_importance,
    upper_importance,
)
from spd_fast.ops.penalty import penalty_sums
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal
from tests.conftest import needs_extension

LP = Penalty("lp", 2.0)


def make_inputs(rows: int, d_in: int, components: int, hidden: tuple[int, ...]) -> dict:
    """x, V and the gate's layers W0, b0, W1, …; logits spread over both kinks."""
    widths = [1, *hidden, 1]
    inputs = {"x": normal(1, rows, d_in), "V": normal(2, d_in, components, scale=d_in**-0.5)}
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        W = normal(10 + layer, components, fan_in, fan_out, scale=1.5 * fan_in**-0.5)
        inputs[f"W{layer}"] = W
        inputs[f"b{layer}"] = normal(20 + layer, components, fan_out, scale=0.5)
    return inputs


def layers(t: dict[str, Tensor], letter: str) -> list[Tensor]:
    return [t[name] for name in sorted(t) if name[0] == letter and name[1:].isdigit()]


def runner(sigmoid: str, penalty: Penalty, backend: str) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        out = gate(
            t["x"], t["V"], layers(t, "W"), layers(t, "b"),
            sigmoid=sigmoid, penalty=penalty, backend=backend,
        )  # fmt: skip
        return out._asdict()

    return run


def truth(sigmoid: str, penalty: Penalty) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        psi = (penalty.kind, penalty.power, penalty.eps)
        out = oracle.gate(t["x"], t["V"], layers(t, "W"), layers(t, "b"), sigmoid, psi)
        return dict(zip(("inner", "lower", "penalty_sum"), out, strict=True))

    return run


def incoming(rows: int, components: int) -> dict[str, Tensor]:
    return {
        "inner": normal(3, rows, components),
        "lower": normal(4, rows, components),
        "penalty_sum": normal(5, components),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
@pytest.mark.parametrize("hidden", [(), (1,), (16,)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (21, 3, 13)])
def test_results_and_gradients_are_the_oracles(shape, hidden, sigmoid, dtype, backend):
    rows, _, components = shape
    assert_matches_oracle(
        runner(sigmoid, LP, backend),
        truth(sigmoid, LP),
        make_inputs(*shape, hidden),
        incoming(rows, components),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "penalty", [Penalty("lp", 1.0), Penalty("lp", 0.7, 0.01), Penalty("smooth_l0", 0.3)], ids=str
)
def test_every_penalty_is_the_oracles(penalty, dtype, backend):
    assert_matches_oracle(
        runner("paper", penalty, backend),
        truth("paper", penalty),
        make_inputs(21, 3, 13, (8,)),
        incoming(21, 13),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmoid", SIGMOIDS)
@pytest.mark.parametrize("hidden", [(4, 1), (6, 3, 5)])
def test_deeper_gates_and_other_sigmoids_are_the_oracles(hidden, sigmoid, dtype):
    assert_matches_oracle(
        runner(sigmoid, LP, "reference"),
        truth(sigmoid, LP),
        make_inputs(9, 4, 5, hidden),
        incoming(9, 5),
        dtype,
    )


@pytest.mark.parametrize("output", ["inner", "lower", "penalty_sum"])
def test_each_output_alone_has_the_oracles_gradients(output, backend):
    inputs, grads = make_inputs(21, 3, 13, (8,)), incoming(21, 13)
    assert_matches_oracle(
        runner("paper", LP, backend),
        truth("paper", LP),
        inputs,
        {output: grads[output]},
        torch.float64,
    )


@pytest.mark.parametrize("s", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("grad", [-1.0, 1.0])
@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
def test_gradients_on_the_kinks_are_the_oracles(sigmoid, grad, s, backend):
    # A linear gate of weight one and bias zero: the logit is x itself.
    one = torch.ones(1, 1).double()
    inputs = {"x": s * one, "V": one, "W0": one[None], "b0": 0 * one}
    grads = {"lower": grad * one, "penalty_sum": grad * one[0]}
    got, expected = (
        evaluate(run, inputs, grads) for run in (runner(sigmoid, LP, backend), truth(sigmoid, LP))
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-14, atol=1e-30, msg=name)


def test_gradcheck(backend):
    inputs = make_inputs(4, 3, 2, (3,))
    leaves = [t.requires_grad_() for t in inputs.values()]
    with torch.no_grad():
        logits = gate_logits(inputs["x"] @ inputs["V"], layers(inputs, "W"), layers(inputs, "b"))
    assert min(logits.abs().min(), (logits - 1).abs().min()) > 1e-3, "a point sits on a kink"

    def run(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return tuple(runner("paper", LP, backend)(named).values())

    assert torch.autograd.gradcheck(run, leaves)


def test_without_a_penalty_the_sums_are_zero(backend):
    t = make_inputs(7, 5, 3, (4,))
    out = gate(
        t["x"], t["V"], layers(t, "W"), layers(t, "b"), sigmoid="paper", backend=backend
    )  # fmt: skip
    assert torch.equal(out.penalty_sum, torch.zeros(3).double())


def test_no_positions_give_empty_results_and_zero_gradients(backend):
    inputs = make_inputs(0, 5, 3, (4,))
    results = evaluate(runner("paper", LP, backend), inputs, incoming(0, 3))
    assert results["inner"].shape == results["lower"].shape == (0, 3)
    assert results["grad_x"].shape == (0, 5)
    for name in ("penalty_sum", "grad_V", "grad_W0", "grad_b0", "grad_W1", "grad_b1"):
        assert (results[name] == 0).all(), name


@needs_extension
def test_second_derivatives_are_refused_by_the_kernels():
    t = make_inputs(7, 5, 3, (4,))
    x = t["x"].requires_grad_()
    total = runner("paper", LP, "cpu")(t)["lower"].square().sum()
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout, backend):
    def other_layout(t):
        changed = {name: LAYOUTS[layout](v) if v.ndim >= 2 else v for name, v in t.items()}
        return runner("paper", LP, backend)(changed)

    inputs, grads = make_inputs(21, 3, 13, (8,)), incoming(21, 13)
    expected = evaluate(runner("paper", LP, backend), inputs, grads)
    strange = {name: LAYOUTS[layout](g) if g.ndim == 2 else g for name, g in grads.items()}
    got = evaluate(other_layout, inputs, strange)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_expanded_rows_and_expanded_gradients(backend):
    t = make_inputs(1, 5, 3, (4,))
    row = t["x"].requires_grad_()
    gradients = []
    for x in (row.expand(6, 5), row.expand(6, 5).contiguous()):
        out = runner("paper", LP, backend)({**t, "x": x})
        # The gradient of a sum arrives expanded, with stride 0.
        total = out["inner"].sum() + out["lower"].sum() + out["penalty_sum"].sum()
        gradients.append(torch.autograd.grad(total, row)[0])
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=0)


def test_sequences_are_rows(backend):
    inputs, grads = make_inputs(6, 5, 3, (4,)), incoming(6, 3)
    flat = evaluate(runner("paper", LP, backend), inputs, grads)
    inputs["x"] = inputs["x"].reshape(2, 3, 5)
    grads = {name: g.reshape(2, 3, 3) if g.ndim == 2 else g for name, g in grads.items()}
    sequences = evaluate(runner("paper", LP, backend), inputs, grads)
    assert sequences["inner"].shape == sequences["lower"].shape == (2, 3, 3)
    for name, value in flat.items():
        torch.testing.assert_close(sequences[name].reshape(value.shape), value, msg=name)


def test_inputs_and_incoming_gradients_are_not_written_to(backend):
    inputs, grads = make_inputs(21, 3, 13, (8,)), incoming(21, 13)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    out = runner("2026", LP, backend)(leaves)
    torch.autograd.grad([out[n] for n in grads], list(leaves.values()), list(grads.values()))
    for name, t in make_inputs(21, 3, 13, (8,)).items():
        assert torch.equal(leaves[name], t), name
    for name, g in incoming(21, 13).items():
        assert torch.equal(grads[name], g), name


def test_two_runs_are_bit_identical(backend):
    inputs, grads = make_inputs(300, 7, 13, (16,)), incoming(300, 13)
    first, second = (evaluate(runner("paper", LP, backend), inputs, grads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_parts_agree_with_the_whole(backend):
    t = make_inputs(9, 4, 5, (6,))
    out = runner("2026", LP, backend)(t)
    logits = gate_logits(t["x"] @ t["V"], layers(t, "W"), layers(t, "b"))
    torch.testing.assert_close(out["lower"], lower_importance(logits, "2026"))
    sums = penalty_sums(upper_importance(logits, "2026"), LP)
    torch.testing.assert_close(out["penalty_sum"], sums)


def test_meta_tensors_give_meta_results():
    t = {name: v.to("meta") for name, v in make_inputs(6, 5, 3, (4,)).items()}
    out = runner("paper", LP, "auto")(t)
    assert {name: tuple(v.shape) for name, v in out.items()} == {
        "inner": (6, 3),
        "lower": (6, 3),
        "penalty_sum": (3,),
    }
    assert all(v.device.type == "meta" for v in out.values())


def test_compiled_is_eager(backend):
    run = runner("2026", LP, backend)
    inputs, grads = make_inputs(9, 4, 5, (6,)), incoming(9, 5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, expected = evaluate(compiled, inputs, grads), evaluate(run, inputs, grads)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_opcheck_of_the_operation(hidden):
    t = {name: v.requires_grad_() for name, v in make_inputs(6, 5, 3, hidden).items()}
    arguments = (t["x"], t["V"], layers(t, "W"), layers(t, "b"), "paper", "lp", 2.0, 1e-12)
    library.opcheck(torch.ops.spd_fast.gate.default, arguments)


def primitive_arguments(hidden: int) -> tuple:
    t = make_inputs(6, 5, 3, (hidden,) if hidden else ())
    w_in, b_in = (t["W0"][:, 0], t["b0"]) if hidden else 2 * (t["V"].new_empty(3, 0),)
    w_out, b_out = layers(t, "W")[-1][:, :, 0], layers(t, "b")[-1][:, 0]
    return (t["x"], t["V"], w_in, b_in, w_out, b_out), ("paper", "lp", 2.0, 1e-12)


@needs_extension
@pytest.mark.parametrize("layout", [torch.clone, LAYOUTS["transposed"]])
@pytest.mark.parametrize("hidden", [0, 4])
def test_opcheck_of_the_primitives(hidden, layout):
    _fused.load("cpu")
    (x, V, *rest), options = primitive_arguments(hidden)
    x, V = layout(x), layout(V)
    library.opcheck(torch.ops.spd_fast.gate_forward.default, (x, V, *rest, *options))
    grads = tuple(incoming(6, 3).values())
    for need_x in (True, False):
        arguments = (*grads, x, V, x @ V, *rest, *options, need_x)
        library.opcheck(torch.ops.spd_fast.gate_backward.default, arguments)


def test_automatic_choice_equals_the_reference():
    t = make_inputs(9, 4, 5, (6,))
    for name, value in runner("paper", LP, "reference")(t).items():
        torch.testing.assert_close(runner("paper", LP, "auto")(t)[name], value, msg=name)


@needs_extension
@pytest.mark.parametrize(
    ("hidden", "sigmoid", "reason"),
    [
        ((4, 3), "paper", "its gates have one hidden layer, not 2"),
        ((4,), "hard", "its sigmoids are 'paper' and '2026', not 'hard'"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused_and_auto_falls_back(hidden, sigmoid, reason):
    t = make_inputs(9, 4, 5, hidden)
    with pytest.raises(UserError, match=f"'cpu' does not support this gate: {reason}"):
        runner(sigmoid, LP, "cpu")(t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = runner(sigmoid, LP, "auto")(t)
    for name, value in runner(sigmoid, LP, "reference")(t).items():
        assert torch.equal(out[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 4)}, "V has d_in 5 but x has 4 columns"),
        ({"V": torch.zeros(5)}, r"V is \(5,\), need \[d_in, C\]"),
        (
            {"W0": torch.zeros(3, 2, 4)},
            r"gate layer 0: need W \[3, 1, out\] and b \[3, out\], got \(3, 2, 4\) and \(3, 4\)",
        ),
        (
            {"W1": torch.zeros(3, 6, 1)},
            r"gate layer 1: need W \[3, 4, out\] and b \[3, out\], got \(3, 6, 1\) and \(3, 1\)",
        ),
        (
            {"b0": torch.zeros(3, 5)},
            r"gate layer 0: need .*, got \(3, 1, 4\) and \(3, 5\)",
        ),
        (
            {"W1": torch.zeros(3, 4, 2), "b1": torch.zeros(3, 2)},
            "the gate's last layer must have one output, got 2",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message, backend):
    t = {name: v.float() for name, v in make_inputs(7, 5, 3, (4,)).items()}
    with pytest.raises(ValueError, match=message):
        runner("paper", LP, backend)({**t, **change})


def test_a_gate_without_layers_is_an_error():
    with pytest.raises(ValueError, match="the gate's last layer must have one output"):
        gate(torch.zeros(2, 3), torch.zeros(3, 4), [], [], sigmoid="paper")


def test_unknown_sigmoid_is_an_error_with_the_nearest(backend):
    with pytest.raises(UserError, match="unknown sigmoid '2025'; nearest: '2026'"):
        runner("2025", LP, backend)(make_inputs(7, 5, 3, (4,)))


@needs_extension
def test_the_extension_is_what_the_cpu_backend_runs(monkeypatch):
    asked = []
    original = _fused._extension_function

    def spy(name):
        asked.append(name)
        return original(name)

    monkeypatch.setattr(_fused, "_extension_function", spy)
    runner("paper", LP, "cpu")(make_inputs(7, 5, 3, (4,)))
    assert asked == ["gate"]
