"""Figures of causal importances: permuted matrices, sorted means, histograms."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from spd_fast.evaluate.ground_truth import OFF, ON, Expected
from spd_fast.report.facts import Facts
from spd_fast.report.style import (
    FONT_SIZE,
    SEQUENTIAL,
    axes_at,
    bare,
    color,
    few_ticks,
    figure,
    legend_below,
    log_axis,
    power_of_ten,
    series,
    style,
)

__all__ = ["contradictions", "histogram", "matrix", "shown_columns", "sorted_means"]

MAX_MARKS = 400
# Mean importances below it are drawn on the lower edge of the logarithmic axis.
LEAST = 1e-6
Matrix = NDArray[np.floating]


def contradictions(ordered: Matrix, expected: Expected) -> list[tuple[int, int]]:
    """(row, column) of every entry of a permuted matrix that the ground-truth check counts. A
    column of a dense pattern without a large value is marked at its largest."""
    k = expected.components
    if expected.pattern == "identity":
        diagonal = np.eye(*ordered.shape) == 1
        wrong = np.where(diagonal, ordered < ON, ordered > OFF)
    else:
        wrong = np.zeros(ordered.shape, dtype=bool)
        for column in range(min(k, ordered.shape[1])):
            if (ordered[:, column] < ON).all():
                wrong[ordered[:, column].argmax(), column] = True
        wrong[:, k:] = ordered[:, k:] > OFF
    return [(int(r), int(c)) for r, c in np.argwhere(wrong)]


def shown_columns(ordered: Matrix, expected: Expected | None) -> int:
    """How many columns to draw: the known mechanisms, some more, and all that are ever on."""
    k = expected.components if expected is not None else 0
    on = np.flatnonzero((ordered > OFF).any(axis=0))
    wanted = max(k + max(k // 4, 3), int(on[-1]) + 2 if on.size else 0)
    return min(ordered.shape[1], wanted)


def colorbar(fig: Figure, left: float, bottom: float, height: float, top: str = "1") -> None:
    """A key to a sequential heat map, 0 at the bottom."""
    ax = bare(axes_at(fig, left, bottom, 9, height))
    ax.imshow(
        np.linspace(0, 1, 64)[:, None], cmap=SEQUENTIAL, aspect="auto", origin="lower",
        interpolation="none", extent=(0, 1, 0, 1),
    )  # fmt: skip
    ax.yaxis.tick_right()
    ax.set_yticks([0, 1], ["0", top])


def _index_ticks(ax: Axes, rows: int, columns: int) -> None:
    for axis, n in ((ax.xaxis, columns), (ax.yaxis, rows)):
        every = max(1, int(np.ceil(n / 8)))
        every = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if s >= every)
        axis.set_ticks(range(0, n, every))


def matrix(importances: Matrix, expected: Expected | None) -> Figure:
    """Lower importances [features, components] of the single-feature probes, columns permuted
    into the expected pattern; contradicting entries are framed."""
    if expected is None:
        order = np.argsort(-importances.sum(axis=0), kind="stable")
    else:
        order = expected.permute(importances)
    ordered = importances[:, order]
    columns, rows = shown_columns(ordered, expected), ordered.shape[0]
    cell = min(272 / columns, 250 / rows, 24)
    # Very wide or tall matrices keep a readable side: cells need not be square there.
    width, height = max(cell * columns, 120), max(cell * rows, 60)
    fig = figure(360, height + 44)
    ax = bare(axes_at(fig, 48, 36, width, height))
    ax.imshow(
        ordered[:, :columns], cmap=SEQUENTIAL, norm=Normalize(0, 1), aspect="auto",
        interpolation="none",
    )  # fmt: skip
    if expected is not None:
        wrong = contradictions(ordered, expected)
        if 0 < len(wrong) <= MAX_MARKS:
            side = min(width / columns, height / rows)
            ys, xs = zip(*wrong, strict=True)
            ax.plot(
                xs, ys, "s", markersize=max(0.72 * side, 1.6), markerfacecolor="none",
                markeredgecolor=color("bad"), markeredgewidth=1.3 if side > 8 else 0.7,
            )  # fmt: skip
        if expected.components < columns:
            ax.axvline(
                expected.components - 0.5, color=color("muted"), linewidth=0.9,
                linestyle=(0, (2, 2)),
            )  # fmt: skip
    _index_ticks(ax, rows, columns)
    ax.set_xlabel("component (permuted)", color=color("ink"))
    ax.set_ylabel("probed feature", color=color("ink"))
    colorbar(fig, 48 + width + 10, 36, height)
    return fig


def sorted_means(facts: Facts, *, log: bool) -> Figure:
    """Mean importance of every component, largest first, a line a site."""
    legend = 14.5 * -(-len(facts.sites) // 2) + 4
    fig = figure(360, 190 + legend + 20)
    ax = style(axes_at(fig, 48, legend + 38, 300, 158))
    largest, widest = 0.0, 1
    for i, name in enumerate(facts.sites):
        means = np.sort(facts.activity[name].mean)[::-1]
        if log:
            means = np.maximum(means, LEAST)
        look = series(i) | {"linewidth": 1.2, "markersize": 2.6 if means.size <= 60 else 1.4}
        ax.plot(np.arange(1, means.size + 1), means, marker="o", label=name, **look)
        largest, widest = (
            max(largest, float(means.max())),
            max(widest, means.size),
        )
    known = sorted({e.components for n, e in facts.expected.items() if n in facts.activity})
    for components in known:
        ax.axvline(components + 0.5, color=color("muted"), linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set_xlim(0, widest + 1)
    few_ticks(ax.xaxis, 6, integer=True)
    if log:
        ax.set_ylim(LEAST, largest)
        log_axis(ax)
    else:
        ax.set_ylim(0, 1.08 * max(largest, 1e-6))
        few_ticks(ax.yaxis, 5)
    ax.set_xlabel("component, by rank")
    ax.set_ylabel("mean importance")
    legend_below(fig, ax)
    return fig


def histogram(counts: NDArray[np.integer]) -> Figure:
    """All importances of one site over data, counts on a logarithmic axis."""
    fig = figure(360, 170)
    ax = style(axes_at(fig, 48, 38, 300, 118))
    edges = np.linspace(0, 1, counts.size + 1)
    # A logarithmic axis has no zero: bars start at one half, below a single value.
    ax.stairs(
        np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=color("s0"), linewidth=0
    )
    ax.set_yscale("log")
    ax.set_ylim(0.5, 2.0 * max(float(counts.max()), 1.0))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
    ax.set_xlim(0, 1)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_xlabel("causal importance g")
    ax.set_ylabel("values")
    ax.yaxis.label.set_fontsize(FONT_SIZE)
    return fig
