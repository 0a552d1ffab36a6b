"""Plots of what bench.run and bench.memory wrote: throughput, memory, memory against C.

python -m bench.plot [--run bench/results/cpu.csv] [--memory bench/results/memory.csv]
                     [--out bench/results]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.machine import ROOT
from bench.memory import MB, slopes

__all__ = ["main", "plot_components", "plot_memory", "plot_throughput"]

Rows = list[dict[str, str]]
COLOURS = {
    "reference": "#8a8f98",
    "compile": "#d98e3f",
    "cpu": "#2f6db3",
    "cpu-interpolated": "#174a80",
    "cpu streamed": "#7fb0e0",
    "triton": "#3a9d6a",
    "cuda": "#7a4fb5",
    "products": "#c9ccd1",
}
LABELS = {
    "reference": "reference (eager)",
    "compile": "torch.compile(reference)",
    "cpu": "spd_fast cpu",
    "cpu-interpolated": "spd_fast cpu, interpolated gates",
    "cpu streamed": "spd_fast cpu, streaming mode",
    "triton": "spd_fast triton",
    "cuda": "spd_fast cuda",
}


def _read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _conditions(rows: Rows) -> str:
    r = rows[0]
    return (
        f"{r['processor']}, {r['threads']} threads, torch {r['torch']}, python {r['python']}, "
        f"spd_fast {r['spd_fast']} ({r['commit']}), {r['started'][:10]}"
    )


def _save(figure: plt.Figure, rows: Rows, path: Path) -> Path:
    figure.text(0.01, 0.01, _conditions(rows), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _grouped(axes: Axes, rows: Rows, field: str, scale: float, style: str) -> None:
    """Bars by workload, one colour a provider; nothing where nothing was measured."""
    rows = [r for r in rows if r[field] and r["status"] == "right" and r["provider"] in LABELS]
    workloads = list(dict.fromkeys(r["workload"] for r in rows))
    providers = [p for p in LABELS if any(r["provider"] == p for r in rows)]
    width = 0.8 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        values = {r["workload"]: float(r[field]) * scale for r in rows if r["provider"] == provider}
        places = [workloads.index(w) + (i - (len(providers) - 1) / 2) * width for w in values]
        bars = axes.bar(
            places, list(values.values()), width, color=COLOURS[provider], label=LABELS[provider]
        )
        axes.bar_label(bars, [format(v, style) for v in values.values()], fontsize=6, padding=1)
    axes.set_xticks(range(len(workloads)), workloads, rotation=20, ha="right", fontsize=8)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def plot_throughput(rows: Rows, path: Path) -> Path:
    """Calls per second of every workload."""
    figure, axes = plt.subplots(figsize=(9, 4))
    rate = [
        {**r, "per_second": f"{1e3 / float(r['median_ms'])}" if r["median_ms"] else ""}
        for r in rows
    ]
    _grouped(axes, rate, "per_second", 1.0, ".3g")
    axes.set_ylabel("steps (calls) per second")
    axes.set_title(
        "Throughput: training steps and fused operations (higher is better)", fontsize=10
    )
    return _save(figure, rows, path)


def plot_memory(rows: Rows, path: Path) -> Path:
    """Extra memory of every workload."""
    figure, axes = plt.subplots(figsize=(9, 4))
    _grouped(axes, rows, "extra_mb", 1.0, ".3g")
    axes.set_ylabel("MB beyond resident inputs")
    axes.set_title("Memory that one step (call) adds (lower is better)", fontsize=10)
    return _save(figure, rows, path)


def plot_components(rows: Rows, path: Path) -> Path:
    """Extra memory of the fused layer against C, parameter gradients aside, beside one [N, C]."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    N = int(rows[0]["N"])
    per_component = slopes(rows)
    for provider in dict.fromkeys(r["provider"] for r in rows):
        measured = [r for r in rows if r["provider"] == provider and r["extra_mb"]]
        if not measured:
            continue
        rest = [float(r["extra_mb"]) - float(r["parameter_gradients_mb"]) for r in measured]
        label = LABELS.get(provider, provider)
        if provider in per_component:
            label += f": {per_component[provider] / (4 * N):.2f} tensors [N, C]"
        counts = [int(r["C"]) for r in measured]
        axes.plot(counts, rest, "o-", color=COLOURS.get(provider), label=label)
    counts = sorted({int(r["C"]) for r in rows})
    one = [4 * N * c / MB for c in counts]
    axes.plot(counts, one, "--", color="black", lw=1, label=f"one [N, C] tensor: {4 * N:,} bytes/C")
    axes.set(xscale="log", yscale="log", xlabel="components C", ylabel="MB beyond resident inputs")
    axes.set_xticks(counts, [f"{c:,}" for c in counts], fontsize=8)
    axes.minorticks_off()
    r = rows[0]
    axes.set_title(
        f"Fused layer, forward and backward, N {N}, {r['d_in']} → {r['d_out']}, gate {r['hidden']}"
        "\nwithout parameter gradients",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, rows, path)


def main(arguments: list[str] | None = None) -> int:
    results = ROOT / "bench/results"
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--run", type=Path, default=results / "cpu.csv")
    parser.add_argument("--memory", type=Path, default=results / "memory.csv")
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args(arguments)
    drawn = []
    if options.run.exists():
        rows = _read(options.run)
        drawn.append(plot_throughput(rows, options.out / "throughput.png"))
        if any(r["extra_mb"] for r in rows):
            drawn.append(plot_memory(rows, options.out / "memory.png"))
    if options.memory.exists():
        drawn.append(plot_components(_read(options.memory), options.out / "memory_components.png"))
    if not drawn:
        parser.error("nothing to plot: run `python -m bench.run` or `python -m bench.memory` first")
    for path in drawn:
        print(path.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
