"""Subset routing: at which positions which sites are masked (the authors' 2026 code).

Where a position is not routed, the site keeps its original weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spd_fast.errors import UserError
from spd_fast.ops.random import RandomSource, uniform

__all__ = ["ROUTING_SITE", "Routing", "draw_routing"]

# The site word of the random counter from which routings are drawn: no site has it.
ROUTING_SITE = 2**32 - 1


@dataclass(frozen=True)
class Routing:
    """``uniform_k``: per position k ~ U{1..L}, then a random k-subset of the L sites.
    ``static_probability``: every site by itself with ``probability``."""

    kind: Literal["uniform_k", "static_probability"] = "uniform_k"
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("uniform_k", "static_probability"):
            raise UserError(
                f"unknown routing {self.kind!r}; known: 'uniform_k', 'static_probability'"
            )


def draw_routing(
    routing: Routing,
    shapes: Mapping[str, Sequence[int]],
    key: Tensor,
    draw: int,
    row_offset: int = 0,
) -> dict[str, Tensor]:
    """Site → bool [...], from the counter-based source: a function of (key, draw, global row).

    Column 0 of the row decides k, columns 1..L are the sites' scores: the k lowest are routed.

    Args:
        shapes: site → its positions' shape; all of the same number of positions.

    Raises:
        UserError: sites with different numbers of positions.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    rows = next(iter(sizes.values()))
    if odd := [name for name, size in sizes.items() if size != rows]:
        raise UserError(
            f"subset routing needs the same positions at every site, but {odd[0]!r} has "
            f"{sizes[odd[0]]} and {next(iter(sizes))!r} has {rows}"
        )
    count = len(shapes)
    source = RandomSource(key, draw, ROUTING_SITE, row_offset)
    u = uniform(source, rows, count + 1)
    scores = u[:, 1:]
    if routing.kind == "static_probability":
        routed = scores < routing.probability
    else:
        # u < 1 has 24 bits and the product is rounded: the largest may reach L itself.
        k = (u[:, :1] * count).floor().clamp(max=count - 1) + 1
        rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
        routed = rank < k
    return {
        name: routed[:, i].contiguous().reshape(torch.Size(shape))
        for i, (name, shape) in enumerate(shapes.items())
    }
