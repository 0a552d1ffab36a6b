"""Checkpoints: written aside, flushed, renamed; the last k kept. A kill at any moment leaves the
previous one whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spd_fast._files import sync_folder, write_bytes
from spd_fast.errors import UserError

__all__ = [
    "Checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "numbered_checkpoints",
    "prune_checkpoints",
    "save_checkpoint",
]

FORMAT = 1


@dataclass
class Checkpoint:
    """``step`` is the next one to run; tensors by name; ``run`` identifies the configuration;
    ``extra`` is whatever else the next step depends on (the sources of persistent PGD)."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    run: str
    extra: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``folder/step_N``, then remove all but the newest ``keep``.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{checkpoint.step}"
    aside = folder / f".step_{checkpoint.step}.tmp"
    replaced = folder / f".step_{checkpoint.step}.old"
    for leftover in (aside, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        aside.mkdir()
        write_bytes(aside / "model.safetensors", save(checkpoint.model))
        write_bytes(aside / "optimizer.safetensors", save(checkpoint.optimizer))
        if checkpoint.extra:
            write_bytes(aside / "extra.safetensors", save(checkpoint.extra))
        state = {"format": FORMAT, "step": checkpoint.step, "run": checkpoint.run}
        if checkpoint.extra:
            state["extra"] = True
        write_bytes(aside / "state.json", json.dumps(state).encode())
        sync_folder(aside)
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    prune_checkpoints(folder, keep)
    return final


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep``, and what a kill left of earlier removals."""
    for old in numbered_checkpoints(folder)[:-keep]:
        # Out of sight first: a kill must not leave half of one under its name.
        aside = old.with_name(f".{old.name}.gone")
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
    for gone in folder.glob(".step_*.gone"):
        shutil.rmtree(gone, ignore_errors=True)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.startswith("step_") and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below ``folder``, or None."""
    numbered = numbered_checkpoints(folder)
    return numbered[-1] if numbered else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        UserError: truncated, incomplete, or not a checkpoint of this program.
    """
    others = [p for p in numbered_checkpoints(path.parent) if p != path]
    then = "resume from the one before it" if others else "begin anew"
    advice = f"remove that folder to {then}"
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {state.get('format')!r}, need {FORMAT}; {advice}"
            )
        extra = path / "extra.safetensors"
        if state.get("extra") and not extra.exists():
            raise UserError(f"checkpoint {path} has lost {extra.name}; {advice}")
        return Checkpoint(
            int(state["step"]),
            load_file(path / "model.safetensors"),
            load_file(path / "optimizer.safetensors"),
            str(state["run"]),
            load_file(extra) if state.get("extra") else {},
        )
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint {path} cannot be read ({reason}); {advice}") from None
