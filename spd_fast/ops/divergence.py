"""Reconstruction divergences D(masked, target)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast.errors import UserError
from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive

__all__ = ["DivergenceKind", "divergence", "kl_divergence", "kl_reference", "mse_divergence"]

DivergenceKind = Literal["mse", "kl"]


@composite("mse_divergence(Tensor prediction, Tensor target) -> Tensor")
def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target)


@composite("kl_divergence(Tensor prediction, Tensor target) -> Tensor")
def kl_reference(prediction: Tensor, target: Tensor) -> Tensor:
    """The mathematics of :func:`kl_divergence`."""
    # Softmax in float32 at least: bf16 log-probabilities lose the small differences that matter.
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    log_q = F.log_softmax(prediction.to(dtype), dim=-1)
    log_p = F.log_softmax(target.to(dtype), dim=-1)
    per_entry = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    positions = max(prediction[..., :1].numel(), 1)
    return per_entry.sum() / positions


def _scalar(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.float32)


@primitive("mse_divergence_forward(Tensor prediction, Tensor target) -> Tensor")
def _(prediction: Tensor, target: Tensor) -> Tensor:
    return _scalar(prediction)


@primitive("mse_divergence_backward(Tensor grad, Tensor prediction, Tensor target) -> Tensor")
def _(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape)


@primitive("kl_divergence_forward(Tensor prediction, Tensor target) -> (Tensor, Tensor, Tensor)")
def _(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = prediction.shape[:-1].numel()
    norm = prediction.new_empty(rows, 2, dtype=torch.float32)
    return _scalar(prediction), norm, torch.empty_like(norm)


@primitive(
    "kl_divergence_backward(Tensor grad, Tensor prediction, Tensor target, Tensor norm_prediction, "
    "Tensor norm_target) -> Tensor"
)
def _(grad: Tensor, prediction: Tensor, *_: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape)


class _FusedMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, target)
        return _fused.kernel("mse_divergence_forward", prediction)(prediction, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        backward = _fused.kernel("mse_divergence_backward", grad)
        return backward(grad, *ctx.saved_tensors), None


class _FusedKL(torch.autograd.Function):
    """Keeps four numbers a position beside its inputs: of each, the maximum and log Z below it."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        forward = _fused.kernel("kl_divergence_forward", prediction)
        loss, norm_prediction, norm_target = forward(prediction, target)
        ctx.save_for_backward(prediction, target, norm_prediction, norm_target)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        backward = _fused.kernel("kl_divergence_backward", grad)
        return backward(grad, *ctx.saved_tensors), None


def _unsupported(backend: str, prediction: Tensor, target: Tensor) -> str | None:
    if target.requires_grad and torch.is_grad_enabled():
        return "it computes no gradient of the target"
    return _fused.unsupported_dtype(backend, prediction)


def _backend(backend: str | None, prediction: Tensor, target: Tensor) -> str:
    return _fused.resolve_on_gpu(
        backend, prediction, "divergence", lambda name: _unsupported(name, prediction, target)
    )


def _check(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )


def mse_divergence(prediction: Tensor, target: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ (prediction − target)² / numel. Shapes equal; returns a scalar; NaN when empty."""
    _check(prediction, target)
    chosen = _backend(backend, prediction, target)
    if chosen == "reference":
        return _mse(prediction, target)
    _fused.load(chosen)
    return _FusedMSE.apply(prediction, target)


def kl_divergence(prediction: Tensor, target: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean over positions of KL(softmax(target) ‖ softmax(prediction)), in nats, in float32.

    Both are logits [..., vocabulary]; returns a scalar, 0 when there are no positions. −∞ in the
    prediction alone makes it ∞. A row with a NaN or ∞, or with nothing but −∞, has no softmax: the
    value and that row's gradient are NaN. Where the target is −∞, torch's passes make it NaN too,
    the Triton kernel counts 0 log 0 = 0.
    """
    _check(prediction, target)
    chosen = _backend(backend, prediction, target)
    if chosen == "reference":
        return kl_reference(prediction, target)
    _fused.load(chosen)
    return _FusedKL.apply(prediction, target)


def divergence(
    prediction: Tensor, target: Tensor, kind: DivergenceKind, *, backend: str | None = None
) -> Tensor:
    """D of the reconstruction losses (the paper, eq. 6): ``mse`` or ``kl``."""
    if kind == "mse":
        return mse_divergence(prediction, target, backend=backend)
    if kind == "kl":
        return kl_divergence(prediction, target, backend=backend)
    raise UserError(f"unknown divergence {kind!r}; known: 'mse', 'kl'")
