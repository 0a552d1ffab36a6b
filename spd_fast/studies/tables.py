"""The tables of the paper's page, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spd_fast.errors import UserError
from spd_fast.experiments import Outcome, aggregate, configuration, recipe
from spd_fast.report.table import APD, PAPER, PAPER_APD, network_of, recovered_word, steps_word
from spd_fast.studies.paper import SEEDS, STUDIES, folder_of
from spd_fast.studies.scaling import METHODS, SERIES, slope
from spd_fast.studies.sources import Sources, machine
from spd_fast.studies.study import Plan
from spd_fast.train import Config

__all__ = ["all_tables"]

NOT_MEASURED = "not measured"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "no estimate"
    if seconds < 5400:
        return f"about {max(round(seconds / 60), 1)} min"
    if seconds < 48 * 3600:
        return f"about {seconds / 3600:.1f} h"
    return f"about {seconds / 86400:.1f} days"


def _seconds(sources: Sources, name: str, steps: int) -> float | None:
    """Estimated time of ``steps`` steps of a recipe on one CPU thread."""
    cost = sources.estimates.get(name, {}).get("cpu_ms")
    return None if cost is None else steps * cost / 1e3


def _missing(sources: Sources, name: str) -> list[str] | None:
    """Seeds, command and estimated time of what a recipe lacks; None where nothing is."""
    lacking = [s for s in SEEDS[name] if s not in sources.runs.get(name, {})]
    if not lacking:
        return None
    listed = ",".join(map(str, lacking))
    config = configuration(recipe(name))
    steps = config.steps
    if isinstance(config, Config):  # each further start does its part again
        steps += round((config.starts.count - 1) * config.starts.fraction * steps)
    one = _seconds(sources, name, steps)
    time = _hours(None if one is None else one * len(lacking))
    command = f"`spd-fast run {name} --seeds {listed} --out runs/paper/{folder_of(name)}`"
    return [listed.replace(",", ", "), command, time]


def _where(record: Mapping[str, Any]) -> str:
    gates = f"; {record['gates']} gates" if record.get("gates") else ""
    return f"{machine(record)}; torch {record['torch']}{gates}; {record['date'][:10]}"


def _pm(stats: Mapping[str, Any], digits: int) -> str:
    spread = "" if stats["std"] is None else f" ± {stats['std']:.{digits}f}"
    return f"{stats['mean']:.{digits}f}{spread}"


def _over_seeds(name: str, records: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    return aggregate(name, {s: Outcome(r["evaluation"]) for s, r in records.items()})


def table1(sources: Sources, method: str) -> str:
    """MMCS and ML2R at linear1, a row a run, and the mean over seeds."""
    values = PAPER_APD if method == "APD" else PAPER
    rows = []
    for name in SEEDS:
        network = network_of(name)
        if network not in PAPER or name.startswith(APD) != (method == "APD"):
            continue
        paper = values.get(network, ("not recovered", "not recovered"))
        records = sources.runs.get(name, {})
        for seed, record in sorted(records.items()):
            evaluation = record["evaluation"]
            site = evaluation["sites"]["linear1"]
            live = " ".join(
                f"{s['live_components']}/{s['components']}" for s in evaluation["sites"].values()
            )
            rows.append(
                [
                    name, str(seed), recovered_word(evaluation), paper[0],
                    f"{site['mmcs']:.4f} ± {site['mmcs_std']:.4f}", paper[1],
                    f"{site['ml2r']:.3f} ± {site['ml2r_std']:.3f}", live,
                    steps_word(evaluation), _where(record),
                ]
            )  # fmt: skip
        if len(records) > 1:
            found = _over_seeds(name, records)
            site = found["sites"].get("linear1")
            if site:
                recovered = found["recovered"]
                rows.append(
                    [
                        name, f"all {len(records)}",
                        f"{len(recovered['seeds'])} of {recovered['of']}", paper[0],
                        _pm(site["mmcs"], 4), paper[1], _pm(site["ml2r"], 3), "", "",
                        "± over seeds",
                    ]
                )  # fmt: skip
        missing = _missing(sources, name)
        if missing is not None:
            lacking, command, time = missing
            rows.append(
                [name, lacking, NOT_MEASURED, paper[0], "", paper[1], "", "", command, time]
            )
    header = (
        "experiment", "seed", "recovered", "MMCS paper", "MMCS ours", "ML2R paper", "ML2R ours",
        "live", "steps or command", "machine and date, or estimated time",
    )  # fmt: skip
    return _markdown(header, rows)


def residual_table(sources: Sources) -> str:
    """Ground-truth errors, live components and neuron contributions of the residual MLPs."""
    rows = []
    for name in (n for n in SEEDS if network_of(n).startswith("resid")):
        records = sources.runs.get(name, {})
        for seed, record in sorted(records.items()):
            evaluation = record["evaluation"]
            parts = {
                end: [s for n, s in evaluation["sites"].items() if n.endswith(end)]
                for end in ("mlp_in", "mlp_out")
            }
            neurons = evaluation["neuron_contributions"]
            rows.append(
                [
                    name, str(seed), recovered_word(evaluation),
                    *(
                        f"{'+'.join(str(s['live_components']) for s in sites)}"
                        f" (errors {'+'.join(str(s['ci_error']) for s in sites)})"
                        for sites in parts.values()
                    ),
                    f"{neurons['r2']:.4f}" if neurons else "—",
                    f"{neurons['slope']:.3f}" if neurons else "—",
                    steps_word(evaluation), _where(record),
                ]
            )  # fmt: skip
        missing = _missing(sources, name)
        if missing is not None:
            lacking, command, time = missing
            rows.append([name, lacking, NOT_MEASURED, "", "", "", "", command, time])
    header = (
        "experiment", "seed", "recovered", "live in mlp_in", "live in mlp_out", "neuron R²",
        "slope", "steps or command", "machine and date, or estimated time",
    )  # fmt: skip
    return _markdown(header, rows)


def seeds_table(sources: Sources) -> str:
    """Fraction recovered of every recipe."""
    rows = []
    for name in SEEDS:
        records = sources.runs.get(name, {})
        if not records:
            rows.append([name, "0", NOT_MEASURED, ""])
            continue
        found = _over_seeds(name, records)
        recovered = found["recovered"]
        left_out = ", ".join(map(str, found["target_incomplete"])) or "none"
        rows.append(
            [name, str(len(records)), f"{len(recovered['seeds'])} of {recovered['of']}", left_out]
        )
    return _markdown(("recipe", "seeds run", "recovered", "left out: target incomplete"), rows)


def _cost(sources: Sources, plan: Plan) -> float | None:
    """Estimated seconds of a study: cost of a step as in the recipe of the same name, in
    proportion to batch and components."""
    total = 0.0
    for cell in plan.values():
        config = cell.config
        whole = configuration(recipe(config.name))
        one = _seconds(sources, config.name, config.steps)
        if one is None:
            return None
        total += one * config.batch_size / whole.batch_size * _size(config) / _size(whole)
    return total


def _size(config: Any) -> int:
    return sum(config.sites.values()) if isinstance(config.sites, dict) else config.components


def _study_command(name: str, seeds: Sequence[str] = (), memory_mb: int | None = None) -> str:
    """``seeds``: of the rows, where the command names them because they are not the study's own.
    ``memory_mb``: the limit by which all series ended that memory ended."""
    own = name not in STUDIES or not seeds or list(seeds) == list(map(str, STUDIES[name].seeds))
    chosen = "" if own else f" --seeds {','.join(seeds)}"
    limit = "" if memory_mb is None else f" --memory-mb {memory_mb}"
    return f"`spd-fast study {name}{chosen}{limit} --out runs/paper/studies/{name}`"


def _study_measured(sources: Sources, name: str) -> str:
    """Command of a finished study, its machines, versions and days."""
    where = sources.measured.get(name, {})
    seeds = sorted({row["seed"] for row in sources.studies[name] if "seed" in row}, key=int)
    days, limits = where.get("days", []), where.get("memory_mb", [])
    command = _study_command(name, seeds, limits[0] if len(limits) == 1 else None)
    told = [
        *where.get("machines", []),
        *where.get("versions", []),
        " to ".join(days[:1] + days[1:][-1:]),
    ]
    return "; ".join([command, *filter(None, told)]) + ".\n"


def _study_missing(sources: Sources, name: str) -> str:
    command = _study_command(name)
    if name == "scaling":
        return f"{NOT_MEASURED}: {command}, at most a quarter of an hour a size and method.\n"
    plan = STUDIES[name].plan(False, STUDIES[name].seeds)
    time = _hours(_cost(sources, plan))
    runs = "1 run" if len(plan) == 1 else f"{len(plan)} runs"
    return f"{NOT_MEASURED}: {command}, {runs}, {time} of one CPU thread.\n"


def splitting_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Live components of every site, against C over the number needed."""
    sites = list(dict.fromkeys(r["site"] for r in rows))
    keys = list(dict.fromkeys((r["network"], r["seed"], r["multiple"]) for r in rows))
    table = []
    for network, seed, multiple in keys:
        mine = {
            r["site"]: r
            for r in rows
            if (r["network"], r["seed"], r["multiple"]) == (network, seed, multiple)
        }
        live = [f"{mine[s]['live_components']} of {mine[s]['components']}" for s in sites]
        recovered = next(iter(mine.values()))["recovered"]
        table.append([network, seed, f"{multiple}×", *live, recovered])
    return _markdown(("network", "seed", "C / needed", *sites, "recovered"), table)


