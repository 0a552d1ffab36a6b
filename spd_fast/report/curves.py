"""Figures over training time: losses, schedules, sparsity, speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from spd_fast.report.facts import Facts
from spd_fast.report.style import (
    FONT_SIZE,
    axes_at,
    color,
    few_ticks,
    figure,
    legend_below,
    log_axis,
    series,
    steps_axis,
    style,
)
from spd_fast.train.config import LoopConfig

__all__ = ["live", "losses", "plot_l0", "plot_losses", "schedules", "site_l0", "speed"]

MAX_POINTS = 500


class Logged(Protocol):
    """A run of any kind: its log and its configuration."""

    @property
    def metrics(self) -> list[dict[str, Any]]: ...

    @property
    def config(self) -> LoopConfig: ...


LOSS_NAMES = {
    "total": "total (weighted)",
    "faithfulness": "faithfulness",
    "stochastic_recon": "stochastic recon",
    "stochastic_recon_layerwise": "layerwise recon",
    "ci_masked_recon": "CI-masked recon",
    "importance_minimality": "importance minimality",
    "topk_recon": "reconstruction, kept alone",
    "schatten": "Schatten simplicity",
    "activation_recon": "activation reconstruction",
}


def _thin(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_POINTS log lines, evenly spaced, the last among them."""
    if len(lines) <= MAX_POINTS:
        return list(lines)
    picks = np.linspace(0, len(lines) - 1, MAX_POINTS).round().astype(int)
    return [lines[i] for i in picks]


def _plot(ax: Axes, x: Sequence[float], y: Sequence[float], label: str, index: int) -> None:
    look = series(index) | {"linewidth": 1.3}
    if len(x) == 1:
        look |= {"marker": "o", "markersize": 5, "linestyle": "none"}
    ax.plot(x, y, label=label, **look)


def _empty(ax: Axes) -> None:
    ax.text(
        0.5, 0.5, "nothing was logged", transform=ax.transAxes, ha="center", color=color("muted")
    )


