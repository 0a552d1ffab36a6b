"""Steps on the toy network, and what their losses are by the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spd_fast.losses import Part, Step
from spd_fast.losses.step import DRAWN
from spd_fast.model import DecomposedModel
from spd_fast.ops import Penalty, make_key
from tests import oracle, toys

SEED, STEP = 5, 8
ROUTING_SITE = 2**32 - 1
X = toys.batch(1)
DIVERGENCES = {"mse": oracle.mse, "kl": oracle.kl}


def step(
    model: DecomposedModel,
    kind: str = "mse",
    draws: int = 1,
    x: Tensor = X,
    penalty: Penalty | None = None,
    **more: Any,
) -> Step:
    clean = model.clean_forward(x)
    importances = model.causal_importances(clean, penalty)
    return Step(model, x, clean, importances, make_key(SEED, STEP), kind, draws, **more)


def parts(model: DecomposedModel, count: int, x: Tensor = X, **more: Any) -> list[Step]:
    """The same step in ``count`` pieces along the first dimension."""
    rows_a_sample = x[0, ..., :1].numel()
    found, sample = [], 0
    for piece in x.tensor_split(count):
        part = Part(len(piece) / len(x), sample * rows_a_sample, sample)
        found.append(step(model, x=piece, **({"part": part} | more)))
        sample += len(piece)
    return found


def draw(loss: str, index: int = 0, draws: int = 1) -> int:
    return DRAWN.index(loss) * draws + index


def lower(model: DecomposedModel, x: Tensor = X) -> dict[str, Tensor]:
    return {name: g for name, (g, _) in toys.importances(model, x).items()}


def value(
    model: DecomposedModel,
    masks: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor] | None = None,
    routing: Mapping[str, Tensor] | None = None,
    kind: str = "mse",
) -> Tensor:
    """D with the sites of ``masks`` masked and W elsewhere."""
    linear = toys.masked(model, masks, deltas if model.delta else None, routing)
    return DIVERGENCES[kind](toys.by_hand(X, linear), model.target(X))


def uniform_k(model: DecomposedModel, draw: int, rows: range = range(9)) -> dict[str, Tensor]:
    """k = ⌊u₀ L⌋ + 1 sites with the lowest of u₁ … u_L, a position at a time."""
    names = list(model.sites)
    routed: dict[str, list[bool]] = {name: [] for name in names}
    for row in rows:
        u = [
            oracle.uniform(SEED, STEP, draw, ROUTING_SITE, row, column)
            for column in range(len(names) + 1)
        ]
        k = min(int(u[0] * len(names)), len(names) - 1) + 1
        chosen = sorted(range(len(names)), key=lambda i: u[i + 1])[:k]
        for i, name in enumerate(names):
            routed[name].append(i in chosen)
    return {name: torch.tensor(values) for name, values in routed.items()}
