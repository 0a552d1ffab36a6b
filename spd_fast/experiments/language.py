"""A run on a language model: from a configuration to a folder that holds everything about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spd_fast import backends, targets
from spd_fast._files import alone_in, write_bytes
from spd_fast.data import ArrayBatches, PackedTokens, StreamBatches, dataset_rows, load_tokens
from spd_fast.data.arrays import check_range
from spd_fast.errors import Diverged, UserError
from spd_fast.evaluate.language import check_logits, evaluate_language
from spd_fast.experiments.records import read_language_evaluation, read_metrics
from spd_fast.experiments.runs import (
    check_device,
    check_out,
    note_environment,
    peak_memory_mb,
    training_time,
    try_step,
)
from spd_fast.experiments.seeds import check_seeds_folder, spread
from spd_fast.model import DecomposedModel
from spd_fast.train import Trainer, load_config
from spd_fast.train.checkpoint import load_checkpoint, numbered_checkpoints
from spd_fast.train.config import LanguageConfig, TokenData, difference, validate

__all__ = [
    "LanguageRun",
    "evaluate_language_run",
    "load_language_run",
    "run_language",
    "run_language_seeds",
    "token_batches",
]

# Token arrays up to this many ids are looked through before a run; larger ones batch by batch.
CHECKED_WHOLE = 2**28
# Sequences of the evaluation on which each checkpoint is a point of the frontier.
FRONTIER_BATCHES = 2


@dataclass
class LanguageRun:
    """A run's folder, opened."""

    folder: Path
    config: LanguageConfig
    model: DecomposedModel

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder)

    def evaluation(self) -> dict[str, Any]:
        """What eval.json holds."""
        return read_language_evaluation(self.folder)

    def evaluation_batches(self) -> Iterator[Tensor]:
        """The batches that the run is evaluated on."""
        device = str(next(self.model.parameters()).device)
        batches = token_batches(self.config, self.model.target, "evaluate", device)
        return (batches(i) for i in range(self.config.evaluation.batches))


def _load_target(config: LanguageConfig) -> nn.Module:
    return targets.load_hf(config.target.path, revision=config.target.revision)


