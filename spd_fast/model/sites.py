"""Sites: which weight matrices of a target are decomposed, and into how many components."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn

from spd_fast.errors import UserError, nearest

__all__ = [
    "IDENTITY", "Site", "SiteKind", "SiteModel", "matrix_of", "resolve_sites", "submodules",
]  # fmt: skip

SiteKind = Literal["linear", "conv1d", "embedding", "identity"]
# ``<module>.pre_identity`` names the site inserted at a module's input, as in the authors' code.
IDENTITY = ".pre_identity"
_COMPILED = "_orig_mod"


@dataclass(frozen=True, eq=False)
class Site:
    """One decomposed weight matrix.

    Attributes:
        name: dotted module path in the target, plus ``.pre_identity`` for an inserted identity.
        index: position in the list of sites: its word of the random counter.
        components: C.
        weight: W [d_out, d_in], detached, sharing the target's storage (an identity's is its own).
        bias: [d_out] or None, likewise.
        tied_to: name of the site whose components this one shares transposed, or None.
        kind: what the module is. Of an ``embedding`` the inputs are tokens, one-hot rows of width
            d_in = vocabulary that nobody forms; of an ``identity`` W = I.
        module: dotted path of the module whose forward holds the site.
    """

    name: str
    index: int
    components: int
    weight: Tensor
    bias: Tensor | None
    tied_to: str | None = None
    kind: SiteKind = "linear"
    module: str = ""

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def d_out(self) -> int:
        return self.weight.shape[0]

    def positions(self, x: Tensor) -> torch.Size:
        """The leading shape of this site's input: that of tokens, or all but x's last dimension."""
        return x.shape if self.kind == "embedding" else x.shape[:-1]


def submodules(target: nn.Module) -> dict[str, nn.Module]:
    """Dotted path → module. A module under ``torch.compile`` goes by its own path, without the
    wrapper's ``_orig_mod``."""
    found = {}
    for name, module in target.named_modules():
        found[".".join(part for part in name.split(".") if part != _COMPILED)] = module
    return found


def matrix_of(module: nn.Module) -> tuple[SiteKind, Tensor] | None:
    """The kind of a module that can be decomposed and its W [d_out, d_in], or None."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return "linear", module.weight
    if isinstance(module, nn.Embedding):
        return "embedding", module.weight.T
    # transformers' Conv1D, by its looks: y = x W + b with W [d_in, d_out].
    looks = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if looks and isinstance(weight, Tensor) and weight.ndim == 2:
        return "conv1d", weight.T
    return None


def _input_width(module: nn.Module) -> int | None:
    """Width of a module's input vectors where its type tells it, else None."""
    matrix = matrix_of(module)
    if matrix is not None:
        return None if matrix[0] == "embedding" else matrix[1].shape[1]
    weight = getattr(module, "weight", None)
    # A norm scales every entry of its input.
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 1 else None


class SiteModel(nn.Module):
    """A frozen target and parameters that stand for the weights of its sites.

    Attributes:
        target: outside the module tree.
        sites: name → site, in the target's module order.
        options: what, besides these, makes the same model again.
    """

    target: nn.Module
    sites: dict[str, Site]
    options: dict[str, Any]

    def V(self, site: str) -> Tensor:
        """The reading side of all components, [d_in, ·]."""
        raise NotImplementedError

    def U(self, site: str) -> Tensor:
        """The writing side of all components, [·, d_out]."""
        raise NotImplementedError

    def matrices(self, site: str) -> Tensor:
        """Every component as a matrix like the site's weight, [C, d_out, d_in]."""
        raise NotImplementedError

    def total(self, site: str) -> Tensor:
        """The sum of all components, (V U)ᵀ [d_out, d_in], in float64."""
        return (self.V(site).double() @ self.U(site).double()).T

    def component_outputs(self, site: str, x: Tensor) -> Tensor:
        """What each component makes of x [N, d_in]: [N, C, d_out], in float64."""
        raise NotImplementedError

    def faithfulness(self) -> dict[str, Tensor]:
        """Site name → ‖W − (V U)ᵀ‖²."""
        raise NotImplementedError

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Parameters in groups to be updated one after the other."""
        return [list(self.parameters())]


def _describe(name: str, module: nn.Module) -> str:
    matrix = matrix_of(module)
    shape = "" if matrix is None else f" {matrix[1].shape[1]} → {matrix[1].shape[0]}"
    return f"{name!r} ({type(module).__name__}{shape})"


def _is_transpose(a: Tensor, b: Tensor) -> bool:
    """Whether b is a's transpose in the same storage."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape[::-1]
        and a.stride() == b.stride()[::-1]
        and a.numel() > 0
    )


def _matches(names: Mapping[str, nn.Module], pattern: str) -> list[str]:
    return [n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)]


