"""How a masked forward masks: one small class per kind, each a maker of mask recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from spd_fast.errors import UserError, nearest
from spd_fast.model.importances import Importances
from spd_fast.model.sites import Site
from spd_fast.ops.masks import MaskRecipe
from spd_fast.ops.random import RandomSource

__all__ = ["Adversarial", "CIMask", "Given", "Masking", "Ones", "Stochastic"]


def _of(tensors: Mapping[str, Tensor], site: str, what: str) -> Tensor:
    if site not in tensors:
        raise UserError(f"no {what} for site {site!r}; given for: {nearest(site, tensors) or '—'}")
    return tensors[site]


class Masking(Protocol):
    """Anything that makes a site's mask recipe."""

    def recipe(self, site: Site) -> MaskRecipe: ...


@dataclass(frozen=True)
class Stochastic:
    """m = g + (1 − g) u, u ~ U(0, 1) from the counter-based source (the paper, eq. 5).

    Attributes:
        key: :func:`spd_fast.ops.make_key` of (seed, step).
        draw: index of this forward within the step: other draws see other numbers.
        delta: mask the weight delta by its own uniform.
        binomial: sources in {0, 1}.
    """

    importances: Importances
    key: Tensor
    draw: int = 0
    delta: bool = False
    binomial: bool = False
    row_offset: int = 0
    routing: Mapping[str, Tensor] = field(default_factory=dict)

    def recipe(self, site: Site) -> MaskRecipe:
        source = RandomSource(self.key, self.draw, site.index, self.row_offset, self.binomial)
        lower = self.importances[site.name].lower
        return MaskRecipe(lower, source, self.delta or None, self.routing.get(site.name))


@dataclass(frozen=True)
class CIMask:
    """m = g, no delta; ``threshold`` rounds: m = 1 where g > threshold, else 0."""

    importances: Importances
    threshold: float | None = None
    routing: Mapping[str, Tensor] = field(default_factory=dict)

    def recipe(self, site: Site) -> MaskRecipe:
        lower, routing = self.importances[site.name].lower, self.routing.get(site.name)
        if self.threshold is None:
            return MaskRecipe(lower, routing=routing)
        return MaskRecipe(source=(lower > self.threshold).to(lower.dtype), routing=routing)


@dataclass(frozen=True)
class Ones:
    """m = 1: the components alone, unmasked, no delta."""

    def recipe(self, site: Site) -> MaskRecipe:
        return MaskRecipe()


@dataclass(frozen=True)
class Given:
    """m (and δ, routing) as given, site by site."""

    masks: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    routing: Mapping[str, Tensor] = field(default_factory=dict)

    def recipe(self, site: Site) -> MaskRecipe:
        name = site.name
        return MaskRecipe(
            source=_of(self.masks, name, "mask"),
            delta=self.deltas.get(name),
            routing=self.routing.get(name),
        )


@dataclass(frozen=True)
class Adversarial:
    """m = g + (1 − g) r for given sources r (and δ), through which gradients flow."""

    importances: Importances
    sources: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    routing: Mapping[str, Tensor] = field(default_factory=dict)

    def recipe(self, site: Site) -> MaskRecipe:
        name = site.name
        return MaskRecipe(
            self.importances[name].lower,
            _of(self.sources, name, "source"),
            self.deltas.get(name),
            self.routing.get(name),
        )
