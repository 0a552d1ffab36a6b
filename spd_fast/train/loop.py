"""What every training run does: steps in order, metrics, checkpoints, exact resume."""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spd_fast._adamw import adamw
from spd_fast._files import write_bytes
from spd_fast.errors import Diverged, UserError
from spd_fast.model.sites import SiteModel
from spd_fast.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from spd_fast.train.config import LoopConfig
from spd_fast.train.loggers import also_logged, check_loggers
from spd_fast.train.progress import Progress

__all__ = ["Losses", "TrainingLoop"]

ModelT = TypeVar("ModelT", bound=SiteModel)
ConfigT = TypeVar("ConfigT", bound=LoopConfig)
StepT = TypeVar("StepT")


class Losses(Protocol):
    """The losses of a configuration."""

    def coefficients(self) -> dict[str, float]:
        """Name → coefficient of every loss that takes part."""
        ...


# Settings that older checkpoints do not know, and what they did without them.
LATER = {"lr_warm_up": 0.0}


class TrainingLoop(ABC, Generic[ModelT, ConfigT, StepT]):
    """Trains a model of sites by gradient descent; a method says what a step is.

    Args:
        model: what is trained.
        config: how long, how often to write, and everything that shapes the training.
        losses: whose coefficients weigh the step's losses.
        batches: step → batch; a pure function of the step, so that a run resumes exactly.
        out: the run's folder for checkpoints and metrics; None keeps everything in memory.
        quiet: no progress.
    """

    def __init__(
        self,
        model: ModelT,
        config: ConfigT,
        losses: Losses,
        batches: Callable[[int], Any],
        *,
        out: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        if not callable(batches):
            raise UserError(
                f"batches is a function of the step, got a {type(batches).__name__}: make one with "
                "spd_fast.data (ArrayBatches of tensors and arrays, StreamBatches of iterables)"
            )
        out = None if out is None else Path(out)
        check_loggers(config.log_to, out)
        self.model, self.config, self.batches, self.out = model, config, batches, out
        self.quiet = quiet
        self._also: Callable[[Mapping[str, Any]], None] | None = None
        self.step = 0
        self._looked_at = 0  # the last step known to have gone well
        self.coefficients = losses.coefficients()
        self.optimizer = adamw(self.groups(), config.lr, 0.0)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._weights: dict[str, tuple[float, Tensor]] = {}

    def groups(self) -> list[list[nn.Parameter]]:
        """Parameters in groups that the optimiser updates one after the other."""
        return self.model.parameter_groups()

    def gradient(self, loss: str, value: float) -> Tensor:
        """The weight ``value`` of a loss on the device, made once as long as it stays the same."""
        held = self._weights.get(loss)
        if held is None or held[0] != value:
            tensor = torch.tensor(value, device=self.device, dtype=self.dtype)
            held = self._weights[loss] = (value, tensor)
        return held[1]

    def fit(self, until: int | None = None, label: str = "decompose") -> None:
        """Train from ``self.step`` to step ``until`` (the last one by default), with metrics and
        checkpoints on the way; ``label`` names the progress. Loggers hear of a part of a training
        (``until``) when it is continued to the last step.

        Raises:
            Diverged: a loss became NaN or infinite (names it, the step and, where it can be told,
                the site). On a GPU the host sees the losses of every ``log_every``-th step only:
                the step is the one at which it is noticed.
        """
        config = self.config
        self._looked_at = self.step
        end = config.steps if until is None else min(until, config.steps)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            self.warm_up()
        window = time.perf_counter(), self.step
        with (
            also_logged(
                config.log_to if until is None else (), self.out, self.step, self._name(),
                config.model_dump(mode="json"),
            ) as self._also,
            Progress(label, end, self.step, quiet=self.quiet) as progress,
        ):  # fmt: skip
            while self.step < end:
                losses, step = self.train_step(self.step)
                self.step += 1
                logs = self.step % config.log_every == 0 or self.step == end
                if logs or self.sees_every_step():
                    values = self.checked(losses, step)
                if logs:
                    now = time.perf_counter()
                    ms = 1e3 * (now - window[0]) / (self.step - window[1])
                    progress.update(self.step, self.log(values, step, ms))
                    window = time.perf_counter(), self.step
                else:
                    progress.update(self.step)
                if self.step % config.checkpoint_every == 0 or self.step == end:
                    self.save()
        self._also = None

    def _name(self) -> str:
        folder = "" if self.out is None else self.out.absolute().name
        return f"{getattr(self.config, 'name', folder)}-seed{self.config.seed}"

    def warm_up(self) -> None:
        """What comes before the first step; nothing by default."""

    @abstractmethod
    def train_step(self, index: int) -> tuple[dict[str, Tensor], StepT]:
        """One step: forward, losses, backward, optimiser. No host synchronisation."""

    @abstractmethod
    def statistics(self, step: StepT) -> dict[str, Any]:
        """A log line's ``p``, ``l0`` and ``live`` (the last two by site)."""

    def unsound(self, step: StepT) -> str | None:
        """Where in a step something is not finite, in words; None where nothing is found."""
        return None

    def extra_state(self) -> dict[str, Tensor]:
        """What the next step depends on beside model, optimiser and step."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`extra_state` gave."""

    @torch.no_grad()
    def log(self, values: dict[str, float], step: StepT, ms: float) -> str:
        """Write one line of metrics.jsonl."""
        statistics = self.statistics(step)
        record = {
            "step": self.step,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "p": statistics["p"],
            "losses": values,
            "l0": statistics["l0"],
            "live": statistics["live"],
            "ms_per_step": round(ms, 4),
        }
        if self.out is not None:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        if self._also is not None:
            self._also(record)
        l0 = sum(statistics["l0"].values())
        return f"loss {values['total']:.3e}  L0 {l0:.2f}  {ms:.1f} ms/step"

    def sees_every_step(self) -> bool:
        """Whether losses can be looked at after every step without waiting for a device."""
        return self.device.type == "cpu"

    def checked(self, losses: dict[str, Tensor], step: StepT) -> dict[str, float]:
        """The losses and their ``total`` on the host, which waits for the device here alone.

        Raises:
            Diverged: one is not finite.
        """
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        values["total"] = sum(self.coefficients[name] * value for name, value in values.items())
        for name, value in values.items():
            if not math.isfinite(value):
                with torch.no_grad():
                    where = self.unsound(step)
                raise Diverged(
                    f"loss {name!r} is {value}{self._noticed()}"
                    f"{'' if where is None else f' ({where})'}; try a lower lr "
                    f"({self.config.lr} now); checkpoints before it are kept"
                )
        self._looked_at = self.step
        return values

    def _noticed(self) -> str:
        """When something went wrong, as far as that is known without looking at every step."""
        first = self._looked_at + 1
        if first >= self.step:
            return f" at step {self.step}"
        return f", noticed at step {self.step} (it began at one of steps {first} to {self.step})"

    def _run_id(self) -> str:
        """Identifies what a checkpoint belongs to: everything that shapes the training."""
        config = self.config.model_dump(
            mode="json",
            exclude={"log_every", "checkpoint_every", "keep_checkpoints", "name", "cuda_graph"},
        )
        # What came later counts where it is used, so that checkpoints of before still belong.
        config = {k: v for k, v in config.items() if k not in LATER or v != LATER[k]}
        weights = hashlib.sha256()
        for site in self.model.sites.values():
            weights.update(site.weight.cpu().contiguous().numpy().tobytes())
        text = json.dumps(config, sort_keys=True) + weights.hexdigest()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self) -> None:
        """Checkpoint the current step, if there is a folder.

        Raises:
            Diverged: a parameter became NaN or infinite.
        """
        if self.out is None:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise Diverged(
                    f"parameter {name!r} is not finite{self._noticed()}; try a lower lr "
                    f"({self.config.lr} now); checkpoints before it are kept"
                )
        self._looked_at = self.step
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
        checkpoint = Checkpoint(self.step, model, optimizer, self._run_id(), self.extra_state())
        save_checkpoint(self.out / "checkpoints", checkpoint, self.config.keep_checkpoints)

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False where there is none.

        Raises:
            UserError: no folder; a checkpoint that cannot be read or belongs to another run.
        """
        if self.out is None:
            raise UserError(
                "resume: checkpoints lie in the run's folder; make the trainer with `out`"
            )
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
        self.load_extra_state(checkpoint.extra)
        self.step = checkpoint.step
        prune_checkpoints(self.out / "checkpoints", self.config.keep_checkpoints)
        _truncate_metrics(self.out / "metrics.jsonl", self.step)
        return True


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl past ``step``, and a last one cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_bytes(path, "".join(kept).encode())
