"""Metrics in TensorBoard and Weights & Biases, beside metrics.jsonl, whose lines they show."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from spd_fast._files import write_bytes
from spd_fast.errors import UserError

__all__ = ["LoggerName", "also_logged", "check_loggers", "numbers"]

LoggerName = Literal["wandb", "tensorboard"]
_MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


class _Logger(Protocol):
    def write(self, line: Mapping[str, Any]) -> None:
        """Take over a line of metrics.jsonl."""
        ...

    def close(self, failed: bool) -> None: ...


def check_loggers(names: Sequence[LoggerName], out: Path | None) -> None:
    """Raise UserError where a logger's package is missing, or a folder to log in."""
    for name in names:
        if out is None:
            raise UserError(f"log_to {name!r} needs a folder: give `out`")
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"log_to {name!r} needs its package ({reason}): pip install 'spd_fast[{name}]'"
            ) from None


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as flat names: ``losses/total``, ``l0/SITE``, ``lr``, …"""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif key != "step":
            flat[key] = value
    return flat


class _TensorBoard:
    """Event files in ``out/tensorboard``."""

    def __init__(self, out: Path) -> None:
        module = importlib.import_module(_MODULES["tensorboard"])
        # What a killed process logged is in part lost, in part ahead of the checkpoint: all is
        # written anew. The step at which to purge tells so to a server that has read it already.
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
        self.writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=0)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self, failed: bool) -> None:
        self.writer.close()


class _WandB:
    """A run of wandb, whose id is kept in ``out/wandb.id`` so that it goes on when ours does."""

    def __init__(self, out: Path, name: str, settings: Mapping[str, Any]) -> None:
        module = importlib.import_module(_MODULES["wandb"])
        record = out / "wandb.id"
        if not record.exists():
            write_bytes(record, secrets.token_hex(4).encode())
        try:
            self.run = module.init(
                project=os.environ.get("WANDB_PROJECT", "spd_fast"), name=name, dir=str(out),
                id=record.read_text(encoding="utf-8").strip(), resume="allow",
                config=dict(settings),
            )  # fmt: skip
        except Exception as error:  # no account, no network: its own errors, not ours to list
            reason = " ".join(str(error).split())
            raise UserError(
                f"wandb does not start ({reason}); `wandb login`, or WANDB_MODE=offline"
            ) from None

    def write(self, line: Mapping[str, Any]) -> None:
        # It refuses steps before its last one: lines that it has from before a kill.
        if line["step"] >= self.run.step:
            self.run.log(numbers(line), step=line["step"])

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


@contextmanager
def also_logged(
    names: Sequence[LoggerName], out: Path | None, step: int, name: str, settings: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What hands a line of metrics.jsonl to the loggers ``names``; first of all they get those that
    the file in ``out`` holds up to ``step``.

    Args:
        name, settings: of the run, for wandb.

    Raises:
        UserError: a logger that does not start.
    """
    loggers: list[_Logger] = []

    def write(line: Mapping[str, Any]) -> None:
        for logger in loggers:
            logger.write(line)

    failed = True
    try:
        for kind in dict.fromkeys(names):
            assert out is not None
            loggers.append(
                _TensorBoard(out) if kind == "tensorboard" else _WandB(out, name, settings)
            )
        if loggers and out is not None and step > 0:
            for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                write(json.loads(text))
        yield write
        failed = False
    finally:
        for logger in loggers:
            logger.close(failed)
