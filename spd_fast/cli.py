"""The command line: ``spd-fast`` or ``python -m spd_fast``."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from spd_fast.errors import UserError

__all__ = ["app", "main"]

INTERRUPTED = 130
# What a disk can do to a correct command; every other OSError is about a path that was given.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

# Some versions of typer carry click inside, others import it: this is its base error in both.
_UsageError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

app = typer.Typer(
    name="spd-fast",
    help="Stochastic Parameter Decomposition: find a network's mechanisms.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME-seedSEED.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Backend = Annotated[str | None, typer.Option(help="auto, reference, cpu, triton or cuda.")]
Folder = Annotated[Path, typer.Argument(help="A run's folder.")]
# Typer reads annotations at import: X | None needs no future import from Python 3.10 on.


def _print_version(wanted: bool) -> None:
    if wanted:
        import spd_fast

        print(spd_fast.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    # Not the docstring: that would replace the help text above.
    del version


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="An experiment's name, or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Further settings.")
    ] = None,
    out: Out = None,
    device: Device = None,
    backend: Backend = None,
    seed: Annotated[int | None, typer.Option(help="Of target, components and masks.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0-4|0,2,5", help="One run a seed, into OUT/seedS; finished ones stay."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="With --seeds: runs side by side.")] = 1,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Decompose a network, evaluate the result and write a report."""
    from spd_fast import _extension, experiments
    from spd_fast.report import results_table, seeds_summary, write_report
    from spd_fast.train import set_keys

    changes = [*(assignments or []), *(overrides or [])]
    changes += [f"{k}={v}" for k, v in (("seed", seed), ("steps", steps)) if v is not None]
    if seeds is not None:
        if seed is not None:
            raise UserError("--seed and --seeds: give one of them")
        if any(change.partition("=")[0].strip() == "seed" for change in changes):
            raise UserError("--set seed and --seeds: give one of them")
        data = set_keys(experiments.recipe(experiment), changes)
        numbers = experiments.parse_seeds(seeds)
        if experiments.language_configuration(data) is not None:
            _run_language_seeds(
                data, numbers, out, jobs, device=device, backend=backend, quiet=quiet
            )
            return
        configs = {s: experiments.configuration(set_keys(data, [f"seed={s}"])) for s in numbers}
        _extension.keep_freed_memory()
        together = out or Path("runs") / next(iter(configs.values())).name
        found, summary = experiments.run_seeds(
            configs, together, device=device, backend=backend, jobs=jobs, finish=write_report,
            unfinished=lambda folder: not (folder / "report.html").is_file(), quiet=quiet,
        )  # fmt: skip
        print(results_table([o.evaluation for o in found.values() if o.evaluation is not None]))
        print(seeds_summary(summary))
        print(f"aggregate: {together / 'aggregate.json'}")
        return
    if jobs != 1:
        raise UserError("--jobs goes with --seeds")
    data = set_keys(experiments.recipe(experiment), changes)
    if (language := experiments.language_configuration(data)) is not None:
        _run_language(
            language, out or Path("runs") / f"{language.name}-seed{language.seed}",
            device=device, backend=backend, resume=resume, quiet=quiet,
        )  # fmt: skip
        return
    config = experiments.configuration(set_keys(experiments.recipe(experiment), changes))
    folder = out or Path("runs") / f"{config.name}-seed{config.seed}"
    _extension.keep_freed_memory()
    finished = experiments.run(
        config, folder, device=device, backend=backend, resume=resume, quiet=quiet
    )
    report_path = write_report(finished)
    print(results_table([finished.evaluation()]))
    print(f"report: {report_path}")


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(help="splitting, robustness, importance, variants, convergence or scaling."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Table, figure and runs. Default: runs/studies/NAME.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="In small: shows that it runs, proves nothing.")] = (
        False
    ),
    seeds: Annotated[
        str | None, typer.Option(metavar="0-4|0,2,5", help="Default: the study's own.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
    memory_mb: Annotated[
        float | None, typer.Option(help="scaling: what a cell may hold. Default: 4/5 of the free.")
    ] = None,
    device: Device = None,
    backend: Backend = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Carry out a study of the paper's claims; running it again continues it."""
    from spd_fast import _extension, studies
    from spd_fast.experiments import parse_seeds

    studies.check_name(name)
    _extension.keep_freed_memory()
    options = studies.Options(
        out=out or Path("runs") / ("studies-quick" if quick else "studies") / name,
        quick=quick,
        seeds=None if seeds is None else parse_seeds(seeds),
        device=device,
        backend=backend,
        jobs=jobs,
        quiet=quiet,
    )
    for path in studies.carry_out(name, options, memory_mb=memory_mb):
        print(path)


@app.command()
def paper(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="With --page: folders whose finished runs it is to show."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Everything goes here. Default: runs/paper.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="In small: shows that it runs, proves nothing.")] = (
        False
    ),
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Runs such as 'tms_5-2/*', or scaling.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Instead of running: fill this page's tables.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option(help="With --page: measure what a step of every recipe costs.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
    memory_mb: Annotated[
        float | None, typer.Option(help="scaling: what a cell may hold. Default: 4/5 of the free.")
    ] = None,
    device: Device = None,
    backend: Backend = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Carry out everything that the paper claims; running it again continues it."""
    from spd_fast import _extension
    from spd_fast.studies import Options, document, sources
    from spd_fast.studies.paper import paper as carry_out

    if page is not None:
        if not page.is_file():
            raise UserError(f"no page {page}")
        running = {
            "--out": out, "--quick": quick, "--only": only, "--jobs": jobs != 1,
            "--memory-mb": memory_mb, "--device": device, "--backend": backend,
        }  # fmt: skip
        if given := [option for option, value in running.items() if value]:
            raise UserError(f"--page fills a page and runs nothing: leave {given[0]} out")
        beside = page.with_suffix("")
        if not (runs or estimate or beside.is_dir()):
            raise UserError(
                f"{page} is filled from {beside}, which is missing; name folders of runs"
            )
        for path in sources.collect(runs or [], beside):
            print(path)
        if estimate:
            print(sources.estimate(beside))
        document.write_page(page)
        print(page)
        return
    if runs or estimate:
        raise UserError("folders of runs and --estimate go with --page")
    _extension.keep_freed_memory()
    options = Options(
        out or Path("runs") / ("paper-quick" if quick else "paper"),
        quick=quick, device=device, backend=backend, jobs=jobs, quiet=quiet,
    )  # fmt: skip
    for path in carry_out(options, only=only, memory_mb=memory_mb):
        print(path)


def _run_language(config: Any, folder: Path, **options: Any) -> None:
    from spd_fast import _extension
    from spd_fast.experiments.language import run_language
    from spd_fast.report.language import language_table, write_language_report

    _extension.keep_freed_memory()
    finished = run_language(config, folder, **options)
    report_path = write_language_report(finished)
    print(language_table(finished.evaluation()))
    print(f"report: {report_path}")


def _run_language_seeds(
    data: dict[str, Any], seeds: list[int], out: Path | None, jobs: int, **options: Any
) -> None:
    from spd_fast import _extension, experiments
    from spd_fast.experiments.language import run_language_seeds
    from spd_fast.report.language import language_seeds_table, write_language_report
    from spd_fast.train import set_keys

    if jobs != 1:
        raise UserError("--jobs: runs on a language model go one after another")
    found = {s: experiments.language_configuration(set_keys(data, [f"seed={s}"])) for s in seeds}
    configs = {s: config for s, config in found.items() if config is not None}
    together = out or Path("runs") / next(iter(configs.values())).name
    _extension.keep_freed_memory()
    summary = run_language_seeds(
        configs, together, finish=write_language_report,
        unfinished=lambda folder: not (folder / "report.html").is_file(), **options,
    )  # fmt: skip
    print(language_seeds_table(summary))
    print(f"aggregate: {together / 'aggregate.json'}")


def _language_run(folder: Path, device: str | None, backend: str | None) -> Any:
    """The run on a language model in a folder; None where it holds another kind of run."""
    from spd_fast import experiments
    from spd_fast.train import load_config

    held = folder / "config.yaml"
    if not held.is_file() or experiments.language_configuration(load_config(held)) is None:
        return None
    from spd_fast.experiments.language import load_language_run

    return load_language_run(folder, device=device, backend=backend)


@app.command("list")
def list_experiments() -> None:
    """Show the experiments that ship with spd_fast."""
    from spd_fast.experiments import recipes

    width = max(map(len, recipes()))
    for name, description in recipes().items():
        print(f"{name.ljust(width)}  {description}")


@app.command("eval")
def evaluate(folder: Folder, device: Device = None, backend: Backend = None) -> None:
    """Evaluate a finished run again and print eval.json."""
    import json

    from spd_fast.experiments import evaluate_run, load_run

    if (language := _language_run(folder, device, backend)) is not None:
        from spd_fast.experiments.language import evaluate_language_run

        print(json.dumps(evaluate_language_run(language), indent=2))
        return
    print(json.dumps(evaluate_run(load_run(folder, device=device, backend=backend)), indent=2))


@app.command()
def report(folder: Folder) -> None:
    """Draw a finished run's figures and report again."""
    from spd_fast.experiments import load_run
    from spd_fast.report import write_report

    if (language := _language_run(folder, "cpu", None)) is not None:
        from spd_fast.report.language import write_language_report

        print(write_language_report(language))
        return
    print(write_report(load_run(folder, device="cpu")))


@app.command()
def components(
    folder: Folder,
    sites: Annotated[
        list[str] | None, typer.Option("--site", help="A site's name or pattern. Default: all.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Components of each site.")] = 16,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of each component.")] = 6,
    device: Device = None,
    backend: Backend = None,
) -> None:
    """Show a language model's components: the contexts in which they are most important."""
    from fnmatch import fnmatchcase

    from spd_fast.errors import nearest

    run = _language_run(folder, device, backend)
    if run is None:
        raise UserError(f"{folder} holds no run on a language model")
    from spd_fast.report.language import write_components

    names = list(run.model.sites)
    chosen = [n for n in names if any(fnmatchcase(n, p) for p in sites or ["*"])]
    for pattern in sites or []:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise UserError(f"no site {pattern!r}; nearest: {nearest(pattern, names)}")
    print(write_components(run, chosen, top=top, contexts=contexts))


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="Finished runs.")],
    markdown: Annotated[bool, typer.Option(help="For a document.")] = False,
) -> None:
    """Print the paper's Table 1 next to these runs."""
    from spd_fast.experiments.records import read_evaluation
    from spd_fast.report import results_table

    print(results_table([read_evaluation(folder) for folder in folders], markdown=markdown))


