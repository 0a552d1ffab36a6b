"""A run: from a configuration to a folder that holds everything about it."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import nn

import spd_fast
from spd_fast import backends, targets
from spd_fast._files import alone_in, write_bytes
from spd_fast.baselines import APDConfig, APDModel, APDTrainer
from spd_fast.errors import UserError
from spd_fast.evaluate import (
    MECHANISM_COSINE,
    WIDER,
    Expected,
    NeuronContributions,
    live,
    live_components,
    mechanism_cosines,
    neuron_contributions,
)
from spd_fast.experiments.measures import AnyModel, match, measure
from spd_fast.experiments.recipes import AnyConfig, configuration, expected_sites
from spd_fast.experiments.records import read_evaluation, read_metrics
from spd_fast.experiments.starts import (
    best_start,
    chosen_start,
    other_starts,
    remove_checkpoints,
    start_config,
)
from spd_fast.losses import Step, stochastic_recon
from spd_fast.model import DecomposedModel
from spd_fast.targets.tms import represented_features
from spd_fast.train import Config, Trainer, load_config
from spd_fast.train.config import ResidMLPTarget, difference
from spd_fast.train.loop import TrainingLoop
from spd_fast.train.progress import Progress

__all__ = [
    "MIN_NEURON_R2",
    "Run",
    "check_device",
    "check_out",
    "contributions",
    "environment",
    "evaluate_run",
    "load_run",
    "make_trainer",
    "note_environment",
    "peak_memory_mb",
    "run",
    "training_time",
    "try_step",
]

EVALUATION_BATCH = 8192
# A residual MLP is recovered where its components' neuron contributions agree this well, too.
MIN_NEURON_R2 = 0.99
# Wrong importances that eval.json lists, of a site.
MOST_CONTRADICTIONS = 20


@dataclass
class Run:
    """A run's folder, opened."""

    folder: Path
    config: AnyConfig
    model: AnyModel

    @property
    def target(self) -> nn.Module:
        return self.model.target

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
            UserError: a line that cannot be read.
        """
        return read_metrics(self.folder)

    def evaluation(self) -> dict[str, Any]:
        """What eval.json holds."""
        return read_evaluation(self.folder)


def _device_of(model: AnyModel) -> torch.device:
    return next(model.parameters()).device


def check_device(device: str | None, backend: str | None) -> torch.device:
    """The device to compute on: the one asked for, else CUDA where there is one.

    Raises:
        UserError: an unknown or absent device, or a backend that cannot run on it.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported; use cpu or cuda")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch sees no CUDA device; use --device cpu")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are {torch.cuda.device_count()} devices")
    backends.check_backend(backend, chosen)
    return chosen


