"""What the paper's page is made of: finished runs, studies and costs, kept beside it.

The folder of a page holds ``evaluations/*.json`` (a finished run each), ``STUDY.csv`` with
``STUDY.png`` and ``STUDY.json`` (where and when it ran), and ``estimates.json`` (what a step costs,
for the time of what was not run).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.experiments import configuration, recipe
from spd_fast.experiments.recipes import AnyConfig
from spd_fast.experiments.records import read_evaluation
from spd_fast.report.facts import recipe_changes
from spd_fast.studies.measure import measure
from spd_fast.studies.paper import SEEDS, STUDIES, folder_of
from spd_fast.studies.scaling import METHODS, SERIES, SIZES
from spd_fast.train import Config, load_config

__all__ = ["Records", "Sources", "collect", "estimate", "machine", "read_sources"]

# Of what a study's file of where and when holds.
LISTS = ("machines", "versions", "days", "memory_mb")
# Recipe → seed → record.
Records = dict[str, dict[int, dict[str, Any]]]


@dataclass
class Sources:
    """What the tables are made of: recipe → seed → record, study → its rows and where and when they
    were measured, recipe → cost."""

    runs: Records = field(default_factory=dict)
    studies: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)


def _record(folder: Path) -> dict[str, Any]:
    """A finished run of a shipped recipe as it stands, with where and when it ran.

    Raises:
        UserError: not finished, or not the recipe's own settings.
    """
    evaluation = read_evaluation(folder)
    config = configuration(load_config(folder / "config.yaml"))
    changes = recipe_changes(config)
    if changes is None:
        raise UserError(f"{folder} is a run of {config.name!r}, which is no shipped recipe")
    # How the same gates are evaluated: within 1e-5 of each other, and told in the record.
    changes = [change for change in changes if change[0] != "gate_eval"]
    if changes:
        what = ", ".join(f"{key} {ours}" for key, _, ours in changes)
        raise UserError(f"{folder} is not {config.name} as it ships: {what}")
    environment = _environment(folder / "env.json")
    ended = datetime.fromtimestamp((folder / "eval.json").stat().st_mtime, timezone.utc)
    keys = ("processor", "cuda", "torch", "spd_fast")
    return {
        "date": environment.get("date") or ended.strftime("%Y-%m-%d %H:%M UTC"),
        **{key: environment.get(key) for key in keys},
        "threads": _threads(environment),
        "gates": _gates(config, evaluation["backend"]),
        "evaluation": evaluation,
    }


def _environment(path: Path) -> dict[str, Any]:
    """What a run or a cell wrote about its machine; nothing where it did not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def machine(environment: Mapping[str, Any]) -> str:
    """The GPU, or the processor and how many threads of it."""
    return str(
        environment.get("cuda")
        or f"{environment.get('processor')}, {_threads(environment)} thread(s)"
    )


def _threads(environment: Mapping[str, Any]) -> Any:
    """Threads of the process that began a run; with those of the ones that went on with it, where
    they had another number, "1 to 2"."""
    begun, later = environment.get("threads"), environment.get("resumed")
    if not isinstance(begun, int) or not isinstance(later, list):
        return begun
    found = [e.get("threads") for e in later if isinstance(e, dict)]
    counts = sorted({begun, *(n for n in found if isinstance(n, int))})
    return begun if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _measured(folder: Path, rows: int) -> dict[str, Any]:
    """Machines, versions and days of a study's runs or cells, sorted, how many rows it has, and the
    limits of memory by which series ended."""
    cells = [_environment(path) for path in folder.glob("cells/*.json")]
    found = [_environment(path) for path in folder.glob("runs/*/env.json")]
    found += [cell.get("environment", {}) for cell in cells]
    found = [environment for environment in found if environment]
    limits = {round(c.get("memory_limit_mb", 0)) for c in cells if c.get("status") == "memory"}
    return {
        "machines": sorted({machine(e) for e in found}),
        "versions": sorted(
            {f"torch {e.get('torch')}, spd_fast {e.get('spd_fast')}" for e in found}
        ),
        "days": sorted({str(e.get("date"))[:10] for e in found}),
        "rows": rows,
        "memory_mb": sorted(limits - {0}),
    }


def _gates(config: AnyConfig, backend: str) -> str | None:
    """How a run evaluated its gates; None where it has none."""
    if not isinstance(config, Config):
        return None
    fast = config.gate_eval == "auto" and backend == "cpu"
    return "interpolated" if fast or config.gate_eval == "interpolated" else "exact"


