"""Reconstruction divergences D(masked, target)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spd_fast.errors import UserError
from spd_fast.ops._library import composite

__all__ = ["DivergenceKind", "divergence", "kl_divergence", "mse_divergence"]

DivergenceKind = Literal["mse", "kl"]


@composite("mse_divergence(Tensor prediction, Tensor target) -> Tensor")
def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target)


@composite("kl_divergence(Tensor prediction, Tensor target) -> Tensor")
def _kl(prediction: Tensor, target: Tensor) -> Tensor:
    # Softmax in float32 at least: bf16 log-probabilities lose the small differences that matter.
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    log_q = F.log_softmax(prediction.to(dtype), dim=-1)
    log_p = F.log_softmax(target.to(dtype), dim=-1)
    per_entry = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    positions = max(prediction[..., :1].numel(), 1)
    return per_entry.sum() / positions


def _check(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )


def mse_divergence(prediction: Tensor, target: Tensor) -> Tensor:
    """Σ (prediction − target)² / numel. Shapes equal; returns a scalar; NaN when empty."""
    _check(prediction, target)
    return _mse(prediction, target)


def kl_divergence(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of KL(softmax(target) ‖ softmax(prediction)), in nats, in float32.

    Both are logits [..., vocabulary]; returns a scalar, 0 when there are no positions.
    """
    _check(prediction, target)
    return _kl(prediction, target)


def divergence(prediction: Tensor, target: Tensor, kind: DivergenceKind) -> Tensor:
    """D of the reconstruction losses (the paper, eq. 6): ``mse`` or ``kl``."""
    if kind == "mse":
        return mse_divergence(prediction, target)
    if kind == "kl":
        return kl_divergence(prediction, target)
    raise UserError(f"unknown divergence {kind!r}; known: 'mse', 'kl'")
