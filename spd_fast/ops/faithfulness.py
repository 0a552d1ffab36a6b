"""Faithfulness of one site: ‖W − (V U)ᵀ‖² (the paper, eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast import backends
from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive

__all__ = ["faithfulness", "weight_delta"]


def weight_delta(V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
    """Δ = W − (V U)ᵀ [d_out, d_in], formed whole: for inspection."""
    return weight - (V @ U).T


@composite("faithfulness(Tensor V, Tensor U, Tensor weight) -> Tensor")
def _reference(V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
    return weight_delta(V, U, weight).square().sum()


@primitive("faithfulness_forward(Tensor V, Tensor U, Tensor weight) -> Tensor")
def _(V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
    return V.new_empty(())


@primitive(
    "faithfulness_backward(Tensor grad, Tensor V, Tensor U, Tensor weight) -> (Tensor, Tensor)"
)
def _(grad: Tensor, V: Tensor, U: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return V.new_empty(V.shape), U.new_empty(U.shape)


class _Faithfulness(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(V, U, weight)
        return _fused.kernel("faithfulness_forward", V)(V, U, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        backward = _fused.kernel("faithfulness_backward", grad)
        return (*backward(grad, *ctx.saved_tensors), None)


def faithfulness(V: Tensor, U: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Σ (W − (V U)ᵀ)², a scalar.

    Args:
        V: [d_in, C]. U: [C, d_out]. weight: [d_out, d_in], without gradient.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if (
        (V.ndim, U.ndim) != (2, 2)
        or V.shape[1] != U.shape[0]
        or weight.shape != (U.shape[1], V.shape[0])
    ):
        raise ValueError(
            f"V {tuple(V.shape)}, U {tuple(U.shape)} and weight {tuple(weight.shape)} do not fit: "
            "need V [d_in, C], U [C, d_out], weight [d_out, d_in]"
        )
    chosen = backends.resolve(
        backend,
        V.device,
        "faithfulness",
        lambda name: _fused.unsupported_weight(weight) or _fused.unsupported_dtype(name, V),
    )
    if chosen == "reference":
        return _reference(V, U, weight)
    _fused.load(chosen)
    return _fused.differentiable(chosen, "faithfulness", V, _Faithfulness)(V, U, weight)
