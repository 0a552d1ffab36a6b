"""KL of a language model's head without its logits in memory: KL(t Wᵀ + b ‖ x Wᵀ + b).

    p = softmax(W t_n + b),  q = softmax(W x_n + b),   KL = mean_n Σ_v p_v (log p_v − log q_v)
    x̄_n = Wᵀ (q − p) / N

The head is not decomposed: it takes part on both sides, without a gradient. A fused backend makes
the logits of a few rows at a time, in the compute dtype, and x̄ with the loss, so that [N,
vocabulary] exists neither in float32 nor between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive
from spd_fast.ops.divergence import kl_reference

__all__ = ["linear_kl"]


@composite("linear_kl(Tensor prediction, Tensor target, Tensor head, Tensor? bias) -> Tensor")
def _reference(prediction: Tensor, target: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    return kl_reference(F.linear(prediction, head, bias), F.linear(target, head, bias))


@primitive(
    "linear_kl_forward(Tensor prediction, Tensor target, Tensor head, Tensor? bias, "
    "bool need_grad) -> (Tensor, Tensor?)"
)
def _(
    prediction: Tensor, target: Tensor, head: Tensor, bias: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    grad = prediction.new_empty(prediction.shape) if need_grad else None
    return prediction.new_empty((), dtype=torch.float32), grad


class _LinearKL(torch.autograd.Function):
    """Keeps x̄ [N, d] for an incoming gradient of one."""

    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, target: Tensor, head: Tensor, bias: Tensor | None
    ) -> Tensor:
        forward = _fused.kernel("linear_kl_forward", prediction)
        loss, grad = forward(prediction, target, head, bias, ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (unit,) = ctx.saved_tensors
        return None if unit is None else (unit * grad).to(unit.dtype), None, None, None


def _unsupported(
    backend: str, prediction: Tensor, target: Tensor, head: Tensor, bias: Tensor | None
) -> str | None:
    if torch.is_grad_enabled():
        named = {"target": target, "head": head, "bias": bias}
        for name, tensor in named.items():
            if tensor is not None and tensor.requires_grad:
                return f"it computes no gradient of the {name}"
    return _fused.unsupported_dtype(backend, prediction)


def linear_kl(
    prediction: Tensor,
    target: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean over positions of KL(softmax(target Wᵀ + b) ‖ softmax(prediction Wᵀ + b)), in nats.

    The softmax is in float32 at least. On a CPU every backend computes it with torch's own passes.

    Args:
        prediction: x [..., d], the head's input in the masked forward.
        target: t [..., d], likewise in the clean forward.
        head: W [vocabulary, d]. bias: b [vocabulary]. A fused backend gives neither a gradient.

    Returns:
        a scalar; 0 when there are no positions.

    Raises:
        ValueError: shapes that do not fit. UserError: backend.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    if head.ndim != 2 or prediction.ndim == 0 or head.shape[1] != prediction.shape[-1]:
        raise ValueError(
            f"head {tuple(head.shape)} does not fit prediction {tuple(prediction.shape)}: "
            "need [vocabulary, d] and [..., d]"
        )
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, need {tuple(head.shape[:1])}")
    chosen = _fused.resolve_on_gpu(
        backend,
        prediction,
        "linear_kl",
        lambda name: _unsupported(name, prediction, target, head, bias),
    )
    if chosen == "reference":
        return _reference(prediction, target, head, bias)
    _fused.load(chosen)
    x, t = (_fused.autocast(v.reshape(-1, v.shape[-1])) for v in (prediction, target))
    return _LinearKL.apply(x, t, head, bias)