def _vocabulary(target: nn.Module) -> int | None:
    embeddings: Any = getattr(target, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def _token_file(config: LanguageConfig, path: str) -> Path:
    beside = Path(config.target.path) / path
    return beside if not Path(path).exists() and beside.exists() else Path(path)


def token_batches(
    config: LanguageConfig, target: nn.Module, stream: str, device: str
) -> Callable[[int], Tensor]:
    """step → tokens [batch, positions]; ``stream`` "decompose" for training, "evaluate".

    Raises:
        UserError: no data, ids beyond the target's vocabulary, sequences beyond its context.
    """
    data, training = config.data, stream == "decompose"
    size = config.batch_size if training else config.evaluation.batch_size
    context = getattr(getattr(target, "config", None), "max_position_embeddings", None)
    length = data.length
    batches: Callable[[int], Tensor]
    if isinstance(data, TokenData):
        path = _token_file(config, data.path if training else data.eval_path or data.path)
        tokens = load_tokens(path, data.dtype)
        vocabulary = _vocabulary(target)
        if vocabulary is not None and tokens.size <= CHECKED_WHOLE:
            check_range(tokens, vocabulary, str(path))
        if length is None and tokens.ndim == 2:
            length = tokens.shape[1]
        batches = ArrayBatches(
            tokens, size, length=length, seed=config.seed, stream=stream, device=device
        )
    else:
        split = data.split if training else data.eval_split or data.split
        rows = dataset_rows(
            data.path,
            split=split,
            column=data.column,
            streaming=data.streaming,
            seed=config.seed if training else None,
        )
        batches = StreamBatches(PackedTokens(rows, size, data.length), device)
    if context is not None and length is not None and length > context:
        raise UserError(
            f"sequences of {length} tokens are longer than the model's context of {context}: "
            "set data.length"
        )
    return batches


def language_trainer(
    config: LanguageConfig, target: nn.Module, out: Path, backend: str | None, quiet: bool
) -> Trainer:
    model = DecomposedModel(
        target,
        config.sites,
        ci_fn=config.ci_fn,
        ci_hidden=config.ci_hidden,
        ci_transformer=None
        if config.ci_transformer is None
        else config.ci_transformer.model_dump(),
        sigmoid=config.sigmoid,
        gate_eval=config.gate_eval,
        init=config.init,
        delta=config.delta,
        output=config.target.output,
        seed=config.seed,
        backend=backend,
    )
    device = str(next(model.parameters()).device)
    batches = token_batches(config, target, "decompose", device)
    return Trainer(model, config, batches, out=out, quiet=quiet)


def run_language(
    config: LanguageConfig,
    out: Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> LanguageRun:
    """Decompose: training, evaluation, into ``out``. Everything that can be wrong with the input is
    found before anything is written.

    Raises:
        UserError: bad input; one line.
    """
    chosen = check_device(device, backend)
    check_out(out, config, resume)
    with ExitStack() as locks:
        if out.is_dir():
            locks.enter_context(alone_in(out))
        target = _load_target(config).to(chosen)
        trainer = language_trainer(config, target, out, backend, quiet)
        token_batches(config, target, "evaluate", str(chosen))(0)
        step = try_step(trainer)
        check_logits(step.clean.output, step.batch, _vocabulary(trainer.model.target))
        resumed = resume and out.is_dir() and trainer.resume()
        if not out.is_dir():
            out.mkdir(parents=True)
            locks.enter_context(alone_in(out))
        write_bytes(out / "config.yaml", config.to_yaml().encode())
        note_environment(out, trainer if resumed else None)
        if resumed and not quiet:
            say(f"resuming at step {trainer.step} of {config.steps}")
        trainer.fit()
        trainer.model.save_pretrained(out)
        finished = LanguageRun(out, config, trainer.model)
        evaluate_language_run(finished)
    return finished


def load_language_run(
    folder: Path, *, device: str | None = None, backend: str | None = None
) -> LanguageRun:
    """Open a finished run's folder.

    Raises:
        UserError: not a run, or not finished; another target than the run's.
    """
    config = validate(load_config(folder / "config.yaml"), LanguageConfig)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"the run in {folder} is not finished: continue it with `run … --resume`")
    chosen = check_device(device, backend)
    target = _load_target(config).to(chosen)
    model = DecomposedModel.from_pretrained(folder, target, backend=backend)
    return LanguageRun(folder, config, model)


def _frontier(run: LanguageRun) -> list[dict[str, float]]:
    """KL and next-token loss against L0 at every checkpoint that was kept. The model is left as it
    was."""
    model = run.model
    final = {k: v.clone() for k, v in model.state_dict().items()}
    points = []
    for path in numbered_checkpoints(run.folder / "checkpoints"):
        checkpoint = load_checkpoint(path)
        model.load_state_dict(checkpoint.model)
        batches = (b for i, b in enumerate(run.evaluation_batches()) if i < FRONTIER_BATCHES)
        found = evaluate_language(model, batches, seed=run.config.seed)
        masks = ("ci", "stochastic", "unmasked")
        points.append(
            {
                "step": checkpoint.step,
                "l0": found["l0"],
                **{f"kl_{mask}": found["kl"][mask] for mask in masks},
                **{f"ce_{mask}": found["ce"][mask] for mask in ("target", *masks)},
            }
        )
    model.load_state_dict(final)
    return points


def evaluate_language_run(run: LanguageRun) -> dict[str, Any]:
    """Evaluate the run's model and write eval.json."""
    config, model = run.config, run.model
    device = next(model.parameters()).device
    evaluation = config.evaluation
    found = evaluate_language(
        model,
        run.evaluation_batches(),
        seed=config.seed,
        pgd_steps=evaluation.pgd_steps,
        pgd_step_size=evaluation.pgd_step_size,
    )
    steps, seconds = training_time(run.metrics())
    result = {
        "name": config.name,
        **found,
        "frontier": _frontier(run),
        "steps": steps,
        "seconds": seconds,
        "ms_per_step": 1e3 * seconds / max(steps, 1),
        "peak_memory_mb": peak_memory_mb(device),
        "backend": backends.name_for(model.backend, device),
        "device": str(device),
        "seed": config.seed,
    }
    write_bytes(run.folder / "eval.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def _finished(folder: Path, config: LanguageConfig) -> dict[str, Any] | None:
    """What is known of a seed's run already: its eval.json, or None."""
    held = folder / "config.yaml"
    if not held.exists():
        return None
    if (how := difference(load_config(held), config)) is not None:
        raise UserError(
            f"{folder} holds a run with other settings ({how}); choose another --out, or remove it"
        )
    return read_language_evaluation(folder) if (folder / "eval.json").exists() else None


def aggregate_language(
    name: str, found: Mapping[int, dict[str, Any]], diverged: Mapping[int, str]
) -> dict[str, Any]:
    """Spread over seeds (seed → eval.json) of next-token loss and KL by masking, and of L0."""
    evaluations = list(found.values())

    def over(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {key: spread([row[key] for row in rows]) for key in (rows[0] if rows else ())}

    return {
        "name": name,
        "seeds": sorted({*found, *diverged}),
        "diverged": dict(diverged),
        "ce": over([e["ce"] for e in evaluations]),
        "kl": over([e["kl"] for e in evaluations]),
        **over([{k: e[k] for k in ("l0", "seconds", "ms_per_step")} for e in evaluations]),
    }


def run_language_seeds(
    configs: Mapping[int, LanguageConfig],
    out: Path,
    *,
    finish: Callable[[LanguageRun], Any] | None = None,
    unfinished: Callable[[Path], bool] = lambda _: False,
    **options: Any,
) -> dict[str, Any]:
    """Carry out every seed's run (seed → configuration) in ``out/seedS``, one after another, and
    write ``out/aggregate.json``. Finished runs stay, killed ones continue; one that diverges is
    left out of the means.

    Args:
        finish: called with every newly finished run (its report, say). unfinished: whether a
            finished run's folder lacks what ``finish`` makes; it is then called again.
        options: of :func:`run_language`.

    Returns:
        The aggregate.

    Raises:
        UserError: bad input; one line.
    """
    check_seeds_folder(out)
    found: dict[int, dict[str, Any]] = {}
    diverged: dict[int, str] = {}
    held = {seed: _finished(out / f"seed{seed}", config) for seed, config in configs.items()}
    for seed, config in configs.items():
        evaluation = held[seed]
        if evaluation is None or unfinished(out / f"seed{seed}"):
            try:
                done = run_language(config, out / f"seed{seed}", resume=True, **options)
            except Diverged as error:
                diverged[seed] = str(error)
                continue
            if finish is not None:
                finish(done)
            evaluation = done.evaluation()
        found[seed] = evaluation
    together = aggregate_language(next(iter(configs.values())).name, found, diverged)
    write_bytes(out / "aggregate.json", (json.dumps(together, indent=2) + "\n").encode())
    return together
