"""How far may a hyperparameter be off? (The paper, §4: SPD's forgive more than APD's.)

SPD's importance coefficient and learning rate, APD's top-k and Schatten coefficient, each alone,
over two decades around its published value. Both methods train on the same number of samples, from
one start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spd_fast.experiments import Outcome, configuration, recipe
from spd_fast.report.style import axes_at, color, figure, legend_below, series, style
from spd_fast.studies.study import Cell, Plan, Row, Study
from spd_fast.train import set_keys

__all__ = ["KNOBS", "MULTIPLIERS", "NETWORKS", "ROBUSTNESS", "SAMPLES"]

NETWORKS = ("tms_5-2", "tms_40-10")
MULTIPLIERS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# What APD's published recipes see, 20,000 batches of 2048. It is a quarter of SPD's.
SAMPLES = 20_000 * 2048
# (method, hyperparameter) → (prefix of the recipe's name, its dotted key).
KNOBS = {
    ("SPD", "importance coefficient"): ("", "losses.importance_minimality.coeff"),
    ("SPD", "learning rate"): ("", "lr"),
    ("APD", "top-k"): ("apd/", "top_k"),
    ("APD", "Schatten coefficient"): ("apd/", "losses.schatten.coeff"),
}
FROM_SITE = ("mechanisms_found", "ci_error", "mmcs", "ml2r")
ORDER = ("network", "method", "hyperparameter", "multiplier", "seed")
QUICK = ["batch_size=512", "target.steps=1500", "target.batch_size=512"]
QUICK_SAMPLES = 512 * 100


def _at(data: Mapping[str, Any], key: str) -> Any:
    value: Any = data
    for part in key.split("."):
        value = value[part]
    return value


def plan(quick: bool, seeds: Sequence[int]) -> Plan:
    """Network, method, hyperparameter, multiplier and seed → a run. Multiplier 1 is the published
    recipe, the same run for both hyperparameters of a method."""
    runs: Plan = {}
    quickly = QUICK if quick else []
    for network in NETWORKS[:1] if quick else NETWORKS:
        for (method, hyperparameter), (prefix, key) in KNOBS.items():
            data = set_keys(recipe(prefix + network), quickly)
            steps = (QUICK_SAMPLES if quick else SAMPLES) // data["batch_size"]
            for multiplier in (0.1, 1.0, 10.0) if quick else MULTIPLIERS:
                value = float(f"{_at(data, key) * multiplier:.6g}")
                what = "published" if multiplier == 1 else f"{key}-x{multiplier:g}"
                for seed in seeds:
                    labels = {
                        "network": network, "method": method, "hyperparameter": hyperparameter,
                        "multiplier": multiplier, "value": value, "seed": seed,
                    }  # fmt: skip
                    changes = [f"steps={steps}", f"seed={seed}"]
                    changes += ["starts.count=1"] if method == "SPD" else []
                    changes += [f"{key}={value:.6e}"] if multiplier != 1 else []
                    config = configuration(set_keys(data, changes))
                    folder = f"{method}-{network}-{what}-seed{seed}"
                    points = runs[folder].points if folder in runs else ()
                    runs[folder] = Cell(config, (*points, labels))
    return runs


def rows(plan: Plan, found: Mapping[str, Outcome]) -> list[Row]:
    """A row a point. ``fraction``: mechanisms found at linear1 of those there are; 0 where
    training diverged."""
    table: list[Row] = []
    for key, cell in plan.items():
        if key not in found:
            continue
        config, evaluation = cell.config, found[key].evaluation
        site = evaluation["sites"]["linear1"] if evaluation else dict.fromkeys(FROM_SITE)
        mechanisms = site["mechanisms_found"] or 0
        measured = {
            "mechanisms": config.target.features,
            "fraction": mechanisms / config.target.features,
            "recovered": bool(evaluation and evaluation["recovered"]),
            "diverged": evaluation is None,
            **{name: site[name] for name in FROM_SITE},
            "steps": config.steps,
            "batch_size": config.batch_size,
        }
        table += [labels | measured for labels in cell.points]
    return sorted(table, key=lambda row: [row[k] for k in ORDER])


def draw(rows: list[Row], _: Path) -> Figure:
    """Fraction of mechanisms found against the multiplier, mean over seeds; a panel a network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    fig = figure(20 + 320 * max(len(networks), 1), 312)
    for i, network in enumerate(networks):
        ax = style(axes_at(fig, 52 + 320 * i, 86, 256, 200))
        for s, (method, hyperparameter) in enumerate(KNOBS):
            values: dict[float, list[float]] = {}
            for row in rows:
                if (row["network"], row["method"], row["hyperparameter"]) == (
                    network, method, hyperparameter,
                ):  # fmt: skip
                    values.setdefault(row["multiplier"], []).append(row["fraction"])
            if values:
                x = sorted(values)
                look = series(s) | {"linestyle": "-" if method == "SPD" else (0, (4, 1.6))}
                y = [sum(values[m]) / len(values[m]) for m in x]
                # Curves often agree: rings of different size stay visible on top of each other.
                ax.plot(
                    x, y, marker="o", markersize=12.5 - 3 * s, markerfacecolor="none",
                    markeredgewidth=1.3, label=f"{method}: {hyperparameter}", **look,
                )  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks([0.1, 1, 10], ["÷ 10", "published", "× 10"])
        ax.minorticks_off()
        ax.set_ylim(-0.04, 1.04)
        ax.set_title(network, fontsize=10, color=color("ink"))
        ax.set_xlabel("hyperparameter")
        ax.set_ylabel("fraction of mechanisms found")
        if i == 0:
            legend_below(fig, ax, columns=2)
    return fig


ROBUSTNESS = Study("robustness", (0,), plan, rows, draw)
