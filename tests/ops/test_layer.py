"""The streamed layer: what gate and component_linear compute, keeping nothing of size N·C."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import library

from spd_fast import UserError
from spd_fast.ops import MaskRecipe, Penalty, RandomSource, component_linear, gate, layer, make_key
from spd_fast.ops.masks import materialize_mask
from tests import oracle
from tests.checks import assert_matches_oracle, evaluate, normal, unit
from tests.conftest import needs_extension
from tests.ops.test_gate import layers, make_inputs

LP = Penalty("lp", 2.0)


def make(rows: int, d_in: int, components: int, d_out: int, hidden: tuple[int, ...]) -> dict:
    inputs = make_inputs(rows, d_in, components, hidden)
    inputs["U"] = normal(31, components, d_out, scale=components**-0.5)
    inputs["bias"] = normal(32, d_out)
    inputs["weight"] = normal(33, d_out, d_in)
    return inputs


def recipe(delta: object = None, binomial: bool = False, routed: bool = False, rows: int = 0):
    routing = unit(34, rows) > 0.4 if routed else None
    return MaskRecipe(
        source=RandomSource(make_key(3, 4), 2, 5, 1000, binomial), delta=delta, routing=routing
    )


def runner(mask: MaskRecipe, backend: str, sigmoid: str = "paper"):
    def run(t):
        out = layer(
            t["x"], t["V"], t["U"], layers(t, "W"), layers(t, "b"), mask,
            sigmoid=sigmoid, penalty=LP, weight=t["weight"], bias=t["bias"], backend=backend,
        )  # fmt: skip
        return out._asdict()

    return run


def truth(mask: MaskRecipe, sigmoid: str = "paper"):
    """Gates, masks and the unfolded sum of the oracle."""

    def run(t):
        h, lower, sums = oracle.gate(
            t["x"], t["V"], layers(t, "W"), layers(t, "b"), sigmoid, ("lp", 2.0, 1e-12)
        )
        if mask.source is None:
            m, delta = lower, mask.delta
        else:
            r, delta = materialize_mask(
                MaskRecipe(source=mask.source, delta=mask.delta), *h.shape, t["x"].dtype
            )
            m = lower + (1 - lower) * r
        if delta is not None:
            delta = delta.to(t["x"].dtype)
        y = oracle.component_linear(
            t["x"], t["V"], t["U"], m, delta, mask.routing, t["weight"], t["bias"]
        )
        return {"y": y, "penalty_sum": sums}

    return run


def incoming(rows: int, components: int, d_out: int) -> dict:
    return {"y": normal(35, rows, d_out), "penalty_sum": normal(36, components)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("delta", "binomial", "routed"), list(itertools.product([None, True], *2 * [[False, True]]))
)
def test_results_and_gradients_are_the_oracles(delta, binomial, routed, dtype, backend):
    mask = recipe(delta, binomial, routed, 23)
    assert_matches_oracle(
        runner(mask, backend), truth(mask), make(23, 5, 7, 3, (4,)), incoming(23, 7, 3), dtype
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, (1,)), (9, 4, 19, 6, ()), (300, 6, 37, 5, (16,))])
@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
def test_every_shape_is_what_the_two_operations_compute(shape, sigmoid, backend):
    rows, _, components, d_out, _ = shape
    t = make(*shape)
    mask = recipe(unit(37, rows), False, True, rows)

    def two(t):
        out = gate(
            t["x"], t["V"], layers(t, "W"), layers(t, "b"),
            sigmoid=sigmoid, penalty=LP, backend="reference",
        )  # fmt: skip
        y = component_linear(
            t["x"], t["V"], t["U"],
            MaskRecipe(out.lower, mask.source, mask.delta, mask.routing),
            weight=t["weight"], bias=t["bias"], inner=out.inner, backend="reference",
        )  # fmt: skip
        return {"y": y, "penalty_sum": out.penalty_sum}

    grads = incoming(rows, components, d_out)
    got, expected = evaluate(runner(mask, backend, sigmoid), t, grads), evaluate(two, t, grads)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=name)


def test_importances_alone_without_a_source(backend):
    t, mask = make(23, 5, 7, 3, (4,)), MaskRecipe()
    assert_matches_oracle(
        runner(mask, backend), truth(mask), t, incoming(23, 7, 3), torch.float64
    )  # fmt: skip


@pytest.mark.parametrize("output", ["y", "penalty_sum"])
def test_each_output_alone_has_the_oracles_gradients(output, backend):
    mask = recipe()
    grads = {output: incoming(23, 7, 3)[output]}
    inputs = make(23, 5, 7, 3, (4,))
    assert_matches_oracle(runner(mask, backend), truth(mask), inputs, grads, torch.float64)


def test_gradcheck(backend):
    inputs = make(4, 3, 2, 2, (3,))
    weight = inputs.pop("weight")
    leaves = [t.requires_grad_() for t in inputs.values()]

    def run(*tensors):
        t = dict(zip(inputs, tensors, strict=True), weight=weight)
        return tuple(runner(recipe(True), backend)(t).values())

    assert torch.autograd.gradcheck(run, leaves)


def test_no_positions_give_empty_results_and_zero_gradients(backend):
    got = evaluate(runner(recipe(), backend), make(0, 5, 7, 3, (4,)), incoming(0, 7, 3))
    assert got["y"].shape == (0, 3)
    assert got["grad_x"].shape == (0, 5)
    for name in ("penalty_sum", "grad_V", "grad_U", "grad_W0", "grad_b1", "grad_bias"):
        assert (got[name] == 0).all(), name


def test_sequences_are_rows(backend):
    t = make(6, 5, 7, 3, (4,))
    flat = runner(recipe(), backend)(t)
    shaped = runner(recipe(), backend)(dict(t, x=t["x"].reshape(2, 3, 5)))
    torch.testing.assert_close(shaped["y"].reshape(6, 3), flat["y"])


@needs_extension
@pytest.mark.parametrize("path_rows", [257, 2100])
def test_one_and_two_threads_agree_in_all_but_products(path_rows):
    t, grads = make(path_rows, 3, 21, 2, (8,)), incoming(path_rows, 21, 2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(evaluate(runner(recipe(True), "cpu"), t, grads))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-13, msg=name)


@needs_extension
def test_nothing_of_size_N_C_is_saved():
    t = {name: v.requires_grad_(name != "weight") for name, v in make(64, 2, 640, 2, (1,)).items()}
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        runner(recipe(), "cpu")(t)
    assert max(saved) < 64 * 640 / 8


@needs_extension
def test_opcheck_of_the_primitives():
    t = make(6, 5, 7, 3, (4,))
    first = (t["x"], t["V"], t["U"], t["W0"][:, 0], t["b0"], t["W1"][:, :, 0], t["b1"][:, 0])
    rest = (
        "paper", "lp", 2.0, 1e-12, make_key(1, 2), 0, 1, 2, False, None, True, t["weight"],
        t["bias"], None,
    )  # fmt: skip
    runner(recipe(), "cpu")(t)
    library.opcheck(torch.ops.spd_fast.layer_forward.default, (*first, *rest))
    grads = tuple(incoming(6, 7, 3).values())
    for need_x in (True, False):
        arguments = (*grads, *first, *rest, need_x)
        library.opcheck(torch.ops.spd_fast.layer_backward.default, arguments)


def test_a_recipe_with_importances_is_an_error():
    t = make(6, 5, 7, 3, (4,))
    with pytest.raises(ValueError, match="a layer makes its own importances"):
        runner(MaskRecipe(unit(1, 6, 7)), "reference")(t)


def test_a_missing_weight_is_an_error(backend):
    t = dict(make(6, 5, 7, 3, (4,)), weight=None)
    with pytest.raises(ValueError, match="needs the weight"):
        runner(recipe(True), backend)(t)


@needs_extension
def test_a_gradient_of_delta_is_refused():
    t = make(6, 5, 7, 3, (4,))
    mask = recipe(unit(1, 6).requires_grad_())
    with pytest.raises(UserError, match="computes no gradient of delta"):
        runner(mask, "cpu")(t)
