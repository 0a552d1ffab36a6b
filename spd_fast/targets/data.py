"""Sparse-feature batches: a pure function of (seed, stream, step), so a run resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SparseFeatures"]

# Distinct streams never share a batch: training a target, decomposing it, evaluating.
STREAMS = {"target": 0, "decompose": 1, "evaluate": 2}


def _mix(seed: int, stream: int, step: int) -> int:
    """A 63-bit generator seed in which every bit depends on all of (seed, stream, step).

    The splitmix64 finaliser, because torch's CPU generator reads the low 32 bits of a seed only.
    """
    x = (seed << 34) ^ (stream << 32) ^ step
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x >> 1


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
        generator.manual_seed(_mix(self.seed, STREAMS[self.stream], step))
        shape = (2, self.batch_size, self.features)
        present, value = torch.rand(shape, generator=generator, device=self.device)
        value = value.mul_(self.high - self.low).add_(self.low)
        return value.mul_(present < self.probability)
