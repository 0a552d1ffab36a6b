"""What every loss of a step reads: the forwards they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spd_fast.model import CleanForward, DecomposedModel, Importances, Stochastic
from spd_fast.ops.divergence import DivergenceKind, divergence

__all__ = ["Step"]


@dataclass
class Step:
    """One training step's shared forwards.

    Attributes:
        key: (seed, step) of the random sources. divergence: D of the reconstruction losses.
        draws: S, masks drawn per reconstruction loss.
    """

    model: DecomposedModel
    batch: Any
    clean: CleanForward
    importances: Importances
    key: Tensor
    divergence: DivergenceKind = "mse"
    draws: int = 1

    def stochastic(self, draw: int) -> Stochastic:
        return Stochastic(self.importances, self.key, draw, delta=self.model.delta)

    def divergence_of(self, output: Tensor) -> Tensor:
        """D(output, clean output)."""
        return divergence(output, self.clean.output, self.divergence)
