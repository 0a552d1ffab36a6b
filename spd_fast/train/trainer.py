"""The training engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_fast._adamw import adamw
from spd_fast.data.streams import StreamBatches
from spd_fast.losses import (
    LOSSES,
    PGD,
    Frequency,
    Part,
    PersistentPGD,
    PersistentSources,
    Routing,
    Step,
    faithfulness,
    find_sources,
    jittered,
)
from spd_fast.model import DecomposedModel
from spd_fast.ops import make_key
from spd_fast.train.config import TrainConfig
from spd_fast.train.loop import TrainingLoop
from spd_fast.train.pieces import Piece, pieces
from spd_fast.train.schedules import learning_rate
from spd_fast.train.step_graph import StepGraph

__all__ = ["ACTIVE_THRESHOLD", "Trainer"]

# A component counts as active at a position where its lower importance exceeds this.
ACTIVE_THRESHOLD = 0.01
# Losses of the weights alone: the same for every piece of a batch.
OF_WEIGHTS = ("faithfulness", "relative_faithfulness")
PERSISTENT = "persistent_pgd_recon"


class Trainer(TrainingLoop[DecomposedModel, TrainConfig, Step]):
    """Trains the components and importance functions of a decomposed model.

    Args:
        model: the decomposed model.
        config: a :class:`TrainConfig` (a whole :class:`Config` is one).
        batches: step → batch; a pure function of the step, so that a run resumes exactly.
        out: the run's folder for checkpoints and metrics, made if needed; None keeps everything in
            memory.
        quiet: no progress.
    """

    def __init__(
        self,
        model: DecomposedModel,
        config: TrainConfig,
        batches: Callable[[int], Any],
        *,
        out: str | Path | None = None,
        quiet: bool = False,
    ) -> None:
        self._of_components = set(map(id, model.components.parameters()))
        super().__init__(model, config, config.losses, batches, out=out, quiet=quiet)
        # Read once: validated objects are made when they are asked for.
        self.terms = config.losses.terms()
        self.options = config.losses.options()
        persistent = self.options.get(PERSISTENT)
        self.persistent: PersistentSources | None = None
        if isinstance(persistent, PersistentPGD):
            self.persistent = PersistentSources(persistent, config.seed)
        self.graph: StepGraph[tuple[dict[str, Tensor], Step]] | None = None
        if self.device.type == "cuda" and config.cuda_graph and self.varies() is None:
            self.capture()

    def capture(self, **options: Any) -> None:
        """Have the steps from now on recorded and replayed."""
        seed, device = self.config.seed, self.device
        self.graph = StepGraph(self.update, self.optimizer, seed, device, **options)

    def varies(self) -> str | None:
        """What but the batch, the key, the learning rate and annealed numbers differs between
        steps, so that one step's recording is no other's; None where nothing does."""
        config = self.config
        if config.accumulation > 1 or config.activation_checkpointing:
            return "the forwards of one step"
        if any(isinstance(o, PGD | Routing | PersistentPGD) for o in self.options.values()):
            return "adversarial sources or routing"
        return None

    def groups(self) -> list[list[nn.Parameter]]:
        """The model's groups, importance functions apart where their learning rate is another."""
        if self.config.ci_fn_lr is None and not self.config.lr_warm_up:
            return self.model.parameter_groups()
        cut = [
            [p for p in group if (id(p) in self._of_components) == of_components]
            for group in self.model.parameter_groups()
            for of_components in (True, False)
        ]
        return [group for group in cut if group]

    def train_step(self, index: int) -> tuple[dict[str, Tensor], Step]:
        """One step: forward, losses, backward, optimiser. No host synchronisation.

        With accumulation the pieces of the batch are worked through one after the other; losses
        and gradients are those of the whole batch, the step returned is the last piece's.
        """
        self._set_lr(index)
        fraction = index / self.config.steps
        self.coefficients = {name: term.coeff_at(fraction) for name, term in self.terms.items()}
        batch = self.batches(index)
        if self.graph is None:
            return self.update(batch, index)
        penalty = self.config.losses.importance_minimality.penalty_at(fraction)
        return self.graph.run(index, batch, (tuple(self.coefficients.items()), penalty))

    def update(self, batch: Any, index: int = 0) -> tuple[dict[str, Tensor], Step]:
        """All of a step that computes. A recorded one is every step of the same coefficients and
        penalty, whatever its ``index``."""
        cut = pieces(batch, self.config.accumulation)
        key = None if self.graph is None else self.graph.key
        only = self.forwards(index, cut[0], key) if len(cut) == 1 else None
        shared = self._of_whole_batch(index, cut, only)
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for number, piece in enumerate(cut):
            step = only or self.forwards(index, piece, **shared)
            losses = {
                name: self._loss(name, step)
                for name, coefficient in self.coefficients.items()
                if coefficient > 0 and not (number and name in OF_WEIGHTS)
            }
            weights = {n: 1.0 if n in OF_WEIGHTS else step.part.share for n in losses}
            # The gradient of Σ c · loss, without building the sum.
            gradients = [self.gradient(n, self.coefficients[n] * w) for n, w in weights.items()]
            torch.autograd.backward(list(losses.values()), gradients)
            if only is not None:
                total = losses
                break
            for name, loss in losses.items():
                share = weights[name] * loss.detach()
                total[name] = total[name] + share if name in total else share
        if self.persistent is not None and self.coefficients[PERSISTENT] > 0:
            self.persistent.ascend_from_backward(self.coefficients[PERSISTENT])
        self._clip()
        self.optimizer.step()
        return total, step

    def forwards(
        self, index: int, piece: Piece | None = None, key: Tensor | None = None, **shared: Any
    ) -> Step:
        """The forwards that the losses of step ``index`` share, for a piece of its batch (the
        whole batch by default). ``key``: the step's, where it is on the device already."""
        config = self.config
        piece = piece or pieces(self.batches(index), 1)[0]
        key = make_key(config.seed, index, self.device) if key is None else key
        with self._autocast():
            clean = self.model.clean_forward(piece.batch)
            penalty = config.losses.importance_minimality.penalty_at(index / config.steps)
            importances = self.model.causal_importances(clean, penalty)
            offset = importances.positions // piece.samples * piece.start
            if config.sampling == "binomial":
                sites = self.model.sites
                importances = jittered(importances, sites, key, config.draws, offset)
        totals = shared.pop("penalty_totals", None)
        return Step(
            self.model,
            piece.batch,
            clean,
            importances,
            key,
            config.divergence,
            config.draws,
            self.options,
            Part(piece.share, offset, piece.start, totals),
            config.sampling == "binomial",
            config.activation_checkpointing,
            persistent=self.persistent,
            **shared,
        )

    def fresh_loss(self, batches: int = 16) -> float:
        """Σ coefficient · loss of the next step, as a mean over batches that no step trains on.
        Persistent sources, which belong to the training's own steps, are left out."""
        config, total = self.config, 0.0
        fraction = self.step / config.steps
        coefficients = {name: term.coeff_at(fraction) for name, term in self.terms.items()}
        for i in range(config.steps, config.steps + batches):
            piece = pieces(self.batches(i), 1)[0]
            step = self.forwards(self.step, piece, make_key(config.seed, i, self.device))
            for name, coefficient in coefficients.items():
                if coefficient > 0 and name != PERSISTENT:
                    total += coefficient * float(self._loss(name, step).detach())
        return total / batches

    def _of_whole_batch(self, index: int, cut: list[Piece], only: Step | None) -> dict[str, Any]:
        """What a loss needs to know of the whole batch before any piece's backward: the penalty
        sums of a frequency term, and adversarial sources that all samples share."""

        def steps() -> Iterator[Step]:
            if only is not None:
                yield only
                return
            for piece in cut:
                with torch.no_grad():
                    step = self.forwards(index, piece)
                yield step

        def attacked() -> Iterator[Step]:
            for step in steps():
                with self._autocast():
                    yield step

        if self.persistent is not None and self.coefficients[PERSISTENT] > 0:
            self.persistent.prepare(next(steps()))
            self.persistent.warm_up(attacked)
        if only is not None:
            return {}
        shared: dict[str, Any] = {}
        frequency = self.options.get("importance_minimality")
        if isinstance(frequency, Frequency) and frequency.beta > 0:
            totals: dict[str, Tensor] = {}
            for step in steps():
                for name, site in step.importances.items():
                    S = site.penalty_sum.detach()
                    totals[name] = totals[name] + S if name in totals else S
            shared["penalty_totals"] = totals
        shared["sources"] = {
            name: find_sources(name, attacked)
            for name, options in self.options.items()
            if isinstance(options, PGD)
            and options.scope == "shared_across_batch"
            and self.coefficients[name] > 0
        }
        return shared

    def _autocast(self) -> AbstractContextManager[Any]:
        device, wanted = self.device.type, self.config.precision == "bf16"
        if not wanted and not torch.is_autocast_enabled(device):
            return nullcontext()
        # Without its cache: a cast made while gradients were off would be taken up by a later
        # forward that needs them.
        return torch.autocast(device, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def _loss(self, name: str, step: Step) -> Tensor:
        if name in OF_WEIGHTS:
            return LOSSES[name](step)
        with self._autocast():
            return LOSSES[name](step)

    def _clip(self) -> None:
        config = self.config
        for of_components, limit in ((True, config.grad_clip), (False, config.ci_fn_grad_clip)):
            if limit is not None:
                parameters = self.model.parameters()
                nn.utils.clip_grad_norm_(
                    [p for p in parameters if (id(p) in self._of_components) == of_components],
                    limit,
                )

    def warm_up(self) -> None:
        """The start from inputs, where the model asks for one; then faithfulness alone, on V and U;
        its optimiser's moments are then forgotten."""
        if self.model.awaits_inputs:
            once = isinstance(self.batches, StreamBatches) and not self.batches.repeats
            first = range(1 if once else self.config.steps)
            self.model.start_from_inputs(map(self.batches, first))
        warm_up = self.config.warm_up
        groups = [
            [p for p in group if id(p) in self._of_components]
            for group in self.model.parameter_groups()
        ]
        optimizer = adamw(groups, warm_up.lr, warm_up.weight_decay)
        for _ in range(warm_up.steps):
            optimizer.zero_grad(set_to_none=True)
            faithfulness(self.model).backward()
            optimizer.step()

    def _set_lr(self, index: int) -> None:
        config = self.config
        rises = config.lr_warm_up * config.steps
        risen = min((index + 1) / rises, 1.0) if rises else 1.0
        for group in self.optimizer.param_groups:
            lr = config.lr if config.ci_fn_lr is None else config.ci_fn_lr
            if id(group["params"][0]) in self._of_components:
                lr = config.lr * risen
            value = learning_rate(config.lr_schedule, lr, index, config.steps)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.persistent is None else self.persistent.state_dict()

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.graph is not None:
            self.graph.forget()
        if self.persistent is not None:
            self.persistent.load_state_dict(state, self.device)

    def unsound(self, step: Step) -> str | None:
        """Where something is not finite, in the order in which a step computes."""
        model, importances = step.model, step.importances
        for name, x in step.clean.inputs.items():
            if x.is_floating_point() and not x.isfinite().all():
                return f"the target's own activations are not finite from site {name!r} on"
        if not step.clean.output.isfinite().all():
            return "the target's own output is not finite"
        for name, site in importances.items():
            if not site.lower.isfinite().all():
                return f"the importances of site {name!r} are not finite"
        # The optimiser's step has passed on what was not finite: it tells only where not all is.
        bad = [
            n
            for n in model.sites
            if not (model.V(n).isfinite().all() & model.U(n).isfinite().all())
        ]
        if bad and len(bad) < len(model.sites):
            return f"the components of site {bad[0]!r} are not finite"
        return None

    def statistics(self, step: Step) -> dict[str, Any]:
        """p (or γ) of the importance penalty; per site the mean number of active components and
        how many are active anywhere in the batch (with accumulation: in its last piece)."""
        active = {n: s.lower > ACTIVE_THRESHOLD for n, s in step.importances.items()}
        positions = max(step.importances.positions, 1)
        minimality = self.config.losses.importance_minimality
        return {
            "p": minimality.p_at((self.step - 1) / self.config.steps),
            "l0": {n: float(a.sum() / positions) for n, a in active.items()},
            "live": {n: int(a.flatten(0, -2).any(dim=0).sum()) for n, a in active.items()},
        }
