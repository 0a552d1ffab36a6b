"""Gates evaluated by interpolation: bound, fallback, every gradient, the same bits every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from spd_fast import UserError, _extension
from spd_fast.ops import Penalty, _fused, gate, gate_logits
from spd_fast.ops.interpolation import grid_spacing
from tests import oracle
from tests.checks import assert_matches_oracle, evaluate, normal
from tests.conftest import needs_extension
from tests.ops.test_gate import incoming, layers, make_inputs

LP = Penalty("lp", 2.0)
BOUND = 5e-6
# A piece's coefficients are differences of node values, which lose digits as the spacing shrinks.
# Measured in float64: 1.0e-14 at most.
FLOOR = {torch.float32: 1e-6, torch.float64: 2e-14}


def assert_oracles(
    run: Callable[[dict], dict], expected: Callable[[dict], dict], inputs: dict, grads: dict,
    dtype: torch.dtype = torch.float64,
) -> None:  # fmt: skip
    assert_matches_oracle(run, expected, inputs, grads, dtype, FLOOR[dtype])


def runner(
    backend: str, gate_eval: str = "interpolated", sigmoid: str = "paper", penalty: Penalty = LP
) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        out = gate(
            t["x"], t["V"], layers(t, "W"), layers(t, "b"),
            sigmoid=sigmoid, penalty=penalty, gate_eval=gate_eval, backend=backend,
        )  # fmt: skip
        return out._asdict()

    return run


def truth(sigmoid: str, penalty: Penalty) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        psi = (penalty.kind, penalty.power, penalty.eps)
        out = oracle.gate(
            t["x"], t["V"], layers(t, "W"), layers(t, "b"), sigmoid, psi, "interpolated"
        )
        return dict(zip(("inner", "lower", "penalty_sum"), out, strict=True))

    return run


def smooth_inputs(rows: int, d_in: int, components: int, hidden: int) -> dict[str, Tensor]:
    """Gates that a grid of less than a quarter of the rows can hold."""
    t = make_inputs(rows, d_in, components, (hidden,))
    t["W0"] = 0.5 * t["W0"].clamp(-2, 2)
    t["x"] = t["x"].clamp(-1.5, 1.5)
    return t


def interpolated(t: dict[str, Tensor]) -> list[bool]:
    return oracle.interpolated_logits(t["x"] @ t["V"], layers(t, "W"), layers(t, "b"))[1]


def linear_importances(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """With weights so small that every logit lies in (0, 1): ``lower`` is the logit itself."""
    t = dict(t, W1=0.005 * t["W1"], b1=0 * t["b1"] + 0.5)
    s = gate_logits(t["x"] @ t["V"], layers(t, "W"), layers(t, "b"))
    assert s.min() > 0
    assert s.max() < 1
    return t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
@pytest.mark.parametrize("shape", [(257, 1, 9, 1), (300, 5, 7, 4), (523, 3, 13, 16)])
def test_results_and_gradients_are_the_oracles(shape, sigmoid, dtype, backend):
    inputs = smooth_inputs(*shape)
    assert all(interpolated(inputs))
    assert_oracles(
        runner(backend, sigmoid=sigmoid),
        truth(sigmoid, LP),
        inputs,
        incoming(shape[0], shape[2]),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [Penalty("lp", 0.7, 0.01), Penalty("smooth_l0", 0.3)], ids=str)
def test_every_penalty_is_the_oracles(penalty, dtype, backend):
    assert_oracles(
        runner(backend, penalty=penalty),
        truth("paper", penalty),
        smooth_inputs(300, 3, 5, 8),
        incoming(300, 5),
        dtype,
    )


@pytest.mark.parametrize("output", ["inner", "lower", "penalty_sum"])
def test_each_output_alone_has_the_oracles_gradients(output, backend):
    assert_oracles(
        runner(backend),
        truth("paper", LP),
        smooth_inputs(300, 3, 5, 8),
        {output: incoming(300, 5)[output]},
        torch.float64,
    )


def test_components_that_need_too_fine_a_grid_are_exact_and_the_others_are_not(backend):
    t = smooth_inputs(300, 3, 5, 8)
    t["W0"][1] *= 30
    t["W0"][3] = 0
    assert interpolated(t) == [True, False, True, True, True]
    grads = incoming(300, 5)
    assert_oracles(runner(backend), truth("paper", LP), t, grads, torch.float64)
    ours, exact = (evaluate(runner(backend, how), t, grads) for how in ("interpolated", "exact"))
    for name in ("W0", "b0", "W1", "b1"):
        torch.testing.assert_close(ours[f"grad_{name}"][1], exact[f"grad_{name}"][1])
    assert torch.equal(ours["lower"][:, 1], exact["lower"][:, 1])
    assert not torch.equal(ours["lower"][:, 2], exact["lower"][:, 2])


def test_gradcheck(backend):
    inputs = smooth_inputs(48, 3, 2, 2)
    inputs["W0"] *= 0.2
    inputs["x"] = 0.5 * inputs["x"]
    assert all(interpolated(inputs))
    h = inputs["x"] @ inputs["V"]
    s = gate_logits(h, layers(inputs, "W"), layers(inputs, "b"), "interpolated")
    spacing = grid_spacing(inputs["W0"][:, 0], inputs["W1"][:, :, 0])
    phase = torch.frac(h / spacing).abs()
    assert torch.stack([s.abs(), (s - 1).abs(), phase, 1 - phase]).min() > 1e-5, "near a kink"
    leaves = [t.requires_grad_() for t in inputs.values()]

    def run(*tensors):
        return tuple(runner(backend)(dict(zip(inputs, tensors, strict=True))).values())

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("hidden", [1, 16])
def test_logits_are_within_the_bound_of_exact(hidden, scale, backend):
    t = make_inputs(4096, 5, 5, (hidden,))
    t["x"], t["W0"] = scale * t["x"], scale * t["W0"]
    t = linear_importances(t)
    assert all(interpolated(t))
    spacing = grid_spacing(t["W0"][:, 0], t["W1"][:, :, 0])
    fourth = 1.6 * (t["W1"][:, :, 0].abs() * t["W0"][:, 0] ** 4).sum(dim=1)
    ours, exact = (runner(backend, how)(t)["lower"] for how in ("interpolated", "exact"))
    error = (ours - exact).abs().amax(dim=0)
    assert (error > 0).all()
    assert (error <= spacing**4 / 384 * fourth).all()
    assert (error <= BOUND).all()


def test_logits_in_float32_are_within_1e_5_of_exact(backend):
    t = {name: v.float() for name, v in make_inputs(4096, 5, 7, (16,)).items()}
    ours, exact = (runner(backend, how)(t)["lower"] for how in ("interpolated", "exact"))
    assert (ours - exact).abs().max() <= 1e-5


def test_spacing_keeps_the_bound_and_is_the_largest_of_its_ladder():
    w, o = normal(1, 200, 16, scale=3.0), normal(2, 200, 16)
    spacing = grid_spacing(w, o)
    bound = spacing**4 / 384 * 4 / (2 * torch.pi) ** 0.5 * (o.abs() * w**4).sum(dim=1)
    assert (bound <= BOUND).all()
    assert (2 * bound > BOUND).all()
    for c in range(200):
        assert spacing[c].item() == pytest.approx(oracle.grid_spacing(w[c], o[c]), rel=1e-14)


def test_spacing_of_constant_and_of_steep_gates():
    w = torch.tensor([[0.0], [1e9], [float("inf")], [float("nan")]])
    assert grid_spacing(w, torch.ones(4, 1)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_nodes_themselves_are_hit(backend):
    t = smooth_inputs(400, 1, 1, 4)
    D = oracle.grid_spacing(t["W0"][0, 0], t["W1"][0, :, 0])
    t["V"] = torch.ones(1, 1).double()
    t["x"] = D * (torch.arange(400) % 41 - 20).double()[:, None]  # both ends included
    assert all(interpolated(t))
    assert_oracles(
        runner(backend), truth("paper", LP), t, incoming(400, 1), torch.float64
    )  # fmt: skip
    ours, exact = (runner(backend, how)(t)["lower"] for how in ("interpolated", "exact"))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_few_rows_are_exact(rows, backend):
    inputs, grads = make_inputs(rows, 3, 5, (4,)), incoming(rows, 5)
    ours, exact = (
        evaluate(runner(backend, how), inputs, grads) for how in ("interpolated", "exact")
    )
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-13, atol=1e-15, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_components_with_undefined_or_far_activations_are_exact(bad, backend):
    t = smooth_inputs(300, 1, 2, 4)
    assert all(interpolated(t))
    t["x"][17] = bad
    ours, exact = (runner(backend, how)(t)["lower"] for how in ("interpolated", "exact"))
    torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("hidden", [(), (4, 3)])
def test_gates_without_exactly_one_hidden_layer_are_exact(hidden, backend):
    if backend == "cpu" and len(hidden) > 1:
        pytest.skip("the kernels have one hidden layer")
    inputs, grads = make_inputs(300, 3, 5, hidden), incoming(300, 5)
    ours, exact = (
        evaluate(runner(backend, how), inputs, grads) for how in ("interpolated", "exact")
    )
    for name, value in exact.items():
        assert torch.equal(ours[name], value), name


def test_two_runs_are_bit_identical(backend):
    inputs, grads = smooth_inputs(523, 3, 7, 16), incoming(523, 7)
    first, second = (evaluate(runner(backend), inputs, grads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_compiled_is_eager(backend):
    inputs, grads = smooth_inputs(200, 2, 3, 4), incoming(200, 3)
    compiled = torch.compile(runner(backend), fullgraph=True, backend="aot_eager")
    got, expected = evaluate(compiled, inputs, grads), evaluate(runner(backend), inputs, grads)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13, msg=name)


def test_opcheck_of_the_operation():
    t = {name: v.requires_grad_() for name, v in smooth_inputs(200, 2, 3, 4).items()}
    options = ("paper", "lp", 2.0, 1e-12, "interpolated")
    arguments = (t["x"], t["V"], layers(t, "W"), layers(t, "b"), *options)
    library.opcheck(torch.ops.spd_fast.gate.default, arguments)


def test_unknown_evaluation_is_an_error_with_the_nearest(backend):
    with pytest.raises(UserError, match="unknown gate_eval 'interpolate'; nearest: 'interpolated'"):
        runner(backend, "interpolate")(make_inputs(7, 5, 3, (4,)))


# ---- the compiled kernels, on every path and instruction set


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    monkeypatch.setenv("SPD_FAST_CPU_ISA", request.param)
    try:
        _extension.module().instruction_set()
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", ["small", "large"])
def test_every_path_is_the_oracles(path, dtype, isa, monkeypatch):
    monkeypatch.setenv("SPD_FAST_CPU_PATH", path)
    t = smooth_inputs(523, 5, 19, 8)
    t["W0"][4] *= 30
    assert interpolated(t).count(False) == 1
    grads = incoming(523, 19)
    assert_oracles(runner("cpu"), truth("paper", LP), t, grads, dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_threads(dtype, isa, monkeypatch):
    monkeypatch.setenv("SPD_FAST_CPU_PATH", "small")
    inputs = {name: v.to(dtype) for name, v in smooth_inputs(2100, 5, 19, 16).items()}
    inputs["W0"][4] *= 100
    grads = {name: g.to(dtype) for name, g in incoming(2100, 19).items()}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(evaluate(runner("cpu"), inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@needs_extension
def test_opcheck_of_the_primitives():
    _fused.load("cpu")
    t = smooth_inputs(200, 2, 3, 4)
    rest = (t["W0"][:, 0], t["b0"], t["W1"][:, :, 0], t["b1"][:, 0])
    options = ("paper", "lp", 2.0, 1e-12)
    forward = torch.ops.spd_fast.gate_interpolated_forward.default
    library.opcheck(forward, (t["x"], t["V"], *rest, *options))
    inner = forward(t["x"], t["V"], *rest, *options)[0]
    arguments = (*incoming(200, 3).values(), t["x"], t["V"], inner, *rest, *options, True)
    library.opcheck(torch.ops.spd_fast.gate_interpolated_backward.default, arguments)


@needs_extension
def test_auto_interpolates_on_the_cpu_backend_in_single_precision() -> None:
    t = smooth_inputs(300, 5, 6, 4)
    single = {name: value.float() for name, value in t.items()}

    def lower(inputs: dict[str, Tensor], backend: str, gate_eval: str) -> Tensor:
        return runner(backend, gate_eval)(inputs)["lower"]

    interpolated, exact = (lower(single, "cpu", e) for e in ("interpolated", "exact"))
    assert not torch.equal(interpolated, exact)
    assert torch.equal(lower(single, "cpu", "auto"), interpolated)
    assert torch.equal(lower(t, "cpu", "auto"), lower(t, "cpu", "exact"))
    for inputs in (single, t):
        expected = lower(inputs, "reference", "exact")
        assert torch.equal(lower(inputs, "reference", "auto"), expected)
