"""The paper's Table 1 beside ours, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "APD",
    "PAPER",
    "PAPER_APD",
    "mean_and_spread",
    "network_of",
    "paper_values",
    "recovered_word",
    "results_table",
    "seeds_summary",
    "steps_word",
]

# arXiv 2506.20790, table 1: experiment → (MMCS ±, ML2R ±), on linear1, over features of one run.
PAPER: dict[str, tuple[str, str]] = {
    "tms_5-2": ("1.000 ± .000", "0.993 ± .002"),
    "tms_40-10": ("1.000 ± .000", "1.010 ± .007"),
    "tms_5-2-id": ("1.000 ± .000", "0.992 ± .010"),
    "tms_40-10-id": ("1.000 ± .000", "1.031 ± .001"),
}
# The same table's values for its predecessor, APD.
PAPER_APD: dict[str, tuple[str, str]] = {
    "tms_5-2": ("0.998", "0.893 ± .004"),
    "tms_40-10": ("0.996 ± .003", "0.935 ± .001"),
}
# How the names of APD's experiments begin.
APD = "apd/"
HEADER = (
    "experiment", "seed", "recovered", "MMCS paper", "MMCS ours", "ML2R paper", "ML2R ours",
    "live", "steps", "time",
)  # fmt: skip


def network_of(name: str) -> str:
    """The network that an experiment of either method and any recipe decomposes."""
    return name.removeprefix(APD).removesuffix("-2026").removesuffix("-published")


def paper_values(name: str) -> tuple[str, str] | None:
    """The paper's (MMCS ±, ML2R ±) of an experiment by SPD or APD, None where it has none."""
    if name.startswith(APD):
        return PAPER_APD.get(network_of(name))
    return PAPER.get(network_of(name))


def mean_and_spread(text: str) -> tuple[float, float]:
    """0.993 ± .002 as two numbers; no spread is 0."""
    mean, _, spread = text.partition("±")
    return float(mean), float(spread or 0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def recovered_word(evaluation: Mapping[str, Any]) -> str:
    """yes, no, ``at 0.2`` where only the wider tolerance lets the check pass, or why neither."""
    if not evaluation["target_represents_all_features"]:
        return "target incomplete"
    if evaluation["recovered"]:
        return "yes"
    return "at 0.2" if evaluation.get("recovered_0p2") else "no"


def steps_word(evaluation: Mapping[str, Any]) -> str:
    """The steps of the run, and of how many starts it is the best."""
    starts = evaluation.get("starts")
    steps = str(evaluation["steps"])
    return steps if starts is None else f"{steps}, best of {len(starts['losses'])} starts"


def _row(evaluation: dict[str, Any]) -> tuple[str, ...]:
    name, sites = evaluation["name"], evaluation["sites"]
    paper = paper_values(name)
    paper_mmcs, paper_ml2r = paper or ("—", "—")
    # Where the paper gives none, APD's row still has the paper's measures.
    first = sites.get("linear1") if paper or name.startswith(APD) else None
    if first is None:
        mmcs = ml2r = "—"
    else:
        mmcs = f"{first['mmcs']:.4f} ± {first['mmcs_std']:.4f}"
        ml2r = f"{first['ml2r']:.3f} ± {first['ml2r_std']:.3f}"
    live = " ".join(f"{s['live_components']}/{s['components']}" for s in sites.values())
    return (
        name, str(evaluation["seed"]), recovered_word(evaluation), paper_mmcs, mmcs, paper_ml2r,
        ml2r, live, steps_word(evaluation), _duration(evaluation["seconds"]),
    )  # fmt: skip


def results_table(evaluations: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """One row a run: paper and ours; ``markdown`` for docs."""
    rows = [HEADER, *(_row(e) for e in evaluations)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    rule = ["-" * w for w in widths]
    if markdown:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
    return "\n".join("  ".join(cells).rstrip() for cells in (lines[0], rule, *lines[1:]))


def _with_spread(stats: dict[str, Any], digits: int) -> str:
    spread = "" if stats["std"] is None else f" ± {stats['std']:.{digits}f}"
    return f"{stats['mean']:.{digits}f}{spread}"


def seeds_summary(aggregate: dict[str, Any]) -> str:
    """What several seeds come to, in a line: ± is the spread over seeds."""
    recovered, sites = aggregate["recovered"], aggregate["sites"]
    parts = [f"recovered on {len(recovered['seeds'])} of {recovered['of']} seeds"]
    first = sites.get("linear1", {})
    parts += [
        f"{label} {_with_spread(first[key], digits)}"
        for key, label, digits in (("mmcs", "MMCS", 4), ("ml2r", "ML2R", 3))
        if key in first
    ]
    neurons = aggregate["neuron_contributions"]
    if neurons is not None:
        parts.append(f"neuron R² {_with_spread(neurons['r2'], 4)}")
    if aggregate["diverged"]:
        parts.append(f"{len(aggregate['diverged'])} diverged")
    if aggregate["target_incomplete"]:
        parts.append(f"{len(aggregate['target_incomplete'])} left out: target incomplete")
    return f"{aggregate['name']}: {'; '.join(parts)}"
