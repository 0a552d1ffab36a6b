"""A masked component layer with the authors' parameter names and forward signature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast import ops
from spd_fast.ops import MaskRecipe

__all__ = ["ComponentLinear"]


class ComponentLinear(nn.Module):
    """y = (x V ⊙ mask) U + δ · x Δᵀ + b (the paper, eq. 4), by the fused operation.

    Takes the place of the authors' ``LinearComponents``: the same constructor, parameters ``V``
    [d_in, C] and ``U`` [C, d_out] of the same initialisation (N(0, 1/d_in) and N(0, 1/C),
    variances), buffer ``bias``, ``weight`` and forward.

    Args:
        C: number of components. d_in, d_out: widths of the layer.
        bias: [d_out], not trained, or None.
        backend: who computes.
    """

    bias: Tensor | None

    def __init__(
        self,
        C: int,
        d_in: int,
        d_out: int,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if C < 1 or d_in < 1 or d_out < 1:
            raise ValueError(f"C, d_in and d_out must be at least 1, got {C}, {d_in} and {d_out}")
        self.C, self.d_in, self.d_out, self.backend = C, d_in, d_out, backend
        self.V = nn.Parameter(torch.randn(d_in, C) / d_in**0.5)
        self.U = nn.Parameter(torch.randn(C, d_out) / C**0.5)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """(V U)ᵀ [d_out, d_in], the components' sum."""
        return (self.V @ self.U).T

    def get_component_acts(self, x: Tensor) -> Tensor:
        """The inner activations x V [..., C]."""
        return x @ self.V

    def forward(
        self,
        x: Tensor,
        mask: Tensor | MaskRecipe | None = None,
        weight_delta_and_mask: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """y [..., d_out] of x [..., d_in].

        Args:
            mask: [..., C] (numbers or booleans; may broadcast), a recipe, or None for all ones.
            weight_delta_and_mask: Δ = W − (V U)ᵀ [d_out, d_in] and its mask δ [...]; gradients flow
                into both. A recipe holds its own δ: give Δ's weight with
                :func:`spd_fast.ops.component_linear` instead.

        Raises:
            ValueError: shapes that do not fit.
        """
        if isinstance(mask, Tensor):
            shape = (*x.shape[:-1], self.C)
            try:
                full = mask.to(x.dtype).expand(shape)
            except RuntimeError:
                raise ValueError(f"mask is {tuple(mask.shape)}, need {shape}") from None
            mask = MaskRecipe(source=full)
        y = ops.component_linear(
            x, self.V, self.U, mask or MaskRecipe(), bias=self.bias, backend=self.backend
        )
        if weight_delta_and_mask is None:
            return y
        delta, delta_mask = weight_delta_and_mask
        if delta.shape != (self.d_out, self.d_in) or delta_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"weight_delta_and_mask is {tuple(delta.shape)} and {tuple(delta_mask.shape)}, "
                f"need {(self.d_out, self.d_in)} and {tuple(x.shape[:-1])}"
            )
        return y + delta_mask[..., None] * F.linear(x, delta)

    def extra_repr(self) -> str:
        return f"C={self.C}, d_in={self.d_in}, d_out={self.d_out}, bias={self.bias is not None}"
