"""AdamW (Loshchilov and Hutter 2019), without what torch's own costs beside its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spd_fast._threads import SMALL, one_thread_where

__all__ = ["AdamW", "adamw"]

BETAS = (0.9, 0.999)
EPS = 1e-8


class AdamW:
    """``torch.optim.AdamW(…, fused=True)`` on a CPU: the same bits, the same state.

    Making torch's imports its compiler, which takes a second, and the Python around each of its
    steps takes longer than the update of a small network.

    Args:
        groups: parameters in groups that are updated one after the other.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], lr: float, weight_decay: float) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(group), "lr": lr, "weight_decay": weight_decay} for group in groups
        ]
        self._small = sum(p.numel() for group in groups for p in group) <= SMALL
        # Of each parameter, in the order of the groups; empty until its first update.
        self._states: list[list[dict[str, Tensor]]] = [[{} for _ in group] for group in groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        assert set_to_none
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group, states in zip(self.param_groups, self._states, strict=True):
            found = [
                (p, grad, state or _begin(state, p))
                for p, state in zip(group["params"], states, strict=True)
                if (grad := p.grad) is not None
            ]
            if not found:
                continue
            steps = [state["step"] for _, _, state in found]
            torch._foreach_add_(steps, 1)
            # The kernel shares out every tensor, however small.
            with one_thread_where(self._small):
                torch._fused_adamw_(
                    [parameter for parameter, _, _ in found],
                    [grad for _, grad, _ in found],
                    [state["exp_avg"] for _, _, state in found],
                    [state["exp_avg_sq"] for _, _, state in found],
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    weight_decay=group["weight_decay"],
                    eps=EPS,
                    amsgrad=False,
                    maximize=False,
                )

    def state_dict(self) -> dict[str, Any]:
        """``state``: index of a parameter → ``step``, ``exp_avg``, ``exp_avg_sq``, of those that
        have been updated."""
        states = [state for group in self._states for state in group]
        return {"state": {index: state for index, state in enumerate(states) if state}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict`, or torch's, gave; tensors are taken over."""
        known, index = state_dict["state"], 0
        for group in self._states:
            for state in group:
                state.clear()
                state.update(known.get(index, {}))
                index += 1


def _begin(state: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    state["step"] = torch.zeros((), dtype=torch.float32)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def adamw(
    groups: Sequence[Sequence[Tensor]], lr: float, weight_decay: float
) -> AdamW | torch.optim.AdamW:
    """AdamW over groups of parameters that are updated one after the other; on a GPU torch's."""
    if all(p.device.type == "cpu" for group in groups for p in group):
        return AdamW(groups, lr, weight_decay)
    named = [{"params": list(group)} for group in groups]
    return torch.optim.AdamW(named, lr=lr, weight_decay=weight_decay, fused=True)
