"""Sparse-feature batches: a pure function of (seed, stream, step), so a run resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spd_fast import _extension
from spd_fast._seeds import mixed_seed

__all__ = ["SparseFeatures"]


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
        seed = mixed_seed(self.seed, self.stream, step)
        if self.device == "cpu" and (extension := _extension.module()) is not None:
            # The same numbers; torch's own generator takes several times as long.
            return extension.sparse_features(
                seed, self.batch_size, self.features, self.probability, self.low, self.high
            )
        generator = torch.Generator(self.device)
        generator.manual_seed(seed)
        shape = (2, self.batch_size, self.features)
        present, value = torch.rand(
            shape, generator=generator, device=self.device, dtype=torch.float32
        )
        value = value.mul_(self.high - self.low).add_(self.low)
        return value.mul_(present < self.probability)
