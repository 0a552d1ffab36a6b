"""Where a measurement was made: what a reader needs to repeat it, and nothing that names a host."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import spd_fast
from spd_fast import _extension

__all__ = ["ROOT", "machine", "processor"]

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    """Short commit, with ``+`` where the code that is measured differs from it. A copy with another
    history, or none, is told by SPD_FAST_COMMIT."""
    if told := os.environ.get("SPD_FAST_COMMIT"):
        return told
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", "spd_fast", "csrc", "kernels", "bench/*.py")
    return commit + ("+" if changed else "")


def machine() -> dict[str, str]:
    """Machine, versions and load; call it before the first measurement."""
    extension = _extension.module()
    return {
        "processor": processor(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "instruction_set": "none" if extension is None else extension.instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "spd_fast": spd_fast.__version__,
        "commit": _commit(),
        "load_average": f"{os.getloadavg()[0]:.2f}",
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
