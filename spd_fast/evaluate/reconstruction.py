"""Reconstruction of the target's output under each way of masking."""

from __future__ import annotations

import math
from typing import Any

import torch

from spd_fast.model import CIMask, DecomposedModel, Given, Masking, Ones, Stochastic
from spd_fast.ops import make_key
from spd_fast.ops.divergence import DivergenceKind, divergence

__all__ = ["importance_l0", "reconstruction"]

ROUND_AT = 0.5


@torch.no_grad()
def reconstruction(
    model: DecomposedModel, batch: Any, kind: DivergenceKind, seed: int
) -> dict[str, float]:
    """D(masked output, target output) for stochastic, CI, rounded (g > 0.5), unmasked and
    all-zero masks."""
    clean = model.clean_forward(batch)
    importances = model.causal_importances(clean)
    zeros = {name: torch.zeros_like(site.lower) for name, site in importances.items()}
    # Evaluation keys live at the end of the 32-bit step range, which no training reaches.
    key = make_key(seed, 2**32 - 1, clean.output.device)
    maskings: dict[str, Masking] = {
        "stochastic": Stochastic(importances, key, delta=model.delta),
        "ci": CIMask(importances),
        "rounded": CIMask(importances, threshold=ROUND_AT),
        "unmasked": Ones(),
        "zero": Given(zeros),
    }
    return {
        name: divergence(model.masked_forward(batch, masking), clean.output, kind).item()
        for name, masking in maskings.items()
    }


@torch.no_grad()
def importance_l0(model: DecomposedModel, batch: Any, threshold: float) -> dict[str, float]:
    """Site → mean number of components per position whose lower importance exceeds
    ``threshold``."""
    clean = model.clean_forward(batch)
    seen = (math.prod(s.positions(clean.inputs.held[n])) for n, s in model.sites.items())
    positions = max(*seen, 1)
    counts = model.active_counts(clean, threshold)
    return {n: (c.sum() / positions).item() for n, c in counts.items()}
