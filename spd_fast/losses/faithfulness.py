"""Faithfulness: the components sum to the target's weights (the paper, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.losses.step import Step
from spd_fast.model import DecomposedModel

__all__ = [
    "faithfulness",
    "faithfulness_loss",
    "relative_faithfulness",
    "relative_faithfulness_loss",
]


def faithfulness(model: DecomposedModel) -> Tensor:
    """Σ_sites ‖W − (V U)ᵀ‖² / Σ_sites numel(W), over the decomposed sites."""
    numel = sum(site.weight.numel() for site in model.sites.values())
    return torch.stack(list(model.faithfulness().values())).sum() / numel


def relative_faithfulness(model: DecomposedModel) -> Tensor:
    """Mean over the decomposed sites of ‖W − (V U)ᵀ‖² / ‖W‖² (VPD)."""
    errors = model.faithfulness()
    return torch.stack([e / model.sites[n].weight.square().sum() for n, e in errors.items()]).mean()


def faithfulness_loss(step: Step) -> Tensor:
    return faithfulness(step.model)


def relative_faithfulness_loss(step: Step) -> Tensor:
    return relative_faithfulness(step.model)
