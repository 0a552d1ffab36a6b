"""How well a decomposed language model does: losses under each masking, sparsity, site by site."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spd_fast.errors import UserError
from spd_fast.evaluate.reconstruction import ROUND_AT
from spd_fast.losses import PGD, Step, find_sources
from spd_fast.model import CIMask, DecomposedModel, Given, Importances, Masking, Ones, Stochastic
from spd_fast.ops import kl_divergence, make_key

__all__ = [
    "THRESHOLDS",
    "Sparsity",
    "check_logits",
    "evaluate_language",
    "next_token_loss",
    "site_group",
]

# Lower importances above which a component counts.
THRESHOLDS = (0.01, 0.1, 0.5)
# The step word of evaluation keys: no training step has it.
_STEP = 2**32 - 1


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over positions t of −log softmax(logits_t)[token_{t+1}], in nats, in float32."""
    vocabulary = logits.shape[-1]
    return F.cross_entropy(
        logits[:, :-1].float().reshape(-1, vocabulary), tokens[:, 1:].reshape(-1).long()
    )


def check_logits(output: Tensor, tokens: Tensor, vocabulary: int | None = None) -> None:
    """Raise UserError unless ``output`` can be logits [B, T, V] of ``tokens`` [B, T], V at least
    ``vocabulary`` (by default, beyond every token)."""
    need = int(tokens.max()) + 1 if vocabulary is None else vocabulary
    if output.shape[:-1] != tokens.shape or output.shape[-1] < need:
        raise UserError(
            f"the next-token loss needs logits {[*tokens.shape, need]}, but the target's output is "
            f"{list(output.shape)}: choose logits with `output` (target.output), or train a model "
            "without them by spd_fast.Trainer"
        )


