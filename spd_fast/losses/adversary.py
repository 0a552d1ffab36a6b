"""Adversarial sources: the r that makes the reconstruction worst, by projected sign-gradient
ascent (the authors' 2026 code).

    r ← clamp(r + η sign ∂D/∂r, 0, 1), k times, with everything else fixed

r is one number per (position, component) or one per component for the whole batch. Where the model
has a weight delta, its mask is one more channel of r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spd_fast.losses.routing import Routing
from spd_fast.losses.step import Step
from spd_fast.model import Adversarial, DecomposedModel, Importances
from spd_fast.ops.random import RandomSource, uniform

__all__ = ["PGD", "Init", "Sources", "find_sources", "gradients", "initial_value", "variants"]

Init = Literal["random", "ones", "zeros"]
# What the adversary sees of a step: its parts, made again for every ascent.
Parts = Callable[[], Iterable[Step]]


@dataclass(frozen=True)
class PGD:
    """``scope``: one r per position, or one per component shared by the whole batch.
    ``steps``: k. ``step_size``: η. ``routing``: of the subset variant."""

    steps: int
    step_size: float
    scope: Literal["unique_per_datapoint", "shared_across_batch"] = "unique_per_datapoint"
    init: Init = "random"
    routing: Routing | None = None


@dataclass(frozen=True)
class Sources:
    """``r``: site → [..., C] or [C]. ``delta``: site → [...] or a scalar; empty without delta."""

    r: Mapping[str, Tensor]
    delta: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [*self.r.values(), *self.delta.values()]

    def masking(self, importances: Importances, routing: Mapping[str, Tensor]) -> Adversarial:
        """m = g + (1 − g) r, sources that are shared repeated at every position."""
        shapes = {name: importances[name].lower.shape for name in self.r}
        return Adversarial(
            importances,
            {n: t.expand(shapes[n]) for n, t in self.r.items()},
            {n: t.expand(shapes[n][:-1]) for n, t in self.delta.items()},
            {n: t for n, t in routing.items() if n in self.r},
        )


def initial_value(
    init: Init, source: RandomSource, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The first r: of this shape, ``random`` from the counter-based source, row by row."""
    device, size = source.key.device, torch.Size(shape)
    if init == "ones":
        return torch.ones(size, dtype=dtype, device=device)
    if init == "zeros":
        return torch.zeros(size, dtype=dtype, device=device)
    return uniform(source, size[:-1].numel(), size[-1], dtype).reshape(size)


def variants(loss: str, step: Step) -> list[tuple[list[str], dict[str, Tensor]]]:
    """The forwards a PGD loss attacks, each by itself: (sites that are masked, routing)."""
    names = list(step.model.sites)
    if loss.endswith("_layerwise"):
        return [([name], {}) for name in names]
    return [(names, step.routing(loss))]


def _initial(step: Step, loss: str, options: PGD, sites: Sequence[str]) -> Sources:
    r, delta = {}, {}
    shared = options.scope == "shared_across_batch"
    for name in sites:
        like = step.importances[name].lower
        source = RandomSource(
            step.key,
            step.draw(loss),
            step.model.sites[name].index,
            0 if shared else step.part.row_offset,
        )
        shape = (1 if shared else like.shape[:-1].numel(), like.shape[-1] + 1)
        raw = initial_value(options.init, source, shape, like.dtype)
        positions = () if shared else like.shape[:-1]
        r[name] = raw[:, :-1].reshape(*positions, like.shape[-1])
        if step.model.delta:
            delta[name] = raw[:, -1].reshape(positions)
    return Sources(r, delta)


@contextmanager
def _frozen(model: DecomposedModel) -> Iterator[None]:
    """Without gradients of the parameters, which the ascent does not need."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def gradients(
    step: Step, sources: Sources, sites: Sequence[str], routing: Mapping[str, Tensor]
) -> list[Tensor]:
    """∂D/∂r (and δ) with everything else detached."""
    leaves = Sources(
        {n: t.detach().requires_grad_() for n, t in sources.r.items()},
        {n: t.detach().requires_grad_() for n, t in sources.delta.items()},
    )
    detached = step.importances.detach()
    with torch.enable_grad(), _frozen(step.model):
        loss = step.reconstruction(leaves.masking(detached, routing), sites, detached)
        return list(torch.autograd.grad(loss, leaves.tensors()))


def find_sources(loss: str, parts: Parts) -> list[Sources]:
    """The sources after k ascents, one for each of the loss's forwards.

    With r per datapoint there is one part: what the adversary does to one position depends on no
    other sample.
    """
    first = next(iter(parts()))
    options = first.options[loss]
    assert isinstance(options, PGD)
    found = []
    for index, (sites, _) in enumerate(variants(loss, first)):
        sources = _initial(first, loss, options, sites)
        for _ in range(options.steps):
            total: list[Tensor] | None = None
            for step in parts():
                routing = variants(loss, step)[index][1]
                grads = [step.part.share * g for g in gradients(step, sources, sites, routing)]
                total = (
                    grads if total is None else [a + g for a, g in zip(total, grads, strict=True)]
                )
            assert total is not None
            with torch.no_grad():
                moved = [
                    (t + options.step_size * g.sign()).clamp_(0, 1)
                    for t, g in zip(sources.tensors(), total, strict=True)
                ]
            names = list(sources.r)
            sources = Sources(
                dict(zip(names, moved[: len(names)], strict=True)),
                dict(zip(sources.delta, moved[len(names) :], strict=True)),
            )
        found.append(sources)
    return found
