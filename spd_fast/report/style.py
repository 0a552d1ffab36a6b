"""How figures look: one palette for light and dark, and figures as PNG and as inline SVG.

Figures are drawn once, in the light palette. Their PNG stands on white; their SVG has every
palette colour replaced by a CSS variable, so that the page decides between light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

__all__ = [
    "DIVERGING",
    "LIGHT_AND_DARK",
    "SEQUENTIAL",
    "Picture",
    "axes_at",
    "bare",
    "color",
    "drawing",
    "few_ticks",
    "figure",
    "legend_below",
    "log_axis",
    "png",
    "power_of_ten",
    "series",
    "steps_axis",
    "style",
    "svg",
    "thousands",
]

# Name → (light, dark). The light values differ from each other: they are what is replaced.
LIGHT_AND_DARK: dict[str, tuple[str, str]] = {
    "ink": ("#23272e", "#e4e2dd"),
    "muted": ("#5f6670", "#a1a7b0"),
    "grid": ("#e4e3df", "#2e333b"),
    "ghost": ("#c9c8c4", "#4b515b"),
    "good": ("#2e7d4f", "#6cc490"),
    "bad": ("#b5352a", "#f08a7e"),
    "s0": ("#2b66ad", "#74aaeb"),
    "s1": ("#c0591f", "#ea9a62"),
    "s2": ("#2f8562", "#66c3a0"),
    "s3": ("#7048a8", "#b89ae8"),
    "s4": ("#a87c10", "#d9b854"),
    "s5": ("#b03a78", "#e98cba"),
}
SERIES = [name for name in LIGHT_AND_DARK if re.fullmatch(r"s\d", name)]
DASHES = ["-", (0, (4, 1.6)), (0, (1.2, 1.4))]
# Mid tones, seen on white and on near-black alike; zero is the page itself.
BLUE, ORANGE = "#3b7dd0", "#d0702f"
FONT_SIZE = 9.5


def _fade(*stops: tuple[float, str, float]) -> LinearSegmentedColormap:
    """A colour map from (position, colour, opacity)."""
    return LinearSegmentedColormap.from_list(
        "fade", [(at, (*to_rgb(c), opacity)) for at, c, opacity in stops]
    )


SEQUENTIAL = _fade((0, BLUE, 0), (1, BLUE, 1))
DIVERGING = _fade((0, ORANGE, 1), (0.4999, ORANGE, 0), (0.5001, BLUE, 0), (1, BLUE, 1))


@dataclass(frozen=True)
class Picture:
    """A figure on the page: inline SVG, what is above it, what is below it."""

    svg: str
    title: str
    caption: str = ""
    compact: bool = False


def color(name: str) -> str:
    """The palette colour, light variant."""
    return LIGHT_AND_DARK[name][0]


def series(index: int) -> dict[str, Any]:
    """Colour and dash of the index-th line of a plot; all different up to eighteen."""
    turn, hue = divmod(index, len(SERIES))
    return {"color": color(SERIES[hue]), "linestyle": DASHES[turn % len(DASHES)]}


@contextmanager
def drawing() -> Iterator[None]:
    """Settings that only exist globally in matplotlib, restored afterwards."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's own typeface
        "svg.hashsalt": "spd_fast",  # identifiers that do not change from run to run
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": FONT_SIZE,
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(settings):
        yield


def figure(width: float = 360, height: float = 230) -> Figure:
    """An empty figure; sizes in points, which the page shows as about one pixel or more."""
    return Figure(figsize=(width / 72, height / 72))


def axes_at(fig: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in points from the lower left corner."""
    w, h = fig.get_size_inches() * 72
    return fig.add_axes((left / w, bottom / h, width / w, height / h))


def style(ax: Axes, *, grid: str = "y") -> Axes:
    """Quiet axes: two spines, hairline grid behind the data."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set(color=color("muted"), linewidth=0.7)
    ax.tick_params(
        which="both", colors=color("muted"), labelcolor=color("ink"), width=0.7, length=3
    )
    ax.tick_params(which="minor", length=1.6)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_color(color("ink"))
    if grid:
        ax.grid(True, axis=grid, which="major", color=color("grid"), linewidth=0.7)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    return ax


def bare(ax: Axes) -> Axes:
    """Axes of a matrix or a drawing: a frame, no ticks."""
    for spine in ax.spines.values():
        spine.set(color=color("ghost"), linewidth=0.7)
    ax.tick_params(length=0, labelcolor=color("ink"), labelsize=FONT_SIZE - 1)
    ax.set(xticks=[], yticks=[])
    return ax


def thousands(value: float, _: object = None) -> str:
    """1500 → 1,500; 40000 → 40k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,.10g}"


def power_of_ten(value: float, _: object = None) -> str:
    """0.001 → 10⁻³, without mathematical typesetting, whose glyphs do not follow the page."""
    if value <= 0:
        return ""
    exponent = round(np.log10(value))
    if not np.isclose(value, 10.0**exponent):
        return ""
    if 0 <= exponent <= 2:
        return f"{10**exponent}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def log_axis(ax: Axes, which: str = "y") -> None:
    """A logarithmic axis that shows at least one whole decade and labels powers of ten."""
    getattr(ax, f"set_{which}scale")("log")
    low, high = getattr(ax, f"get_{which}lim")()
    low, high = 10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high))
    getattr(ax, f"set_{which}lim")(low, high if high > low else 10 * low)
    axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(power_of_ten))


def few_ticks(axis: Axis, n: int, *, integer: bool = False) -> None:
    """At most n + 1 ticks, at round values."""
    axis.set_major_locator(MaxNLocator(n, integer=integer, steps=[1, 2, 2.5, 5, 10]))


def steps_axis(ax: Axes, last: int, *, label: bool = True) -> None:
    """Training steps along x."""
    ax.set_xlim(0, max(last, 1))
    few_ticks(ax.xaxis, 5, integer=True)
    ax.xaxis.set_major_formatter(FuncFormatter(thousands))
    if label:
        ax.set_xlabel("training step")
    else:
        ax.tick_params(labelbottom=False)


def legend_below(fig: Figure, ax: Axes, columns: int = 2) -> None:
    """The legend under the axes, along the figure's lower edge."""
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    fig.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0.02, 0.0), ncols=columns,
        frameon=False, labelcolor=color("ink"), fontsize=FONT_SIZE - 0.5, handlelength=1.8,
        columnspacing=1.4, borderaxespad=0.2, labelspacing=0.35,
    )  # fmt: skip


def png(fig: Figure, dpi: int = 160) -> bytes:
    """The figure on white."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _shorten(match: re.Match[str]) -> str:
    return f"{float(match.group()):.2f}".rstrip("0").rstrip(".")


def _short_paths(match: re.Match[str]) -> str:
    return re.sub(r"-?\d+\.\d{3,}", _shorten, match.group())


def _own_ids(text: str, prefix: str) -> str:
    """Keep only the identifiers that something refers to, and make them this figure's own."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r' id="([^"]+)"', rename, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)


def svg(fig: Figure, name: str, description: str) -> str:
    """The figure as an element of an HTML page, coloured by the page's variables."""
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = text.replace("xlink:href", "href")
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    head = f'<svg class="plot" role="img" aria-label="{escape(description)}" viewBox="{view[1]}">'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = _own_ids(text, re.sub(r"\W+", "-", name))
    text = re.sub(r' (?:d|x|y|points)="[^"]*"', _short_paths, text)
    for key, (light, _) in LIGHT_AND_DARK.items():
        text = text.replace(light, f"var(--{key})")
    return re.sub(r">\s+<", "><", text).strip()
