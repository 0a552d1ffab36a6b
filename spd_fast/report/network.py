"""The network drawn as in the paper's figure 1: target weight, sum of the components, and the
largest components one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spd_fast.evaluate.ground_truth import permute_identity
from spd_fast.experiments.measures import AnyModel, match
from spd_fast.report.importances import colorbar
from spd_fast.report.style import (
    DIVERGING,
    FONT_SIZE,
    SEQUENTIAL,
    SERIES,
    axes_at,
    bare,
    color,
    few_ticks,
    figure,
    style,
)

__all__ = [
    "Decomposition",
    "arrow_panel",
    "arrow_strip",
    "column_lengths",
    "component_maps",
    "decomposition",
    "matches",
    "weight_maps",
]

MAX_ARROWS = 24
Matrix = NDArray[np.floating]


@dataclass(frozen=True)
class Decomposition:
    """One site's weight and components, as arrays in float64.

    ``weight`` [d_out, d_in]; ``matrices`` P [C, d_out, d_in]; ``order``: components by ‖P_c‖,
    largest first; per input feature the ``best`` component, its ``cosine`` and length ``ratio``.
    """

    weight: Matrix
    matrices: Matrix
    order: NDArray[np.intp]
    best: NDArray[np.integer]
    cosine: Matrix
    ratio: Matrix

    @property
    def total(self) -> Matrix:
        """Σ_c P_c [d_out, d_in]."""
        return self.matrices.sum(axis=0)

    @property
    def planar(self) -> bool:
        """Whether the weight's columns are arrows in a plane."""
        return self.weight.shape[0] == 2 and self.weight.shape[1] <= MAX_ARROWS

    def component(self, c: int) -> Matrix:
        """P_c [d_out, d_in]: u_c V_cᵀ in SPD."""
        return self.matrices[c]

    def rest(self, shown: int) -> Matrix:
        """The sum of all but the ``shown`` largest components."""
        return self.matrices[self.order[shown:]].sum(axis=0)

    def label(self, c: int) -> str:
        """Which features this component is the best match of."""
        features = np.flatnonzero(self.best == c)
        if features.size == 0:
            return ""
        if features.size > 3:
            return f"{features.size} features"
        return f"feature {', '.join(map(str, features))}"


def decomposition(model: AnyModel, site: str, probe: Matrix) -> Decomposition:
    """Read one site; ``probe``: its importances on single features, which say who is live."""
    matched, weight = match(model, site, probe), model.sites[site].weight
    matrices, w = (t.detach().double().cpu().numpy() for t in (model.matrices(site), weight))
    return Decomposition(
        w, matrices, np.argsort(-np.linalg.norm(matrices, axis=(1, 2)), kind="stable"),
        matched.component.cpu().numpy(), matched.cosine.cpu().numpy(),
        matched.ratio.cpu().numpy(),
    )  # fmt: skip


def _feature_color(j: int) -> str:
    return color(SERIES[j % len(SERIES)])


def _arrows(ax: Axes, columns: Matrix, colors: Sequence[str], width: float) -> None:
    zeros = np.zeros(columns.shape[1])
    ax.quiver(
        zeros, zeros, columns[0], columns[1], color=list(colors), angles="xy", scale_units="xy",
        scale=1, width=width, headwidth=3.6, headlength=4.2, headaxislength=3.8, minlength=0,
        minshaft=1.2, zorder=3,
    )  # fmt: skip


def arrow_panel(
    ax: Axes, matrix: Matrix, limit: float, *, ghost: Matrix | None = None, label: bool = False
) -> None:
    """Columns of a [2, d_in] matrix as arrows, over the target's in grey."""
    bare(ax)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.axhline(0, color=color("grid"), linewidth=0.7, zorder=0)
    ax.axvline(0, color=color("grid"), linewidth=0.7, zorder=0)
    if ghost is not None:
        _arrows(ax, ghost, [color("ghost")] * ghost.shape[1], 0.014)
    _arrows(ax, matrix, [_feature_color(j) for j in range(matrix.shape[1])], 0.022)
    if label:
        for j, (x, y) in enumerate(matrix.T):
            length = max(float(np.hypot(x, y)), 1e-9)
            away = 1 + 0.14 * limit / length
            ax.text(
                x * away, y * away, str(j), color=_feature_color(j), ha="center", va="center",
                fontsize=FONT_SIZE,
            )  # fmt: skip


