"""Persistent PGD (VPD): an adversary that goes on from step to step.

r and its Adam moments live across training steps. In a step r first ascends ``n_warmup`` times with
everything else detached; then the loss is taken at r, and its one backward gives the gradients of
the parameters and the last ascent of r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spd_fast.errors import UserError
from spd_fast.losses.adversary import Init, Sources, gradients, initial_value
from spd_fast.losses.routing import Routing
from spd_fast.losses.step import Step
from spd_fast.ops.random import RandomSource, make_key

__all__ = ["PersistentPGD", "PersistentSources", "persistent_pgd_recon"]

NAME = "persistent_pgd_recon"
# The step word of the key from which the first r is drawn: no training step has it.
INITIAL_STEP = 2**32 - 2


@dataclass(frozen=True)
class PersistentPGD:
    """``scope``: one r per component (``shared``), per (position in the sequence, component), or
    per (sample of the batch, position, component). ``lr``, ``betas``, ``eps``: of r's Adam."""

    lr: float
    n_warmup: int = 0
    scope: Literal["shared", "per_position", "per_sample_and_position"] = "shared"
    init: Init = "random"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    routing: Routing | None = None


class PersistentSources:
    """r of every site, δ among them as one more channel, with its Adam moments.

    Attributes:
        r: site → raw sources [..., C + 1] ([..., C] without delta), leaves that take a gradient.
    """

    def __init__(self, options: PersistentPGD, seed: int) -> None:
        self.options, self.seed, self.count = options, seed, 0
        self.r: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def shapes(self, step: Step) -> dict[str, tuple[int, ...]]:
        """Site → the shape of its r for the whole batch of ``step``."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, site in step.importances.items():
            samples, *rest = site.lower.shape[:-1]
            channels = site.lower.shape[-1] + int(step.model.delta)
            if self.options.scope == "shared":
                shapes[name] = (channels,)
            elif self.options.scope == "per_position":
                shapes[name] = (*rest, channels)
            else:
                shapes[name] = (round(samples / step.part.share), *rest, channels)
        return shapes

    def prepare(self, step: Step) -> None:
        """Draw the first r, at the first step.

        Raises:
            UserError: the batch has another shape than the sources were made for.
        """
        shapes = self.shapes(step)
        if not self.r:
            key = make_key(self.seed, INITIAL_STEP, step.key.device)
            for name, shape in shapes.items():
                source = RandomSource(key, site=step.model.sites[name].index)
                dtype = step.model.V(name).dtype
                self.r[name] = initial_value(self.options.init, source, shape, dtype)
                self._first[name] = torch.zeros_like(self.r[name])
                self._second[name] = torch.zeros_like(self.r[name])
        for name, shape in shapes.items():
            if self.r[name].shape != shape:
                raise UserError(
                    f"the sources of persistent PGD at site {name!r} are "
                    f"{tuple(self.r[name].shape)}, but this batch needs {shape}: with scope "
                    f"{self.options.scope!r} all batches must have one shape"
                )
            self.r[name].requires_grad_()

    def of(self, step: Step) -> Sources:
        """The sources at the positions of ``step``; gradients flow to ``r``."""
        r, delta = {}, {}
        for name, raw in self.r.items():
            if self.options.scope == "per_sample_and_position":
                samples = step.importances[name].lower.shape[0]
                raw = raw.narrow(0, step.part.sample_offset, samples)
            if step.model.delta:
                r[name], delta[name] = raw[..., :-1], raw[..., -1]
            else:
                r[name] = raw
        return Sources(r, delta)

    def warm_up(self, parts: Callable[[], Iterable[Step]]) -> None:
        """``n_warmup`` ascents over the whole batch, with everything else detached."""
        for _ in range(self.options.n_warmup):
            total = {n: torch.zeros_like(r) for n, r in self.r.items()}
            for step in parts():
                names = list(self.r)
                with torch.enable_grad():
                    sources = self.of(step)
                grads = gradients(step, sources, names, step.routing(NAME))
                # Back through the slices to the raw sources.
                raw = torch.autograd.grad(
                    sources.tensors(), list(self.r.values()), grads, allow_unused=True
                )
                for name, grad in zip(names, raw, strict=True):
                    total[name] += step.part.share * grad
            self.ascend(total)

    @torch.no_grad()
    def ascend(self, gradients: Mapping[str, Tensor]) -> None:
        """One step of Adam upwards, then back into [0, 1]."""
        self.count += 1
        (b1, b2), lr, eps = self.options.betas, self.options.lr, self.options.eps
        for name, grad in gradients.items():
            first, second = self._first[name], self._second[name]
            first.lerp_(grad, 1 - b1)
            second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
            unbiased = second.div(1 - b2**self.count).sqrt_().add_(eps)
            step = lr / (1 - b1**self.count)
            self.r[name].addcdiv_(first, unbiased, value=step).clamp_(0, 1)

    def ascend_from_backward(self, coefficient: float) -> None:
        """The last ascent of a step, by the gradient that the main backward left: that of
        ``coefficient`` · D."""
        gradients = {n: r.grad / coefficient for n, r in self.r.items() if r.grad is not None}
        for r in self.r.values():
            r.grad = None
        self.ascend(gradients)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        if not self.r:
            return {}
        state = {"count": torch.tensor(self.count)}
        for name, r in self.r.items():
            state[f"r.{name}"] = r.detach()
            state[f"first.{name}"], state[f"second.{name}"] = self._first[name], self._second[name]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.count = int(state["count"]) if state else 0
        for kind, held in (("r.", self.r), ("first.", self._first), ("second.", self._second)):
            held.clear()
            for key, value in state.items():
                if key.startswith(kind):
                    held[key.removeprefix(kind)] = value.to(device)


def persistent_pgd_recon(step: Step) -> Tensor:
    """D with every site masked, m = g + (1 − g) r for the adversary's present r.

    The trainer lets r ascend before and after (:class:`PersistentSources`).
    """
    assert step.persistent is not None
    sources = step.persistent.of(step)
    return step.reconstruction(sources.masking(step.importances, step.routing(NAME)))
