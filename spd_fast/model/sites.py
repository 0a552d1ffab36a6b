"""Sites: which modules of a target are decomposed, and into how many components."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_fast.errors import UserError, nearest

__all__ = ["Site", "SiteModel", "resolve_sites"]


@dataclass(frozen=True, eq=False)
class Site:
    """One decomposed weight matrix.

    Attributes:
        name: dotted module path in the target.
        index: position in the list of sites: its word of the random counter.
        components: C.
        weight: W [d_out, d_in], detached, sharing the target's storage.
        bias: [d_out] or None, likewise.
        tied_to: name of the site whose components this one shares transposed, or None.
    """

    name: str
    index: int
    components: int
    weight: Tensor
    bias: Tensor | None
    tied_to: str | None = None

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[0]


class SiteModel(nn.Module):
    """A frozen target and parameters that stand for the weights of its sites.

    Attributes:
        target: outside the module tree.
        sites: name → site, in the target's module order.
    """

    target: nn.Module
    sites: dict[str, Site]

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Parameters in groups to be updated one after the other."""
        return [list(self.parameters())]


def _describe(name: str, module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    shape = f" {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return f"{name!r} ({type(module).__name__}{shape})"


def _is_transpose(a: Tensor, b: Tensor) -> bool:
    """Whether b is a's transpose in the same storage."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape[::-1]
        and a.stride() == b.stride()[::-1]
        and a.numel() > 0
    )


def resolve_sites(target: nn.Module, patterns: Mapping[str, int]) -> dict[str, Site]:
    """The sites that ``patterns`` (dotted path or glob → C) name, in the target's module order.

    A weight that is the transpose of an earlier site's, in the same storage, is tied to it: the
    two share one set of components. Where several patterns match a module, the last one counts.

    Raises:
        UserError: a pattern that matches no module, or a module that is no ``nn.Linear``; C < 1;
            tied sites with different C.
    """
    if not patterns:
        raise UserError("no sites: name at least one module, e.g. sites={'layers.*.mlp_in': 100}")
    modules = dict(target.named_modules())
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
    if not linear:
        raise UserError(f"the target ({type(target).__name__}) has no nn.Linear to decompose")
    chosen: dict[str, int] = {}
    for pattern, components in patterns.items():
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise UserError(f"site {pattern!r} needs at least one component, got C = {components}")
        matched = [n for n in linear if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            if pattern in modules:
                kind = type(modules[pattern]).__name__
                raise UserError(f"site {pattern!r} is a {kind}; only nn.Linear can be decomposed")
            names = [n.strip("'") for n in nearest(pattern, linear).split(", ") if n]
            close = "; ".join(_describe(n, linear[n]) for n in names if n in linear)
            raise UserError(f"site pattern {pattern!r} matches no module; closest: {close}")
        chosen.update(dict.fromkeys(matched, components))
    sites: dict[str, Site] = {}
    for name, module in linear.items():
        if name not in chosen:
            continue
        weight = module.weight.detach()
        owner = next((s for s in sites.values() if _is_transpose(s.weight, weight)), None)
        if owner is not None and owner.components != chosen[name]:
            raise UserError(
                f"sites {owner.name!r} and {name!r} are tied and need the same C, "
                f"got {owner.components} and {chosen[name]}"
            )
        bias = None if module.bias is None else module.bias.detach()
        sites[name] = Site(
            name, len(sites), chosen[name], weight, bias, None if owner is None else owner.name
        )
    if not all(torch.isfinite(s.weight).all() for s in sites.values()):
        bad = next(n for n, s in sites.items() if not torch.isfinite(s.weight).all())
        raise UserError(f"the target's weight at site {bad!r} is not finite")
    return sites