@app.command()
def plan(
    experiment: Annotated[str, typer.Argument(help="An experiment's name, or a .yaml file.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting.")
    ] = None,
    device: Device = None,
    backend: Backend = None,
) -> None:
    """Show what a run will need before it runs: sites, parameters, memory, time of a step."""
    from spd_fast import experiments
    from spd_fast.experiments.planning import plan_experiment
    from spd_fast.train import set_keys

    data = set_keys(experiments.recipe(experiment), assignments or [])
    print(plan_experiment(data, device=device, backend=backend).table())


@app.command("import")
def import_(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder of the authors' torch code.")],
    out: Annotated[Path, typer.Option(help="Where to write the decomposition; an empty folder.")],
    target: Annotated[
        str | None, typer.Option(help="Its target: a folder or hub id. Default: the toy inside.")
    ] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME", help="Make it a run with this experiment's training settings."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --as.")
    ] = None,
) -> None:
    """Read a checkpoint of the authors' torch code (either format); none of its code is run."""
    from spd_fast import experiments
    from spd_fast.targets import import_run
    from spd_fast.train import set_keys

    if settings is None:
        if assignments:
            raise UserError("--set goes with --as")
        model = import_run(run_dir, out, target)
    else:
        from spd_fast.experiments.importing import import_as_run

        data = set_keys(experiments.recipe(settings), assignments or [])
        model = import_as_run(run_dir, out, data, target)
    components = sum(site.components for site in model.sites.values())
    print(f"{out}: {len(model.sites)} sites, {components} components")


@app.command()
def doctor() -> None:
    """Print versions, device and usable backends, and try each of them."""
    from spd_fast.doctor import examine

    sys.exit(examine())


def _warn(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"spd-fast: note: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit status 0, or 2 with one line for a mistake of the user's."""
    warnings.showwarning = _warn
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # ± must not end a run on an old terminal
    try:
        given = sys.argv[1:] if arguments is None else arguments
        status = app(given or ["--help"], prog_name="spd-fast", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        _fail(f"{message} (see `spd-fast --help`)", 2)
    except BrokenPipeError:  # the reader of our output went away: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        if error.errno in _DISK_ERRORS:
            _fail(f"{error}; checkpoints written before are kept, `--resume` continues", 1)
        _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        # torch has a class for it on a GPU only.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _fail(f"not enough memory: {error or 'use a smaller batch or fewer components'}", 2)
    if status == INTERRUPTED:  # typer makes this of a KeyboardInterrupt
        _fail("interrupted; `--resume` continues from the last checkpoint", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"spd-fast: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
