"""A run's report: figures/*.png, report.html and README.md, written into its folder."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from spd_fast._files import write_bytes
from spd_fast.baselines import APDConfig
from spd_fast.experiments import Run
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.report import bars, curves, importances, network, neurons
from spd_fast.report.facts import (
    Facts,
    count,
    duration,
    gather,
    number,
    recipe_changes,
    verdict,
)
from spd_fast.report.style import LIGHT_AND_DARK, Picture, drawing, png, svg
from spd_fast.report.table import (
    PAPER,
    PAPER_APD,
    mean_and_spread,
    network_of,
    paper_values,
    results_table,
)
from spd_fast.train.config import TMSTarget

__all__ = ["write_report"]

LARGEST = 6
MASKS = {
    "topk": ("kept", "the components that the sample's attributions keep"),
    "unmasked": ("all one", "every component on: m = 1"),
    "ci": ("importances", "m = g"),
    "stochastic": ("stochastic", "m = g + (1 − g) r, r uniform"),
    "rounded": ("rounded", "m = 1 where g > 0.5, else 0"),
    "zero": ("all zero", "every component off: the yardstick"),
}


@dataclass
class Album:
    """Collects a report's figures: PNG into the folder, SVG for the page."""

    folder: Path
    files: list[str] = field(default_factory=list)

    def save(self, name: str, fig: Figure) -> None:
        """The figure as figures/NAME.png."""
        write_bytes(self.folder / f"{name}.png", png(fig))
        self.files.append(f"{name}.png")

    def add(
        self, name: str, fig: Figure, title: str, caption: str = "", *, compact: bool = False
    ) -> Picture:
        """The figure as a file and for the page."""
        if not compact:
            self.save(name, fig)
        return Picture(Markup(svg(fig, name, title)), title, caption, compact)


def _network(facts: Facts, album: Album) -> list[dict[str, Any]]:
    """The drawing of every untied site of a toy model of superposition."""
    if not isinstance(facts.config.target, TMSTarget):
        return []
    drawings = []
    for name, site in facts.run.model.sites.items():
        if site.tied_to is not None:
            continue
        known = facts.expected.get(name)
        shown = min(known.components if known else LARGEST, site.components)
        alone = known is None or known.pattern == "identity"
        parts = network.decomposition(facts.run.model, name, facts.probes[name])
        panels: list[Picture] = []
        figures: list[Picture] = []
        if parts.planar:
            limit = network.limit_of(parts, shown)
            for i, (title, note, values, ghost, label) in enumerate(
                network.arrow_panels(parts, shown, alone=alone)
            ):
                fig = network.single_arrow_panel(parts, values, ghost, limit, label)
                panels.append(album.add(f"{name}-{i}", fig, title, note, compact=True))
            album.save(f"network-{name}", network.arrow_strip(parts, shown, alone=alone))
        else:
            figures = [
                album.add(
                    f"network-{name}", network.weight_maps(parts), "Target, sum, difference",
                    "Blue is positive, orange negative, on the target's scale. Good: no trace is "
                    "left in the difference.",
                ),
                album.add(
                    f"network-{name}-lengths", network.column_lengths(parts, shown),
                    "Length of every component at every input",
                    "‖u_c V_jc‖ over the length of the target's column j, components permuted. "
                    + (
                        "Good: a diagonal of ones, nothing elsewhere."
                        if alone
                        else f"Good: {shown} components, which may mix inputs as they like "
                        "since they act together, and nothing below them."
                    ),
                ),
                album.add(
                    f"network-{name}-largest",
                    network.component_maps(parts, min(LARGEST, site.components)),
                    "The largest components",
                    "u_c V_cᵀ on the target's colour scale. "
                    + (
                        "Good: a single column each, that of the target."
                        if alone
                        else "Good: together they are the target; one alone may look like anything."
                    ),
                ),
            ]  # fmt: skip
        tied = [n for n, s in facts.run.model.sites.items() if s.tied_to == name]
        drawings.append({"site": name, "tied": tied, "panels": panels, "figures": figures})
    return drawings


def _in_table1(config: AnyConfig) -> bool:
    """Whether the network is one of table 1, by whichever method."""
    return network_of(config.name) in PAPER