def robustness_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Fraction of mechanisms found at every multiplier, mean over seeds."""
    multipliers = sorted({float(r["multiplier"]) for r in rows})
    keys = list(dict.fromkeys((r["network"], r["method"], r["hyperparameter"]) for r in rows))
    table = []
    for key in keys:
        cells = []
        for multiplier in multipliers:
            values = [
                float(r["fraction"])
                for r in rows
                if (r["network"], r["method"], r["hyperparameter"]) == key
                and float(r["multiplier"]) == multiplier
            ]
            cells.append(f"{sum(values) / len(values):.2f}" if values else "—")
        table.append([*key, *cells])
    header = ("network", "method", "hyperparameter", *(f"×{m:g}" for m in multipliers))
    return _markdown(header, table)


def importance_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A row a run and site."""
    keys = ("coefficient", "seed", "site", "needed", "live_components", "ci_error")
    table = [
        [
            *(r[k] for k in keys),
            f"{float(r['neuron_r2']):.4f}",
            f"{float(r['stochastic_recon']):.2e}",
        ]
        for r in rows
    ]
    header = ("coefficient", "seed", "site", "needed", "live", "errors", "neuron R²", "recon")
    return _markdown(header, table)


def variants_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A row a run."""
    table = [
        [
            r["variant"],
            r["seed"],
            *(
                ["diverged", *[""] * 5]
                if r["diverged"] == "True"
                else [
                    *(r[k].replace(" ", "+") for k in ("live_components", "ci_error")),
                    *(f"{float(r[k]):.3f}" for k in ("lowest_on", "highest_off")),
                    f"{float(r['neuron_r2']):.4f}",
                    f"{float(r['slope']):.3f}",
                ]
            ),
        ]
        for r in rows
    ]
    header = (
        "variant", "seed", "live (mlp_in, mlp_out of both layers)", "errors", "lowest wanted on",
        "highest wanted off", "neuron R²", "slope",
    )  # fmt: skip
    return _markdown(header, table)


def convergence_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A row a run and site, after the last step."""
    table = [
        [
            *(r[k] for k in ("network", "seed", "steps", "site", "needed")),
            f"{r['live_components']} of {r['components']}",
            r["ci_error"],
            f"{float(r['neuron_r2']):.4f}",
            f"{float(r['stochastic_recon']):.2e}",
            f"{float(r['zero_recon']):.2e}",
        ]
        for r in rows
    ]
    header = (
        "network", "seed", "steps", "site", "needed", "live", "errors", "neuron R²", "recon",
        "recon without any component",
    )  # fmt: skip
    return _markdown(header, table)


