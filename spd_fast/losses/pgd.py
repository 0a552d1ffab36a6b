"""Reconstruction under adversarial sources (the authors' 2026 code)."""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.losses.adversary import find_sources, variants
from spd_fast.losses.step import Step

__all__ = ["pgd_recon", "pgd_recon_layerwise", "pgd_recon_subset"]


def _pgd(step: Step, loss: str) -> Tensor:
    found = step.sources.get(loss) or find_sources(loss, lambda: [step])
    losses = [
        step.reconstruction(sources.masking(step.importances, routing), sites)
        for sources, (sites, routing) in zip(found, variants(loss, step), strict=True)
    ]
    return torch.stack(losses).mean()


def pgd_recon(step: Step) -> Tensor:
    """D with every site masked, m = g + (1 − g) r for the r found by
    :func:`~spd_fast.losses.adversary.find_sources`."""
    return _pgd(step, "pgd_recon")


def pgd_recon_layerwise(step: Step) -> Tensor:
    """Mean over sites of D with that site alone masked, each against its own adversary."""
    return _pgd(step, "pgd_recon_layerwise")


def pgd_recon_subset(step: Step) -> Tensor:
    """D with a random subset of sites masked per position; the subset is drawn once and the
    adversary knows it."""
    return _pgd(step, "pgd_recon_subset")
