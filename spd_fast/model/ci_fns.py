"""Causal-importance functions: parameters of the gates (the paper, §2.4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from spd_fast.errors import UserError

__all__ = ["CI_FNS", "CIFnKind", "MLPGate", "make_ci_fn"]

CIFnKind = Literal["mlp", "linear"]
CI_FNS: tuple[CIFnKind, ...] = ("mlp", "linear")


class _ParallelLinear(nn.Module):
    """One layer of C independent small MLPs: W [C, in, out], b [C, out]."""

    def __init__(
        self, C: int, d_in: int, d_out: int, std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(C, d_in, d_out, generator=generator) * std)
        self.b = nn.Parameter(torch.zeros(C, d_out))


class MLPGate(nn.Module):
    """One scalar MLP per component on its own inner activation.

    Layers 1 → hidden… → 1 with GELU between. Weights N(0, std²): first layer std √2 (fan-in 1),
    further hidden layers √2/√fan_in, head 1/√hidden; biases 0. ``hidden=()`` is the linear gate
    s = w h + b. Layers are numbered as in the authors' code: 0, 2, 4, … (GELUs between).
    """

    def __init__(self, components: int, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        widths = [1, *hidden, 1]
        layers: dict[str, nn.Module] = {}
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            head = i == len(widths) - 2
            std = (1.0 if head else 2.0**0.5) / d_in**0.5
            layers[str(2 * i)] = _ParallelLinear(components, d_in, d_out, std, generator)
        self.layers = nn.ModuleDict(layers)

    @property
    def weights(self) -> list[Tensor]:
        return [layer.W for layer in self._ordered()]

    @property
    def biases(self) -> list[Tensor]:
        return [layer.b for layer in self._ordered()]

    def _ordered(self) -> list[_ParallelLinear]:
        return [layer for layer in self.layers.values() if isinstance(layer, _ParallelLinear)]


def make_ci_fn(
    kind: CIFnKind, components: int, hidden: Sequence[int], generator: torch.Generator
) -> MLPGate:
    """The causal-importance function of one site.

    Raises:
        UserError: unknown kind, or hidden widths that do not go with it.
    """
    if kind not in CI_FNS:
        raise UserError(f"unknown ci_fn {kind!r}; known: {', '.join(CI_FNS)}")
    if kind == "linear":
        return MLPGate(components, (), generator)
    if not hidden or any(width < 1 for width in hidden):
        raise UserError(f"ci_fn 'mlp' needs hidden widths of at least 1, got {tuple(hidden)}")
    return MLPGate(components, hidden, generator)
