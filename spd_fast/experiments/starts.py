"""Several starts of one run: its first steps from other seeds, the one of lowest loss continued.

A start is the same run with another seed (other initial components, batches and masks) on the same
target. No known mechanism takes part in the choice, so that it serves networks that nobody has
understood as well as toys.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spd_fast._files import write_bytes
from spd_fast._seeds import mixed_seed
from spd_fast.errors import Diverged, UserError
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.experiments.records import StartsRecord, read_metrics, read_starts
from spd_fast.train import Trainer
from spd_fast.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from spd_fast.train.config import Config
from spd_fast.train.progress import Progress

__all__ = [
    "best_start", "chosen_start", "other_starts", "remove_checkpoints", "start_config",
    "train_start",
]  # fmt: skip

# From so many steps on starts go side by side: a process takes seconds to begin.
SIDE_BY_SIDE_FROM = 1000


def start_config(config: Config, start: int) -> Config:
    """The configuration of a start; the first is the run's own."""
    if start == 0:
        return config
    return config.model_copy(update={"seed": mixed_seed(config.seed, "start", start) % 2**32})


def chosen_start(config: AnyConfig, out: Path) -> StartsRecord | None:
    """Which start the run in ``out`` continues; None while that is open, or where there is but one.

    Raises:
        UserError: a record that cannot be read.
    """
    if not isinstance(config, Config) or config.starts.count == 1:
        return None
    path = out / "starts.json"
    if path.exists():
        return read_starts(path, config.starts.count)
    losses = [_read_loss(folder) for folder in _folders(config, out) if _loss_file(folder).exists()]
    if len(losses) < config.starts.count or not any(loss is not None for loss in losses):
        return None
    return _record(config, losses)


def best_start(
    config: Config,
    make: Callable[[Config, Path], Trainer],
    out: Path,
    *,
    side_by_side: bool = False,
    backend: str | None = None,
    quiet: bool = True,
) -> Trainer:
    """Train every start to ``config.starts.fraction`` of the steps, in ``out/starts/K``, and hand
    over the trainer of the best one at that step, its metrics and checkpoint now those of ``out``.
    Continues where a killed process stopped.

    Args:
        make: (configuration, folder) → the trainer of a start.
        side_by_side: long starts go each in a process of its own, with its share of the threads.
        backend, quiet: as ``make`` has them, for those processes.

    Raises:
        Diverged: every start did. UserError: a start's files are damaged or lost.
    """
    record = chosen_start(config, out)
    if record is None:
        with _side_by_side(config, out, backend, side_by_side) as others:
            losses = []
            for start, folder in enumerate(_folders(config, out)):
                if start in others:
                    _wait(others[start], config, start, folder, quiet)
                # Also what a process has left undone, whatever became of it.
                losses.append(train_start(config, start, make, folder))
        if all(loss is None for loss in losses):
            raise Diverged(f"all {len(losses)} starts diverged; try a lower lr ({config.lr} now)")
        record = _record(config, losses)
    write_bytes(out / "starts.json", (record.model_dump_json() + "\n").encode())
    folder = _folders(config, out)[record.chosen]
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise UserError(f"{folder} has lost its checkpoint; start anew in a fresh --out")
    write_bytes(out / "metrics.jsonl", (folder / "metrics.jsonl").read_bytes())
    save_checkpoint(out / "checkpoints", load_checkpoint(newest), config.keep_checkpoints)
    trainer = make(start_config(config, record.chosen), out)
    trainer.resume()
    return trainer


def other_starts(config: AnyConfig, out: Path) -> list[list[dict[str, Any]]]:
    """The metrics of the starts that were not continued."""
    record = chosen_start(config, out)
    if record is None:
        return []
    assert isinstance(config, Config)
    folders = _folders(config, out)
    return [read_metrics(folder) for k, folder in enumerate(folders) if k != record.chosen]


def remove_checkpoints(out: Path) -> None:
    """Remove the starts' checkpoints, once the run has a later one of its own."""
    for folder in (out / "starts").glob("*/checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)


def _folders(config: Config, out: Path) -> list[Path]:
    return [out / "starts" / str(k) for k in range(config.starts.count)]


def _steps(config: Config) -> int:
    return max(round(config.starts.fraction * config.steps), 1)


def _record(config: Config, losses: Sequence[float | None]) -> StartsRecord:
    comparable = [math.inf if loss is None else loss for loss in losses]
    return StartsRecord(
        chosen=comparable.index(min(comparable)),
        losses=list(losses),
        seeds=[start_config(config, k).seed for k in range(len(losses))],
        steps=_steps(config),
    )


def _loss_file(folder: Path) -> Path:
    return folder / "loss.json"


def _read_loss(folder: Path) -> float | None:
    path = _loss_file(folder)
    try:
        loss = json.loads(path.read_text(encoding="utf-8"))
        if loss is not None and not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); remove it and use --resume") from None
    return None if loss is None else float(loss)


@contextmanager
def _side_by_side(
    config: Config, out: Path, backend: str | None, wanted: bool
) -> Iterator[Mapping[int, subprocess.Popen[bytes]]]:
    """The processes that train all starts but the first, which is this process's own; none where
    that does not pay. They end with this process, for they watch its end of a pipe."""
    threads = torch.get_num_threads()
    if not wanted or threads < config.starts.count or _steps(config) < SIDE_BY_SIDE_FROM:
        yield {}
        return
    share = threads // config.starts.count
    others: dict[int, subprocess.Popen[bytes]] = {}
    try:
        torch.set_num_threads(share)
        for start, folder in enumerate(_folders(config, out)):
            if start and not _loss_file(folder).exists():
                command = [sys.executable, "-c", _begin(), str(out), str(start), str(share)]
                others[start] = subprocess.Popen(
                    command + ([] if backend is None else [backend]),
                    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        yield others
    finally:
        torch.set_num_threads(threads)
        for process in others.values():
            process.kill()
            process.communicate()


def _begin() -> str:
    """The program of such a process. It finds its modules where this process does: ``python -m``
    would look into the current folder first, which can hold others of the same name."""
    module = "spd_fast.experiments.start_process"
    return (
        f"import sys; sys.path[:] = {sys.path!r}; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )


def _wait(
    process: subprocess.Popen[bytes], config: Config, start: int, folder: Path, quiet: bool
) -> None:
    """Show the progress of a start in another process until that has ended."""
    with Progress(_label(config, start), _steps(config), quiet=quiet) as progress:
        while True:
            try:
                process.wait(timeout=0.2)
                return
            except subprocess.TimeoutExpired:
                progress.update(_steps_done(folder))


def _steps_done(folder: Path) -> int:
    """The last step that a start has logged; its last line may be half written."""
    try:
        for line in reversed((folder / "metrics.jsonl").read_text("utf-8").splitlines()):
            if line.endswith("}"):
                return int(json.loads(line)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0


def _label(config: Config, start: int) -> str:
    return f"start {start + 1} of {config.starts.count}"


def train_start(
    config: Config, start: int, make: Callable[[Config, Path], Trainer], folder: Path
) -> float | None:
    """The loss of a start after its part of the steps; None where it diverged."""
    if _loss_file(folder).exists():
        return _read_loss(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make(start_config(config, start), folder)
    trainer.resume()
    loss: float | None = None
    try:
        trainer.fit(_steps(config), label=_label(config, start))
        fresh = trainer.fresh_loss()
        loss = fresh if math.isfinite(fresh) else None
    except Diverged:
        pass
    write_bytes(_loss_file(folder), json.dumps(loss).encode())
    return loss
