"""Figures of neuron contributions (the paper, figures 6, 7, 10 and 11)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spd_fast.evaluate import NeuronContributions
from spd_fast.report.style import axes_at, color, few_ticks, figure, legend_below, series, style

__all__ = ["by_feature", "scatter"]

SHOWN_FEATURES = 10
Values = NDArray[np.floating]  # [layers, features, d_mlp]


def _limits(*values: Values) -> tuple[float, float]:
    low = min(0.0, *(float(v.min()) for v in values))
    high = max(0.0, *(float(v.max()) for v in values))
    margin = 0.05 * max(high - low, 1e-6)
    return low - margin, high + margin


def _dots(ax: Axes, values: Values) -> None:
    """Every neuron of the first features, a column a feature, a colour a layer."""
    layers, features, width = values.shape
    for layer in range(layers):
        # Neurons lie beside each other in their order, so that the two panels can be compared.
        x = np.arange(features)[:, None] + np.linspace(-0.3, 0.3, width)[None]
        ax.plot(
            x.ravel(), values[layer].ravel(), "o", markersize=2.4, alpha=0.6, markeredgewidth=0,
            color=series(layer)["color"], label=f"layer {layer + 1}",
        )  # fmt: skip
    ax.set_xlim(-0.6, features - 0.4)
    ax.set_xticks(range(features))
    few_ticks(ax.yaxis, 4)


def by_feature(found: NeuronContributions) -> Figure:
    """Contributions of every neuron to the first features: the target above, each feature's
    component below (figure 6)."""
    shown = min(SHOWN_FEATURES, found.target.shape[1])
    target, ours = (v[:, :shown].numpy(force=True) for v in (found.target, found.found))
    legend = 22 if target.shape[0] > 1 else 0
    fig = figure(360, 330 + legend)
    limits = _limits(target, ours)
    for values, bottom, name in ((target, 190, "target"), (ours, 40, "component")):
        ax = style(axes_at(fig, 52, bottom + legend, 296, 128))
        _dots(ax, values)
        ax.set_ylim(*limits)
        ax.set_ylabel(name)
    ax.set_xlabel("input feature")
    if legend:
        legend_below(fig, ax, columns=3)
    return fig


def scatter(found: NeuronContributions) -> Figure:
    """Contributions of the target along x, of each feature's component along y: every layer,
    feature and neuron (figures 7, 10 and 11)."""
    target, ours = (v.numpy(force=True) for v in (found.target, found.found))
    layers = target.shape[0]
    legend = 22 if layers > 1 else 0
    fig = figure(360, 340 + legend)
    fig.set_dpi(200)  # of the picture of the points, in the SVG
    ax = style(axes_at(fig, 56, 42 + legend, 290, 290), grid="both")
    limits = _limits(target, ours)
    ax.plot(limits, limits, color=color("muted"), linewidth=0.9, linestyle=(0, (2, 2)))
    for layer in range(layers):
        # Thousands of points: a picture inside the drawing, not an element each.
        ax.plot(
            target[layer].ravel(), ours[layer].ravel(), "o", markersize=2.2, alpha=0.35,
            markeredgewidth=0, color=series(layer)["color"], label=f"layer {layer + 1}",
            rasterized=True,
        )  # fmt: skip
    ax.set_xlim(*limits)
    ax.set_ylim(*limits)
    few_ticks(ax.xaxis, 5)
    few_ticks(ax.yaxis, 5)
    ax.set_xlabel("contribution in the target")
    ax.set_ylabel("contribution of the feature's component")
    if legend:
        legend_below(fig, ax, columns=3)
    return fig
