"""What does a step cost as components and networks grow, until memory ends?

APD, SPD as plain eager PyTorch (the backend ``reference``, which materialises everything) and
spd_fast, on toy models of superposition: against the number of components of tms_40-10, and
against the width of the network. Every cell is measured in a process of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.experiments import configuration, recipe
from spd_fast.experiments.runs import check_device, environment
from spd_fast.report.style import axes_at, color, figure, log_axis, series, style
from spd_fast.studies.measure import available_memory_mb, measure
from spd_fast.studies.study import Options, Row, check_folder, write_results
from spd_fast.train import set_keys
from spd_fast.train.progress import Progress

__all__ = ["METHODS", "SERIES", "SIZES", "check_memory", "scaling", "settings", "slope"]

BATCH = 2048
FEATURES, HIDDEN = 40, 10
# Method → (prefix of the recipe's name, backend).
METHODS: dict[str, tuple[str, str | None]] = {
    "APD": ("apd/", "auto"),
    "eager SPD": ("", "reference"),
    "spd_fast": ("", "auto"),
}
SERIES = ("components", "width")
SIZES = tuple(2**k for k in range(15))
QUICK_SIZES = (1, 4)
# Components per feature in the width series: the published recipes of tms_40-10.
PER_FEATURE = {"APD": 50 / 40, "eager SPD": 200 / 40, "spd_fast": 200 / 40}
# Of the machine's free memory, what a cell may take; the rest is the system's.
SHARE = 0.8
SECONDS = 900.0


def settings(method: str, series_name: str, size: int) -> dict[str, Any]:
    """The run of one cell. ``components``: tms_40-10 with 40 · size components for every method.
    ``width``: a network of size times as many features and hidden dimensions, with the published
    number of components per feature."""
    prefix, _ = METHODS[method]
    if series_name == "components":
        features, hidden, components = FEATURES, HIDDEN, FEATURES * size
    else:
        features, hidden = FEATURES * size, HIDDEN * size
        components = round(PER_FEATURE[method] * features)
    data = set_keys(
        recipe(f"{prefix}tms_40-10"),
        [f"target.features={features}", f"target.hidden={hidden}", f"batch_size={BATCH}"],
    )
    if prefix:
        return data | {"components": components}
    return data | {"sites": {"linear1": components, "linear2": components}}


@dataclass(frozen=True)
class _Cell:
    method: str
    series: str
    size: int

    @property
    def key(self) -> str:
        return f"{self.series}-{self.method.replace(' ', '_')}-{self.size}"


def _row(cell: _Cell, answer: dict[str, Any]) -> Row:
    config = settings(cell.method, cell.series, cell.size)
    components = config["components"] if "components" in config else config["sites"]["linear1"]
    return {
        "series": cell.series,
        "method": cell.method,
        "size": cell.size,
        "components": components,
        "features": config["target"]["features"],
        "hidden": config["target"]["hidden"],
        "batch_size": config["batch_size"],
        **{
            key: answer.get(key)
            for key in ("status", "ms", "cpu_ms", "peak_mb", "bare_mb", "steps", "threads")
        },
    }


def check_memory(memory_mb: float | None) -> None:
    """Raise UserError unless ``memory_mb`` is left open or a positive number."""
    if memory_mb is not None and not 0 < memory_mb < math.inf:
        raise UserError(f"--memory-mb needs to be positive, got {memory_mb:g}")


def scaling(
    options: Options,
    *,
    memory_mb: float | None = None,
    seconds: float = SECONDS,
    take: Callable[..., dict[str, Any]] = measure,
) -> list[Path]:
    """Measure what is missing, then write ``scaling.csv`` and ``scaling.png``.

    A method's series ends with the first size that runs out of memory or time.

    Args:
        memory_mb: what a cell may hold; by default four fifths of what is free.
        seconds: for one cell. take: what measures a cell.

    Raises:
        UserError: bad input, or a cell that fails for another reason than memory or time.
    """
    chosen = check_device(options.device, options.backend)
    if options.backend is not None:
        raise UserError("study scaling compares backends: leave --backend out")
    check_memory(memory_mb)
    limit = memory_mb if memory_mb is not None else SHARE * _free_mb(chosen.type)
    check_folder(options.out, "scaling")
    cells = options.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    sizes = QUICK_SIZES if options.quick else SIZES
    rows: list[Row] = []
    with Progress(
        "scaling", len(SERIES) * len(METHODS) * len(sizes), quiet=options.quiet, interval=0
    ) as progress:
        done = 0
        for name in SERIES:
            for method, (_, backend) in METHODS.items():
                for i, size in enumerate(sizes):
                    cell = _Cell(method, name, size)
                    path = cells / f"{cell.key}.json"
                    if path.exists():
                        answer = json.loads(path.read_text(encoding="utf-8"))
                    else:
                        config = settings(method, name, size)
                        configuration(config)
                        answer = take(
                            config, backend=backend, device=options.device, memory_mb=limit,
                            seconds=seconds,
                            before=settings(method, "components", 1) | {"batch_size": 64},
                        )  # fmt: skip
                        if answer["status"].startswith("failed"):
                            raise UserError(f"{cell.key}: {answer['status']}")
                        answer |= {"environment": environment(), "memory_limit_mb": limit}
                        write_bytes(path, (json.dumps(answer, indent=2) + "\n").encode())
                    rows.append(_row(cell, answer))
                    done += 1
                    ended = answer["status"] != "ok"
                    if ended:
                        done += len(sizes) - i - 1
                    progress.update(done, f"{cell.key}: {answer['status']}")
                    if ended:
                        break
    return write_results("scaling", rows, lambda: _draw(rows), options.out)


def _free_mb(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / 2**20
    return available_memory_mb()


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Exponent s of value ~ size^s: least squares in logarithms over the upper half of the sizes,
    at least three of them; None where there are fewer."""
    if len(sizes) < 3:
        return None
    most = max(3, -(-len(sizes) // 2))
    x, y = np.log(sizes[-most:]), np.log(values[-most:])
    return float(np.polyfit(x, y, 1)[0])


def _panel(ax: Axes, rows: list[Row], name: str, key: str) -> None:
    against = "components" if name == "components" else "features"
    for i, method in enumerate(METHODS):
        mine = [r for r in rows if (r["series"], r["method"]) == (name, method)]
        ok = [r for r in mine if r["status"] == "ok" and r[key] > 0]
        if not ok:
            continue
        x, y = [r[against] for r in ok], [r[key] for r in ok]
        exponent = slope(x, y)
        label = f"{method}" if exponent is None else f"{method}: slope {exponent:.2f}"
        ax.plot(x, y, marker="o", markersize=3.5, label=label, **series(i))
        ended = [r for r in mine if r["status"] != "ok"]
        if ended:
            ax.annotate(
                ended[0]["status"], (x[-1], y[-1]), textcoords="offset points", xytext=(5, -3),
                fontsize=8, color=series(i)["color"],
            )  # fmt: skip
    if ax.lines:
        log_axis(ax, "x")
        log_axis(ax, "y")
        ax.legend(frameon=False, fontsize=8, labelcolor=color("ink"), loc="upper left")


def _draw(rows: list[Row]) -> Figure:
    """Time and memory of a step against components and against features, a line a method."""
    fig = figure(680, 560)
    labels = {
        "components": "components C (tms_40-10)",
        "width": "features of the network (hidden: a quarter)",
    }
    quantities = (("ms", "ms per step"), ("peak_mb", "peak memory beyond the bare process, MB"))
    for column, name in enumerate(SERIES):
        for line, (key, title) in enumerate(quantities):
            ax = style(axes_at(fig, 56 + 336 * column, 316 - 270 * line, 270, 216), grid="both")
            _panel(ax, rows, name, key)
            ax.set_xlabel(labels[name])
            ax.set_ylabel(title)
    return fig