def scaling_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Fitted slopes, and the largest size that fits."""
    table = []
    for name in SERIES:
        against = "components" if name == "components" else "features"
        for method in METHODS:
            mine = [r for r in rows if (r["series"], r["method"]) == (name, method)]
            ok = [r for r in mine if r["status"] == "ok"]
            if not ok:
                continue
            x = [float(r[against]) for r in ok]
            slopes = [slope(x, [float(r[key]) for r in ok]) for key in ("ms", "peak_mb")]
            ended = next((r["status"] for r in mine if r["status"] != "ok"), "largest tried")
            last = ok[-1]
            table.append(
                [
                    name, method, *("—" if s is None else f"{s:.2f}" for s in slopes),
                    f"{last[against]} {against}: {float(last['ms']):.0f} ms, "
                    f"{float(last['peak_mb']):.0f} MB",
                    ended,
                ]
            )  # fmt: skip
    header = ("series", "method", "slope of time", "slope of memory", "largest size", "ended by")
    return _markdown(header, table)


STUDY_TABLES: dict[str, Callable[[Sequence[Mapping[str, str]]], str]] = {
    "splitting": splitting_table,
    "robustness": robustness_table,
    "importance": importance_table,
    "variants": variants_table,
    "convergence": convergence_table,
    "scaling": scaling_table,
}


def all_tables(sources: Sources, pictures: str) -> dict[str, str]:
    """Name → table; ``pictures`` is where the page finds the figures."""
    tables = {
        "spd": table1(sources, "SPD"),
        "apd": table1(sources, "APD"),
        "residual": residual_table(sources),
        "seeds": seeds_table(sources),
    }
    for name, draw in STUDY_TABLES.items():
        rows = sources.studies.get(name)
        if rows:
            try:
                where, table = _study_measured(sources, name), draw(rows)
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{name}.csv is no table of the study {name}: {error!r}") from None
            tables[name] = f"{where}\n![{name}]({pictures}/{name}.png)\n\n{table}"
        else:
            tables[name] = _study_missing(sources, name)
    return tables