def _matches(facts: Facts, album: Album) -> Picture | None:
    """The figure behind table 1, for the networks that are in it."""
    if not _in_table1(facts.config) or "linear1" not in facts.run.model.sites:
        return None
    values = paper_values(facts.config.name)
    paper = None if values is None else mean_and_spread(values[1])
    fig = network.matches(
        network.decomposition(facts.run.model, "linear1", facts.probes["linear1"]), paper
    )
    band, near = "", ""
    if paper is not None:
        band = "The orange band is the paper's mean and spread of the length. "
        near = ", and in or near the band below"
    return album.add(
        "table1", fig, "Feature by feature at linear1",
        f"Of the live component that matches each feature's column best. {band}Good: every dot on "
        f"the dotted line above{near}; lengths well under 1 are the shrinkage SPD is meant to end.",
    )  # fmt: skip


def _matrices(facts: Facts, album: Album) -> list[Picture]:
    pictures = []
    for name in facts.sites:
        probes, known = facts.probes[name], facts.expected.get(name)
        fig = importances.matrix(probes, known)
        result = facts.evaluation["sites"][name]
        if known is None:
            caption = "Columns by descending mass. No ground truth is known for this site."
        else:
            ordered = probes[:, known.permute(probes)]
            shown = importances.shown_columns(ordered, known)
            if known.pattern == "identity":
                good = f"a clean diagonal over {count(known.components, 'component')}"
            else:
                good = (
                    f"{count(known.components, 'column')} that reach 0.9, left of the dotted line"
                )
            error = result["ci_error"]
            outcome = "No entry contradicts it" if error == 0 else f"{count(error, 'entry')} "
            if error:
                outcome += "contradicts it" if error == 1 else "contradict it"
                if error <= importances.MAX_MARKS:
                    outcome += " (framed)"
            hidden = probes.shape[1] - shown
            rest = (
                f" Not drawn: {count(hidden, 'component')} that never exceed 0.1." if hidden else ""
            )
            caption = f"Good: {good}, nothing above 0.1 elsewhere. {outcome}.{rest}"
        pictures.append(album.add(f"importances-{name}", fig, name, caption))
    return pictures


def _neurons(facts: Facts, album: Album) -> list[Picture]:
    """Neuron contributions: residual MLPs only."""
    found = facts.neurons
    if found is None:
        return []
    layers = "".join(
        f" Layer {i + 1}: R² {layer['r2']:.3f}, slope {layer['slope']:.3f}."
        for i, layer in enumerate(found.by_layer())
        if found.target.shape[0] > 1
    )
    return [
        album.add(
            "neurons-features", neurons.by_feature(found), "The first features, neuron by neuron",
            "A dot a neuron: how much it contributes to the feature's own output, in the target "
            "and with the feature's component alone. Good: the two panels are the same.",
        ),
        album.add(
            "neurons", neurons.scatter(found), "All features",
            f"R² {found.r2:.4f} about the dotted diagonal, slope {found.slope:.3f} (below 1 is "
            f"shrinkage).{layers} Good: every dot on the diagonal.",
        ),
    ]  # fmt: skip


def _training(facts: Facts, album: Album) -> list[Picture]:
    target = facts.config.target
    floor = target.features * target.probability if isinstance(target, TMSTarget) else None
    return [
        album.add(
            "losses", curves.losses(facts), "Losses",
            "Single batches, before their coefficients; the total is weighted. Good: "
            "reconstruction and faithfulness fall by orders of magnitude while importance "
            "minimality settles on a floor, the number of components the data needs.",
        ),
        album.add(
            "schedules", curves.schedules(facts), "Schedules",
            "What the optimiser and the importance penalty (g + ε)ᵖ were set to.",
        ),
        album.add(
            "l0", curves.site_l0(facts, floor), "Active components per sample (L0)",
            "Importance above 0.01, mean over the batch. "
            + (
                "Good: near the dotted line, the mean number of features present in a sample."
                if floor is not None
                else "Good: falls until a handful of components serves each sample."
            ),
        ),
        album.add(
            "live", curves.live(facts), "Live components",
            "Active (importance above 0.01) anywhere in the batch. Good: meets the dotted line, "
            "the known number of mechanisms, and stays.",
        ),
    ]  # fmt: skip


