"""How much memory a call takes, each provider in a process of its own.

    python -m bench.memory [--quick]          fused layer against C, 256 → 16,384, with the slope
    python -m bench.memory --measure NAME --provider P          one measurement, as JSON

What is counted: the process's highest resident set during one call minus its resident set right
before. The call comes after a first one, so that libraries, threads and the optimiser's state are
resident already; everything that the first call returned is dropped. So the extra memory holds what
the call creates: outputs, gradients (of parameters too), whatever is saved in between, and the
temporaries at the worst moment; inputs, parameters and optimiser state are not in it. The kernel's
own high-water mark is read (VmHWM, reset through /proc/self/clear_refs), so no peak falls between
two samples. The process runs with a fixed threshold above which malloc returns freed memory to
the system at once; by default the threshold grows, and the resident set then lags behind.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from bench.machine import ROOT, machine
from bench.problems import PROVIDERS, Problem, prepare, unavailable_reason
from bench.registry import CPU, CPU_SHAPE, OperationWorkload, Shape, Workload
from spd_fast import _extension
from spd_fast.train.progress import Progress

__all__ = ["Memory", "extra_memory", "fresh_process", "main", "measure", "slope", "supported"]

MB = 2**20
COMPONENTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
# Memory that malloc takes from the system itself, and gives back when freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
Memory = dict[str, float]


def supported() -> bool:
    """Whether this system tells a process its own high-water mark and lets it be reset."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> float:
    """Give freed memory back and forget the high-water mark; returns the resident set, in MB."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_mb("VmRSS")


def peak() -> float:
    """Highest resident set since :func:`reset_peak`, in MB."""
    return _status_mb("VmHWM")


def extra_memory(problem: Problem, calls: int = 3) -> Memory:
    """Extra and peak resident memory of a call in this process: medians, in MB."""
    problem.call()
    extra, highest = [], []
    for _ in range(calls):
        problem.clear()
        gc.collect()
        before = reset_peak()
        problem.call()
        highest.append(peak())
        extra.append(highest[-1] - before)
    return {"extra_mb": statistics.median(extra), "peak_mb": statistics.median(highest)}


def _named(name: str, components: int | None, quick: bool) -> Workload:
    workload = CPU[name]
    if quick:
        workload = workload.small()
    if components is not None:
        assert isinstance(workload, OperationWorkload)
        workload = replace(workload, shape=replace(workload.shape, C=components))
    return workload


def measure(name: str, provider: str, *, components: int | None = None, quick: bool) -> Memory:
    """In this process: see the module's docstring for what is counted."""
    calls = 1 if name.startswith("resid_mlp3") else 3
    return extra_memory(prepare(_named(name, components, quick), provider), calls)


def fresh_process(
    name: str,
    provider: str,
    *,
    components: int | None = None,
    quick: bool = False,
    keep_freed: bool = False,
) -> Memory:
    """:func:`measure` in a process of its own; ``keep_freed``: with malloc as in `spd-fast run`.

    Raises:
        RuntimeError: it failed; the last line of what it said.
    """
    command = [sys.executable, "-m", "bench.memory", "--measure", name, "--provider", provider]
    if components is not None:
        command += ["--components", str(components)]
    if quick:
        command.append("--quick")
    if keep_freed:
        command.append("--keep-freed-memory")
    environment = os.environ | ({} if keep_freed else MALLOC)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{said[-1]} (exit status {done.returncode})")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _parameter_gradients_mb(shape: Shape) -> float:
    """Gradients of V, U, the gate and the bias, float32."""
    per_component = shape.d_in + shape.d_out + 3 * shape.hidden + 1
    return 4 * (shape.C * per_component + shape.d_out) / MB


def _eager_estimate_mb(shape: Shape) -> float:
    # Kept for backward: z and GELU(z) [N, C, hidden]; in backward two more of that size.
    return 4 * 4 * shape.N * shape.C * shape.hidden / MB


