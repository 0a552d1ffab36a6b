"""Faithfulness: the components sum to the target's weights (the paper, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.losses.step import Step
from spd_fast.model import DecomposedModel

__all__ = ["faithfulness", "faithfulness_loss"]


def faithfulness(model: DecomposedModel) -> Tensor:
    """Σ_sites ‖W − (V U)ᵀ‖² / Σ_sites numel(W), over the decomposed sites."""
    numel = sum(site.weight.numel() for site in model.sites.values())
    return torch.stack(list(model.faithfulness().values())).sum() / numel


def faithfulness_loss(step: Step) -> Tensor:
    return faithfulness(step.model)
