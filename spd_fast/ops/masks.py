"""Mask recipes: what a mask is made of, instead of the mask.

A site's mask is m = g + (1 − g) ⊙ r and its weight-delta mask is δ (the paper, §2.3 and
appendix A.1). A :class:`MaskRecipe` holds the few things from which any kernel rebuilds the tile
of them that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spd_fast.ops._library import composite
from spd_fast.ops.random import RandomSource, uniform, uniform_column

__all__ = ["MaskRecipe", "component_source", "delta_source", "materialize_mask"]


@dataclass(frozen=True, eq=False)
class MaskRecipe:
    """The recipe of one site's masks over N positions.

    Attributes:
        lower: lower-leaky causal importances g [..., C]; None means g = 0.
        source: r: a :class:`RandomSource`, an explicit tensor [..., C], or None for r = 0
            (so m = g). With ``lower`` and ``source`` both None, m = 1.
        delta: δ of the weight delta: an explicit tensor [...], True to draw it from the random
            source's column C, or None where there is no delta component.
        routing: bool [...]; where False the position keeps the original weight. None: all routed.
    """

    lower: Tensor | None = None
    source: RandomSource | Tensor | None = None
    delta: Tensor | bool | None = None
    routing: Tensor | None = None

    def __post_init__(self) -> None:
        if self.delta is True and not isinstance(self.source, RandomSource):
            raise ValueError("delta=True draws from the recipe's RandomSource, but it has none")

    @property
    def random(self) -> RandomSource | None:
        return self.source if isinstance(self.source, RandomSource) else None

    @property
    def needs_weight(self) -> bool:
        """Whether the site's original weight takes part in the masked output."""
        return self.routing is not None or (self.delta is not None and self.delta is not False)

    def passed(self, components: int, positions: torch.Size, dtype: torch.dtype) -> Tensor:
        """δ̃ [...] of a recipe that needs the weight: δ where routed, else 1."""
        delta: Tensor | None = None
        if isinstance(self.source, RandomSource) and self.delta is True:
            rows = positions.numel()
            delta = delta_source(self.source, rows, components, dtype).reshape(positions)
        elif isinstance(self.delta, Tensor):
            delta = self.delta
        if self.routing is None:
            assert delta is not None
            return delta
        one = torch.ones((), dtype=dtype, device=self.routing.device)
        return torch.where(self.routing, torch.zeros_like(one) if delta is None else delta, one)


def component_source(
    source: RandomSource, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """r [rows, columns] of a random source: u, or u ≥ ½ when it is binomial."""
    u = uniform(source, rows, columns, dtype)
    return (u >= 0.5).to(dtype) if source.binomial else u


def delta_source(
    source: RandomSource, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """δ [rows] of a random source: its column C, continuous even when the source is binomial."""
    return uniform_column(source, rows, columns, dtype)


def materialize_mask(
    recipe: MaskRecipe,
    rows: int,
    components: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """The masks a recipe stands for: (m [rows, C], δ [rows] or None).

    For looking at and for tests: no kernel calls it. ``routing`` is not applied: it selects the
    positions at which the masks are used at all.
    """
    lower = None if recipe.lower is None else recipe.lower.reshape(rows, components)
    if isinstance(recipe.source, RandomSource):
        r = component_source(recipe.source, rows, components, dtype)
    elif recipe.source is not None:
        r = recipe.source.reshape(rows, components)
    else:
        r = None
    if lower is None:
        mask = torch.ones(rows, components, dtype=dtype, device=device) if r is None else r
    else:
        mask = lower if r is None else lower + (1 - lower) * r
    if recipe.delta is None or recipe.delta is False:
        return mask, None
    if recipe.delta is True:
        assert isinstance(recipe.source, RandomSource)
        return mask, delta_source(recipe.source, rows, components, dtype)
    return mask, recipe.delta.reshape(rows)


@composite(
    "materialize_mask(Tensor lower, Tensor key, int draw, int site, int row_offset, bool binomial) "
    "-> (Tensor, Tensor)"
)
def _reference(
    lower: Tensor, key: Tensor, draw: int, site: int, row_offset: int, binomial: bool
) -> tuple[Tensor, Tensor]:
    """(m [N, C], δ [N]) of the recipe that training uses."""
    recipe = MaskRecipe(lower, RandomSource(key, draw, site, row_offset, binomial), delta=True)
    mask, delta = materialize_mask(recipe, lower.shape[0], lower.shape[1], lower.dtype)
    assert delta is not None
    return mask, delta
