"""Do more components split what is found? (The paper, §3.2: they should not.)

The identity variants of the toy models of superposition, with C from 1 to 16 times the number of
components that every site needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from spd_fast.experiments import Outcome, configuration, expected_sites, recipe
from spd_fast.report.style import axes_at, color, figure, legend_below, series, style
from spd_fast.studies.study import Cell, Plan, Row, Study, site_rows
from spd_fast.train import set_keys

__all__ = ["MULTIPLES", "NETWORKS", "SPLITTING"]

NETWORKS = ("tms_5-2-id", "tms_40-10-id")
MULTIPLES = (1, 2, 4, 8, 16)
QUICK = ["steps=200", "batch_size=512", "target.steps=1500", "target.batch_size=512"]


def plan(quick: bool, seeds: Sequence[int]) -> Plan:
    """Network, multiple and seed → a run whose sites have that multiple of what they need."""
    runs: Plan = {}
    for name in NETWORKS[:1] if quick else NETWORKS:
        data = set_keys(recipe(name), QUICK if quick else [])
        needed = {n: e.components for n, e in expected_sites(configuration(data)).items()}
        for multiple in (1, 4) if quick else MULTIPLES:
            sizes = {site: multiple * components for site, components in needed.items()}
            for seed in seeds:
                config = configuration(data | {"sites": sizes, "seed": seed})
                labels = {"network": name, "seed": seed, "multiple": multiple}
                runs[f"{name}-x{multiple}-seed{seed}"] = Cell(config, (labels,))
    return runs


def rows(plan: Plan, found: Mapping[str, Outcome]) -> list[Row]:
    """A row a run and site."""
    return site_rows(
        plan,
        found,
        lambda evaluation, known, result: {
            "needed": known.components,
            "components": result["components"],
            "live_components": result["live_components"],
            "ci_error": result["ci_error"],
            "recovered": evaluation["recovered"],
            "target_represents_all_features": evaluation["target_represents_all_features"],
            "steps": evaluation["steps"],
        },
    )


def draw(rows: list[Row], _: Path) -> Figure:
    """Live components against components, both over the number needed; a panel a network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    fig = figure(20 + 320 * max(len(networks), 1), 300)
    for i, network in enumerate(networks):
        ax = style(axes_at(fig, 52 + 320 * i, 74, 256, 200))
        mine = [row for row in rows if row["network"] == network]
        for s, site in enumerate(dict.fromkeys(row["site"] for row in mine)):
            points = sorted(
                (row["multiple"], row["live_components"] / row["needed"])
                for row in mine
                if row["site"] == site
            )
            look = series(s)
            # Sites often agree: rings of different size stay visible on top of each other.
            ax.plot(
                *zip(*points, strict=True), "o", color=look["color"], label=site,
                markersize=5 + 3.5 * s, markerfacecolor="none", markeredgewidth=1.3,
            )  # fmt: skip
        ax.axhline(1, color=color("muted"), linewidth=0.9, linestyle=(0, (2, 2)))
        multiples = sorted({row["multiple"] for row in mine})
        ax.plot(multiples, multiples, color=color("ghost"), linewidth=0.9)
        ax.set_xscale("log", base=2)
        ax.set_xticks(multiples, [f"{m}×" for m in multiples])
        ax.minorticks_off()
        ax.set_ylim(0, max(2.0, 1.1 * max(r["live_components"] / r["needed"] for r in mine)))
        ax.set_title(network, fontsize=10, color=color("ink"))
        ax.set_xlabel("components over the number needed")
        ax.set_ylabel("live components, likewise")
        if i == 0:
            legend_below(fig, ax, columns=3)
    return fig


SPLITTING = Study("splitting", (0,), plan, rows, draw)
