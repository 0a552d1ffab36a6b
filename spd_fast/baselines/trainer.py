"""Training of APD's components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_fast.baselines.apd import APDModel, batch_topk
from spd_fast.baselines.config import APDConfig
from spd_fast.baselines.losses import LOSSES, APDStep
from spd_fast.train.loop import TrainingLoop
from spd_fast.train.schedules import learning_rate

__all__ = ["APDTrainer"]


class APDTrainer(TrainingLoop[APDModel, APDConfig, APDStep]):
    """Trains A and B with Adam: attribute, keep the largest, reconstruct with those alone."""

    def __init__(
        self,
        model: APDModel,
        config: APDConfig,
        batches: Callable[[int], Any],
        *,
        out: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(model, config, config.losses, batches, out=out, quiet=quiet)

    def lr_at(self, index: int) -> float:
        """A linear rise from zero, then the schedule."""
        config = self.config
        rise = int(config.lr_warm_up * config.steps)
        if index < rise:
            return config.lr * index / rise
        return learning_rate(config.lr_schedule, config.lr, index - rise, config.steps - rise)

    def train_step(self, index: int) -> tuple[dict[str, Tensor], APDStep]:
        """One step: attributions, forward, losses, backward, optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(index)
        if self.config.unit_norm:
            self.model.normalise()
        step = self.forwards(index)
        losses = {name: LOSSES[name](step) for name in self.coefficients}
        self.optimizer.zero_grad(set_to_none=True)
        weights = [self.gradient(name, c) for name, c in self.coefficients.items()]
        torch.autograd.backward(list(losses.values()), weights)
        if self.config.unit_norm:
            self.model.remove_parallel_gradients()
        self.optimizer.step()
        return losses, step

    def forwards(self, index: int) -> APDStep:
        """The forwards that the losses of step ``index`` share."""
        batch = self.batches(index)
        clean = self.model.attribute(batch)
        kept = batch_topk(clean.attributions, self.config.top_k)
        output, outputs = self.model.kept_forward(batch, kept)
        return APDStep(self.model, self.config, clean, kept, output, outputs)

    def statistics(self, step: APDStep) -> dict[str, Any]:
        """The Schatten norm's p; how many components a sample keeps, and how many are kept
        anywhere in the batch: the same at every site."""
        l0 = float(step.kept.sum() / step.kept.shape[0])
        live = int(step.kept.any(dim=0).sum())
        return {
            "p": self.config.losses.schatten.p,
            "l0": dict.fromkeys(self.model.sites, l0),
            "live": dict.fromkeys(self.model.sites, live),
        }
