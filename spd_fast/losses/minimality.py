"""Importance minimality (the paper, eq. 9; the frequency term of the authors' 2026 code; the
smooth L0 of VPD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spd_fast.losses.step import Step

__all__ = ["Frequency", "importance_minimality"]


@dataclass(frozen=True)
class Frequency:
    """The frequency term: ``beta`` · Σ_c f_c log2(1 + a f_c); ``scale`` is a, None for the number
    of positions of the whole batch (over all accumulation steps)."""

    beta: float
    scale: float | None = None


def importance_minimality(step: Step) -> Tensor:
    """Σ over sites and components of f_c (1 + β log2(1 + a f_c)), f_c = mean of ψ(g⁺) over
    positions.

    ψ = (· + eps)^p or g² / (g² + γ²) was chosen when the importances were computed: here only its
    sums S_c = N f_c are read. With a frequency term the loss is no sum over positions: a part of
    the batch gives the value of the whole, with the gradient of its own positions.
    """
    frequency = step.options.get("importance_minimality")
    positions = step.importances.positions
    if not isinstance(frequency, Frequency) or frequency.beta == 0:
        total = torch.stack([s.penalty_sum.sum() for s in step.importances.values()]).sum()
        return total / positions
    share, totals = step.part.share, step.part.penalty_totals
    n = round(positions / share)
    a = n if frequency.scale is None else frequency.scale
    terms = []
    for name, site in step.importances.items():
        S = site.penalty_sum
        if totals is not None:
            S = totals[name] + (S - S.detach()) / share
        f = S / n
        terms.append((f * (1 + frequency.beta * torch.log2(1 + a * f))).sum())
    return torch.stack(terms).sum()
