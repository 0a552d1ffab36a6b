"""The first steps of the residual MLP of three layers, whose whole decomposition takes a CPU most
of a day: do its losses and its number of live components go where they should?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from spd_fast.experiments import Outcome, configuration, expected_sites, recipe
from spd_fast.experiments.records import read_metrics
from spd_fast.report.curves import LOSS_NAMES
from spd_fast.report.style import (
    axes_at,
    color,
    figure,
    log_axis,
    series,
    steps_axis,
    style,
    thousands,
)
from spd_fast.studies.study import Cell, Plan, Row, Study
from spd_fast.train import set_keys

__all__ = ["CONVERGENCE", "NETWORK", "STEPS"]

NETWORK = "resid_mlp3"
# The published rate is constant: a run of so many steps is the beginning of the whole one.
STEPS = 5000
QUICK = [
    "batch_size=256", "log_every=5", "target.steps=60", "target.batch_size=256",
    "target.d_embed=200",
]  # fmt: skip


def plan(quick: bool, seeds: Sequence[int]) -> Plan:
    """Seed → a run that ends early."""
    data = set_keys(recipe(NETWORK), QUICK if quick else [])
    runs: Plan = {}
    for seed in seeds:
        config = configuration(set_keys(data, [f"steps={30 if quick else STEPS}", f"seed={seed}"]))
        key = f"{NETWORK}-seed{seed}"
        runs[key] = Cell(config, ({"network": NETWORK, "run": key, "seed": seed},))
    return runs


def rows(plan: Plan, found: Mapping[str, Outcome]) -> list[Row]:
    """A row a run and site: what is found after the last of the steps."""
    table: list[Row] = []
    for key, cell in plan.items():
        evaluation = found[key].evaluation if key in found else None
        if evaluation is None:
            continue
        for site, known in expected_sites(cell.config).items():
            result = evaluation["sites"][site]
            table.append(
                cell.points[0]
                | {
                    "steps": evaluation["steps"],
                    "site": site,
                    "needed": known.components,
                    "live_components": result["live_components"],
                    "components": result["components"],
                    "ci_error": result["ci_error"],
                    "l0": result["l0"],
                    "neuron_r2": evaluation["neuron_contributions"]["r2"],
                    "slope": evaluation["neuron_contributions"]["slope"],
                    "stochastic_recon": evaluation["reconstruction"]["stochastic"],
                    "zero_recon": evaluation["reconstruction"]["zero"],
                }
            )
    return table


def _curve(ax: Axes, x: Sequence[int], y: Sequence[float], label: str, index: int) -> None:
    ax.plot(x, y, **series(index), linewidth=1.3, label=label)


def draw(rows: list[Row], folder: Path) -> Figure:
    """Losses, and how many components a sample uses at every site, against the training step."""
    fig = figure(700, 320)
    left, right = (style(axes_at(fig, 52 + 350 * i, 110, 276, 186)) for i in range(2))
    if rows:
        first = rows[0]
        lines = read_metrics(folder / first["run"])
        steps = [line["step"] for line in lines]
        for i, name in enumerate(n for n in LOSS_NAMES if n in lines[0]["losses"]):
            _curve(left, steps, [line["losses"][name] for line in lines], LOSS_NAMES[name], i)
        for i, site in enumerate(lines[0]["l0"]):
            _curve(right, steps, [line["l0"][site] for line in lines], site, i)
        for ax in (left, right):
            log_axis(ax)
            steps_axis(ax, first["steps"])
        right.yaxis.set_major_formatter(FuncFormatter(thousands))
    left.set_title("losses", fontsize=10, color=color("ink"))
    right.set_title("components a sample uses (L0)", fontsize=10, color=color("ink"))
    for ax in (left, right):
        ax.legend(
            loc="upper left", bbox_to_anchor=(-0.12, -0.2), ncols=2, frameon=False, fontsize=8.5,
            labelcolor=color("ink"),
        )  # fmt: skip
    return fig


CONVERGENCE = Study("convergence", (0,), plan, rows, draw)
