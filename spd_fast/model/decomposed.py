"""DecomposedModel: a frozen target, its components, and their causal-importance functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast import ops
from spd_fast._seeds import mixed_seed
from spd_fast.errors import UserError, nearest
from spd_fast.model.ci_fns import CIFnKind, MLPGate, make_ci_fn
from spd_fast.model.components import Components, Init, TiedComponents
from spd_fast.model.importances import Importances, SiteImportances
from spd_fast.model.masking import Masking
from spd_fast.model.replay import overridden_forwards, prefixes
from spd_fast.model.sites import Site, SiteModel, resolve_sites
from spd_fast.ops.penalty import Penalty
from spd_fast.ops.sigmoids import SigmoidKind, check_sigmoid, upper_importance

__all__ = ["CleanForward", "DecomposedModel"]


@dataclass
class CleanForward:
    """The target's own forward on a batch.

    Attributes:
        output: the target's output.
        inputs: site name → x [..., d_in], the very tensors the modules received, in the order
            in which the sites were called.
        outputs: of the sites, and of the modules before them that masked forwards take over.
    """

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


def _key(site: str) -> str:
    """A site's name inside a ModuleDict, as in the authors' checkpoints."""
    return site.replace(".", "-")


def _constant(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _capture(name: str, forward: Callable[..., Any], clean: CleanForward) -> Callable[..., Any]:
    def captured(*args: Any, **kwargs: Any) -> Any:
        output = clean.outputs[name] = forward(*args, **kwargs)
        return output

    return captured


class _BySite(nn.ModuleDict):
    """Modules by site, which may be called like a method: ``keys``, ``values``."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class DecomposedModel(SiteModel):
    """A target network whose sites are decomposed into rank-one components.

    Only V, U and the causal-importance functions are parameters here. The target stays outside
    the module tree, frozen (its parameters lose ``requires_grad``) and otherwise untouched.

    Args:
        target: any ``nn.Module`` with ``nn.Linear`` submodules.
        sites: dotted module path or glob → number of components C.
        ci_fn, ci_hidden: causal-importance function and its hidden widths (METHOD: ``mlp``).
        sigmoid: preset of the leaky sigmoids, ``paper`` or ``2026``.
        init: preset of the initialisation of V and U, ``paper`` or ``2026``.
        delta: whether stochastic masks include the weight delta.
        seed: of the initialisation.
        backend: who computes the operations.

    Raises:
        UserError: a site pattern without match, C < 1, unknown options.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Mapping[str, int],
        *,
        ci_fn: CIFnKind = "mlp",
        ci_hidden: Sequence[int] = (16,),
        sigmoid: SigmoidKind = "paper",
        init: Init = "paper",
        delta: bool = False,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sigmoid(sigmoid)
        object.__setattr__(self, "target", target)
        self.sites = resolve_sites(target, sites)
        self.sigmoid: SigmoidKind = sigmoid
        self.options: dict[str, Any] = {
            "ci_fn": ci_fn,
            "ci_hidden": list(ci_hidden),
            "sigmoid": sigmoid,
            "init": init,
            "delta": delta,
        }
        self.delta = delta
        self.backend = backend
        self._prefixes: dict[str, tuple[str, ...]] | None = None  # known after the first forward
        self.components = _BySite()
        self.ci_fns = _BySite()
        generator = torch.Generator().manual_seed(mixed_seed(seed, "initialise components"))
        for name, site in self.sites.items():
            if site.tied_to is None:
                self.components[_key(name)] = Components(site, init, generator)
            else:
                owner = self.components[_key(site.tied_to)]
                assert isinstance(owner, Components)
                self.components[_key(name)] = TiedComponents(owner)
        for name, site in self.sites.items():
            gate = make_ci_fn(ci_fn, site.components, ci_hidden, generator)
            self.ci_fns[_key(name)] = gate.to(site.weight.device, site.weight.dtype)
        target.requires_grad_(False)

    def V(self, site: str) -> Tensor:
        """V [d_in, C] of a site."""
        return self.components[_key(site)].V  # type: ignore[return-value]

    def U(self, site: str) -> Tensor:
        """U [C, d_out] of a site."""
        return self.components[_key(site)].U  # type: ignore[return-value]

    def ci_fn(self, site: str) -> MLPGate:
        gate = self.ci_fns[_key(site)]
        assert isinstance(gate, MLPGate)
        return gate

    def clean_forward(self, batch: Any) -> CleanForward:
        """The target's forward, with every site's input captured by reference (no copy).

        Raises:
            UserError: a site that is not called, or is called more than once.
        """
        if self._prefixes is None:
            self._prefixes = prefixes(self.target, self.sites, lambda: self.target(batch))
        clean = CleanForward(output=torch.empty(0))
        captured = {n: self._capture_site(s, clean) for n, s in self.sites.items()}
        for name in {n for prefix in self._prefixes.values() for n in prefix} - captured.keys():
            captured[name] = _capture(name, self.target.get_submodule(name).forward, clean)
        with torch.no_grad(), overridden_forwards(self.target, captured):
            clean.output = self.target(batch)
        if not isinstance(clean.output, Tensor):
            kind = type(clean.output).__name__
            raise UserError(f"the target returns a {kind}, need a tensor: wrap it to select one")
        if missing := [n for n in self.sites if n not in clean.inputs]:
            raise UserError(f"site {missing[0]!r} is not called in the target's forward")
        return clean

    @staticmethod
    def _capture_site(site: Site, clean: CleanForward) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if site.name in clean.inputs:
                raise UserError(
                    f"site {site.name!r} is called more than once per forward, which is not "
                    "supported: leave it out of `sites`"
                )
            clean.inputs[site.name] = x
            y = clean.outputs[site.name] = F.linear(x, site.weight, site.bias)
            return y

        return forward

    def causal_importances(
        self, clean: CleanForward, penalty: Penalty | None = None
    ) -> Importances:
        """Causal importances of every site from the clean forward's site inputs.

        ``penalty`` chooses ψ of the penalty sums; None leaves them zero.
        """
        sites = {}
        positions = 0
        for name in self.sites:
            gate, x = self.ci_fn(name), clean.inputs[name]
            positions = x[..., :1].numel()
            out = ops.gate(
                x, self.V(name), gate.weights, gate.biases,
                sigmoid=self.sigmoid, penalty=penalty, backend=self.backend,
            )  # fmt: skip

            def upper(inner: Tensor, gate: MLPGate = gate) -> Tensor:
                flat = inner.reshape(-1, inner.shape[-1])
                s = ops.gate_logits(flat, gate.weights, gate.biases)
                return upper_importance(s, self.sigmoid).reshape(inner.shape)

            sites[name] = SiteImportances(*out, upper)
        return Importances(sites, positions)

    def masked_forward(
        self,
        batch: Any,
        masking: Masking,
        *,
        sites: Iterable[str] | None = None,
        clean: CleanForward | None = None,
        importances: Importances | None = None,
        inputs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The target's output with the named sites (all by default) replaced by masked components.

        Every other site keeps its original weight. Given the ``clean`` forward of the same batch,
        work that cannot differ from it is not done again: modules that finish before the first
        masked site is called return their clean outputs, and that site takes its inner activations
        from ``importances``. A dict given as ``inputs`` is filled with the inputs that the masked
        sites receive.

        Raises:
            UserError: an unknown site.
        """
        names = list(self.sites) if sites is None else list(sites)
        for name in names:
            if name not in self.sites:
                raise UserError(f"unknown site {name!r}; nearest: {nearest(name, self.sites)}")
        forwards: dict[str, Callable[..., Any]] = {}
        first = None  # the first masked site sees what it saw in the clean forward
        if clean is not None and self._prefixes is not None:
            first = next((n for n in clean.inputs if n in names), None)
            for name in self._prefixes[first] if first is not None else ():
                if name in clean.outputs:
                    forwards[name] = _constant(clean.outputs[name])
        for name in names:
            inner = importances[name].inner if importances is not None and name == first else None
            forwards[name] = self._masked(self.sites[name], masking, inner, inputs)
        with overridden_forwards(self.target, forwards):
            return self.target(batch)

    def _masked(
        self,
        site: Site,
        masking: Masking,
        inner: Tensor | None,
        inputs: dict[str, Tensor] | None,
    ) -> Callable[[Tensor], Tensor]:
        name = site.name

        def forward(x: Tensor) -> Tensor:
            if inputs is not None:
                inputs[name] = x
            return ops.component_linear(
                x, self.V(name), self.U(name), masking.recipe(site),
                weight=site.weight, bias=site.bias, inner=inner,
                backend=self.backend, site_name=name,
            )  # fmt: skip

        return forward

    def save_pretrained(self, folder: str | Path) -> None:
        """Write V, U and the importance functions (never the target) into ``folder``."""
        from spd_fast.model.pretrained import save_pretrained

        save_pretrained(self, folder)

    @staticmethod
    def from_pretrained(
        folder: str | Path, target: nn.Module, *, backend: str | None = None
    ) -> DecomposedModel:
        """What :meth:`save_pretrained` wrote, on the same target.

        Raises:
            UserError: nothing readable there, or a target with other weights.
        """
        from spd_fast.model.pretrained import load_pretrained

        return load_pretrained(folder, target, backend=backend)

    def faithfulness(self) -> dict[str, Tensor]:
        """Site name → ‖W − (V U)ᵀ‖²."""
        return {
            n: ops.faithfulness(self.V(n), self.U(n), s.weight, backend=self.backend)
            for n, s in self.sites.items()
        }

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Parameters in groups to be updated one after the other: those of tied components share
        storage with the first group's, and must not be written at the same time."""
        tied = [
            p
            for name, site in self.sites.items()
            if site.tied_to is not None
            for p in self.components[_key(name)].parameters()
        ]
        aliases = set(map(id, tied))
        free = [p for p in self.parameters() if id(p) not in aliases]
        return [free, tied] if tied else [free]
