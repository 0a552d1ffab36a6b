"""The first steps of the residual MLP of three layers, whose whole decomposition takes a CPU most
of a day: do its losses, and the number of components that a sample uses, go where they should?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from spd_fast.experiments import Outcome, configuration, recipe
from spd_fast.experiments.records import read_metrics
from spd_fast.report.curves import plot_l0, plot_losses
from spd_fast.report.style import axes_at, color, figure, steps_axis, style
from spd_fast.studies.study import QUICK_MLP, Cell, Plan, Row, Study, site_rows
from spd_fast.train import set_keys

__all__ = ["CONVERGENCE", "NETWORK", "STEPS"]

NETWORK = "resid_mlp3"
# The published rate is constant: a run of so many steps is the beginning of the whole one.
STEPS = 5000


def plan(quick: bool, seeds: Sequence[int]) -> Plan:
    """Seed → a run that ends early."""
    changes = [*QUICK_MLP, "log_every=5"] if quick else [f"steps={STEPS}"]
    runs: Plan = {}
    for seed in seeds:
        config = configuration(set_keys(recipe(NETWORK), [*changes, f"seed={seed}"]))
        key = f"{NETWORK}-seed{seed}"
        runs[key] = Cell(config, ({"network": NETWORK, "run": key, "seed": seed},))
    return runs


def rows(plan: Plan, found: Mapping[str, Outcome]) -> list[Row]:
    """A row a run and site: what is found after the last of the steps."""
    return site_rows(
        plan,
        found,
        lambda evaluation, known, result: {
            "steps": evaluation["steps"],
            "needed": known.components,
            "live_components": result["live_components"],
            "components": result["components"],
            "ci_error": result["ci_error"],
            "l0": result["l0"],
            "neuron_r2": evaluation["neuron_contributions"]["r2"],
            "slope": evaluation["neuron_contributions"]["slope"],
            "stochastic_recon": evaluation["reconstruction"]["stochastic"],
            "zero_recon": evaluation["reconstruction"]["zero"],
        },
    )


def draw(rows: list[Row], folder: Path) -> Figure:
    """Losses, and how many components a sample uses at every site, against the training step; of
    the first seed."""
    fig = figure(700, 320)
    left, right = (style(axes_at(fig, 52 + 350 * i, 110, 276, 186)) for i in range(2))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    lines = read_metrics(folder / runs[0]) if runs else []
    plot_losses(left, lines)
    plot_l0(right, lines, lines[0]["l0"] if lines else ())
    for ax in (left, right):
        steps_axis(ax, rows[0]["steps"] if rows else 1)
        ax.legend(
            loc="upper left", bbox_to_anchor=(-0.12, -0.2), ncols=2, frameon=False, fontsize=8.5,
            labelcolor=color("ink"),
        )  # fmt: skip
    return fig


CONVERGENCE = Study("convergence", (0,), plan, rows, draw)
