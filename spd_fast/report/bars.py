"""Figures of one number a row: reconstruction and faithfulness, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from spd_fast.report.style import axes_at, color, figure, power_of_ten, style

__all__ = ["faithfulness", "reconstruction"]

ROW = 24


def _bars(values: Mapping[str, float], label: str, anchor: str | None, top: float) -> Figure:
    """A lollipop a row, on a logarithmic axis from below the smallest value up to ``top``; zeros
    lie on the left edge. ``anchor`` is the row drawn in grey, as a yardstick."""
    names = list(values)
    left = min(24 + 5.6 * max(map(len, names)), 150)
    fig = figure(360, 56 + ROW * len(names))
    ax = style(axes_at(fig, left, 42, 340 - left, ROW * len(names)), grid="x")
    positive = [v for v in values.values() if v > 0] or [top]
    high = 10.0 ** np.ceil(np.log10(max([top, *positive])))
    low = min(10.0 ** np.floor(np.log10(min(positive) / 2)), high / 100)
    for y, name in enumerate(reversed(names)):
        shade = color("muted" if name == anchor else "s0")
        value = max(values[name], low)
        ax.hlines(y, low, value, color=shade, linewidth=2.2)
        ax.plot([value], [y], "o", color=shade, markersize=6, clip_on=False)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(LogLocator(numticks=6))
    ax.xaxis.set_major_formatter(FuncFormatter(power_of_ten))
    ax.minorticks_off()
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_yticks(range(len(names)), names[::-1])
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(label)
    return fig


def reconstruction(values: Mapping[str, float], anchor: str, unit: str) -> Figure:
    """Divergence from the target's output under each mask."""
    return _bars(values, f"{unit} to the target's output", anchor, max(values.values()))


def faithfulness(relative: Mapping[str, float]) -> Figure:
    """‖W − (V U)ᵀ‖ / ‖W‖ of every site."""
    return _bars(relative, "‖W − Σ components‖ / ‖W‖", None, 1.0)
