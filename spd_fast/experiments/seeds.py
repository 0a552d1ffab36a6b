"""One experiment over several seeds: runs, and what they come to together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.experiments.grid import Outcome, run_grid
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.experiments.runs import Run

__all__ = ["aggregate", "check_seeds_folder", "parse_seeds", "run_seeds", "spread"]

MOST_SEEDS = 1000
# A site's numbers in eval.json that have a mean over seeds.
METRICS = (
    "mmcs", "ml2r", "mechanisms_found", "live_components", "ci_error", "l0", "faithfulness",
    "relative_error",
)  # fmt: skip


def parse_seeds(text: str) -> list[int]:
    """``0-4`` or ``0,2,5`` or both: seeds in their order, none twice.

    Raises:
        UserError: anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\s*-\s*(\d{1,10}))?\s*", part, re.ASCII)
        if match is None:
            raise UserError(f"--seeds needs numbers such as 0-4 or 0,2,5, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--seeds: the range {part.strip()} ends before it begins")
        if last >= 2**32:
            raise UserError(f"--seeds: seeds are below 2^32, got {last}")
        if last - first >= MOST_SEEDS:
            raise UserError(f"--seeds: at most {MOST_SEEDS} seeds, got {part.strip()}")
        seeds += [s for s in range(first, last + 1) if s not in seeds]
    if len(seeds) > MOST_SEEDS:
        raise UserError(f"--seeds: at most {MOST_SEEDS} seeds, got {len(seeds)}")
    return seeds


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation (None for a single value), smallest and largest."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((v - mean) ** 2 for v in values)
    std = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    return {"mean": mean, "std": std, "min": min(values), "max": max(values)}


def _spreads(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    held = {k: [row[k] for row in rows if row.get(k) is not None] for k in keys}
    return {k: spread(values) for k, values in held.items() if values}


def aggregate(name: str, found: Mapping[int, Outcome]) -> dict[str, Any]:
    """What several seeds (seed → outcome) come to.

    Seeds whose target lacks a feature have no mechanism to find there: they count for neither side
    and stay out of every mean.
    """
    evaluations = {s: o.evaluation for s, o in found.items() if o.evaluation is not None}
    complete = {s: e for s, e in evaluations.items() if e["target_represents_all_features"]}
    counted = [s for s in found if s in complete or found[s].diverged is not None]
    recovered = [s for s, e in complete.items() if e["recovered"]]
    sites = list(next(iter(complete.values()))["sites"]) if complete else []
    neurons = [
        e["neuron_contributions"] for e in complete.values() if e.get("neuron_contributions")
    ]
    return {
        "name": name,
        "seeds": list(found),
        "diverged": {s: o.diverged for s, o in found.items() if o.diverged is not None},
        "target_incomplete": [s for s in evaluations if s not in complete],
        "recovered": {
            "seeds": recovered,
            "of": len(counted),
            "fraction": len(recovered) / len(counted) if counted else None,
        },
        "sites": {
            site: _spreads([e["sites"][site] for e in complete.values()], METRICS) for site in sites
        },
        "neuron_contributions": _spreads(neurons, ("r2", "slope")) or None,
        **_spreads(list(complete.values()), ("seconds", "ms_per_step")),
    }


def check_seeds_folder(out: Path) -> None:
    """Raise UserError where ``out`` holds anything but runs by seed and their aggregate."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if (out / "config.yaml").exists():
        raise UserError(f"--out {out} holds a single run; choose another folder for --seeds")
    if out.is_dir():
        foreign = [
            p.name
            for p in out.iterdir()
            if not re.fullmatch(r"seed\d+|aggregate\.json|\..*", p.name)
        ]
        if foreign:
            raise UserError(f"--out {out} holds other things ({foreign[0]}); choose another folder")


def run_seeds(
    configs: Mapping[int, AnyConfig],
    out: Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    jobs: int = 1,
    finish: Callable[[Run], Any] | None = None,
    unfinished: Callable[[Path], bool] | None = None,
    quiet: bool = False,
) -> tuple[dict[int, Outcome], dict[str, Any]]:
    """Carry out every seed's run (seed → configuration) in ``out/seedS``, and write
    ``out/aggregate.json``. Options as of :func:`~spd_fast.experiments.run_grid`.

    Returns:
        seed → outcome, and the aggregate.

    Raises:
        UserError: bad input; one line.
    """
    check_seeds_folder(out)
    name = next(iter(configs.values())).name
    found = run_grid(
        {f"seed{seed}": config for seed, config in configs.items()}, out,
        label=f"{name}, {len(configs)} seeds", device=device, backend=backend, jobs=jobs,
        finish=finish, unfinished=unfinished, quiet=quiet,
    )  # fmt: skip
    by_seed = {seed: found[f"seed{seed}"] for seed in configs}
    together = aggregate(name, by_seed)
    write_bytes(out / "aggregate.json", (json.dumps(together, indent=2) + "\n").encode())
    return by_seed, together