def _sparsity(facts: Facts, album: Album) -> list[Picture]:
    known = "The dotted lines stand after the known number of mechanisms."
    pictures = [
        album.add(
            "importance-mean", importances.sorted_means(facts, log=False),
            "Mean importance, sorted",
            f"Over {count(facts.samples, 'sample')} of the data. {known} Good: nothing to their "
            "right.",
        ),
        album.add(
            "importance-mean-log", importances.sorted_means(facts, log=True),
            "The same, logarithmic",
            "Good: a cliff of orders of magnitude right at the dotted line. Means "
            "below 10⁻⁶ lie on the lower edge.",
        ),
    ]  # fmt: skip
    for name in facts.sites:
        fig = importances.histogram(facts.activity[name].histogram)
        pictures.append(
            album.add(
                f"importance-histogram-{name}", fig, f"Importances at {name}",
                "All samples and components, counts on a logarithmic axis. Good: most at 0, a "
                "spike at 1, few between.",
            )
        )  # fmt: skip
    return pictures


def _quality(facts: Facts, album: Album) -> list[Picture]:
    evaluation = facts.evaluation
    values = evaluation["reconstruction"]
    named = {MASKS.get(k, (k, ""))[0]: v for k, v in values.items()}
    order = [MASKS[k][0] for k in MASKS if k in values]
    order += [n for n in named if n not in order]
    unit = {"mse": "mean squared error", "kl": "KL divergence [nats]"}[facts.config.divergence]
    relative = {n: s["relative_error"] for n, s in evaluation["sites"].items()}
    return [
        album.add(
            "reconstruction",
            bars.reconstruction({n: named[n] for n in order}, MASKS["zero"][0], unit),
            "Reconstruction under each mask",
            "Good: all far below “all zero”, and “importances” and “rounded” as low as "
            "“stochastic”: what is called unimportant can be left out.",
        ),
        album.add(
            "faithfulness", bars.faithfulness(relative), "Faithfulness of each site",
            "What the components' sum misses of the target's weight. Good: below 10⁻².",
        ),
    ]  # fmt: skip


def _site_rows(facts: Facts) -> list[dict[str, str]]:
    rows = []
    for name, result in facts.evaluation["sites"].items():
        site = facts.run.model.sites[name]
        known = result["expected"]
        # The paper's measures go by input feature: they mean something where inputs are features.
        by_feature = (
            known is not None
            and known[0] == "identity"
            and site.d_in == facts.config.target.features
        )
        rows.append(
            {
                "site": name + (f" (tied to {site.tied_to})" if site.tied_to else ""),
                "W": f"{site.d_out} × {site.d_in}",
                "C": str(result["components"]),
                "live": str(result["live_components"]),
                "expected": f"{known[1]} ({known[0]})" if known else "—",
                "contradictions": "—" if result["ci_error"] is None else f"{result['ci_error']:,}",
                "L0": number(result["l0"]),
                "MMCS": f"{result['mmcs']:.4f}" if by_feature else "—",
                "ML2R": f"{result['ml2r']:.3f}" if by_feature else "—",
                "faithfulness": number(result["faithfulness"]),
                "relative": number(result["relative_error"]),
            }
        )
    return rows


def _table1(facts: Facts) -> list[dict[str, Any]]:
    """MMCS and ML2R: experiment → (APD, SPD, this run)."""
    tables = []
    for i, (metric, key) in enumerate((("MMCS", "mmcs"), ("ML2R", "ml2r"))):
        rows = []
        for name, paper in PAPER.items():
            ours = None
            site = facts.evaluation["sites"].get("linear1")
            if network_of(facts.config.name) == name and site is not None:
                digits = 4 if key == "mmcs" else 3
                ours = f"{site[key]:.{digits}f} ± {site[f'{key}_std']:.{digits}f}"
            rows.append(
                {
                    "name": name,
                    "apd": PAPER_APD.get(name, ("—", "—"))[i],
                    "spd": paper[i],
                    "ours": ours,
                }
            )
        tables.append({"metric": metric, "rows": rows})
    return tables


