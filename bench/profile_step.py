"""Time and memory of one training step, by phase and by operation.

    python -m bench.profile_step EXPERIMENT [--backend B] [--steps N] [--trace out.json]

EXPERIMENT is a shipped name or a .yaml. Phases are timed without a profiler, over several steps;
memory and operations come from one further step each, for looking at them costs time. The trace
opens in https://ui.perfetto.dev or chrome://tracing. The target is freshly initialised, untrained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from bench import memory
from bench.machine import machine
from bench.problems import step_trainer
from spd_fast import backends
from spd_fast.losses import LOSSES
from spd_fast.train import Trainer

__all__ = ["OTHER", "main", "operations", "phase_memory", "phase_times"]

OTHER = "other (Python between the phases)"
PREFIX = "phase: "
Wrapper = Callable[[str, Callable[..., Any]], Callable[..., Any]]


@contextmanager
def _wrapped_phases(trainer: Trainer, wrap: Wrapper) -> Iterator[None]:
    """Put ``wrap(phase, function)`` in place of each call that makes up a step."""
    parts: list[tuple[Any, str, str]] = [
        (trainer, "batches", "batch"),
        (trainer.model, "clean_forward", "clean forward"),
        (trainer.model, "causal_importances", "importances"),
        (torch.autograd, "backward", "backward"),
        (trainer.optimizer, "step", "optimiser"),
    ]
    with ExitStack() as stack:
        for owner, attribute, phase in parts:
            wrapped = wrap(phase, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, wrapped))
        losses = {name: wrap(f"loss {name}", LOSSES[name]) for name in trainer.coefficients}
        stack.enter_context(patch.dict(LOSSES, losses))
        yield


def phase_times(trainer: Trainer, steps: int, warm_up: int = 2) -> dict[str, float]:
    """Phase → median milliseconds per step; the rest of the step under ``OTHER``."""
    spent: dict[str, float] = {}

    def wrap(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - begin

        return timed

    for index in range(warm_up):
        trainer.train_step(index)
    samples: list[dict[str, float]] = []
    with _wrapped_phases(trainer, wrap):
        for index in range(warm_up, warm_up + steps):
            spent.clear()
            begin = time.perf_counter()
            trainer.train_step(index)
            whole = time.perf_counter() - begin
            samples.append({**spent, OTHER: whole - sum(spent.values())})
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {n: 1e3 * statistics.median(s.get(n, 0.0) for s in samples) for n in names}


def phase_memory(trainer: Trainer, index: int) -> dict[str, tuple[float, float]]:
    """Phase → (peak over the start of the step, change of what is resident), in MB."""
    found: dict[str, tuple[float, float]] = {}
    start = memory.reset_peak()

    def wrap(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def weighed(*args: Any, **kwargs: Any) -> Any:
            before = memory.reset_peak()
            result = function(*args, **kwargs)
            highest = memory.peak()
            found[phase] = (highest - start, memory.reset_peak() - before)
            return result

        return weighed

    with _wrapped_phases(trainer, wrap):
        trainer.train_step(index)
    return found


def operations(trainer: Trainer, index: int, trace: Path | None) -> list[FunctionEventAvg]:
    """Operations of one step by their own time, longest first; writes the trace if asked to."""

    def wrap(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with record_function(PREFIX + phase):
                return function(*args, **kwargs)

        return recorded

    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        _wrapped_phases(trainer, wrap),
        profile(activities=activities, profile_memory=True) as profiler,
    ):
        trainer.train_step(index)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
        _anonymise(trace)
    averages = [e for e in profiler.key_averages() if not e.key.startswith((PREFIX, "["))]
    return sorted(averages, key=lambda e: -e.self_cpu_time_total)


def _anonymise(trace: Path) -> None:
    """Take the host's name out of a trace, so that it can be shared."""
    content = json.loads(trace.read_text(encoding="utf-8"))
    content.pop("host_name", None)
    trace.write_text(json.dumps(content), encoding="utf-8")


def _print_phases(times: dict[str, float], weights: dict[str, tuple[float, float]]) -> None:
    total = sum(times.values())
    print(f"{'phase':<40}{'ms':>10}{'share':>8}{'peak MB':>10}{'kept MB':>10}")
    for name, ms in times.items():
        line = f"{name:<40}{ms:>10.3f}{ms / total:>8.0%}"
        if name in weights:
            line += f"{weights[name][0]:>10.1f}{weights[name][1]:>10.1f}"
        print(line)
    print(f"{'step (sum of medians)':<40}{total:>10.3f}")
    if weights:
        print("peak: over what is resident when the step begins; kept: resident after the phase")
    else:
        print("memory needs Linux (/proc/self/clear_refs): not measured")


def _print_operations(events: list[FunctionEventAvg], top: int) -> None:
    total = sum(e.self_cpu_time_total for e in events)
    print(f"\n{'operation':<48}{'calls':>7}{'own ms':>10}{'share':>8}{'own MB':>10}")
    for e in events[:top]:
        ms, mb = e.self_cpu_time_total / 1e3, e.self_cpu_memory_usage / memory.MB
        share = e.self_cpu_time_total / total
        print(f"{str(e.key)[:47]:<48}{e.count:>7}{ms:>10.3f}{share:>8.0%}{mb:>10.1f}")
    rest = events[top:]
    ms = sum(e.self_cpu_time_total for e in rest) / 1e3
    print(f"{f'{len(rest)} others':<48}{sum(e.count for e in rest):>7}{ms:>10.3f}")
    print("own: without the operations it calls; MB: allocated less freed, by torch's allocator")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--backend", choices=backends.BACKENDS, default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--batch", type=int, help="instead of the experiment's")
    parser.add_argument("--top", type=int, default=20, help="operations in the table")
    parser.add_argument("--trace", type=Path, help="JSON for Perfetto")
    options = parser.parse_args(arguments)
    where = machine()
    trainer = step_trainer(
        options.experiment, options.backend, device=options.device, batch=options.batch
    )
    chosen = backends.name_for(options.backend, trainer.device)
    print(f"one training step of {options.experiment}, backend {chosen}, device {options.device}")
    print(", ".join(f"{key} {value}" for key, value in where.items()) + "\n")
    times = phase_times(trainer, options.steps)
    done = options.steps + 2
    on_cpu = trainer.device.type == "cpu"
    weights = phase_memory(trainer, done) if on_cpu and memory.supported() else {}
    _print_phases(times, weights)
    _print_operations(operations(trainer, done + 1, options.trace), options.top)
    if options.trace is not None:
        print(f"\ntrace: {options.trace} (open it in https://ui.perfetto.dev)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
