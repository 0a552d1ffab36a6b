"""Reconstruction without random sources: m = g or m = 1, no weight delta."""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.losses.step import Step
from spd_fast.model import CIMask, Ones

__all__ = [
    "ci_masked_recon",
    "ci_masked_recon_layerwise",
    "ci_masked_recon_subset",
    "unmasked_recon",
]


def ci_masked_recon(step: Step) -> Tensor:
    """D with every site masked by its importances, m = g."""
    return step.reconstruction(CIMask(step.importances))


def ci_masked_recon_layerwise(step: Step) -> Tensor:
    """Mean over sites of D with that site alone masked by its importances."""
    masking = CIMask(step.importances)
    return torch.stack([step.reconstruction(masking, [name]) for name in step.model.sites]).mean()


def ci_masked_recon_subset(step: Step) -> Tensor:
    """Mean over S routings of D with the routed sites masked by their importances."""
    name = "ci_masked_recon_subset"
    losses = [
        step.reconstruction(CIMask(step.importances, routing=step.routing(name, index)))
        for index in range(step.draws)
    ]
    return torch.stack(losses).mean()


def unmasked_recon(step: Step) -> Tensor:
    """D of the components alone, m = 1."""
    return step.reconstruction(Ones())
