"""One start of a run, in a process of its own; it ends when its standard input does.

Arguments: OUT START THREADS [BACKEND]. :mod:`spd_fast.experiments.starts` runs it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch

from spd_fast import _extension
from spd_fast.experiments.recipes import configuration
from spd_fast.experiments.runs import make_trainer
from spd_fast.experiments.starts import train_start
from spd_fast.targets import load_target
from spd_fast.train import load_config
from spd_fast.train.config import Config


def end_with_the_caller() -> None:
    """The other end of the pipe closes however the caller ends, SIGKILL included."""
    # Not by sys.stdin: an interpreter that ends while a thread reads from that aborts.
    os.read(0, 1)
    os._exit(1)


def main(out: Path, start: int, threads: int, backend: str | None = None) -> None:
    """Train start ``start`` of the run in ``out``, whose configuration and target lie there."""
    _extension.keep_freed_memory()
    torch.set_num_threads(threads)
    config = configuration(load_config(out / "config.yaml"))
    assert isinstance(config, Config)
    target = load_target(config.target, out / "target")
    folder = out / "starts" / str(start)
    train_start(config, start, lambda c, at: make_trainer(c, target, at, backend, True), folder)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_caller, daemon=True).start()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5])
