"""The training engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_fast.losses import LOSSES, Step, faithfulness
from spd_fast.model import DecomposedModel
from spd_fast.ops import Penalty, make_key
from spd_fast.train.config import TrainConfig
from spd_fast.train.loop import TrainingLoop
from spd_fast.train.schedules import learning_rate

__all__ = ["ACTIVE_THRESHOLD", "Trainer"]

# A component counts as active at a position where its lower importance exceeds this.
ACTIVE_THRESHOLD = 0.01


class Trainer(TrainingLoop[DecomposedModel, TrainConfig, Step]):
    """Trains the components and importance functions of a decomposed model.

    Args:
        model: the decomposed model.
        config: a :class:`TrainConfig` (a whole :class:`Config` is one).
        batches: step → batch; a pure function of the step, so that a run resumes exactly.
        out: the run's folder for checkpoints and metrics; None keeps everything in memory.
        quiet: no progress.
    """

    def __init__(
        self,
        model: DecomposedModel,
        config: TrainConfig,
        batches: Callable[[int], Any],
        *,
        out: Path | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(model, config, config.losses, batches, out=out, quiet=quiet)

    def train_step(self, index: int) -> tuple[dict[str, Tensor], Step]:
        """One step: forward, losses, backward, optimiser. No host synchronisation."""
        self._set_lr(index)
        step = self.forwards(index)
        losses = {name: LOSSES[name](step) for name in self.coefficients}
        self.optimizer.zero_grad(set_to_none=True)
        # The gradient of Σ c · loss, without building the sum.
        torch.autograd.backward(list(losses.values()), self._gradients)
        self.optimizer.step()
        return losses, step

    def forwards(self, index: int) -> Step:
        """The forwards that the losses of step ``index`` share."""
        config, minimality = self.config, self.config.losses.importance_minimality
        batch = self.batches(index)
        clean = self.model.clean_forward(batch)
        penalty = None
        if minimality.coeff > 0:
            penalty = Penalty("lp", minimality.p_at(index / config.steps), minimality.eps)
        importances = self.model.causal_importances(clean, penalty)
        key = make_key(config.seed, index, self.device)
        return Step(self.model, batch, clean, importances, key, config.divergence, config.draws)

    def warm_up(self) -> None:
        """Faithfulness alone, on V and U; its optimiser's moments are then forgotten."""
        warm_up = self.config.warm_up
        components = set(map(id, self.model.components.parameters()))
        groups = [
            [p for p in group if id(p) in components] for group in self.model.parameter_groups()
        ]
        optimizer = self._adamw(groups, warm_up.lr, warm_up.weight_decay)
        for _ in range(warm_up.steps):
            optimizer.zero_grad(set_to_none=True)
            faithfulness(self.model).backward()
            optimizer.step()

    def _set_lr(self, index: int) -> None:
        config = self.config
        lr = learning_rate(config.lr_schedule, config.lr, index, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def statistics(self, step: Step) -> dict[str, Any]:
        """p of the importance penalty; per site the mean number of active components and how many
        are active anywhere in the batch."""
        active = {n: s.lower > ACTIVE_THRESHOLD for n, s in step.importances.items()}
        positions = max(step.importances.positions, 1)
        minimality = self.config.losses.importance_minimality
        return {
            "p": minimality.p_at((self.step - 1) / self.config.steps),
            "l0": {n: float(a.sum() / positions) for n, a in active.items()},
            "live": {n: int(a.flatten(0, -2).any(dim=0).sum()) for n, a in active.items()},
        }