def check_out(out: Path, config: BaseModel, resume: bool) -> None:
    """Raise UserError unless ``out`` can take this run; nothing is written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--out {out} cannot be made: {parent} is no folder that can be written to")
    held = out / "config.yaml"
    if held.exists():
        if (how := difference(load_config(held), config)) is not None:
            raise UserError(f"{out} already holds a different run ({how}); choose another --out")
        if not resume:
            raise UserError(f"{out} already holds this run; pass --resume to continue it")
    elif out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run; choose another --out")


def run(
    config: AnyConfig,
    out: Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> Run:
    """Decompose: target, training, evaluation, into ``out``. Everything that can be wrong with
    the input is found before anything is written.

    Raises:
        UserError: bad input; one line.
    """
    chosen = check_device(device, backend)
    check_out(out, config, resume)
    with ExitStack() as locks:
        if out.is_dir():
            locks.enter_context(alone_in(out))
        trained = _trained_target(config, out)
        # An untrained network stands in for a target still to be trained until all is checked.
        target = targets.make_target(config.target, config.seed) if trained is None else trained
        trainer = make_trainer(_started(config, out), target.to(chosen), out, backend, quiet)
        if isinstance(trainer, APDTrainer):
            with torch.no_grad():
                trainer.forwards(0)
        else:
            try_step(trainer)
        resumed = resume and trained is not None and trainer.resume()

        if not out.is_dir():
            out.mkdir(parents=True)
            locks.enter_context(alone_in(out))
        write_bytes(out / "config.yaml", config.to_yaml().encode())
        note_environment(out, trainer if resumed else None)
        if trained is None:
            target = _train_target(config, out / "target", quiet)
            trainer = make_trainer(_started(config, out), target.to(chosen), out, backend, quiet)
            resumed = resume and trainer.resume()
        elif config.target.path is not None:
            targets.save_target(target, config.target, out / "target")
        if resumed and not quiet:
            say(f"resuming at step {trainer.step} of {config.steps}")
        trains = trainer.step < config.steps
        if isinstance(config, Config) and config.starts.count > 1 and not resumed:
            trainer = best_start(
                config,
                lambda c, at: make_trainer(c, target.to(chosen), at, backend, quiet),
                out,
                side_by_side=chosen.type == "cpu",
                backend=backend,
                quiet=quiet,
            )
        trainer.fit()
        trainer.model.save_pretrained(out)
        finished = Run(out, config, trainer.model)
        evaluate_run(finished, trained_here=trains)
        remove_checkpoints(out)
    return finished


def _started(config: AnyConfig, out: Path) -> AnyConfig:
    """The configuration of the start that the run in ``out`` continues: its own if none."""
    record = chosen_start(config, out)
    if record is None:
        return config
    assert isinstance(config, Config)
    return start_config(config, record.chosen)


@overload
def make_trainer(
    config: Config, target: nn.Module, out: Path | None, backend: str | None, quiet: bool
) -> Trainer: ...
@overload
def make_trainer(
    config: AnyConfig, target: nn.Module, out: Path | None, backend: str | None, quiet: bool
) -> Trainer | APDTrainer: ...
def make_trainer(
    config: AnyConfig, target: nn.Module, out: Path | None, backend: str | None, quiet: bool
) -> Trainer | APDTrainer:
    """What trains the components of a target; ``out`` None keeps everything in memory."""
    device = str(next(target.parameters()).device)
    batches = targets.feature_data(
        config.target, config.batch_size, config.seed, "decompose", device
    )
    if isinstance(config, APDConfig):
        rival = APDModel(
            target,
            dict.fromkeys(config.sites, config.components),
            rank=config.rank,
            extra_rank=config.extra_rank,
            seed=config.seed,
            backend=backend,
        )
        return APDTrainer(rival, config, batches, out=out, quiet=quiet)
    model = DecomposedModel(
        target,
        config.sites,
        ci_fn=config.ci_fn,
        ci_hidden=config.ci_hidden,
        sigmoid=config.sigmoid,
        gate_eval=config.gate_eval,
        init=config.init,
        delta=config.delta,
        seed=config.seed,
        backend=backend,
    )
    return Trainer(model, config, batches, out=out, quiet=quiet)


@torch.no_grad()
def try_step(trainer: Trainer) -> Step:
    """Forwards of one step, which show what the data, the sites or the backend cannot do.

    Raises:
        UserError: also where something is not finite.
    """
    step = trainer.forwards(0)
    if (where := trainer.unsound(step)) is not None:
        raise UserError(where)
    stochastic_recon(step)
    return step


def _trained_target(config: AnyConfig, out: Path) -> nn.Module | None:
    """The target given by path, or the one that this run has trained already, or None."""
    if config.target.path is not None:
        return targets.load_target(config.target, Path(config.target.path))
    if (out / "target" / "config.json").exists():
        try:
            return targets.load_target(config.target, out / "target")
        except UserError as error:
            raise UserError(f"{error}; without {out / 'target'} it is trained again") from None
    return None


def _train_target(config: AnyConfig, folder: Path, quiet: bool) -> nn.Module:
    with Progress("train target", config.target.steps, quiet=quiet) as progress:
        target, losses = targets.train_target(config.target, config.seed, progress.update)
    folder.mkdir(parents=True, exist_ok=True)
    # First, for a folder with the target's config.json is not trained again.
    write_bytes(folder / "losses.json", json.dumps(losses).encode())
    targets.save_target(target, config.target, folder)
    return target


def load_run(folder: Path, *, device: str | None = None, backend: str | None = None) -> Run:
    """Open a finished run's folder.

    Raises:
        UserError: not a run, or not finished.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run (no config.yaml)")
    try:
        config = configuration(load_config(folder / "config.yaml"))
    except UserError as error:
        raise UserError(f"{folder} holds no run: {error}") from None
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"the run in {folder} is not finished: continue it with `run … --resume`")
    chosen = check_device(device, backend)
    target = targets.load_target(config.target, folder / "target").to(chosen)
    kind = APDModel if isinstance(config, APDConfig) else DecomposedModel
    return Run(folder, config, kind.from_pretrained(folder, target, backend=backend))


def note_environment(out: Path, resumed: TrainingLoop[Any, Any, Any] | None) -> None:
    """Write env.json. What a run was begun with stays in it; a process that takes more of its steps
    (``resumed``: its trainer) joins ``resumed`` there, one that finds nothing to do does not."""
    path, now = out / "env.json", environment()
    if resumed is not None and path.exists():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            later = [*begun.get("resumed", []), {"step": resumed.step} | now]
        except (ValueError, AttributeError, TypeError):
            begun, later = now, []
        if resumed.step < resumed.config.steps:
            begun["resumed"] = later
        now = begun
    write_bytes(path, (json.dumps(now, indent=2) + "\n").encode())


