"""Binomial sampling (the authors' 2026 code): what goes with sources in {0, 1}."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spd_fast.losses.step import DRAWN
from spd_fast.model import Importances, Site
from spd_fast.ops.random import RandomSource, uniform
from spd_fast.ops.sigmoids import lower_importance

__all__ = ["jittered"]


def jittered(
    importances: Importances,
    sites: Mapping[str, Site],
    key: Tensor,
    draws: int,
    row_offset: int = 0,
) -> Importances:
    """g = lower(1.05 s − 0.05 u), u ~ U(0, 1) per (position, component), once a step.

    u is drawn after all losses' draws. The logits are formed whole: no fused kernel knows this.
    """
    found = {}
    for name, site in importances.items():
        s = site.logits
        source = RandomSource(key, len(DRAWN) * draws, sites[name].index, row_offset)
        u = uniform(source, site.positions, s.shape[-1], s.dtype).reshape(s.shape)
        found[name] = site.with_lower(lower_importance(1.05 * s - 0.05 * u, site.sigmoid))
    return Importances(found)
