"""Plots of what bench.gpu wrote: speed over eager, and memory, at every workload."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw"]

COLOURS = {
    "eager": "#8a8f98", "torch.compile": "#d98e3f", "spd_fast": "#3a9d6a",
    "spd_fast, captured": "#2f6db3",
}  # fmt: skip


def draw(table: Path, folder: Path) -> list[Path]:
    """gpu_speed.png and gpu_memory.png of the CSV ``table``; its conditions stand under each."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    full = [r for r in rows if r["passes"] in ("fwd+bwd", "step")]
    eager = {r["workload"]: r for r in full if r["variant"] == "eager" and _number(r["ms"])}
    speed = [
        (r["workload"], r["variant"], float(eager[r["workload"]]["ms"]) / float(r["ms"]))
        for r in full
        if r["workload"] in eager and _number(r["ms"])
    ]
    memory = [(r["workload"], r["variant"], float(r["extra_mb"])) for r in full if r["extra_mb"]]
    where = rows[0]
    conditions = (
        f"{where['gpu']}, bf16 layers, torch {where['torch']}, triton {where['triton']}, python "
        f"{where['python']}, {where['commit']}, {where['started'][:10]}"
    )
    return [
        _bars(speed, "times eager's speed, forward and backward", conditions,
              folder / "gpu_speed.png"),
        _bars(memory, "MB beyond the inputs", conditions, folder / "gpu_memory.png"),
    ]  # fmt: skip


def _number(cell: str) -> bool:
    """Whether a time: a variant that failed has its reason there."""
    try:
        return float(cell) > 0
    except ValueError:
        return False


def _bars(values: list[tuple[str, str, float]], label: str, conditions: str, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(9, 4))
    workloads = list(dict.fromkeys(v[0] for v in values))
    variants = [v for v in COLOURS if any(row[1] == v for row in values)]
    width = 0.8 / max(len(variants), 1)
    for i, variant in enumerate(variants):
        own = {name: value for name, other, value in values if other == variant}
        places = [workloads.index(w) + (i - (len(variants) - 1) / 2) * width for w in own]
        bars = axes.bar(places, list(own.values()), width, color=COLOURS[variant], label=variant)
        axes.bar_label(bars, [format(v, ".3g") for v in own.values()], fontsize=6, padding=1)
    axes.set_xticks(range(len(workloads)), workloads, fontsize=8, rotation=15, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if variants:
        axes.legend(frameon=False, fontsize=8)
    figure.text(0.01, 0.01, conditions, fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
