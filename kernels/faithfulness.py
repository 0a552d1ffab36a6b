"""Faithfulness ‖W − (V U)ᵀ‖²: library products around one transient of W's size.

Arithmetic is 2 · C · d_in · d_out flops against 4 · d_in · d_out bytes a trip: above C = 370 the
trips cost less than 1 % of an fp32 product, so a kernel of its own would only save two launches.
An active autocast has no say: the sum of squares of a small Δ would lose its digits in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.kernels.product import as_given


def _residual(V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
    """Δᵀ = Wᵀ − V U [d_in, d_out]."""
    return torch.addmm(weight.t().to(V.dtype), V, U, alpha=-1)


def faithfulness_forward(V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
    with as_given(V):
        return _residual(V, U, weight).square_().sum()


def faithfulness_backward(
    grad: Tensor, V: Tensor, U: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    with as_given(V):
        residual = _residual(V, U, weight) * (-2 * grad)
        return residual @ U.t(), V.t() @ residual
