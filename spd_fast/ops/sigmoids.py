"""Leaky hard sigmoids: the pair that turns a gate's logit into causal importances.

The *lower* importance makes masks, the *upper* one is what importance minimality penalises; they
differ only in where they leak a gradient (the paper, §2.4 and appendix A.2).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from spd_fast.errors import UserError, nearest
from spd_fast.ops._library import composite

__all__ = ["SIGMOIDS", "SigmoidKind", "check_sigmoid", "lower_importance", "upper_importance"]

SigmoidKind = Literal["paper", "2026", "hard", "normal"]
SIGMOIDS: tuple[SigmoidKind, ...] = ("paper", "2026", "hard", "normal")
LEAK = 0.01


def check_sigmoid(kind: str) -> None:
    """Raise UserError for an unknown kind."""
    if kind not in SIGMOIDS:
        raise UserError(f"unknown sigmoid {kind!r}; nearest: {nearest(kind, SIGMOIDS)}")


class _LowerLeaky2026(torch.autograd.Function):
    """clamp(s, 0, 1) whose backward leaks below zero only towards larger importances."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        ctx.save_for_backward(s)
        return s.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        below = torch.where(grad < 0, LEAK * grad, torch.zeros_like(grad))
        inside = torch.where(s <= 1, grad, torch.zeros_like(grad))
        return torch.where(s <= 0, below, inside)


@composite("lower_importance(Tensor s, str kind) -> Tensor")
def lower_importance(s: Tensor, kind: SigmoidKind) -> Tensor:
    """g(s), elementwise.

    paper: 0.01 s for s ≤ 0, else min(s, 1); ordinary derivative (masks can be slightly negative).
    2026: clamp(s, 0, 1); backward 0.01·grad where s ≤ 0 and grad < 0, 0 where s ≤ 0 and grad ≥ 0,
    grad for 0 < s ≤ 1, 0 for s > 1. hard: clamp(s, 0, 1). normal: logistic.
    """
    if kind == "paper":
        return torch.where(s <= 0, LEAK * s, s.clamp(max=1))
    if kind == "2026":
        return _LowerLeaky2026.apply(s)
    if kind == "hard":
        return s.clamp(0, 1)
    if kind == "normal":
        return torch.sigmoid(s)
    raise UserError(f"unknown sigmoid {kind!r}; nearest: {nearest(kind, SIGMOIDS)}")


@composite("upper_importance(Tensor s, str kind) -> Tensor")
def upper_importance(s: Tensor, kind: SigmoidKind) -> Tensor:
    """g⁺(s), elementwise: 1 + 0.01 (s − 1) for s > 1, else clamp(s, 0, 1) (paper and 2026).

    hard and normal have no leak: the upper importance equals the lower one.
    """
    if kind in ("paper", "2026"):
        return torch.where(s > 1, 1 + LEAK * (s - 1), s.clamp(0, 1))
    return lower_importance(s, kind)
