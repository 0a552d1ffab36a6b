"""Several starts of one run: its first steps from other seeds, the one of lowest loss continued.

A start is the same run with another seed (other initial components, batches and masks) on the same
target. No known mechanism takes part in the choice, so that it serves networks that nobody has
understood as well as toys.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spd_fast._files import write_bytes
from spd_fast._seeds import mixed_seed
from spd_fast.errors import Diverged, UserError
from spd_fast.experiments.records import read_metrics
from spd_fast.train import Trainer
from spd_fast.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from spd_fast.train.config import Config

__all__ = ["best_start", "chosen_start", "other_starts", "remove_checkpoints", "start_config"]


def start_config(config: Config, start: int) -> Config:
    """The configuration of a start; the first is the run's own."""
    if start == 0:
        return config
    return config.model_copy(update={"seed": mixed_seed(config.seed, "start", start) % 2**32})


def chosen_start(out: Path) -> dict[str, Any] | None:
    """``chosen``, the number of the start that the run in ``out`` continues, and ``losses``, of
    all of them when it was chosen (None for one that diverged); None before there is one.

    Raises:
        UserError: a record that cannot be read.
    """
    path = out / "starts.json"
    if not path.exists():
        return None
    record: dict[str, Any] = _read(path, lambda data: data["losses"][data["chosen"]] + 0.0)
    return record


def _read(path: Path, check: Callable[[Any], Any]) -> Any:
    """A JSON file that passes ``check`` without an exception."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        check(data)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); remove it and use --resume") from None
    return data


def best_start(config: Config, make: Callable[[Config, Path], Trainer], out: Path) -> Trainer:
    """Train every start to ``config.starts.fraction`` of the steps, in ``out/starts/K``, and hand
    over the trainer of the best one at that step, its metrics and checkpoint now those of ``out``.
    Continues where a killed process stopped.

    Args:
        make: (configuration, folder) → the trainer of a start.

    Raises:
        Diverged: every start did. UserError: a start's files are damaged or lost.
    """
    record = chosen_start(out)
    if record is None:
        losses = [
            _train(config, k, make, out / "starts" / str(k)) for k in range(config.starts.count)
        ]
        finite = [math.inf if loss is None else loss for loss in losses]
        record = {"chosen": finite.index(min(finite)), "losses": losses}
        if min(finite) == math.inf:
            raise Diverged(f"all {len(losses)} starts diverged; try a lower lr ({config.lr} now)")
        write_bytes(out / "starts.json", (json.dumps(record) + "\n").encode())
    number = int(record["chosen"])
    folder = out / "starts" / str(number)
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise UserError(f"{folder} has lost its checkpoint; start anew in a fresh --out")
    write_bytes(out / "metrics.jsonl", (folder / "metrics.jsonl").read_bytes())
    save_checkpoint(out / "checkpoints", load_checkpoint(newest), config.keep_checkpoints)
    trainer = make(start_config(config, number), out)
    trainer.resume()
    return trainer


def _train(
    config: Config, start: int, make: Callable[[Config, Path], Trainer], folder: Path
) -> float | None:
    """The loss of a start after its part of the steps; None where it diverged."""
    record = folder / "loss.json"
    if record.exists():
        value: float | None = _read(record, lambda data: data is None or data + 0.0)
        return value
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make(start_config(config, start), folder)
    trainer.resume()
    steps = max(round(config.starts.fraction * config.steps), 1)
    loss: float | None = None
    try:
        trainer.fit(steps, label=f"start {start + 1} of {config.starts.count}")
        loss = trainer.fresh_loss()
    except Diverged:
        pass
    write_bytes(record, json.dumps(loss).encode())
    return loss


def other_starts(out: Path) -> list[list[dict[str, Any]]]:
    """The metrics of the starts that were not continued."""
    record = chosen_start(out)
    if record is None:
        return []
    numbers = [k for k in range(len(record["losses"])) if k != record["chosen"]]
    return [read_metrics(out / "starts" / str(k)) for k in numbers]


def remove_checkpoints(out: Path) -> None:
    """Remove the starts' checkpoints, once the run has a later one of its own."""
    for folder in (out / "starts").glob("*/checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)