def _read_rows(table: Path) -> list[dict[str, str]]:
    """A study's table.

    Raises:
        UserError: unreadable, without a row, or a row of more or fewer cells than the header.
    """
    try:
        with table.open(encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {table}: {error}") from None
    if not rows or any(None in row or None in row.values() for row in rows):
        raise UserError(f"cannot read {table}: cut short; make it again from the study's folder")
    return rows


def _check_study(table: Path) -> list[dict[str, str]]:
    """The rows of a study's table, which is of the whole study, as it ships, or a UserError."""
    name, rows = table.stem, _read_rows(table)
    try:
        whole = _whole_scaling(rows) if name == "scaling" else _planned(name, rows)
    except (ValueError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{table} is not the study {name} as it ships; one in small proves nothing")
    return rows


def _planned(name: str, rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether every row is a point of the study's plan, after its number of steps."""
    seeds = sorted({int(row["seed"]) for row in rows})
    cells = STUDIES[name].plan(False, seeds).values()
    points = [point | {"steps": c.config.steps} for c in cells for point in c.points]
    known = {tuple(str(value) for value in point.values()) for point in points}
    return all(tuple(row[key] for key in points[0]) in known for row in rows)


def _whole_scaling(rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether every method's series goes on to its last size, or to where memory or time end."""
    for series in SERIES:
        for method in METHODS:
            mine = [r for r in rows if (r["series"], r["method"]) == (series, method)]
            sizes = [int(row["size"]) for row in mine]
            if not mine or sizes != list(SIZES[: len(sizes)]):
                return False
            if mine[-1]["status"] == "ok" and len(sizes) < len(SIZES):
                return False
    return True


def collect(folders: Iterable[Path], into: Path) -> list[Path]:
    """Copy what is finished below ``folders`` (runs, or what ``spd-fast paper`` filled) to the
    page's sources ``into``. Runs of other settings than their recipe's are refused, and studies
    in small.

    Returns:
        the files written.
    """
    contents: dict[Path, bytes] = {}  # everything is read before anything is written
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}")
        studies = folder / "studies"
        runs = [p.parent for p in sorted(folder.rglob("eval.json")) if studies not in p.parents]
        tables = [studies / name / f"{name}.csv" for name in (*STUDIES, "scaling")]
        if not runs and not any(table.exists() for table in tables):
            raise UserError(f"{folder} holds no finished run")
        for run in runs:
            record = _record(run)
            evaluation = record["evaluation"]
            name = f"{folder_of(evaluation['name'])}-seed{evaluation['seed']}"
            path = into / "evaluations" / f"{name}.json"
            contents[path] = (json.dumps(record, indent=1) + "\n").encode()
        for table in filter(Path.exists, tables):
            rows = _check_study(table)
            for path in (table, table.with_suffix(".png")):
                contents[into / path.name] = _read_bytes(path)
            where = json.dumps(_measured(table.parent, len(rows)), indent=1) + "\n"
            contents[into / f"{table.stem}.json"] = where.encode()
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return list(contents)


def estimate(into: Path, say: Callable[[str], None] = print) -> Path:
    """Measure a few steps of every recipe and write ``estimates.json``.

    CPU time, which other work on the machine hardly changes; good for telling hours from days,
    no measure of speed. Recipes that have an estimate are left alone.

    Raises:
        UserError: a step that fails for another reason than memory or time.
    """
    path = into / "estimates.json"
    found = _read_mapping(path, dict) if path.exists() else {}
    for name in SEEDS:
        if found.get(name, {}).get("status") == "ok":
            continue
        answer = measure(
            recipe(name), backend=None, device="cpu", memory_mb=float(2**20), seconds=600
        )
        if answer["status"].startswith("failed"):
            raise UserError(f"a step of {name} {answer['status']}")
        found[name] = {"status": answer["status"], "cpu_ms": answer.get("cpu_ms")}
        say(f"{name}: {found[name]}")
        into.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(found, indent=1) + "\n").encode())
    return path


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; run the study again, it draws it") from None


def _read_mapping(path: Path, held: type) -> dict[str, Any]:
    """A JSON object whose values are of the type ``held``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, held) for v in found.values()):
        raise UserError(f"cannot read {path}: it holds something else")
    return found


def read_sources(folder: Path) -> Sources:
    """Everything that :func:`collect` and :func:`estimate` wrote.

    Raises:
        UserError: a file that holds something else.
    """
    sources = Sources()
    for path in sorted((folder / "evaluations").glob("*.json")):
        record = _read_mapping(path, object)
        evaluation = record.get("evaluation")
        if not isinstance(evaluation, dict) or not {"name", "seed"} <= set(evaluation):
            raise UserError(f"cannot read {path}: it holds no run's record")
        sources.runs.setdefault(evaluation["name"], {})[evaluation["seed"]] = record
    for name in (*STUDIES, "scaling"):
        path = folder / f"{name}.csv"
        if path.exists():
            rows = sources.studies[name] = _read_rows(path)
            where = path.with_suffix(".json")
            measured = sources.measured[name] = _read_mapping(where, object)
            if not all(isinstance(measured.get(k), list) for k in LISTS):
                raise UserError(f"cannot read {where}: it holds something else")
            if measured.get("rows") != len(rows):
                told = measured.get("rows")
                raise UserError(f"{path} has {len(rows)} rows, but {where.name} counted {told}")
            if not path.with_suffix(".png").is_file():
                raise UserError(f"no figure {path.with_suffix('.png')} beside {path.name}")
    path = folder / "estimates.json"
    if path.exists():
        sources.estimates = _read_mapping(path, dict)
    return sources