def site_group(name: str) -> str:
    """A site's name with its numbers left open: the same matrix of every layer."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


@dataclass
class Sparsity:
    """Counts over positions, in constant memory."""

    positions: int = 0
    # Site → threshold → positions × components above it.
    active: dict[str, dict[float, float]] = field(default_factory=dict)
    # Site → threshold → [C] whether a component was above it anywhere.
    alive: dict[str, dict[float, Tensor]] = field(default_factory=dict)

    def add(self, importances: Importances) -> None:
        self.positions += importances.positions
        for name, site in importances.items():
            lower = site.lower.flatten(0, -2)
            for threshold in THRESHOLDS:
                above = lower > threshold
                active = self.active.setdefault(name, {})
                active[threshold] = active.get(threshold, 0.0) + above.sum().item()
                alive = self.alive.setdefault(name, {})
                now = above.any(dim=0)
                alive[threshold] = alive[threshold] | now if threshold in alive else now

    def l0(self, threshold: float = THRESHOLDS[0]) -> dict[str, float]:
        """Site → mean number of components per position above the threshold."""
        return {n: a[threshold] / max(self.positions, 1) for n, a in self.active.items()}

    def live(self, threshold: float) -> dict[str, int]:
        """Site → components above the threshold anywhere."""
        return {n: int(a[threshold].sum()) for n, a in self.alive.items()}


def _adversary(step: Step, count: int, step_size: float) -> Masking:
    """The masking that ``count`` ascents of KL arrive at."""
    step = replace(step, options={"pgd_recon": PGD(count, step_size)})
    (sources,) = find_sources("pgd_recon", lambda: [step])
    return sources.masking(step.importances, {})


def _maskings(
    step: Step, row_offset: int, pgd_steps: Sequence[int], step_size: float
) -> Iterator[tuple[str, Masking]]:
    importances = step.importances
    yield "unmasked", Ones()
    yield "ci", CIMask(importances)
    yield "rounded", CIMask(importances, threshold=ROUND_AT)
    yield (
        "stochastic",
        Stochastic(importances, step.key, delta=step.model.delta, row_offset=row_offset),
    )
    for count in pgd_steps:
        yield f"pgd_{count}", _adversary(step, count, step_size)
    yield "zero", Given({n: torch.zeros_like(s.lower) for n, s in importances.items()})


@torch.no_grad()
def evaluate_language(
    model: DecomposedModel,
    batches: Iterable[Any],
    *,
    seed: int = 0,
    pgd_steps: Sequence[int] = (),
    pgd_step_size: float = 0.1,
    tokens_of: Callable[[Any], Tensor] = lambda batch: batch,
) -> dict[str, Any]:
    """Next-token loss and KL(target ‖ masked) under each masking, and what explains them.

    Maskings: ``unmasked`` (m = 1), ``ci`` (m = g), ``rounded`` (m = 1 where g > ½), ``stochastic``,
    ``pgd_k`` (sources after k sign-gradient ascents of KL), ``zero``. The hidden-activation error
    of a site is Σ (x̃ − x)² / Σ x² of its input, every site masked stochastically.

    Args:
        batches: each of token ids [B, T], or whatever ``tokens_of`` finds them in.

    Returns:
        ``ce`` and ``kl`` by masking (``ce`` of the ``target`` too), ``sites``, ``groups``
        (:func:`site_group`), ``l0`` (mean over positions of the sum over sites), ``positions``.

    Raises:
        UserError: the target's output cannot be logits of the tokens.
    """
    ce: dict[str, float] = defaultdict(float)
    kl: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    sparsity, samples = Sparsity(), 0
    for index, batch in enumerate(batches):
        tokens = tokens_of(batch)
        clean = model.clean_forward(batch)
        check_logits(clean.output, tokens)
        importances = model.causal_importances(clean)
        key = make_key(seed, _STEP, clean.output.device)
        step = Step(model, batch, clean, importances, key, "kl")
        sparsity.add(importances)
        weight = len(tokens)
        samples += weight
        ce["target"] += weight * next_token_loss(clean.output, tokens).item()
        # Later batches are further draws: rows of one key are positions of one batch.
        offset = index * importances.positions
        for name, masking in _maskings(step, offset, pgd_steps, pgd_step_size):
            seen: dict[str, Tensor] = {}
            output = model.masked_forward(
                batch, masking, clean=clean, importances=importances, inputs=seen
            )
            ce[name] += weight * next_token_loss(output, tokens).item()
            kl[name] += weight * kl_divergence(output, clean.output).item()
            if name == "stochastic":
                for site, x in clean.inputs.items():
                    if x.is_floating_point():
                        errors[site] += (seen[site] - x).double().square().sum().item()
                        sizes[site] += x.double().square().sum().item()
    n = max(samples, 1)
    sites = _sites(model, sparsity, errors, sizes)
    return {
        "ce": {name: total / n for name, total in ce.items()},
        "kl": {name: total / n for name, total in kl.items()},
        "l0": sum(sparsity.l0().values()),
        "sites": sites,
        "groups": _groups(sites),
        "positions": sparsity.positions,
    }


def _sites(
    model: DecomposedModel,
    sparsity: Sparsity,
    errors: Mapping[str, float],
    sizes: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    unfaithful = model.faithfulness()
    l0 = {t: sparsity.l0(t) for t in THRESHOLDS}
    live = {t: sparsity.live(t) for t in THRESHOLDS}
    found = {}
    for name, site in model.sites.items():
        found[name] = {
            "components": site.components,
            "l0": l0[THRESHOLDS[0]][name],
            "l0_above": {str(t): l0[t][name] for t in THRESHOLDS},
            "live_components": {str(t): live[t][name] for t in THRESHOLDS},
            "hidden_error": errors[name] / sizes[name] if sizes.get(name) else None,
            "faithfulness": (unfaithful[name] / site.weight.numel()).item(),
            "relative_error": (unfaithful[name].sqrt() / site.weight.norm()).item(),
        }
    return found


def _groups(sites: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same matrix of all layers together: L0 and live components summed."""
    members: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, site in sites.items():
        members[site_group(name)].append(site)
    return {
        group: {
            "sites": len(found),
            "components": sum(s["components"] for s in found),
            "l0": sum(s["l0"] for s in found),
            "live_components": {
                str(t): sum(s["live_components"][str(t)] for s in found) for t in THRESHOLDS
            },
        }
        for group, found in members.items()
    }