def arrow_panels(
    site: Decomposition, shown: int, *, alone: bool
) -> list[tuple[str, str, Matrix, Matrix | None, bool]]:
    """(title, note, matrix, target behind it, numbered) of every panel, in the paper's order.
    ``alone``: a component is expected to match one feature, and the note says which."""
    w = site.weight
    panels: list[tuple[str, str, Matrix, Matrix | None, bool]] = [
        ("Target", "columns of W", w, None, True),
        ("Sum", f"all {len(site.matrices)} components", site.total, w, False),
    ]
    for c in site.order[:shown]:
        note = (site.label(c) or "best for no feature") if alone else ""
        panels.append((f"Component {c}", note, site.component(c), w, False))
    left = len(site.matrices) - shown
    if left > 0:
        panels.append(("The rest", f"other {left}, summed", site.rest(shown), w, False))
    return panels


def limit_of(site: Decomposition, shown: int) -> float:
    """Half the side of every arrow panel."""
    matrices = [site.weight, site.total, *(site.component(c) for c in site.order[:shown])]
    return 1.28 * max(float(np.linalg.norm(m, axis=0).max()) for m in matrices)


def single_arrow_panel(site: Decomposition, matrix: Matrix, ghost: Matrix | None, limit: float,
                       label: bool) -> Figure:  # fmt: skip
    """One panel as a figure of its own, for the page's grid."""
    fig = figure(130, 130)
    arrow_panel(axes_at(fig, 2, 2, 126, 126), matrix, limit, ghost=ghost, label=label)
    return fig


