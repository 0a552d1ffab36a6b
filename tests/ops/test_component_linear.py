"""The masked linear layer in folded form against explicit masks and an explicit weight delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, library

from spd_fast import UserError
from spd_fast.ops import (
    MaskRecipe,
    RandomSource,
    _fused,
    component_linear,
    make_key,
    materialize_mask,
)
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal, unit
from tests.conftest import needs_extension

SEED, STEP, DRAW, SITE, OFFSET = 11, 17, 2, 3, 1000


@dataclass(frozen=True)
class Kind:
    """One kind of mask: which parts its recipe has."""

    lower: bool = False
    source: str = "none"  # none, given, random, binomial
    delta: str = "none"  # none, given, random
    routing: bool = False


KINDS = {
    "unmasked": Kind(),
    "importance": Kind(lower=True),
    "given_source": Kind(source="given"),
    "random_source": Kind(source="random"),
    "importance_given_source": Kind(lower=True, source="given"),
    "stochastic": Kind(lower=True, source="random"),
    "binomial": Kind(lower=True, source="binomial"),
    "stochastic_delta": Kind(lower=True, source="random", delta="random"),
    "binomial_delta": Kind(lower=True, source="binomial", delta="random"),
    "adversarial_delta": Kind(lower=True, source="given", delta="given"),
    "unmasked_delta": Kind(delta="given"),
    "unmasked_routed": Kind(routing=True),
    "stochastic_routed": Kind(lower=True, source="random", routing=True),
    "stochastic_delta_routed": Kind(lower=True, source="random", delta="random", routing=True),
    "adversarial_delta_routed": Kind(lower=True, source="given", delta="given", routing=True),
}
FULL = KINDS["stochastic_delta_routed"]
GIVEN = KINDS["adversarial_delta_routed"]


def make_inputs(
    kind: Kind, rows: int = 9, d_in: int = 5, components: int = 7, d_out: int = 3
) -> dict[str, Tensor]:
    inputs = {
        "x": normal(1, rows, d_in),
        "V": normal(2, d_in, components),
        "U": normal(3, components, d_out),
        "weight": normal(4, d_out, d_in),
        "bias": normal(5, d_out),
    }
    if kind.lower:
        # The paper's lower importances can be slightly negative.
        inputs["lower"] = unit(6, rows, components) * 1.1 - 0.1
    if kind.source == "given":
        inputs["source"] = unit(7, rows, components)
    if kind.delta == "given":
        inputs["delta"] = unit(8, rows)
    if kind.routing:
        inputs["routing"] = unit(9, rows) < 0.6
    return inputs


def recipe_of(kind: Kind, t: dict[str, Tensor]) -> MaskRecipe:
    source: RandomSource | Tensor | None = t.get("source")
    if kind.source in ("random", "binomial"):
        key = make_key(SEED, STEP, t["x"].device)
        source = RandomSource(key, DRAW, SITE, OFFSET, kind.source == "binomial")
    delta = True if kind.delta == "random" else t.get("delta")
    return MaskRecipe(t.get("lower"), source, delta, t.get("routing"))


def runner(kind: Kind, backend: str) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        y = component_linear(
            t["x"], t["V"], t["U"], recipe_of(kind, t),
            weight=t["weight"], bias=t["bias"], backend=backend,
        )  # fmt: skip
        return {"y": y}

    return run


def truth(kind: Kind) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, components = t["x"].shape[0], t["U"].shape[0]
        source, delta = t.get("source"), t.get("delta")
        if kind.source in ("random", "binomial"):
            u = oracle.uniforms(
                SEED, STEP, DRAW, SITE, range(OFFSET, OFFSET + rows), range(components + 1)
            ).to(t["x"].dtype)
            source = u[:, :components]
            if kind.source == "binomial":
                source = (source >= 0.5).to(u.dtype)
            if kind.delta == "random":
                delta = u[:, components]
        mask = oracle.mask(t.get("lower"), source, (rows, components)).to(t["x"].dtype)
        return {
            "y": oracle.component_linear(
                t["x"], t["V"], t["U"], mask, delta, t.get("routing"), t["weight"], t["bias"]
            )
        }

    return run


def incoming(rows: int = 9, d_out: int = 3) -> dict[str, Tensor]:
    return {"y": normal(10, rows, d_out)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_the_oracles(kind, dtype, backend):
    kind = KINDS[kind]
    assert_matches_oracle(runner(kind, backend), truth(kind), make_inputs(kind), incoming(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [FULL, GIVEN, KINDS["stochastic"]])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 5, 7, 3), (9, 5, 1, 3), (7, 1, 4, 1), (19, 17, 34, 13)]
)
def test_odd_sizes_are_the_oracles(shape, kind, dtype, backend):
    rows, _, _, d_out = shape
    assert_matches_oracle(
        runner(kind, backend), truth(kind), make_inputs(kind, *shape), incoming(rows, d_out), dtype
    )


@pytest.mark.parametrize("kind", ["stochastic", "stochastic_delta", "adversarial_delta_routed"])
def test_given_inner_activations_change_nothing(kind, backend):
    kind = KINDS[kind]

    def run(t):
        inner = t["x"] @ t["V"]
        mask = recipe_of(kind, t)
        return {
            "y": component_linear(
                t["x"], t["V"], t["U"], mask,
                weight=t["weight"], bias=t["bias"], inner=inner, backend=backend,
            )
        }  # fmt: skip

    assert_matches_oracle(run, truth(kind), make_inputs(kind), incoming(), torch.float64)


def test_given_inner_activations_take_the_gradient_of_V(backend):
    t = make_inputs(FULL)
    V, inner = t["V"].requires_grad_(), (t["x"] @ t["V"]).detach().requires_grad_()
    y = component_linear(
        t["x"], V, t["U"], recipe_of(FULL, t), weight=t["weight"], inner=inner, backend=backend
    )
    grad_V, grad_inner = torch.autograd.grad(y.sum(), [V, inner], allow_unused=True)
    assert grad_V is None
    assert (grad_inner != 0).any()


def test_without_bias(backend):
    t = make_inputs(FULL)
    y = component_linear(
        t["x"], t["V"], t["U"], recipe_of(FULL, t), weight=t["weight"], backend=backend
    )
    torch.testing.assert_close(y + t["bias"], runner(FULL, backend)(t)["y"])


@pytest.mark.parametrize("kind", [FULL, GIVEN, KINDS["stochastic"]])
def test_gradcheck(kind, backend):
    t = make_inputs(kind, rows=4, d_in=3, components=3, d_out=2)
    constant = {name: t.pop(name) for name in ("weight", "routing") if name in t}

    def run(*tensors):
        return runner(kind, backend)({**constant, **dict(zip(t, tensors, strict=True))})["y"]

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in t.values()])


def test_exact_factors_unmasked_give_the_original_layer(backend):
    x, weight, bias = normal(1, 6, 5), normal(2, 3, 5), normal(3, 3)
    y = component_linear(
        x, torch.eye(5).double(), weight.T, MaskRecipe(), bias=bias, backend=backend
    )
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


def test_everything_switched_on_gives_the_original_layer_for_any_factors(backend):
    t = make_inputs(Kind())
    ones = MaskRecipe(delta=torch.ones(9).double())
    y = component_linear(
        t["x"], t["V"], t["U"], ones, weight=t["weight"], bias=t["bias"], backend=backend
    )
    expected = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    torch.testing.assert_close(y, expected)


def test_positions_that_are_not_routed_keep_the_original_weight(backend):
    t = make_inputs(FULL)
    y = runner(FULL, backend)(t)["y"]
    expected = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    off = ~t["routing"]
    assert 0 < off.sum() < 9
    torch.testing.assert_close(y[off], expected[off])
    assert not torch.isclose(y[~off], expected[~off]).all(dim=1).any()


def test_positions_that_are_not_routed_ignore_their_mask(backend):
    t = make_inputs(GIVEN)
    t["lower"][~t["routing"]] = 5.0
    t["delta"][~t["routing"]] = -3.0
    torch.testing.assert_close(runner(GIVEN, backend)(t)["y"], truth(GIVEN)(t)["y"])


def test_the_random_recipe_is_its_materialized_mask(backend):
    t = make_inputs(FULL)
    mask, delta = materialize_mask(recipe_of(FULL, t), 9, 7, torch.float64)
    recipe = MaskRecipe(mask, None, delta, t["routing"])
    y = component_linear(
        t["x"], t["V"], t["U"], recipe, weight=t["weight"], bias=t["bias"], backend=backend
    )
    torch.testing.assert_close(y, runner(FULL, backend)(t)["y"], rtol=1e-13, atol=1e-13)


def test_tiles_of_rows_make_the_whole(backend):
    t = make_inputs(FULL)
    whole = runner(FULL, backend)(t)["y"]
    parts = []
    for rows in (slice(0, 4), slice(4, 9)):
        source = RandomSource(make_key(SEED, STEP), DRAW, SITE, OFFSET + rows.start)
        recipe = MaskRecipe(t["lower"][rows], source, True, t["routing"][rows])
        parts.append(
            component_linear(
                t["x"][rows], t["V"], t["U"], recipe,
                weight=t["weight"], bias=t["bias"], backend=backend,
            )
        )  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_no_positions_give_empty_output_and_zero_gradients(kind, backend):
    kind = KINDS[kind]
    results = evaluate(runner(kind, backend), make_inputs(kind, rows=0), incoming(0))
    assert results["y"].shape == (0, 3)
    assert results["grad_x"].shape == (0, 5)
    for name in ("grad_V", "grad_U", "grad_bias"):
        assert (results[name] == 0).all(), name


@needs_extension
def test_second_derivatives_are_refused_by_the_kernels():
    t = make_inputs(FULL)
    x = t["x"].requires_grad_()
    total = runner(FULL, "cpu")(t)["y"].square().sum()
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [FULL, GIVEN])
def test_memory_layout_does_not_matter(kind, layout, backend):
    def change(t):
        return LAYOUTS[layout](t) if t.ndim == 2 else t

    def changed(t):
        return runner(kind, backend)({name: change(v) for name, v in t.items()})

    expected = evaluate(runner(kind, backend), make_inputs(kind), incoming())
    got = evaluate(changed, make_inputs(kind), {"y": change(incoming()["y"])})
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_vectors_with_a_stride(backend):
    t = make_inputs(GIVEN)
    wide = {name: t[name].repeat_interleave(2)[::2] for name in ("delta", "routing", "bias")}
    got, expected = (runner(GIVEN, backend)(inputs)["y"] for inputs in ({**t, **wide}, t))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_expanded_inputs_are_their_copies(backend):
    t = make_inputs(GIVEN)
    for name in ("x", "lower", "source", "delta"):
        t[name] = t[name][:1].expand(t[name].shape)
    copies = {name: v.contiguous() for name, v in t.items()}
    got, expected = (runner(GIVEN, backend)(inputs)["y"] for inputs in (t, copies))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_gradients_through_expanded_inputs(backend):
    t = make_inputs(GIVEN)
    names = ("x", "lower", "source", "delta")
    rows = {name: t[name][:1].clone().requires_grad_() for name in names}
    gradients = []
    for copy in (lambda v: v, lambda v: v.contiguous()):
        expanded = {name: copy(row.expand(t[name].shape)) for name, row in rows.items()}
        # The gradient of a sum arrives expanded, with stride 0.
        total = runner(GIVEN, backend)({**t, **expanded})["y"].sum()
        gradients.append(torch.autograd.grad(total, list(rows.values())))
    for name, got, expected in zip(names, *gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0, msg=name)


@pytest.mark.parametrize("kind", [FULL, GIVEN, KINDS["unmasked"]])
def test_sequences_are_rows(kind, backend):
    inputs = make_inputs(kind, rows=6)
    flat = evaluate(runner(kind, backend), inputs, incoming(6))
    sequences = {
        name: v.reshape(2, 3, *v.shape[1:])
        if name in ("x", "lower", "source", "delta", "routing")
        else v
        for name, v in inputs.items()
    }
    got = evaluate(runner(kind, backend), sequences, {"y": incoming(6)["y"].reshape(2, 3, 3)})
    assert got["y"].shape == (2, 3, 3)
    for name, value in flat.items():
        torch.testing.assert_close(got[name].reshape(value.shape), value, msg=name)


def test_one_position_without_a_batch(backend):
    t = make_inputs(Kind(lower=True), rows=1)
    expected = runner(Kind(lower=True), backend)(t)["y"][0]
    t["x"], t["lower"] = t["x"][0], t["lower"][0]
    torch.testing.assert_close(runner(Kind(lower=True), backend)(t)["y"], expected)


def test_inputs_and_incoming_gradients_are_not_written_to(backend):
    inputs, grads = make_inputs(GIVEN), incoming()
    leaves = [v.requires_grad_() for n, v in inputs.items() if n not in ("weight", "routing")]
    torch.autograd.grad(runner(GIVEN, backend)(inputs)["y"], leaves, grads["y"])
    for name, value in make_inputs(GIVEN).items():
        assert torch.equal(inputs[name], value), name
    assert torch.equal(grads["y"], incoming()["y"])


def test_two_runs_are_bit_identical(backend):
    inputs, grads = make_inputs(FULL, 300, 17, 70, 13), incoming(300, 13)
    first, second = (evaluate(runner(FULL, backend), inputs, grads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("kind", ["unmasked", "stochastic_delta_routed"])
def test_meta_tensors_give_meta_output(kind):
    kind = KINDS[kind]
    t = {name: v.to("meta") for name, v in make_inputs(kind).items()}
    y = runner(kind, "auto")(t)["y"]
    assert (y.device.type, y.shape) == ("meta", (9, 3))


@pytest.mark.parametrize("kind", ["stochastic", "adversarial_delta_routed"])
def test_compiled_is_eager(kind, backend):
    kind = KINDS[kind]
    compiled = torch.compile(runner(kind, backend), fullgraph=True, backend="aot_eager")
    got, expected = (
        evaluate(run, make_inputs(kind), incoming()) for run in (compiled, runner(kind, backend))
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13, msg=name)


OPTIONS = (DRAW, SITE, OFFSET, False)


def op_arguments(kind: Kind, rows: int = 9) -> tuple:
    t = make_inputs(kind, rows)
    key = make_key(SEED, STEP) if kind.source == "random" else None
    return (
        t["x"], None, t["V"], t["U"], t.get("lower"), t.get("source"), key, *OPTIONS,
        t.get("delta"), kind.delta == "random", t["weight"], t["bias"], t.get("routing"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["unmasked", "stochastic_delta", "adversarial_delta_routed"])
def test_opcheck_of_the_operation(kind):
    def leaf(v):
        return v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v

    arguments = tuple(leaf(v) for v in op_arguments(KINDS[kind]))
    library.opcheck(torch.ops.spd_fast.component_linear.default, arguments)


@needs_extension
@pytest.mark.parametrize("layout", [torch.clone, LAYOUTS["transposed"]])
@pytest.mark.parametrize("kind", ["unmasked", "stochastic_delta", "adversarial_delta_routed"])
def test_opcheck_of_the_primitives(kind, layout):
    _fused.load("cpu")
    kind = KINDS[kind]
    arguments = tuple(
        layout(v) if isinstance(v, Tensor) and v.ndim == 2 else v for v in op_arguments(kind)
    )
    library.opcheck(torch.ops.spd_fast.component_linear_forward.default, arguments)
    has = [arguments[i] is not None for i in (0, 1, 2, 3, 4, 5, 11, 14)]
    backward = torch.ops.spd_fast.component_linear_backward.default
    for needs in (has, [False, False, True, False, False, False, False, False]):
        library.opcheck(backward, (layout(incoming()["y"]), *arguments, *needs))


@needs_extension
def test_a_gradient_to_the_weight_is_refused_by_the_kernels():
    t = make_inputs(FULL)
    t["weight"].requires_grad_()
    with pytest.raises(
        UserError,
        match="does not support this component_linear: it computes no gradient of the weight",
    ):
        runner(FULL, "cpu")(t)


def test_the_reference_gives_the_weight_its_gradient():
    t = make_inputs(GIVEN)
    gradients = []
    for run in (runner(GIVEN, "reference"), truth(GIVEN)):
        weight = t["weight"].clone().requires_grad_()
        y = run({**t, "weight": weight})["y"]
        gradients.append(torch.autograd.grad(y, weight, incoming()["y"])[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 6)}, "V has d_in 5 but x has 6 columns (site 'h.0')"),
        ({"V": torch.zeros(5, 6)}, "V (5, 6) and U (7, 3) do not share C (site 'h.0')"),
        ({"U": torch.zeros(7)}, "V (5, 7) and U (7,) do not share C (site 'h.0')"),
        ({"lower": torch.zeros(9, 6)}, "mask.lower is (9, 6), need (9, 7) (site 'h.0')"),
        ({"source": torch.zeros(8, 7)}, "mask.source is (8, 7), need (9, 7) (site 'h.0')"),
        ({"delta": torch.zeros(9, 1)}, "mask.delta is (9, 1), need (9,) (site 'h.0')"),
        ({"routing": torch.zeros(3).bool()}, "mask.routing is (3,), need (9,) (site 'h.0')"),
        ({"weight": torch.zeros(5, 3)}, "weight is (5, 3), need (3, 5) (site 'h.0')"),
        ({"bias": torch.zeros(5)}, "bias is (5,), need (3,) (site 'h.0')"),
        ({"inner": torch.zeros(9, 3)}, "inner is (9, 3), need (9, 7) (site 'h.0')"),
        (
            {"weight": None},
            "a mask with a weight delta or routing needs the weight (site 'h.0')",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message, backend):
    t = {n: v.float() if v.is_floating_point() else v for n, v in make_inputs(GIVEN).items()}
    t = {**t, **change}
    with pytest.raises(ValueError) as raised:
        component_linear(
            t["x"], t["V"], t["U"], recipe_of(GIVEN, t), weight=t["weight"], bias=t["bias"],
            inner=t.get("inner"), backend=backend, site_name="h.0",
        )  # fmt: skip
    assert str(raised.value) == message
