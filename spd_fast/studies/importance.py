"""The importance coefficient of resid_mlp1, from too low to too high (the paper, figure 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from spd_fast.evaluate import probe_importances
from spd_fast.experiments import Outcome, configuration, expected_sites, load_run, recipe
from spd_fast.model import DecomposedModel
from spd_fast.report.style import SEQUENTIAL, axes_at, bare, color, figure, power_of_ten
from spd_fast.studies.study import QUICK_MLP, Cell, Plan, Row, Study, site_rows
from spd_fast.train import set_keys

__all__ = ["COEFFICIENTS", "IMPORTANCE"]

NETWORK = "resid_mlp1"
COEFFICIENTS = (1e-6, 3e-6, 1e-5, 1e-4, 1e-3)


def plan(quick: bool, seeds: Sequence[int]) -> Plan:
    """Coefficient and seed → a run."""
    data = set_keys(recipe(NETWORK), QUICK_MLP if quick else [])
    runs: Plan = {}
    for coefficient in (1e-6, 1e-3) if quick else COEFFICIENTS:
        for seed in seeds:
            changes = [
                f"losses.importance_minimality.coeff={coefficient:.1e}", f"seed={seed}",
            ]  # fmt: skip
            key = f"{coefficient:g}-seed{seed}"
            labels = {"run": key, "coefficient": coefficient, "seed": seed}
            runs[key] = Cell(configuration(set_keys(data, changes)), (labels,))
    return runs


def rows(plan: Plan, found: Mapping[str, Outcome]) -> list[Row]:
    """A row a run and site, with what the whole network's reconstruction comes to."""
    return site_rows(
        plan,
        found,
        lambda evaluation, known, result: {
            "pattern": known.pattern,
            "needed": known.components,
            "live_components": result["live_components"],
            "ci_error": result["ci_error"],
            "l0": result["l0"],
            "neuron_r2": evaluation["neuron_contributions"]["r2"],
            "stochastic_recon": evaluation["reconstruction"]["stochastic"],
            "recovered": evaluation["recovered"],
            "steps": evaluation["steps"],
        },
    )


def draw(rows: list[Row], folder: Path) -> Figure:
    """Importances of single-feature probes, columns permuted: a column a coefficient, a row a
    site."""
    first = rows[0]["seed"] if rows else None
    keys = list(dict.fromkeys(row["run"] for row in rows if row["seed"] == first))
    fig = figure(70 + 150 * max(len(keys), 1), 352)
    for i, key in enumerate(keys):
        run = load_run(folder / key, device="cpu")
        assert isinstance(run.model, DecomposedModel)
        probes = probe_importances(run.model, run.config.target.features)
        for j, (site, known) in enumerate(expected_sites(run.config).items()):
            ordered = probes[site][:, known.permute(probes[site])]
            ax = bare(axes_at(fig, 56 + 150 * i, 180 - 150 * j, 136, 136))
            ax.imshow(
                np.clip(ordered, 0, 1), cmap=SEQUENTIAL, norm=Normalize(0, 1), aspect="auto",
                interpolation="none",
            )  # fmt: skip
            if j == 0:
                coefficient = next(r["coefficient"] for r in rows if r["run"] == key)
                title = power_of_ten(coefficient) or f"{coefficient:g}"
                ax.set_title(title, fontsize=10, color=color("ink"))
            if i == 0:
                ax.set_ylabel(site, color=color("ink"))
    fig.text(
        0.5, 0.02, "component (permuted); rows are single-feature probes", ha="center",
        color=color("ink"),
    )  # fmt: skip
    return fig


IMPORTANCE = Study("importance", (0,), plan, rows, draw)
