"""What a report says: everything measured, gathered once, and the verdict in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spd_fast import targets
from spd_fast.baselines import APDConfig, APDModel
from spd_fast.baselines.evaluate import on_data, probe_shares
from spd_fast.evaluate import Expected, NeuronContributions, probe_importances
from spd_fast.experiments.recipes import AnyConfig, configuration, expected_sites, recipe, recipes
from spd_fast.experiments.runs import EVALUATION_BATCH, MIN_NEURON_R2, Run, contributions
from spd_fast.model import DecomposedModel
from spd_fast.train import Config
from spd_fast.train.config import flat

__all__ = [
    "Activity",
    "Facts",
    "Verdict",
    "count",
    "duration",
    "gather",
    "number",
    "recipe_changes",
    "verdict",
]

BINS = 50
# A verdict that names more sites than this one by one is no headline any more.
NAMED_SITES = 4
# Nor is one that lists more wrong importances than this.
NAMED_ENTRIES = 6
# Gate neurons evaluated for the importance statistics, over all sites and samples.
NEURON_BUDGET = 2**29
CHUNK_NEURONS = 2**24


@dataclass(frozen=True)
class Activity:
    """Importances of a site over data: mean per component [C], and the histogram of all values
    clipped to [0, 1]."""

    mean: NDArray[np.floating]
    histogram: NDArray[np.integer]


@dataclass(frozen=True)
class Facts:
    """A run, and what its report needs to know of it."""

    run: Run
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    expected: dict[str, Expected]
    probes: dict[str, NDArray[np.floating]]
    activity: dict[str, Activity]
    samples: int
    neurons: NeuronContributions | None

    @property
    def config(self) -> AnyConfig:
        return self.run.config

    @property
    def sites(self) -> list[str]:
        return list(self.run.model.sites)


@dataclass(frozen=True)
class Verdict:
    """``kind``: recovered, missed, void (the target misses features) or open (no ground truth)."""

    kind: str
    headline: str
    reason: str


def count(n: int, noun: str) -> str:
    """1 step, 1,500 steps, 2 entries."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def duration(seconds: float) -> str:
    """Whole seconds as 40 s, 12 min 30 s or 1 h 05 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; powers of ten for what is very small or large."""
    if value is None:
        return "—"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(digits - 1 - int(np.floor(np.log10(abs(value)))), 0)
        return f"{value:,.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} × 10{power}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _named(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """Each wrong importance of a run that has few: where it is, and what it should be."""
    found = [
        (name, entry) for name, s in sites.items() for entry in s.get("ci_contradictions") or []
    ]
    if not found or sum(s["ci_error"] or 0 for s in sites.values()) > NAMED_ENTRIES:
        return ""
    told = [
        f"{name}, feature {e['feature']}: component {e['component']} is "
        f"{round(e['importance'], 2) + 0.0:.2f} (wanted: {e['wanted']})"  # 0.00, never -0.00
        for name, e in found
    ]
    return f" Counted from 0: {'; '.join(told)}."


def verdict(evaluation: Mapping[str, Any]) -> Verdict:
    """Recovered or not, and why, in a sentence each."""
    errors = {n: s["ci_error"] for n, s in evaluation["sites"].items() if s["ci_error"] is not None}
    wrong = [f"{count(error, 'entry')} at {name}" for name, error in errors.items() if error]
    if wrong:
        passed = [name for name, error in errors.items() if not error]
        if len(wrong) > NAMED_SITES:
            worst = sorted(errors, key=lambda name: -errors[name])[:NAMED_SITES]
            total = f"{count(sum(errors.values()), 'entry')} over {len(wrong)} of {len(errors)}"
            wrong = [f"{total} sites, most of them at {_listed(worst)}"]
        check = f"The importances contradict the known mechanisms in {_listed(wrong)}."
        check += _named(evaluation["sites"])
        if passed:
            check += f" Without contradiction: {_listed(passed)}."
    else:
        names = _listed(list(errors)) if errors else "no site"
        check = f"Every importance fits the known mechanisms: no contradicting entry at {names}."
    neurons = evaluation.get("neuron_contributions")
    if neurons is not None and neurons["r2"] < MIN_NEURON_R2:
        check += (
            f" Neuron contributions agree with the target's to R² {neurons['r2']:.3f} only, need "
            f"{MIN_NEURON_R2}."
        )
    missing = evaluation["features_not_represented"]
    if not evaluation["target_represents_all_features"]:
        which = f"{'feature' if len(missing) == 1 else 'features'} {_listed([*map(str, missing)])}"
        reason = (
            f"The trained target itself does not represent {which} (counted from 0): there is no "
            f"such mechanism to find, so seed {evaluation['seed']} counts for neither side. Take "
            f"the next seed. {check}"
        )
        return Verdict("void", "The target is incomplete", reason)
    if not errors:
        return Verdict("open", "No known answer", "This network has no ground truth to check.")
    if evaluation["recovered"]:
        return Verdict("recovered", "Recovered", check)
    if evaluation.get("recovered_0p2"):
        check += " At a tolerance of 0.2 instead of 0.1, which the authors tell as well, none do."
    return Verdict("missed", "Not recovered", check)


def recipe_changes(config: AnyConfig) -> list[tuple[str, str, str]] | None:
    """Settings that differ from the shipped recipe of the same name: (key, recipe's, this run's);
    None where there is no such recipe. The seed is not a difference, nor is how often to log."""
    if config.name not in recipes():
        return None
    ours = flat(config.model_dump(mode="json"))
    theirs = flat(configuration(recipe(config.name)).model_dump(mode="json"))
    aside = {"seed", "log_every", "checkpoint_every", "keep_checkpoints"}
    keys = [k for k in {**theirs, **ours} if k not in aside and theirs.get(k) != ours.get(k)]
    return [(k, str(theirs.get(k, "—")), str(ours.get(k, "—"))) for k in keys]


def _neurons(model: DecomposedModel, config: Config) -> int:
    """Gate neurons a sample costs, over all sites."""
    return sum(s.components for s in model.sites.values()) * max(sum(config.ci_hidden), 1)


@dataclass(frozen=True)
class _Seen:
    """What the components did: ``probes`` as in :class:`Facts`, ``activity`` over ``samples``."""

    probes: dict[str, NDArray[np.floating]]
    activity: dict[str, Activity]
    samples: int


@torch.no_grad()
def _importances(model: DecomposedModel, config: Config) -> _Seen:
    """Importances over the evaluation data, in chunks that keep the memory small."""
    device = next(model.parameters()).device
    cost = _neurons(model, config)
    samples = int(min(max(NEURON_BUDGET // cost, 512), EVALUATION_BATCH))
    chunk = max(CHUNK_NEURONS // cost, 16)
    data = targets.feature_data(config.target, samples, config.seed, "evaluate", str(device))
    sums = {n: np.zeros(s.components) for n, s in model.sites.items()}
    histograms = {n: np.zeros(BINS, dtype=np.int64) for n in model.sites}
    for part in data(0).split(chunk):
        for name, site in model.causal_importances(model.clean_forward(part)).items():
            values = site.lower.float().clamp(0, 1)
            sums[name] += values.double().sum(dim=0).cpu().numpy()
            histograms[name] += torch.histc(values.cpu(), BINS, 0, 1).long().numpy()
    activity = {n: Activity(sums[n] / samples, histograms[n]) for n in model.sites}
    return _Seen(probe_importances(model, config.target.features), activity, samples)


def _kept(model: APDModel, config: APDConfig) -> _Seen:
    """The same for APD, whose components are kept (1) or not (0) at all sites together."""
    device = next(model.parameters()).device
    data = targets.feature_data(
        config.target, EVALUATION_BATCH, config.seed, "evaluate", str(device)
    )
    found = on_data(model, data(0), config.top_k)
    kept = found.kept.float().cpu()
    everywhere = Activity(
        kept.double().mean(dim=0).numpy(), torch.histc(kept, BINS, 0, 1).long().numpy()
    )
    probes = probe_shares(model, config.target.features, found.threshold)
    return _Seen(probes, dict.fromkeys(model.sites, everywhere), len(kept))


def _seen(run: Run) -> _Seen:
    config, model = run.config, run.model
    if isinstance(model, APDModel):
        assert isinstance(config, APDConfig)
        return _kept(model, config)
    assert isinstance(config, Config)
    return _importances(model, config)


def gather(run: Run) -> Facts:
    """Read the run's folder and measure what it does not hold."""
    held = run.folder / "env.json"
    seen = _seen(run)
    return Facts(
        run=run,
        evaluation=run.evaluation(),
        metrics=run.metrics(),
        environment=json.loads(held.read_text(encoding="utf-8")) if held.exists() else {},
        expected=expected_sites(run.config),
        probes=seen.probes,
        activity=seen.activity,
        samples=seen.samples,
        neurons=contributions(run),
    )