def _environment(facts: Facts) -> list[tuple[str, str]]:
    names = {
        "date": "Started", "spd_fast": "spd_fast", "torch": "PyTorch", "python": "Python",
        "platform": "Platform", "processor": "Processor", "threads": "Threads", "cuda": "GPU",
    }  # fmt: skip
    rows = [(label, str(facts.environment.get(key) or "—")) for key, label in names.items()]
    rows += [("Backend", facts.evaluation["backend"]), ("Device", facts.evaluation["device"])]
    command = facts.environment.get("command")
    if command:
        rows.append(("Command", shlex.join(["spd-fast", *map(str, command)])))
    return rows


def _starts(evaluation: dict[str, Any]) -> str:
    """How many starts there were, from which seeds, and the loss of each after its steps."""
    record = evaluation.get("starts")
    if record is None:
        return ""
    losses = ["diverged" if loss is None else f"{loss:.3g}" for loss in record["losses"]]
    losses[record["chosen"]] += " (continued)"
    return (
        f"The start of lowest loss among {len(losses)}, after {count(record['steps'], 'step')} "
        f"from the seeds {', '.join(map(str, record['seeds']))}: {', '.join(losses)}."
    )


def _target_line(facts: Facts) -> str:
    target = facts.config.target
    if isinstance(target, TMSTarget):
        identity = ", with a frozen identity between" if target.identity_layers else ""
        return (
            f"toy model of superposition: {target.features} features in {target.hidden} "
            f"dimensions{identity}"
        )
    return (
        f"residual MLP: {count(target.layers, 'layer')} of {target.d_mlp} neurons, "
        f"{target.features} features in a stream of {target.d_embed}"
    )


def _pages() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("spd_fast.report", "."),
        autoescape=jinja2.select_autoescape(("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_report(run: Run) -> Path:
    """Write figures/*.png, report.html and README.md into the run's folder.

    Returns:
        the page's path.

    Raises:
        UserError: the run has no eval.json.
    """
    facts = gather(run)
    evaluation, config = facts.evaluation, facts.config
    album = Album(run.folder / "figures")
    album.folder.mkdir(parents=True, exist_ok=True)
    with drawing():
        context: dict[str, Any] = {
            "drawings": _network(facts, album),
            "matches": _matches(facts, album),
            "matrices": _matrices(facts, album),
            "neurons": _neurons(facts, album),
            "training": _training(facts, album),
            "sparsity": _sparsity(facts, album),
            "quality": _quality(facts, album),
            "speed": album.add(
                "speed", curves.speed(facts), "Time per training step",
                "Mean between two log lines. Good: flat; bumps are other work on the machine.",
            ),
        }  # fmt: skip
    changes, rows = recipe_changes(config), _site_rows(facts)
    context |= {
        "apd": isinstance(config, APDConfig),
        "name": config.name,
        "seed": config.seed,
        "starts": _starts(evaluation),
        "verdict": verdict(evaluation),
        "target": _target_line(facts),
        "config": config,
        "changes": changes,
        "evaluation": evaluation,
        "site_rows": rows,
        "by_feature": any(row["MMCS"] != "—" for row in rows),
        "table1": _table1(facts) if _in_table1(config) else None,
        "reconstruction": [
            (*MASKS.get(k, (k, "")), number(evaluation["reconstruction"][k]))
            for k in (*MASKS, *sorted(set(evaluation["reconstruction"]) - set(MASKS)))
            if k in evaluation["reconstruction"]
        ],
        "duration": duration(evaluation["seconds"]),
        "ms_per_step": number(evaluation["ms_per_step"]),
        "memory": f"{evaluation['peak_memory_mb']:,.0f} MB",
        "environment": _environment(facts),
        "version": facts.environment.get("spd_fast", "—"),
        "yaml": config.to_yaml(),
        "eval_json": json.dumps(evaluation, indent=2),
        "palette": LIGHT_AND_DARK,
        "figures": album.files,
        "table": results_table([evaluation], markdown=True),
        "expected": facts.expected,
    }
    pages = _pages()
    html = pages.get_template("report.html.j2").render(context)
    card = pages.get_template("README.md.j2").render(context)
    write_bytes(run.folder / "README.md", card.encode())
    page = run.folder / "report.html"
    write_bytes(page, html.encode())
    return page
