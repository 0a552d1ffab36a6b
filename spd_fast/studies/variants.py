"""What decides whether two layers are recovered? One thing changed at a time in the recipe of
resid_mlp2, each for its first steps.

The paper leaves open why its runs depend on the seed. Candidates are the initialisation, the
learning rate, the sigmoid, the delta, a warm-up of faithfulness, and importance minimality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from spd_fast.experiments import Outcome, configuration, recipe
from spd_fast.report.style import axes_at, color, figure, legend_below, series, style
from spd_fast.studies.study import QUICK_MLP, Cell, Plan, Row, Study
from spd_fast.train import set_keys

__all__ = ["NETWORK", "ROBUST", "STEPS", "VARIANTS", "VARIANTS_OF"]

NETWORK = "resid_mlp2"
STEPS = 5000
_MINIMALITY = "losses.importance_minimality"
ROBUST = "robust recipe"
# Variant → what it changes; the robust one is a recipe of its own.
VARIANTS_OF: dict[str, tuple[str, ...]] = {
    "published": (),
    "rate falls to zero": ("lr_schedule=cosine",),
    "rate ÷ 3": ("lr=3.3e-4",),
    "rate × 3": ("lr=3.0e-3",),
    "initialisation of 2026": ("init=2026",),
    "sigmoid of 2026": ("sigmoid=2026",),
    "delta": ("delta=true",),
    "warm-up": ("warm_up.steps=200",),
    "coefficient ÷ 2": (f"{_MINIMALITY}.coeff=1.0e-5",),
    "p = 1, coefficient ÷ 4": (f"{_MINIMALITY}.coeff=5.0e-6", f"{_MINIMALITY}.p=1"),
    ROBUST: (),
}


def plan(quick: bool, seeds: Sequence[int]) -> Plan:
    """Variant and seed → a run."""
    runs: Plan = {}
    for variant in list(VARIANTS_OF)[:2] if quick else VARIANTS_OF:
        for seed in seeds:
            changes = [*VARIANTS_OF[variant], *(QUICK_MLP if quick else [f"steps={STEPS}"])]
            data = recipe(f"{NETWORK}-robust" if variant == ROBUST else NETWORK)
            config = configuration(set_keys(data, [*changes, f"seed={seed}"]))
            key = f"{variant.replace(' ', '_').replace('÷', 'by').replace('×', 'times')}-seed{seed}"
            runs[key] = Cell(config, ({"variant": variant, "seed": seed},))
    return runs


def rows(plan: Plan, found: Mapping[str, Outcome]) -> list[Row]:
    """A row a run; sites side by side, in the network's order."""
    table: list[Row] = []
    for key, cell in plan.items():
        if key not in found:
            continue
        evaluation = found[key].evaluation or {"sites": {}, "neuron_contributions": {}}
        sites, neurons = list(evaluation["sites"].values()), evaluation["neuron_contributions"]
        table.append(
            cell.points[0]
            | {
                "steps": cell.config.steps,
                "diverged": found[key].diverged is not None,
                "live_components": " ".join(str(s["live_components"]) for s in sites),
                "ci_error": " ".join(str(s["ci_error"]) for s in sites),
                "errors": sum(s["ci_error"] for s in sites) if sites else None,
                "lowest_on": min((s["ci_margins"][0] for s in sites), default=None),
                "highest_off": max((s["ci_margins"][1] for s in sites), default=None),
                "neuron_r2": neurons.get("r2"),
                "slope": neurons.get("slope"),
            }
        )
    return table


def draw(rows: list[Row], _: Path) -> Figure:
    """Wrong importances, and R² of the neuron contributions, of every variant; a ring a seed."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    height = 24 * max(len(names), 1)
    fig = figure(700, height + 90)
    panels = (("errors", "wrong importances", "symlog"), ("neuron_r2", "neuron R²", "linear"))
    for i, (key, title, scale) in enumerate(panels):
        ax = style(axes_at(fig, 160 + 270 * i, 50, 240, height))
        for s, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
            mine = [row for row in rows if row["seed"] == seed and row[key] is not None]
            ax.plot(
                [row[key] for row in mine], [names.index(row["variant"]) for row in mine], "o",
                color=series(s)["color"], markersize=6 + 3 * s, markerfacecolor="none",
                label=f"seed {seed}",
            )  # fmt: skip
        ax.set_xscale(scale)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        ax.set_title(title, fontsize=10, color=color("ink"))
        if i == 0 and ax.lines:
            ax.set_xlim(left=-0.5)
            legend_below(fig, ax, columns=5)
    return fig


VARIANTS = Study("variants", (0,), plan, rows, draw)