def _no_match(
    pattern: str, modules: Mapping[str, nn.Module], possible: Mapping[str, nn.Module]
) -> UserError:
    """Why ``pattern`` names no site: an unsupported module, or nothing at all."""
    path = pattern.removesuffix(IDENTITY)
    unsupported = [n for n in _matches(modules, path) if n]
    if unsupported:
        module = _describe(unsupported[0], modules[unsupported[0]])
        if path == pattern:
            return UserError(
                f"site {module} cannot be decomposed: nn.Linear, nn.Embedding and Conv1D can"
            )
        return UserError(
            f"site {pattern!r}: nothing tells the width of the input of {module}; insert the "
            "identity at a linear layer or a norm"
        )
    names = [n.strip("'") for n in nearest(path, possible).split(", ") if n]
    close = "; ".join(_describe(n, possible[n]) for n in names if n in possible)
    return UserError(f"site pattern {pattern!r} matches no module; closest: {close}")


def _chosen(modules: dict[str, nn.Module], patterns: Mapping[str, int]) -> dict[str, int]:
    """Site name → C."""
    decomposable = {n: m for n, m in modules.items() if n and matrix_of(m) is not None}
    with_width = {n: m for n, m in modules.items() if n and _input_width(m) is not None}
    if not decomposable and matrix_of(modules[""]) is not None:
        raise UserError(
            f"the target is a {type(modules['']).__name__} itself, whose site would have no name: "
            "put it into an nn.Sequential"
        )
    if not decomposable:
        raise UserError(
            f"the target ({type(modules['']).__name__}) has no nn.Linear, nn.Embedding or Conv1D "
            "to decompose"
        )
    chosen: dict[str, int] = {}
    for pattern, components in patterns.items():
        # Whole numbers of any library; True is one to Python, and a slip here.
        if isinstance(components, bool) or not isinstance(components, SupportsIndex):
            raise UserError(f"site {pattern!r} needs a whole number C, got {components!r}")
        components = operator.index(components)
        if components < 1:
            raise UserError(f"site {pattern!r} needs at least one component, got C = {components}")
        matched = _matches(decomposable, pattern)
        if not matched and pattern.endswith(IDENTITY):
            path = pattern.removesuffix(IDENTITY)
            matched = [n + IDENTITY for n in _matches(with_width, path)]
        if not matched:
            inserted = pattern.endswith(IDENTITY)
            raise _no_match(pattern, modules, with_width if inserted else decomposable)
        chosen.update(dict.fromkeys(matched, components))
    return chosen


def _check(name: str, module: nn.Module, kind: SiteKind, weight: Tensor) -> None:
    described = f"site {name!r} ({type(module).__name__})"
    if not weight.is_floating_point():
        raise UserError(f"{described} has weights of {weight.dtype}; need a floating-point matrix")
    if weight.device.type == "meta":
        raise UserError(f"{described} has no weights yet (device 'meta'): load the target first")
    if kind == "embedding" and getattr(module, "max_norm", None) is not None:
        raise UserError(f"{described} rescales its weights while it runs (max_norm): leave it out")
    if not torch.isfinite(weight).all():
        raise UserError(f"the target's weight at site {name!r} is not finite")


def resolve_sites(target: nn.Module, patterns: Mapping[str, int]) -> dict[str, Site]:
    """The sites that ``patterns`` (dotted path or glob → C) name, in the target's module order.

    ``nn.Linear``, transformers' ``Conv1D`` and ``nn.Embedding`` can be decomposed.
    ``<path>.pre_identity`` inserts a site with W = I at the input of a linear layer or a norm. A
    weight that is the transpose of an earlier site's, in the same storage (an embedding and the
    head tied to it), is tied: the two share one set of components. Where several patterns match a
    module, the last one counts.

    Raises:
        UserError: a pattern that matches no module, or only modules that cannot be decomposed;
            C < 1; tied sites with different C; weights that are not finite.
    """
    if not isinstance(patterns, Mapping) or not all(isinstance(p, str) for p in patterns):
        given = type(patterns).__name__
        raise UserError(
            f"sites map module paths to numbers of components, e.g. {{'layers.*.mlp_in': 100}}; "
            f"got a {given}"
        )
    if not patterns:
        raise UserError("no sites: name at least one module, e.g. sites={'layers.*.mlp_in': 100}")
    modules = submodules(target)
    chosen = _chosen(modules, patterns)
    sites: dict[str, Site] = {}
    for path, module in modules.items():
        if (name := path + IDENTITY) in chosen and name not in modules:
            like = module.weight
            assert isinstance(like, Tensor)
            width = _input_width(module)
            assert width is not None
            eye = torch.eye(width, dtype=like.dtype, device=like.device)
            sites[name] = Site(name, len(sites), chosen[name], eye, None, None, "identity", path)
        if path not in chosen:
            continue
        matrix = matrix_of(module)
        assert matrix is not None
        kind, weight = matrix[0], matrix[1].detach()
        _check(path, module, kind, weight)
        owner = next((s for s in sites.values() if _is_transpose(s.weight, weight)), None)
        if owner is not None and owner.components != chosen[path]:
            raise UserError(
                f"sites {owner.name!r} and {path!r} are tied and need the same C, "
                f"got {owner.components} and {chosen[path]}"
            )
        bias = getattr(module, "bias", None)
        sites[path] = Site(
            path, len(sites), chosen[path], weight, None if bias is None else bias.detach(),
            None if owner is None else owner.name, kind, path,
        )  # fmt: skip
    return sites
