"""The masked embedding against the masked linear layer of one-hot rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd_fast.ops import MaskRecipe, RandomSource, component_embedding, embedding_inner, make_key
from tests.checks import assert_matches_oracle, normal
from tests.ops import test_component_linear as cases

ROWS, VOCABULARY, C, WIDTH = 9, 5, 7, 3


def make_inputs(
    kind: cases.Kind, rows: int = ROWS, vocabulary: int = VOCABULARY, C: int = C, d: int = WIDTH
) -> dict[str, Tensor]:
    t = cases.make_inputs(kind, rows, vocabulary, C, d)
    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, **{k: v for k, v in t.items() if k not in ("x", "bias")}}


def runner(
    kind: cases.Kind, backend: str | None, given_inner: bool = False
) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        inner = embedding_inner(t["tokens"], t["V"], backend=backend) if given_inner else None
        recipe = cases.recipe_of(kind, {**t, "x": t["V"]})
        y = component_embedding(
            t["tokens"], t["V"], t["U"], recipe, weight=t["weight"].T, inner=inner,
            backend=backend,
        )  # fmt: skip
        return {"y": y}

    return run


def truth(kind: cases.Kind) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        one_hot = torch.nn.functional.one_hot(t["tokens"], t["V"].shape[0]).to(t["V"].dtype)
        return cases.truth(kind)({**t, "x": one_hot, "bias": None})

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given_inner", [False, True])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_output_and_gradients_are_the_oracles(kind, given_inner, dtype, backend):
    kind = cases.KINDS[kind]
    assert_matches_oracle(
        runner(kind, backend, given_inner), truth(kind), make_inputs(kind), cases.incoming(), dtype
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 50, 3, 17)])
def test_odd_sizes_are_the_oracles(shape, backend):
    assert_matches_oracle(
        runner(cases.FULL, backend), truth(cases.FULL), make_inputs(cases.FULL, *shape),
        cases.incoming(shape[0], shape[3]), torch.float64,
    )  # fmt: skip


def test_sequences_of_tokens_are_rows(backend):
    t = make_inputs(cases.FULL, rows=6)
    flat = runner(cases.FULL, backend)(t)["y"]
    shaped = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in t.items()
              if k in ("tokens", "lower", "routing")}  # fmt: skip
    y = runner(cases.FULL, backend)({**t, **shaped})["y"]
    assert torch.equal(y.reshape(6, WIDTH), flat)


def test_gradcheck(backend):
    t = make_inputs(cases.GIVEN, rows=4)
    names = ("V", "U", "lower", "source", "delta")

    def run(*tensors: Tensor) -> Tensor:
        return runner(cases.GIVEN, backend)({**t, **dict(zip(names, tensors, strict=True))})["y"]

    assert torch.autograd.gradcheck(run, [t[n].requires_grad_() for n in names])


def test_without_delta_or_routing_the_weight_is_not_needed():
    t = make_inputs(cases.KINDS["stochastic"])
    source = RandomSource(make_key(1, 2))
    y = component_embedding(t["tokens"], t["V"], t["U"], MaskRecipe(t["lower"], source))
    assert y.shape == (ROWS, WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(9)}, "tokens are torch.float32"),
        ({"U": torch.zeros(6, 3)}, r"V \(5, 7\) and U \(6, 3\) do not share C \(site 'wte'\)"),
        ({"weight": torch.zeros(3, 5)}, r"weight is \(3, 5\), need \(5, 3\) \(site 'wte'\)"),
        ({"weight": None}, r"needs the weight \(site 'wte'\)"),
        ({"lower": torch.zeros(9, 8)}, r"mask.lower is \(9, 8\), need \(9, 7\) \(site 'wte'\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    t = {
        "tokens": torch.zeros(9, dtype=torch.int64), "V": torch.zeros(5, 7),
        "U": torch.zeros(7, 3), "weight": torch.zeros(5, 3), "lower": torch.zeros(9, 7), **change,
    }  # fmt: skip
    mask = MaskRecipe(t["lower"], delta=torch.zeros(9))
    with pytest.raises(ValueError, match=message):
        component_embedding(t["tokens"], t["V"], t["U"], mask, weight=t["weight"], site_name="wte")


def test_the_target_is_what_unrouted_positions_keep():
    weight = normal(1, 5, 3)
    tokens = torch.tensor([4, 0, 4])
    mask = MaskRecipe(routing=torch.zeros(3, dtype=torch.bool))
    y = component_embedding(tokens, normal(2, 5, 7), normal(3, 7, 3), mask, weight=weight)
    assert torch.equal(y, weight[tokens])
