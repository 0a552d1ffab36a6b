"""Importance minimality (the paper, eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.losses.step import Step

__all__ = ["importance_minimality"]


def importance_minimality(step: Step) -> Tensor:
    """Σ over sites and components of the mean over positions of ψ(g⁺); ψ = (· + eps)^p.

    ψ was chosen when the importances were computed: here only its sums are read.
    """
    total = torch.stack([site.penalty_sum.sum() for site in step.importances.values()]).sum()
    return total / step.importances.positions