def environment() -> dict[str, Any]:
    """Date, versions and machine, for env.json."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "spd_fast": spd_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv[1:],
    }


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _mechanisms_found(
    model: AnyModel, name: str, known: Expected | None, probes: NDArray[np.floating]
) -> int | None:
    """How many input features have a live component of their own; None where the site's inputs
    are not the features."""
    site = model.sites[name]
    if known is None or known.pattern != "identity" or site.d_in != known.components:
        return None
    matrices = model.matrices(name)[torch.from_numpy(live(probes)).to(site.weight.device)]
    if len(matrices) == 0:
        return 0
    return int((mechanism_cosines(matrices, site.weight) >= MECHANISM_COSINE).sum())


def contributions(run: Run) -> NeuronContributions | None:
    """The neuron contributions of a residual MLP with every matrix decomposed; None for others."""
    target = run.config.target
    if not isinstance(target, ResidMLPTarget) or len(run.model.sites) < 2 * target.layers:
        return None
    return neuron_contributions(run.model)


def _trained_where(run: Run, here: bool) -> dict[str, Any]:
    """Memory, backend and device of the training: this process, or what eval.json has kept."""
    keys = ("peak_memory_mb", "backend", "device")
    if not here:
        try:
            before = read_evaluation(run.folder)
            return {key: before[key] for key in keys}
        except UserError:
            pass
    device = _device_of(run.model)
    backend = backends.name_for(run.model.backend, device)
    return dict(zip(keys, (peak_memory_mb(device), backend, str(device)), strict=True))


def training_time(metrics: list[dict[str, Any]]) -> tuple[int, float]:
    """Steps that metrics cover, and the seconds they took."""
    steps = [0, *(m["step"] for m in metrics)]
    spent = ((b - a) * m["ms_per_step"] for (a, b), m in zip(pairwise(steps), metrics, strict=True))
    return steps[-1], sum(spent) / 1e3


def evaluate_run(run: Run, *, trained_here: bool = False) -> dict[str, Any]:
    """Evaluate the run's model against the known mechanisms and write eval.json.

    ``trained_here``: this process trained it, so its memory, backend and device are the run's.
    """
    config, model = run.config, run.model
    device = _device_of(model)
    features = config.target.features
    batch = targets.feature_data(
        config.target, EVALUATION_BATCH, config.seed, "evaluate", str(device)
    )(0)
    expected = expected_sites(config)
    measured = measure(config, model, batch)
    unfaithful = model.faithfulness()
    sites: dict[str, dict[str, Any]] = {}
    for name, site in model.sites.items():
        matched = match(model, name, measured.probes[name])
        anything = match(model, name)
        known, probe = expected.get(name), measured.probes[name]
        # APD has no importances: its errors are its own (measure).
        graded = None if isinstance(model, APDModel) else known
        sites[name] = {
            "mmcs": matched.mmcs,
            "mmcs_std": matched.cosine.std(correction=0).item(),
            "ml2r": matched.ml2r,
            "ml2r_std": matched.ratio.std(correction=0).item(),
            "mmcs_any": anything.mmcs,
            "ml2r_any": anything.ml2r,
            "mechanisms_found": _mechanisms_found(model, name, known, measured.probes[name]),
            "components": site.components,
            "live_components": live_components(measured.probes[name]),
            "expected": None if known is None else [known.pattern, known.components],
            "ci_error": measured.errors.get(name),
            "ci_error_0p2": None if graded is None else graded.error(probe, WIDER),
            "ci_margins": None if graded is None else list(graded.margins(probe)),
            "ci_contradictions": None
            if graded is None
            else [asdict(c) for c in graded.contradictions(probe)[:MOST_CONTRADICTIONS]],
            "l0": measured.l0[name],
            "faithfulness": (unfaithful[name] / site.weight.numel()).item(),
            "relative_error": (unfaithful[name].sqrt() / site.weight.norm()).item(),
        }
    represented = represented_features(model.target, features, device)
    metrics = run.metrics()
    steps, seconds = training_time(metrics)
    elsewhere = sum(training_time(lines)[1] for lines in other_starts(config, run.folder))
    starts = chosen_start(config, run.folder)
    neurons = contributions(run)

    def recovered(key: str) -> bool:
        errors = [s[key] for s in sites.values() if s[key] is not None]
        enough = neurons is None or neurons.r2 >= MIN_NEURON_R2
        return bool(errors) and not any(errors) and enough

    result = {
        "name": config.name,
        "recovered": recovered("ci_error"),
        "recovered_0p2": recovered("ci_error_0p2"),
        "target_represents_all_features": all(represented),
        "features_not_represented": [i for i, ok in enumerate(represented) if not ok],
        "sites": sites,
        "neuron_contributions": None
        if neurons is None
        else {"r2": neurons.r2, "slope": neurons.slope, "layers": neurons.by_layer()},
        "reconstruction": measured.reconstruction,
        "steps": steps,
        "seconds": seconds + elsewhere,
        "ms_per_step": 1e3 * seconds / max(steps, 1),
        "starts": None if starts is None else starts.model_dump(),
        **_trained_where(run, trained_here),
        "seed": config.seed,
    }
    write_bytes(run.folder / "eval.json", (json.dumps(result, indent=2) + "\n").encode())
    return result