def _available_mb() -> float:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return float("inf")


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of y over x."""
    x = [p[0] for p in points]
    y = [p[1] for p in points]
    return statistics.linear_regression(x, y).slope


def sweep(providers: list[str], quick: bool) -> list[dict[str, str]]:
    """Extra memory of the fused layer, forward and backward, for every C: one row each. The cpu's
    streaming mode is a curve of its own."""
    counts = (32, 64, 128) if quick else COMPONENTS
    rows = []
    where = machine()
    curves = [(p, "layer", p) for p in providers]
    if "cpu" in providers:
        curves.append(("cpu streamed", "layer_streamed", "cpu"))
    with Progress("memory", len(counts) * len(curves)) as progress:
        for i, (C, (name, workload, provider)) in enumerate((c, v) for v in curves for c in counts):
            shape = replace(CPU_SHAPE.small() if quick else CPU_SHAPE, C=C)
            row = {
                "workload": workload, "provider": name, "N": shape.N, "d_in": shape.d_in,
                "d_out": shape.d_out, "C": C, "hidden": shape.hidden, "extra_mb": "",
                "parameter_gradients_mb": f"{_parameter_gradients_mb(shape):.3f}",
                "status": "measured",
            }  # fmt: skip
            needs = _eager_estimate_mb(shape) if provider == "reference" else 0.0
            if needs > 0.7 * _available_mb():
                row["status"] = f"not run: eager would need about {needs / 1024:.0f} GB"
            else:
                memory = fresh_process(workload, provider, components=C, quick=quick)
                row["extra_mb"] = f"{memory['extra_mb']:.3f}"
            rows.append({k: str(v) for k, v in row.items()} | where)
            progress.update(i + 1, f"{name}, C = {C}")
    return rows


def _print(rows: list[dict[str, str]]) -> None:
    N = int(rows[0]["N"])
    print(f"extra memory of the fused layer, forward and backward, N = {N}, float32, in MB")
    print(f"{'provider':<12}{'C':>7}{'extra':>12}{'without parameter gradients':>30}")
    for row in rows:
        if not row["extra_mb"]:
            print(f"{row['provider']:<12}{row['C']:>7}   {row['status']}")
            continue
        rest = float(row["extra_mb"]) - float(row["parameter_gradients_mb"])
        print(f"{row['provider']:<12}{row['C']:>7}{float(row['extra_mb']):>12.1f}{rest:>30.1f}")
    for provider, per_component in slopes(rows).items():
        print(
            f"{provider}: {per_component:,.0f} bytes per component without parameter gradients = "
            f"{per_component / (4 * N):.2f} tensors [N, C] of float32 (4 N = {4 * N:,} bytes)"
        )


def slopes(rows: list[dict[str, str]]) -> dict[str, float]:
    """Provider → bytes per component, parameter gradients aside."""
    found = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = [
            (
                float(r["C"]),
                MB * (float(r["extra_mb"]) - float(r["parameter_gradients_mb"])),
            )
            for r in rows
            if r["provider"] == provider and r["extra_mb"]
        ]
        if len(points) > 1:
            found[provider] = slope(points)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["reference", "cpu"])
    parser.add_argument("--out", type=Path, help="CSV (default bench/results/memory.csv)")
    parser.add_argument("--measure", choices=CPU, help="only this workload, as JSON")
    parser.add_argument("--provider", choices=PROVIDERS, help="with --measure")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="with --measure: malloc as in spd-fast run"
    )
    parser.add_argument("--components", type=int, help="with --measure: another C")
    options = parser.parse_args(arguments)
    if not supported():
        parser.error("needs /proc/self/clear_refs (Linux) to read a process's peak memory")
    if options.measure:
        if options.provider is None:
            parser.error("--measure needs --provider")
        if options.keep_freed_memory:
            _extension.keep_freed_memory()
        quick, components = options.quick, options.components
        memory = measure(options.measure, options.provider, components=components, quick=quick)
        print(json.dumps(memory))
        return 0
    providers = []
    for provider in options.providers:
        if reason := unavailable_reason(provider):
            print(f"{provider}: not available: {reason}")
        else:
            providers.append(provider)
    rows = sweep(providers, options.quick)
    default = ROOT / "bench/results" / ("quick-memory.csv" if options.quick else "memory.csv")
    out = options.out or default
    with out.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    _print(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
