"""Many runs in one folder: finished ones are skipped, killed ones continue, one bar over all."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spd_fast._files import write_bytes
from spd_fast.errors import Diverged, UserError
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.experiments.records import read_evaluation
from spd_fast.experiments.runs import Run, check_device, load_run, run
from spd_fast.train import load_config
from spd_fast.train.config import difference
from spd_fast.train.progress import Progress

__all__ = ["Outcome", "outcomes", "run_grid"]

DIVERGED = "diverged.json"


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its eval.json, or why training diverged."""

    evaluation: dict[str, Any] | None
    diverged: str | None = None


def _finished(folder: Path, config: AnyConfig) -> Outcome | None:
    """The outcome of the run in ``folder``, or None while it has none.

    Raises:
        UserError: another run is there, or what is left of one.
    """
    if not (folder / "config.yaml").exists():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"{folder} has lost its config.yaml; remove it, then it is run anew")
        return None
    if (how := difference(load_config(folder / "config.yaml"), config)) is not None:
        raise UserError(
            f"{folder} holds a run with other settings ({how}); choose another --out, or remove it"
        )
    if (folder / DIVERGED).exists():
        reason = json.loads((folder / DIVERGED).read_text(encoding="utf-8"))["reason"]
        return Outcome(None, reason)
    if (folder / "eval.json").exists():
        return Outcome(read_evaluation(folder))
    return None


def outcomes(configs: Mapping[str, AnyConfig], folder: Path) -> dict[str, Outcome]:
    """Of the runs that are finished already.

    Raises:
        UserError: a run's folder holds a run with other settings, or something unreadable.
    """
    found = {key: _finished(folder / key, config) for key, config in configs.items()}
    return {key: outcome for key, outcome in found.items() if outcome is not None}


def _run_one(
    config: AnyConfig,
    folder: Path,
    device: str | None,
    backend: str | None,
    finish: Callable[[Run], Any] | None,
    trained: bool,
    quiet: bool,
) -> Outcome:
    if trained:
        done = load_run(folder, device=device, backend=backend)
        if finish is not None:
            finish(done)
        return Outcome(done.evaluation())
    try:
        done = run(config, folder, device=device, backend=backend, resume=True, quiet=quiet)
    except Diverged as error:
        write_bytes(folder / DIVERGED, json.dumps({"reason": str(error)}).encode())
        return Outcome(None, str(error))
    if finish is not None:
        finish(done)
    return Outcome(done.evaluation())


def _one_of_several(threads: int, *arguments: Any) -> Outcome:
    """:func:`_run_one` in a process of its own."""
    from spd_fast import _extension

    torch.set_num_threads(threads)
    _extension.keep_freed_memory()
    return _run_one(*arguments)


def run_grid(
    configs: Mapping[str, AnyConfig],
    folder: Path,
    *,
    label: str,
    device: str | None = None,
    backend: str | None = None,
    jobs: int = 1,
    finish: Callable[[Run], Any] | None = None,
    unfinished: Callable[[Path], bool] | None = None,
    quiet: bool = False,
) -> dict[str, Outcome]:
    """Carry out every run (key → configuration) in ``folder/KEY``.

    A run that diverges is an outcome too; it is not tried again.

    Args:
        jobs: runs side by side, each in a process of its own with its share of the threads.
        finish: called with every newly finished run (its report, say); with several jobs, in the
            run's process.
        unfinished: whether what ``finish`` writes last is missing from a run's folder: then it is
            called again, for a run that was killed on the way there.

    Raises:
        UserError: bad input, found before the first run.
    """
    chosen = check_device(device, backend)
    if jobs < 1:
        raise UserError(f"--jobs needs at least 1, got {jobs}")
    if jobs > 1 and chosen.type == "cuda":
        raise UserError("--jobs shares out the CPU's threads; on a GPU run one after another")
    found = outcomes(configs, folder)
    trained = [
        key
        for key, outcome in found.items()
        if unfinished is not None and outcome.evaluation is not None and unfinished(folder / key)
    ]
    arguments = {
        key: (config, folder / key, device, backend, finish, key in trained)
        for key, config in configs.items()
        if key not in found or key in trained
    }
    for key in trained:
        del found[key]
    with Progress(label, len(configs), len(found), quiet=quiet, interval=0) as progress:
        done = (
            ((key, _run_one(*given, quiet)) for key, given in arguments.items())
            if jobs == 1
            else _side_by_side(arguments, jobs)
        )
        for key, outcome in done:
            found[key] = outcome
            progress.update(len(found), f"{key}: {_said(outcome)}")
    return {key: found[key] for key in configs}


def _side_by_side(
    arguments: Mapping[str, tuple[Any, ...]], jobs: int
) -> Iterator[tuple[str, Outcome]]:
    threads = max((os.cpu_count() or 1) // jobs, 1)
    # A fresh interpreter: a forked one would inherit threads and locks of this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {
            pool.submit(_one_of_several, threads, *given, True): key
            for key, given in arguments.items()
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def _said(outcome: Outcome) -> str:
    if outcome.evaluation is None:
        return "diverged"
    if not outcome.evaluation["target_represents_all_features"]:
        return "target incomplete"
    return "recovered" if outcome.evaluation["recovered"] else "not recovered"
