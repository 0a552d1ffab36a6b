"""Mask recipes against explicit masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from spd_fast.ops import MaskRecipe, RandomSource, make_key, materialize_mask
from tests import oracle
from tests.checks import LAYOUTS, strided, unit

N, C = 5, 6
SEED, STEP, DRAW, SITE, OFFSET = 3, 4, 5, 6, 7
LOWER, SOURCE, DELTA = unit(1, N, C), unit(2, N, C), unit(3, N)


def random_source(binomial: bool = False) -> RandomSource:
    return RandomSource(make_key(SEED, STEP), DRAW, SITE, OFFSET, binomial)


def drawn(columns: range) -> torch.Tensor:
    return oracle.uniforms(SEED, STEP, DRAW, SITE, range(OFFSET, OFFSET + N), columns)


def materialize(recipe: MaskRecipe) -> tuple[torch.Tensor, torch.Tensor | None]:
    return materialize_mask(recipe, N, C, torch.float64)


@pytest.mark.parametrize(
    ("lower", "source"), [(None, None), (LOWER, None), (None, SOURCE), (LOWER, SOURCE)]
)
def test_given_parts_make_the_mask_of_the_formula(lower, source):
    mask, delta = materialize(MaskRecipe(lower, source))
    torch.testing.assert_close(mask, oracle.mask(lower, source, (N, C)), rtol=1e-15, atol=0)
    assert delta is None


@pytest.mark.parametrize("lower", [None, LOWER])
def test_random_source_is_drawn_from_the_key(lower):
    mask, _ = materialize(MaskRecipe(lower, random_source()))
    expected = oracle.mask(lower, drawn(range(C)), (N, C))
    torch.testing.assert_close(mask, expected, rtol=1e-15, atol=0)


def test_binomial_source_is_zero_or_one():
    mask, _ = materialize(MaskRecipe(None, random_source(binomial=True)))
    assert torch.equal(mask, (drawn(range(C)) >= 0.5).double())
    assert set(mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("binomial", [False, True])
def test_delta_mask_is_the_continuous_column_after_the_last_component(binomial):
    _, delta = materialize(MaskRecipe(LOWER, random_source(binomial), delta=True))
    assert torch.equal(delta, drawn(range(C, C + 1))[:, 0])


def test_delta_does_not_change_the_component_masks():
    with_delta, _ = materialize(MaskRecipe(LOWER, random_source(), delta=True))
    without, _ = materialize(MaskRecipe(LOWER, random_source()))
    assert torch.equal(with_delta, without)


def test_given_delta_is_kept():
    _, delta = materialize(MaskRecipe(LOWER, None, delta=DELTA))
    assert torch.equal(delta, DELTA)


@pytest.mark.parametrize("delta", [None, False])
def test_no_delta_is_none(delta):
    assert materialize(MaskRecipe(LOWER, random_source(), delta=delta))[1] is None


def test_routing_does_not_change_the_masks():
    routing = torch.tensor([True, False, True, False, False])
    routed, _ = materialize(MaskRecipe(LOWER, random_source(), routing=routing))
    assert torch.equal(routed, materialize(MaskRecipe(LOWER, random_source()))[0])


def test_tiles_of_rows_see_the_same_mask():
    whole, whole_delta = materialize(MaskRecipe(LOWER, random_source(), delta=True))
    part = RandomSource(make_key(SEED, STEP), DRAW, SITE, OFFSET + 2)
    recipe = MaskRecipe(LOWER[2:], part, delta=True)
    mask, delta = materialize_mask(recipe, N - 2, C, torch.float64)
    assert torch.equal(mask, whole[2:])
    assert torch.equal(delta, whole_delta[2:])


@given(g=st.floats(0, 1, width=32), seed=st.integers(0, 2**32 - 1), binomial=st.booleans())
def test_masks_lie_between_the_importance_and_one(g, seed, binomial):
    lower = torch.full((3, 5), g)
    recipe = MaskRecipe(lower, RandomSource(make_key(seed, 0), binomial=binomial))
    mask, _ = materialize_mask(recipe, 3, 5)
    assert ((mask >= lower) & (mask <= 1)).all()


def test_an_importance_of_one_leaves_nothing_to_chance():
    mask, _ = materialize(MaskRecipe(torch.ones(N, C).double(), random_source()))
    assert (mask == 1).all()


def test_sequence_shaped_parts_are_flattened_to_rows():
    lower = unit(1, 2, 3, C)
    recipe = MaskRecipe(lower, random_source(), delta=unit(2, 2, 3))
    mask, delta = materialize_mask(recipe, 6, C, torch.float64)
    flat = MaskRecipe(lower.reshape(6, C), random_source())
    assert torch.equal(mask, materialize_mask(flat, 6, C, torch.float64)[0])
    assert delta.shape == (6,)


def test_no_rows_give_an_empty_mask():
    mask, delta = materialize_mask(MaskRecipe(None, random_source(), delta=True), 0, C)
    assert mask.shape == (0, C)
    assert delta.shape == (0,)


def test_drawing_a_delta_needs_a_random_source():
    with pytest.raises(ValueError, match="delta=True draws from the recipe's RandomSource"):
        MaskRecipe(LOWER, SOURCE, delta=True)


@pytest.mark.parametrize(
    ("recipe", "needed"),
    [
        (MaskRecipe(LOWER, random_source()), False),
        (MaskRecipe(LOWER, random_source(), delta=False), False),
        (MaskRecipe(LOWER, random_source(), delta=True), True),
        (MaskRecipe(LOWER, None, delta=DELTA), True),
        (MaskRecipe(LOWER, routing=torch.ones(N, dtype=torch.bool)), True),
    ],
)
def test_the_weight_is_needed_with_a_delta_or_routing_only(recipe, needed):
    assert recipe.needs_weight is needed


def test_gradients_go_through_the_materialized_mask():
    lower, source, delta = (t.clone().requires_grad_() for t in (LOWER, SOURCE, DELTA))
    assert torch.autograd.gradcheck(
        lambda *parts: materialize(MaskRecipe(*parts)), (lower, source, delta)
    )
    assert torch.autograd.gradcheck(
        lambda g: materialize(MaskRecipe(g, random_source(), delta=True))[0], lower
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    parts = (LAYOUTS[layout](LOWER), LAYOUTS[layout](SOURCE), strided(DELTA))
    changed = MaskRecipe(*parts)
    for got, expected in zip(
        materialize(changed), materialize(MaskRecipe(LOWER, SOURCE, DELTA)), strict=True
    ):
        assert torch.equal(got, expected)


def test_expanded_importances_are_their_copies():
    row = LOWER[:1].expand(N, C)
    got, _ = materialize(MaskRecipe(row, random_source()))
    assert torch.equal(got, materialize(MaskRecipe(row.contiguous(), random_source()))[0])


def test_compiled_is_eager():
    def both(lower):
        return materialize(MaskRecipe(lower, random_source(), delta=True))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(LOWER), both(LOWER), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("binomial", [False, True])
def test_opcheck(binomial):
    arguments = (LOWER.clone().requires_grad_(), make_key(SEED, STEP), DRAW, SITE, OFFSET, binomial)
    operation = torch.ops.spd_fast.materialize_mask.default
    library.opcheck(operation, arguments)
    expected = materialize(MaskRecipe(LOWER, random_source(binomial), delta=True))
    for got, value in zip(operation(*arguments), expected, strict=True):
        assert torch.equal(got, value)