def _rows(lines: int, columns: int) -> float:
    """Height of a legend."""
    return 14.5 * -(-lines // columns) + 4


def _frame(lines: int, columns: int = 2, height: float = 170) -> tuple[Figure, Axes]:
    """Axes above a legend of this many lines."""
    legend = _rows(lines, columns)
    fig = figure(360, height + legend + 50)
    return fig, style(axes_at(fig, 48, legend + 38, 300, height))


def _loss_names(metrics: Sequence[dict[str, Any]]) -> list[str]:
    found = metrics[-1]["losses"] if metrics else {}
    names = [n for n in LOSS_NAMES if n in found]
    return names + [n for n in found if n not in names]


def plot_losses(ax: Axes, lines: Sequence[dict[str, Any]]) -> None:
    """Every loss of a log over time, unweighted, and their weighted total."""
    metrics = _thin(lines)
    steps = [m["step"] for m in metrics]
    names = _loss_names(metrics)
    for i, name in enumerate(names):
        values = [m["losses"].get(name, np.nan) for m in metrics]
        # Zero has no place on a logarithmic axis.
        _plot(ax, steps, [v if v > 0 else np.nan for v in values], LOSS_NAMES.get(name, name), i)
    if names:
        log_axis(ax)
    else:
        _empty(ax)
    ax.set_ylabel("loss")


def losses(facts: Logged) -> Figure:
    """Every loss over time, unweighted, and their weighted total."""
    fig, ax = _frame(len(_loss_names(facts.metrics)))
    plot_losses(ax, facts.metrics)
    steps_axis(ax, facts.config.steps)
    legend_below(fig, ax)
    return fig


def schedules(facts: Facts) -> Figure:
    """Learning rate, and the exponent p of the importance penalty."""
    fig = figure(360, 258)
    upper = style(axes_at(fig, 48, 148, 300, 90))
    lower = style(axes_at(fig, 48, 38, 300, 90))
    metrics = _thin(facts.metrics)
    steps = [m["step"] for m in metrics]
    for i, (ax, key, label) in enumerate(
        ((upper, "lr", "learning rate"), (lower, "p", "exponent p"))
    ):
        values = [m[key] for m in metrics]
        if values:
            _plot(ax, steps, values, label, 0)
        else:
            _empty(ax)
        ax.set_ylim(0, 1.12 * max([*values, 1e-12]))
        few_ticks(ax.yaxis, 4)
        ax.set_title(label, loc="left", fontsize=FONT_SIZE, color=color("ink"), pad=4)
        steps_axis(ax, facts.config.steps, label=i == 1)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    return fig


def _per_site(
    lines: Sequence[dict[str, Any]], sites: Iterable[str], key: str
) -> tuple[list[int], Mapping[str, list[float]]]:
    metrics = _thin(lines)
    values = {n: [m[key].get(n, np.nan) for m in metrics] for n in sites}
    return [m["step"] for m in metrics], values


def plot_l0(
    ax: Axes, lines: Sequence[dict[str, Any]], sites: Iterable[str], floor: float | None = None
) -> None:
    """Active components per sample at every site; ``floor`` is what the data alone asks for."""
    steps, values = _per_site(lines, sites, "l0")
    for i, (name, ys) in enumerate(values.items()):
        _plot(ax, steps, [y if y > 0 else np.nan for y in ys], name, i)
    if floor is not None:
        ax.axhline(
            floor, color=color("ink"), linewidth=0.9, linestyle=(0, (2, 2)),
            label=f"active features: {floor:.3g}",
        )  # fmt: skip
    if steps:
        log_axis(ax)
        low, high = ax.get_ylim()
        if high / low <= 100:  # few decades: also label 2 and 5
            ax.set_yticks(
                [t for d in (low, low * 10) for t in (d, 2 * d, 5 * d) if t <= high],
                minor=False,
            )
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        _empty(ax)
    ax.set_ylabel("active components per sample")


def site_l0(facts: Facts, floor: float | None) -> Figure:
    """Active components per sample at every site; ``floor`` is what the data alone asks for."""
    fig, ax = _frame(len(facts.sites) + (floor is not None))
    plot_l0(ax, facts.metrics, facts.sites, floor)
    steps_axis(ax, facts.config.steps)
    legend_below(fig, ax)
    return fig


def live(facts: Facts) -> Figure:
    """Components active anywhere in the batch, with the known number as a dotted line."""
    fig, ax = _frame(len(facts.sites))
    steps, values = _per_site(facts.metrics, facts.sites, "live")
    for i, (name, ys) in enumerate(values.items()):
        _plot(ax, steps, ys, name, i)
        if name in facts.expected:
            ax.axhline(
                facts.expected[name].components, color=series(i)["color"], linewidth=0.9,
                linestyle=(0, (2, 2)),
            )  # fmt: skip
    if not steps:
        _empty(ax)
    known = [e.components for e in facts.expected.values()]
    highest = max([1, *known, *(y for ys in values.values() for y in ys)])
    ax.set_ylim(0, 1.08 * highest)
    few_ticks(ax.yaxis, 6, integer=True)
    ax.set_ylabel("live components")
    steps_axis(ax, facts.config.steps)
    legend_below(fig, ax)
    return fig


def speed(facts: Facts) -> Figure:
    """Milliseconds per training step."""
    fig = figure(360, 190)
    ax = style(axes_at(fig, 48, 38, 300, 136))
    metrics = _thin(facts.metrics)
    values = [m["ms_per_step"] for m in metrics]
    if values:
        _plot(ax, [m["step"] for m in metrics], values, "", 0)
    else:
        _empty(ax)
    ax.set_ylim(0, 1.12 * max([*values, 1e-3]))
    few_ticks(ax.yaxis, 5)
    ax.set_ylabel("time per step [ms]")
    steps_axis(ax, facts.config.steps)
    return fig
