"""The training engine."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.losses import LOSSES, Step, faithfulness
from spd_fast.model import DecomposedModel
from spd_fast.ops import Penalty, make_key
from spd_fast.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from spd_fast.train.config import TrainConfig
from spd_fast.train.progress import Progress
from spd_fast.train.schedules import learning_rate

__all__ = ["ACTIVE_THRESHOLD", "Trainer"]

# A component counts as active at a position where its lower importance exceeds this.
ACTIVE_THRESHOLD = 0.01


class Trainer:
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
        self.model, self.config, self.batches, self.out = model, config, batches, out
        self.quiet = quiet
        self.step = 0
        self.coefficients = config.losses.coefficients()
        self.optimizer = self._adamw(model.parameter_groups(), config.lr, 0.0)
        self.device = next(model.parameters()).device
        self._gradients = [
            torch.tensor(c, device=self.device, dtype=next(model.parameters()).dtype)
            for c in self.coefficients.values()
        ]

    @staticmethod
    def _adamw(
        groups: list[list[nn.Parameter]], lr: float, weight_decay: float
    ) -> torch.optim.AdamW:
        named: list[dict[str, Any]] = [{"params": group} for group in groups]
        return torch.optim.AdamW(named, lr=lr, weight_decay=weight_decay, fused=True)

    def fit(self) -> None:
        """Train from ``self.step`` to the end, with metrics and checkpoints on the way.

        Raises:
            UserError: a loss became NaN or infinite (names it and the step).
        """
        config = self.config
        if self.step == 0:
            self.warm_up()
        window = time.perf_counter(), self.step
        with Progress("decompose", config.steps, self.step, quiet=self.quiet) as progress:
            while self.step < config.steps:
                losses, step = self.train_step(self.step)
                self.step += 1
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.perf_counter()
                    ms = 1e3 * (now - window[0]) / (self.step - window[1])
                    progress.update(self.step, self.log(losses, step, ms))
                    window = time.perf_counter(), self.step
                else:
                    progress.update(self.step)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save()

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

    @torch.no_grad()
    def log(self, losses: dict[str, Tensor], step: Step, ms: float) -> str:
        """Write one line of metrics.jsonl; the only place where the host waits for the device."""
        values = {name: float(loss) for name, loss in losses.items()}
        values["total"] = sum(c * values[name] for name, c in self.coefficients.items())
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"loss {name!r} is {value} at step {self.step}; try a lower lr "
                    f"({self.config.lr} now); checkpoints before it are kept"
                )
        active = {n: s.lower > ACTIVE_THRESHOLD for n, s in step.importances.items()}
        positions = max(step.importances.positions, 1)
        l0 = {n: float(a.sum() / positions) for n, a in active.items()}
        minimality = self.config.losses.importance_minimality
        record = {
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "p": minimality.p_at((self.step - 1) / self.config.steps),
            "losses": values,
            "l0": l0,
            "live": {n: int(a.flatten(0, -2).any(dim=0).sum()) for n, a in active.items()},
            "ms_per_step": round(ms, 4),
        }
        if self.out is not None:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        return f"loss {values['total']:.3e}  L0 {sum(l0.values()):.2f}  {ms:.1f} ms/step"

    def _run_id(self) -> str:
        """Identifies what a checkpoint belongs to: everything that shapes the training."""
        config = self.config.model_dump(
            mode="json",
            exclude={"log_every", "checkpoint_every", "keep_checkpoints", "name"},
        )
        weights = hashlib.sha256()
        for site in self.model.sites.values():
            weights.update(site.weight.cpu().contiguous().numpy().tobytes())
        text = json.dumps(config, sort_keys=True) + weights.hexdigest()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self) -> None:
        """Checkpoint the current step, if there is a folder.

        Raises:
            UserError: a parameter became NaN or infinite.
        """
        if self.out is None:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"parameter {name!r} is not finite at step {self.step}; try a lower lr "
                    f"({self.config.lr} now); checkpoints before it are kept"
                )
        optimizer = {
            f"{index}.{name}": value.contiguous()
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        # Copies, for tied components share a storage, which the format does not know.
        model = {
            k: v.clone(memory_format=torch.contiguous_format)
            for k, v in self.model.state_dict().items()
        }
        checkpoint = Checkpoint(self.step, model, optimizer, self._run_id())
        save_checkpoint(self.out / "checkpoints", checkpoint, self.config.keep_checkpoints)

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False where there is none.

        Raises:
            UserError: a checkpoint that cannot be read or belongs to another run.
        """
        assert self.out is not None
        path = latest_checkpoint(self.out / "checkpoints")
        if path is None:
            _truncate_metrics(self.out / "metrics.jsonl", 0)
            return False
        checkpoint = load_checkpoint(path)
        if checkpoint.run != self._run_id():
            raise UserError(
                f"checkpoint {path} belongs to another configuration or target; "
                "use a fresh --out, or the settings in the run's config.yaml"
            )
        try:
            self.model.load_state_dict(checkpoint.model)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"checkpoint {path} does not fit the model: {reason}") from None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in checkpoint.optimizer.items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            # Fused Adam takes it for granted that moments lie in memory as their parameter does.
            moment = value.shape == like.shape
            value = torch.empty_like(like).copy_(value) if moment else value
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.step = checkpoint.step
        _truncate_metrics(self.out / "metrics.jsonl", self.step)
        return True


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl past ``step``, and a last one cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_bytes(path, "".join(kept).encode())