def arrow_strip(site: Decomposition, shown: int, *, alone: bool) -> Figure:
    """All arrow panels side by side, for a PNG that stands alone."""
    panels = arrow_panels(site, shown, alone=alone)
    limit = limit_of(site, shown)
    per_row = min(len(panels), 8)
    rows = -(-len(panels) // per_row)
    fig = figure(8 + 118 * per_row, 154 * rows)
    for i, (title, note, matrix, ghost, label) in enumerate(panels):
        row, column = divmod(i, per_row)
        ax = axes_at(fig, 8 + 118 * column, 8 + 154 * (rows - 1 - row), 110, 110)
        arrow_panel(ax, matrix, limit, ghost=ghost, label=label)
        ax.text(
            0, 1.17, title, transform=ax.transAxes, color=color("ink"), fontsize=FONT_SIZE + 0.5
        )
        ax.text(
            0, 1.05, note, transform=ax.transAxes, color=color("muted"), fontsize=FONT_SIZE - 1.5
        )
    return fig


def _map(ax: Axes, matrix: Matrix, bound: float) -> None:
    bare(ax)
    ax.imshow(
        matrix, cmap=DIVERGING, norm=Normalize(-bound, bound), aspect="auto", interpolation="none"
    )


def weight_maps(site: Decomposition) -> Figure:
    """Heat maps of the target's weight, the sum of the components, and their difference: one
    below the other, or side by side where the weight is not much wider than high."""
    rows, columns = site.weight.shape
    abreast = columns <= 2 * rows
    across, down = (3, 1) if abreast else (1, 3)
    cell = min((318 - 8 * (across - 1)) / across / columns, 300 / down / rows)
    width, height = cell * columns, max(cell * rows, 30)
    fig = figure(360, down * (height + 26) + 34)
    bound = float(np.abs(site.weight).max()) or 1.0
    panels = (
        ("Target W", site.weight),
        ("Sum of all" if abreast else "Sum of all components", site.total),
        ("Difference", site.weight - site.total),
    )
    for i, (title, values) in enumerate(panels):
        row, column = divmod(i, across)
        x, y = 34 + column * (width + 8), 34 + (down - 1 - row) * (height + 26)
        ax = axes_at(fig, x, y, width, height)
        _map(ax, values, bound)
        ax.set_title(title, loc="left", fontsize=FONT_SIZE, color=color("ink"), pad=4)
        if column == 0:
            ax.set_ylabel("output", color=color("ink"))
        if row == down - 1:
            few_ticks(ax.xaxis, 8 // across, integer=True)
            ax.set_xlabel("input feature" if rows != columns else "input", color=color("ink"))
    return fig


def component_maps(site: Decomposition, shown: int) -> Figure:
    """Heat maps of the largest components on the target's colour scale."""
    rows, columns = site.weight.shape
    across = 3 if columns <= 2 * rows else 2
    width = (352 - 8 * (across - 1)) / across
    height = float(np.clip(width * rows / columns, 34, width))
    picks = site.order[:shown]
    down = -(-len(picks) // across)
    fig = figure(360, down * (height + 22) + 4)
    bound = float(np.abs(site.weight).max()) or 1.0
    for i, c in enumerate(picks):
        row, column = divmod(i, across)
        left, bottom = 4 + (width + 8) * column, 4 + (height + 22) * (down - 1 - row)
        ax = axes_at(fig, left, bottom, width, height)
        _map(ax, site.component(c), bound)
        what = site.label(c) if across == 2 else ""
        ax.set_title(
            f"component {c}" + (f" · {what}" if what else ""), loc="left", pad=3,
            fontsize=FONT_SIZE - 0.5, color=color("ink"),
        )  # fmt: skip
    return fig


def column_lengths(site: Decomposition, known: int) -> Figure:
    """‖P_c[:, j]‖ over ‖W_:j‖ of the components (rows, permuted) at every input feature."""
    lengths = np.linalg.norm(site.matrices, axis=1).T  # [d_in, C]
    lengths /= np.maximum(np.linalg.norm(site.weight, axis=0), 1e-12)[:, None]
    order = permute_identity(lengths)
    rows = min(lengths.shape[1], known + max(known // 4, 3))
    shown = lengths[:, order[:rows]].T
    cell = min(272 / shown.shape[1], 250 / rows, 18)
    width, height = max(cell * shown.shape[1], 100), max(cell * rows, 60)
    fig = figure(360, height + 44)
    ax = bare(axes_at(fig, 48, 36, width, height))
    ax.imshow(shown, cmap=SEQUENTIAL, norm=Normalize(0, 1), aspect="auto", interpolation="none")
    for axis, n in ((ax.xaxis, shown.shape[1]), (ax.yaxis, rows)):
        axis.set_ticks(range(0, n, max(1, 5 * round(n / 40))))
    ax.set_xlabel("input", color=color("ink"))
    ax.set_ylabel("component (permuted)", color=color("ink"))
    colorbar(fig, 48 + width + 10, 36, height)
    return fig


def matches(site: Decomposition, paper_ratio: tuple[float, float] | None) -> Figure:
    """Cosine similarity and length ratio of every input feature's best component; the paper's
    mean and spread of the ratio as a band."""
    fig = figure(360, 250)
    upper, lower = axes_at(fig, 48, 148, 300, 80), axes_at(fig, 48, 38, 300, 80)
    x = np.arange(site.cosine.size)
    for ax, values, title in (
        (upper, site.cosine, "cosine similarity to the target's column"),
        (lower, site.ratio, "length, as a fraction of the target's column"),
    ):
        style(ax)
        ax.axhline(1, color=color("muted"), linewidth=0.9, linestyle=(0, (2, 2)))
        ax.plot(x, values, "o", color=color("s0"), markersize=4 if x.size <= 60 else 2.5)
        ax.set_title(title, loc="left", fontsize=FONT_SIZE, color=color("ink"), pad=4)
        ax.set_xlim(-0.6, x.size - 0.4)
        few_ticks(ax.yaxis, 4)
        few_ticks(ax.xaxis, 10, integer=True)
    shown = [1.0, *site.ratio.tolist()]
    if paper_ratio is not None:
        mean, deviation = paper_ratio
        low, high = mean - deviation, mean + deviation
        lower.axhspan(low, high, color=color("s1"), alpha=0.35, linewidth=0)
        lower.axhline(mean, color=color("s1"), linewidth=1)
        shown += [low, high]
    span = max(1 - float(site.cosine.min()), 0.02)
    upper.set_ylim(1 - 1.15 * span, 1 + 0.15 * span)
    span = max(max(shown) - min(shown), 0.05)
    lower.set_ylim(min(shown) - 0.12 * span, max(shown) + 0.12 * span)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("input feature")
    return fig
