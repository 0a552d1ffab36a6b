"""A study: runs that vary something, what their evaluations say, a table and a figure of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.evaluate import Expected
from spd_fast.experiments import Outcome, expected_sites, run_grid
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.report.style import drawing, png

__all__ = [
    "QUICK_MLP",
    "Cell",
    "Options",
    "Plan",
    "Row",
    "Study",
    "check_folder",
    "run_study",
    "site_rows",
    "write_csv",
    "write_results",
]

Row = dict[str, Any]
# A residual MLP in small.
QUICK_MLP = [
    "steps=30", "batch_size=256", "target.steps=60", "target.batch_size=256", "target.d_embed=200",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A run of a study, and the points of the study that it stands for: their labels."""

    config: AnyConfig
    points: tuple[Row, ...]


# A run's key (its folder below the study's) → the run.
Plan = dict[str, Cell]


@dataclass(frozen=True)
class Study:
    """What is run and how it is shown.

    Attributes:
        name: of the study and of its files. seeds: those it runs unless told otherwise.
        plan: (quick, seeds) → the runs. rows: the table's, of the runs that are finished.
        draw: (rows, folder of the runs) → the figure.
    """

    name: str
    seeds: tuple[int, ...]
    plan: Callable[[bool, Sequence[int]], Plan]
    rows: Callable[[Plan, Mapping[str, Outcome]], list[Row]]
    draw: Callable[[list[Row], Path], Figure]


@dataclass(frozen=True)
class Options:
    """How to carry out a study; ``seeds`` None means its own."""

    out: Path
    quick: bool = False
    seeds: Sequence[int] | None = None
    device: str | None = None
    backend: str | None = None
    jobs: int = 1
    quiet: bool = False


def site_rows(
    plan: Plan,
    found: Mapping[str, Outcome],
    values: Callable[[dict[str, Any], Expected, dict[str, Any]], Row],
) -> list[Row]:
    """A row a finished run and site: the run's labels, the site, and ``values`` of the evaluation,
    of what is known about the site and of what was found there."""
    return [
        cell.points[0] | {"site": site} | values(evaluation, known, evaluation["sites"][site])
        for key, cell in plan.items()
        if key in found and (evaluation := found[key].evaluation) is not None
        for site, known in expected_sites(cell.config).items()
    ]


def check_folder(out: Path, name: str) -> None:
    """Raise UserError unless ``out`` is new, empty, or holds this study."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    ours = {"runs", "cells", f"{name}.csv", f"{name}.png"}
    if out.is_dir():
        foreign = [p.name for p in out.iterdir() if p.name not in ours and p.name[0] != "."]
        if foreign:
            raise UserError(f"--out {out} holds other things ({foreign[0]}); choose another folder")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows as CSV, with the first row's keys as header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, out.getvalue().encode())


def write_results(
    name: str, rows: list[Row], figure: Callable[[], Figure], out: Path
) -> list[Path]:
    """``out/NAME.csv`` and ``out/NAME.png``."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{name}.csv", rows)
    with drawing():
        write_bytes(out / f"{name}.png", png(figure()))
    return [out / f"{name}.csv", out / f"{name}.png"]


def run_study(study: Study, options: Options) -> list[Path]:
    """Run what is missing below ``options.out/runs``, then write table and figure.

    Raises:
        UserError: bad input, before the first run.
    """
    check_folder(options.out, study.name)
    plan = study.plan(options.quick, options.seeds or study.seeds)
    folder = options.out / "runs"
    found = run_grid(
        {key: cell.config for key, cell in plan.items()}, folder, label=study.name,
        device=options.device, backend=options.backend, jobs=options.jobs, quiet=options.quiet,
    )  # fmt: skip
    rows = study.rows(plan, found)
    return write_results(study.name, rows, lambda: study.draw(rows, folder), options.out)
