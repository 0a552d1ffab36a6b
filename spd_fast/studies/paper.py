"""Everything the paper claims, as one list of runs: what ``make paper`` carries out."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.experiments import (
    Outcome,
    aggregate,
    configuration,
    recipe,
    run_grid,
)
from spd_fast.experiments.grid import outcomes
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.report import write_report
from spd_fast.studies.convergence import CONVERGENCE
from spd_fast.studies.importance import IMPORTANCE
from spd_fast.studies.robustness import ROBUSTNESS
from spd_fast.studies.scaling import check_memory, scaling
from spd_fast.studies.splitting import SPLITTING
from spd_fast.studies.study import QUICK_MLP, Options, Plan, Study, write_results
from spd_fast.studies.variants import VARIANTS
from spd_fast.train import set_keys

__all__ = ["SEEDS", "STUDIES", "claims", "folder_of", "paper", "planned"]

# Recipe → seeds, cheapest first. What takes days on a CPU comes last.
SEEDS: dict[str, tuple[int, ...]] = {
    "tms_5-2": (0, 1, 2, 3, 4),
    "apd/tms_5-2": (0, 1),
    "tms_5-2-id": (0, 1, 2, 3, 4),
    "apd/tms_5-2-id": (0, 1),
    "tms_5-2-2026": (0,),
    "tms_5-2-id-2026": (0,),
    "tms_40-10": (0, 1, 2, 3, 4),
    "apd/tms_40-10": (0, 1),
    "tms_40-10-id": (0, 1, 2, 3, 4),
    "apd/tms_40-10-id": (0,),
    "tms_40-10-id-published": (0,),
    "tms_40-10-2026": (0,),
    "tms_40-10-id-2026": (0,),
    "resid_mlp1": (0, 1, 2),
    "resid_mlp1-2026": (0,),
    "resid_mlp2": (0, 1, 2, 3, 4),
    "resid_mlp2-2026": (0,),
    "resid_mlp2-robust": (0, 1, 2, 3, 4),
    "apd/resid_mlp1": (0,),
    "apd/resid_mlp2": (0,),
    "resid_mlp3": (0, 1, 2),
    "resid_mlp3-2026": (0,),
    "resid_mlp3-robust": (0, 1, 2, 3, 4),
}
STUDIES: dict[str, Study] = {
    study.name: study for study in (SPLITTING, ROBUSTNESS, IMPORTANCE, VARIANTS, CONVERGENCE)
}
QUICK_TMS = ["steps=300", "batch_size=512", "target.steps=1500", "target.batch_size=512"]


def folder_of(name: str) -> str:
    """A recipe's name as one folder: apd/tms_5-2 → apd-tms_5-2."""
    return name.replace("/", "-")


def claims(quick: bool) -> dict[str, AnyConfig]:
    """Folder of a run, NAME/seedS → its configuration."""
    runs: dict[str, AnyConfig] = {}
    for name, of in SEEDS.items():
        small = QUICK_MLP if "resid" in name else QUICK_TMS
        data = set_keys(recipe(name), small if quick else [])
        for seed in of[:1] if quick else of:
            runs[f"{folder_of(name)}/seed{seed}"] = configuration(data | {"seed": seed})
    return runs


def planned(quick: bool) -> tuple[dict[str, AnyConfig], dict[str, Plan]]:
    """Every run, folder → configuration, studies' runs last; and the studies' plans."""
    runs, plans = claims(quick), {}
    for name, study in STUDIES.items():
        plans[name] = study.plan(quick, study.seeds)
        for key, cell in plans[name].items():
            runs[f"studies/{name}/runs/{key}"] = cell.config
    return runs, plans


def paper(options: Options, only: str | None = None, memory_mb: float | None = None) -> list[Path]:
    """Run what is missing of everything into ``options.out``; then aggregates, tables and figures
    of what is complete.

    Args:
        only: a pattern of runs (``tms_5-2*/*``, ``studies/splitting/*``) or ``scaling``.

    Raises:
        UserError: bad input, a pattern without a run, or another run in the folder of one of these
            recipes' seeds.
    """
    check_memory(memory_mb)
    runs, plans = planned(options.quick)
    chosen = {k: c for k, c in runs.items() if only is None or fnmatch.fnmatchcase(k, only)}
    if not chosen and only != "scaling":
        raise UserError(
            f"--only {only!r} matches no run; runs are called as {next(iter(runs))!r} or "
            f"'studies/splitting/*', and there is 'scaling'"
        )
    held = [n for n in ("config.yaml", "aggregate.json") if (options.out / n).exists()]
    if held:
        raise UserError(f"--out {options.out} holds a run ({held[0]}); choose another")
    # An aggregate counts the seeds that were finished before as well.
    recipes = {key.rpartition("/seed")[0] for key in chosen}
    same_recipe = {
        k: c for k, c in claims(options.quick).items() if k.rpartition("/seed")[0] in recipes
    }
    outcomes(same_recipe, options.out)
    found = run_grid(
        chosen, options.out, label="paper", device=options.device, backend=options.backend,
        jobs=options.jobs, finish=_report, unfinished=_lacks_report, quiet=options.quiet,
    )  # fmt: skip
    written = _aggregates(outcomes(same_recipe, options.out), options.out)
    for name, plan in plans.items():
        prefix = f"studies/{name}/runs/"
        mine = {k: found[prefix + k] for k in plan if prefix + k in found}
        if len(mine) == len(plan):
            written += _results(STUDIES[name], plan, mine, options.out / "studies" / name)
    if only is None or only == "scaling":
        place = Options(
            options.out / "studies" / "scaling", options.quick, device=options.device,
            quiet=options.quiet,
        )  # fmt: skip
        written += scaling(place, memory_mb=memory_mb)
    return written


def _has_report(folder: Path) -> bool:
    # A study's run is one of many: its numbers are in the study's table.
    return "studies" not in folder.parts


def _lacks_report(folder: Path) -> bool:
    return _has_report(folder) and not (folder / "report.html").is_file()


def _report(run: Any) -> None:
    if _has_report(run.folder):
        write_report(run)


def _results(study: Study, plan: Plan, found: Mapping[str, Outcome], folder: Path) -> list[Path]:
    rows = study.rows(plan, found)
    return write_results(study.name, rows, lambda: study.draw(rows, folder / "runs"), folder)


def _aggregates(found: Mapping[str, Outcome], out: Path) -> list[Path]:
    """``aggregate.json`` of every recipe, over the seeds that are finished."""
    by_name: dict[str, dict[int, Outcome]] = {}
    for key, outcome in found.items():
        name, _, seed = key.partition("/seed")
        if seed:
            by_name.setdefault(name, {})[int(seed)] = outcome
    written = []
    for name, by_seed in by_name.items():
        path = out / name / "aggregate.json"
        text = json.dumps(aggregate(name, by_seed), indent=2) + "\n"
        write_bytes(path, text.encode())
        written.append(path)
    return written
