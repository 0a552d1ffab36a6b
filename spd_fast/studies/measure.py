"""One measurement of a training step, by ``python -m spd_fast.studies.measure``.

Reads a request from standard input, prints the answer as a line of JSON. A process of its own,
because only then is its peak memory that of the one thing it did, and running out of memory ends
it alone.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["available_memory_mb", "measure"]

# Steps before the clock starts: threads, caches and the optimiser's moments come into being.
WARM_STEPS = 1
MOST_STEPS = 20
# A cell stops measuring after about this long, in seconds.
ENOUGH = 5.0


def available_memory_mb() -> float:
    """What the machine can still give, in MB; infinite where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return float("inf")
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else float("inf")


def measure(
    settings: dict[str, Any],
    *,
    backend: str | None,
    device: str | None,
    memory_mb: float,
    seconds: float,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Time and memory of a training step on an untrained target.

    Args:
        settings: of the run. memory_mb: beyond the bare process; seconds: for the whole
            measurement; what needs more of either is ended. before: settings of a small run that
            takes a step first, so that code which loads with the first step counts as bare.

    Returns:
        ``status``: "ok", "memory", "time" or what went wrong. With "ok": ``ms`` and ``cpu_ms``,
        the smallest of several steps; ``peak_mb``, the most memory held beyond ``bare_mb``, which
        the process holds before the run is built; ``steps`` and ``threads``.
    """
    request = {
        "settings": settings, "backend": backend, "device": device, "memory_mb": memory_mb,
        "before": before,
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-m", "spd_fast.studies.measure"], input=json.dumps(request),
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"status": "time"}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    # Killed from outside (9: the kernel's own guard of memory), or by a failed allocation.
    if done.returncode == -9 or _out_of_memory(done.stderr):
        return {"status": "memory"}
    said = done.stderr.strip().splitlines()
    return {"status": f"failed ({done.returncode}): {said[-1] if said else ''}"}


def _out_of_memory(text: str) -> bool:
    return bool(re.search(r"MemoryError|bad_alloc|can't allocate memory|out of memory", text, re.I))


def _limit(memory_mb: float) -> None:
    """Let allocations fail once the process holds this much more private memory than now."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        held = int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
        limit = held + int(memory_mb * 2**20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    except (OSError, TypeError, ValueError, AttributeError):
        return  # only Linux counts private memory; elsewhere the study ends with its largest size


def _status_mb(key: str) -> float:
    """A line of /proc/self/status in MB; elsewhere than on Linux the process's peak so far."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _forget_peak() -> float:
    """Begin a new peak of resident memory, for importing torch has one of its own; what the
    process holds now, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return _status_mb("VmRSS")
    except OSError:
        return _status_mb("VmHWM")


def _fastest(step: Callable[[int], Any], wait: Callable[[], Any]) -> dict[str, Any]:
    began, index = time.perf_counter(), WARM_STEPS
    wall: list[float] = []
    cpu: list[float] = []
    while index < WARM_STEPS + MOST_STEPS and (time.perf_counter() - began < ENOUGH or not wall):
        start, used = time.perf_counter(), time.process_time()
        step(index)
        wait()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        index += 1
    return {"ms": 1e3 * min(wall), "cpu_ms": 1e3 * min(cpu), "steps": len(wall)}


def _nothing() -> None:
    """There is nothing to wait for: a CPU's step is done when its call returns."""


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from spd_fast import _extension, targets
    from spd_fast.experiments import configuration
    from spd_fast.experiments.runs import check_device, make_trainer

    _extension.keep_freed_memory()
    chosen = check_device(request["device"], request["backend"])
    torch.manual_seed(0)

    def trainer_of(data: dict[str, Any]) -> Any:
        config = configuration(data)
        target = targets.make_target(config.target, config.seed).to(chosen)
        return make_trainer(config, target, None, request["backend"], quiet=True)

    if request["before"] is not None:
        trainer_of(request["before"]).train_step(0)
    cuda = chosen.type == "cuda"
    bare = 0.0 if cuda else _forget_peak()
    if cuda:
        total = torch.cuda.get_device_properties(chosen).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(request["memory_mb"] * 2**20 / total, 1.0), chosen
        )
    else:
        _limit(request["memory_mb"])
    trainer = trainer_of(request["settings"])
    wait: Callable[[], Any] = torch.cuda.synchronize if cuda else _nothing
    for index in range(WARM_STEPS):
        trainer.train_step(index)
        wait()
    found = _fastest(trainer.train_step, wait)
    peak = torch.cuda.max_memory_allocated(chosen) / 2**20 if cuda else _status_mb("VmHWM") - bare
    return {
        "status": "ok", **found, "peak_mb": peak, "bare_mb": bare,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
