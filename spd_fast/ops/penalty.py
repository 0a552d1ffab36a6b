"""Penalty sums: the only thing that importance minimality needs of the importances.

S_c = Σ_n ψ(g⁺_nc). Every published penalty is a function of these C numbers: L_p with
ψ(g) = (g + eps)^p (the paper, eq. 9), and the smooth L0 of VPD with ψ(g) = g² / (g² + γ²).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spd_fast.errors import UserError
from spd_fast.ops._library import composite

__all__ = ["Penalty", "PenaltyKind", "penalty_sums"]

PenaltyKind = Literal["none", "lp", "smooth_l0"]


@dataclass(frozen=True)
class Penalty:
    """ψ. ``power`` is p of ``lp`` and γ of ``smooth_l0``; ``eps`` is used by ``lp`` only."""

    kind: PenaltyKind = "none"
    power: float = 1.0
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.kind not in ("none", "lp", "smooth_l0"):
            raise UserError(f"unknown penalty {self.kind!r}; known: 'none', 'lp', 'smooth_l0'")
        if self.kind != "none" and not self.power > 0:
            raise UserError(f"penalty {self.kind!r} needs a power above 0, got {self.power}")


@composite("penalty_sums(Tensor upper, str kind, float power, float eps) -> Tensor")
def _reference(upper: Tensor, kind: PenaltyKind, power: float, eps: float) -> Tensor:
    return penalty_sums(upper, Penalty(kind, power, eps))


def penalty_sums(upper: Tensor, penalty: Penalty) -> Tensor:
    """S [C] = Σ over positions of ψ(upper [N, C])."""
    if penalty.kind == "none":
        return upper.new_zeros(upper.shape[-1])
    if penalty.kind == "lp":
        psi = upper + penalty.eps if penalty.power == 1 else (upper + penalty.eps) ** penalty.power
    else:
        squared = upper * upper
        psi = squared / (squared + penalty.power**2)
    return psi.sum(dim=0)
