"""Sparse-feature batches: a pure function of (seed, stream, step), so a run resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SparseFeatures"]

# Distinct streams never share a batch: training a target, decomposing it, evaluating.
STREAMS = {"target": 0, "decompose": 1, "evaluate": 2}


@dataclass(frozen=True)
class SparseFeatures:
    """Features i.i.d. present with a probability, their value uniform in [low, high).

    Attributes:
        features: number of features. probability: of a feature being present.
        stream: "target", "decompose" or "evaluate".
    """

    features: int
    probability: float
    low: float
    high: float
    batch_size: int
    seed: int
    stream: str
    device: str = "cpu"

    def __call__(self, step: int) -> Tensor:
        """The batch of a step, [batch_size, features], float32."""
        generator = torch.Generator(self.device)
        generator.manual_seed(((self.seed * 4 + STREAMS[self.stream]) << 32) + step)
        shape = (2, self.batch_size, self.features)
        present, value = torch.rand(shape, generator=generator, device=self.device)
        value = value.mul_(self.high - self.low).add_(self.low)
        return value.mul_(present < self.probability)
