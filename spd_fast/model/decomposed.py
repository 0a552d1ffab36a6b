"""DecomposedModel: a frozen target, its components, and their causal-importance functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd_fast import backends, ops
from spd_fast._seeds import mixed_seed
from spd_fast.errors import UserError, nearest
from spd_fast.model.calling import Caller, OutputSelector
from spd_fast.model.ci_fns import (
    GLOBAL_CI_FNS,
    CIFnKind,
    GlobalMLP,
    MLPGate,
    TransformerCI,
    TransformerShape,
    hidden_widths,
    make_ci_fn,
    make_global_ci_fn,
)
from spd_fast.model.components import Components, Init, TiedComponents
from spd_fast.model.factored import Factored, Inputs, Product, dense, version_of
from spd_fast.model.importances import Importances, SiteImportances
from spd_fast.model.masking import Masking
from spd_fast.model.replay import overridden_forwards, prefixes
from spd_fast.model.sites import Site, SiteModel, resolve_sites, submodules
from spd_fast.ops.component_linear import check_site
from spd_fast.ops.gate import GateEval, check_gate_eval, definite_eval
from spd_fast.ops.masks import MaskRecipe
from spd_fast.ops.penalty import Penalty
from spd_fast.ops.sigmoids import SigmoidKind, check_sigmoid

__all__ = ["CleanForward", "DecomposedModel"]

Forward = Callable[..., Any]
# The key of a network for all sites, which then is the only one.
_GLOBAL = "global"
# A product this many times as wide as its rows is kept as its factors.
WIDENS = 2
# Positions at which a module that reads a factored stream is compared with its weight.
CHECKED = 256
# Hidden neurons of an embedding's gates that are in memory at a time.
NEURONS = 2**22


@dataclass
class CleanForward:
    """The target's own forward on a batch.

    Attributes:
        output: the target's output tensor.
        inputs: site name → x [..., d_in] (tokens [...] at an embedding), the very tensors the
            modules received, in the order in which the sites were called. One that the engine
            keeps factored (:mod:`spd_fast.model.factored`) is formed when asked for.
        outputs: of the modules that finish before a site, which masked forwards take over.
    """

    output: Tensor
    inputs: Inputs = field(default_factory=Inputs)
    outputs: dict[str, Any] = field(default_factory=dict)


def _key(site: str) -> str:
    """A site's name inside a ModuleDict, as in the authors' checkpoints."""
    return site.replace(".", "-")


def _constant(output: Any) -> Forward:
    return lambda *_, **__: output


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a site's module is called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _keep_output(name: str, forward: Forward, clean: CleanForward) -> Forward:
    def kept(*args: Any, **kwargs: Any) -> Any:
        output = clean.outputs[name] = forward(*args, **kwargs)
        return output

    return kept


def _module(target: nn.Module | str | Path) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    from spd_fast.targets.hf import load_hf

    return load_hf(target)


class _BySite(nn.ModuleDict):
    """Modules by site, which may be called like a method: ``keys``, ``values``."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


# Positions whose inputs components start from, where they do.
POSITIONS = 8192


class DecomposedModel(SiteModel):
    """A target network whose sites are decomposed into rank-one components.

    Only V, U and the causal-importance functions are parameters here. The target stays outside
    the module tree, frozen (its parameters lose ``requires_grad``) and otherwise untouched. Targets
    or modules under ``torch.compile`` run uncompiled here: what replaces a site's forward could not
    be traced into them.

    Args:
        target: any ``nn.Module`` (with ``nn.Linear``, ``nn.Embedding`` or transformers' ``Conv1D``
            inside), or the folder or hub id of a Hugging Face model.
        sites: dotted module path or glob → number of components C. ``<path>.pre_identity`` inserts
            a site with W = I at the input of that module.
        ci_fn, ci_hidden: causal-importance function and its hidden widths: ``mlp``,
            ``linear``, ``vector_mlp``, ``shared_mlp``, ``global_mlp``, ``transformer``.
        ci_transformer: ``d_model``, ``layers`` and ``heads`` of the last one.
        sigmoid: preset of the leaky sigmoids, ``paper`` or ``2026``.
        gate_eval: how the gates of ``mlp`` at linear sites are evaluated: ``exact``,
            ``interpolated`` within 1e-5, or ``auto``: the faster of the two on this backend.
        init: of V and U: ``paper`` or ``2026``, random as in the authors' codes, or ``inputs``:
            first directions that recur in the sites' inputs, once :meth:`start_from_inputs` has
            seen some, then as ``paper``.
        delta: whether stochastic masks include the weight delta.
        output: which tensor of what the target returns is its output: a field name such as
            ``"logits"``, an index, a dotted path of both, or a function; None where it returns a
            tensor.
        adapter: ``adapter(target, batch)`` calls the target; by default a tensor is its first
            argument and a mapping its keyword arguments.
        seed: of the initialisation.
        backend: who computes the operations.
        factored: whether a residual stream is kept as its factors
            (:mod:`spd_fast.model.factored`); None: where the target asks for it
            (``factored_stream``), on a CPU and not on ``reference``, which stays plain.

    Raises:
        UserError: a site pattern without match, a module that cannot be decomposed, C < 1, unknown
            options, a backend that cannot run here or on the target's device.
    """

    caller: Caller
    _submodules: dict[str, nn.Module]
    _wide: dict[str, nn.Linear]

    def __init__(
        self,
        target: nn.Module | str | Path,
        sites: Mapping[str, int],
        *,
        ci_fn: CIFnKind = "mlp",
        ci_hidden: Sequence[int] = (16,),
        ci_transformer: Mapping[str, int] | None = None,
        sigmoid: SigmoidKind = "paper",
        gate_eval: GateEval = "exact",
        init: Init = "paper",
        delta: bool = False,
        output: OutputSelector | None = None,
        adapter: Callable[[nn.Module, Any], Any] | None = None,
        seed: int = 0,
        backend: str | None = None,
        factored: bool | None = None,
    ) -> None:
        super().__init__()
        check_sigmoid(sigmoid)
        check_gate_eval(gate_eval)
        ci_hidden = hidden_widths(ci_hidden)
        target = _module(target)
        self.sites = resolve_sites(target, sites)
        backends.check_backend(backend, next(iter(self.sites.values())).weight.device)
        # The target and what refers to it stay outside the module tree.
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "caller", Caller(target, output, adapter))
        object.__setattr__(self, "_submodules", submodules(target))
        object.__setattr__(self, "_wide", _wide(self._submodules))
        self.sigmoid: SigmoidKind = sigmoid
        self.gate_eval: GateEval = gate_eval
        self.options = {
            "ci_fn": ci_fn,
            "ci_hidden": ci_hidden,
            "sigmoid": sigmoid,
            "gate_eval": gate_eval,
            "init": init,
            "delta": delta,
        }
        # Whether components are still to start from the sites' inputs.
        self.awaits_inputs = init == "inputs"
        self.delta = delta
        self.backend = backend
        self.factored = factored
        self._prefixes: dict[str, tuple[str, ...]] | None = None  # known after the first forward
        self.components = _BySite()
        self.ci_fns = _BySite()
        generator = torch.Generator().manual_seed(mixed_seed(seed, "initialise components"))
        for name, site in self.sites.items():
            if (taken := _key(name)) in self.components:
                raise UserError(f"two sites share the name {taken!r} with '-' for '.': keep one")
            if site.tied_to is None:
                self.components[_key(name)] = Components(site, init, generator)
            else:
                owner = self.components[_key(site.tied_to)]
                assert isinstance(owner, Components)
                self.components[_key(name)] = TiedComponents(owner)
        if ci_fn in GLOBAL_CI_FNS:
            shape = TransformerShape(ci_transformer)
            if ci_fn == "transformer":
                self.options["ci_transformer"] = dict(shape)
            widths = {
                n: s.components if s.kind == "embedding" else s.d_in for n, s in self.sites.items()
            }
            components = {n: s.components for n, s in self.sites.items()}
            network = make_global_ci_fn(ci_fn, widths, components, ci_hidden, shape, generator)
            like = next(iter(self.sites.values())).weight
            self.ci_fns[_GLOBAL] = network.to(like.device, like.dtype)
        else:
            for name, site in self.sites.items():
                d_in = None if site.kind == "embedding" else site.d_in
                gate = make_ci_fn(ci_fn, site.components, ci_hidden, generator, d_in)
                self.ci_fns[_key(name)] = gate.to(site.weight.device, site.weight.dtype)
        if ci_fn != "transformer" and ci_transformer is not None:
            raise UserError(f"ci_transformer belongs to ci_fn 'transformer', not to {ci_fn!r}")
        target.requires_grad_(False)

    def V(self, site: str) -> Tensor:
        """V [d_in, C] of a site."""
        return self.components[_key(site)].V  # type: ignore[return-value]

    def U(self, site: str) -> Tensor:
        """U [C, d_out] of a site."""
        return self.components[_key(site)].U  # type: ignore[return-value]

    def ci_fn(self, site: str) -> MLPGate:
        """The gate of a site, where ``ci_fn`` is ``mlp`` or ``linear``."""
        gate = self.ci_fns[_key(site)]
        assert isinstance(gate, MLPGate)
        return gate

    @property
    def global_ci_fn(self) -> GlobalMLP | TransformerCI | None:
        """The one importance function of all sites, where ``ci_fn`` is of that kind."""
        if self.options["ci_fn"] not in GLOBAL_CI_FNS:
            return None
        network = self.ci_fns[_GLOBAL]
        assert isinstance(network, (GlobalMLP, TransformerCI))
        return network

    @torch.no_grad()
    def start_from_inputs(self, batches: Iterable[Any]) -> None:
        """Let components of every site start from its inputs on ``batches``, of which no more are
        taken than 8,192 positions need (:meth:`Components.start_from`). Sites of token ids, which
        have no directions, stay as they are.

        Raises:
            UserError: as :meth:`clean_forward` does.
        """
        inputs: dict[str, list[Tensor]] = {}
        for batch in batches:
            clean = self.clean_forward(batch)
            for name, site in self.sites.items():
                if site.kind != "embedding" and site.tied_to is None:
                    inputs.setdefault(name, []).append(
                        clean.inputs[name].flatten(0, -2)[:POSITIONS].cpu()
                    )
            if not inputs or all(sum(map(len, xs)) >= POSITIONS for xs in inputs.values()):
                break
        for name, xs in inputs.items():
            components = self.components[_key(name)]
            assert isinstance(components, Components)
            components.start_from(torch.cat(xs)[:POSITIONS], self.sites[name])
        self.awaits_inputs = False

    def clean_forward(self, batch: Any) -> CleanForward:
        """The target's forward, with every site's input captured by reference (no copy).

        Raises:
            UserError: a site that is not called, is called more than once, receives another width,
                or computes something else than its weight says; an input of a site that the target
                writes to afterwards; a batch the target cannot take; an output that is no tensor.
        """
        first, versions = self._prefixes is None, dict[str, int]()
        before = self._prefixes or prefixes(
            self._submodules,
            {n: s.module for n, s in self.sites.items()},
            lambda: self.caller.clean(batch),
        )
        clean = CleanForward(output=torch.empty(0))
        forwards = {path: _factored(W) for path, W in self.widening().items()}
        for path in {p for prefix in before.values() for p in prefix}:
            inside = forwards.get(path, self._submodules[path].forward)
            forwards[path] = _keep_output(path, inside, clean)
        # The identity at a module's input is called before the module's own site.
        for site in sorted(self.sites.values(), key=lambda s: s.kind == "identity"):
            inside = forwards.get(site.module, self._submodules[site.module].forward)
            forwards[site.module] = self._capture(site, inside, clean, versions if first else None)
        with torch.no_grad(), overridden_forwards(self._submodules, forwards):
            clean.output = self.caller.clean(batch)
        if missing := [n for n in self.sites if n not in clean.inputs]:
            raise UserError(
                f"site {missing[0]!r} is not called in the target's forward: leave it out of "
                "`sites`"
            )
        for name, version in versions.items():
            if version_of(clean.inputs.held[name]) != version:
                raise UserError(
                    f"the target writes in place to the input of site {name!r} after the site has "
                    "read it: leave the site out of `sites`, or let the target make a new tensor"
                )
        self._prefixes = before
        return clean

    @staticmethod
    def _capture(
        site: Site, forward: Forward, clean: CleanForward, versions: dict[str, int] | None
    ) -> Forward:
        """``forward``, its input kept; with ``versions``, to be filled, it is also looked at."""

        def captured(*args: Any, **kwargs: Any) -> Any:
            if site.name in clean.inputs:
                raise UserError(
                    f"site {site.name!r} is called more than once per forward, which is not "
                    "supported: leave it out of `sites`"
                )
            x = clean.inputs.held[site.name] = _input(args, kwargs)
            if site.kind != "embedding" and x.shape[-1] != site.d_in:
                raise UserError(
                    f"site {site.name!r} takes vectors of width {site.d_in}, got {tuple(x.shape)}"
                )
            if versions is not None and not isinstance(x, Factored):
                versions[site.name] = version_of(x)
            y = forward(*args, **kwargs)
            if versions is not None and site.kind != "identity":
                if isinstance(x, Factored) or isinstance(y, Factored):
                    _check_module(site, _first(x), _first(y))
                else:
                    _check_module(site, x, y)
            return y

        return captured

    def _factors(self) -> bool:
        if self.factored is not None:
            return self.factored
        device = next(iter(self.sites.values())).weight.device
        return (
            getattr(self.target, "factored_stream", False)
            # On a GPU a step of such a network is as long as its launches.
            and device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and backends.name_for(self.backend, device) != "reference"
        )

    def widening(self) -> dict[str, Tensor]:
        """Path → W [d_out, d_in] of the modules that write to a factored stream; none where no
        stream is kept factored."""
        if not self._factors():
            return {}
        # A module may be given a forward of its own later on.
        return {
            path: module.weight.detach()
            for path, module in self._wide.items()
            if "forward" not in module.__dict__
        }

    def causal_importances(
        self, clean: CleanForward, penalty: Penalty | None = None
    ) -> Importances:
        """Causal importances of every site from the clean forward's site inputs.

        ``penalty`` chooses ψ of the penalty sums; None leaves them zero.

        Raises:
            UserError: a global importance function over sites that see different positions.
        """
        network = self.global_ci_fn
        if network is None:
            return Importances(
                {n: self._local_importances(s, clean, penalty) for n, s in self.sites.items()}
            )
        inputs = dict(clean.inputs)
        shapes = {n: tuple(s.positions(inputs[n])) for n, s in self.sites.items()}
        first = next(iter(shapes))
        for name, shape in shapes.items():
            if shape != shapes[first]:
                raise UserError(
                    f"ci_fn {self.options['ci_fn']!r} joins the inputs of all sites, but {first!r} "
                    f"sees positions {shapes[first]} and {name!r} {shape}: leave one out"
                )
        inner = {
            n: self._inner(s, inputs[n]) for n, s in self.sites.items() if s.kind == "embedding"
        }
        logits = network({n: inner.get(n, inputs[n]) for n in self.sites})
        return Importances(
            {
                n: self._from_logits(s, inputs[n], logits[n], inner.get(n), penalty)
                for n, s in self.sites.items()
            }
        )

    @torch.no_grad()
    def active_counts(self, clean: CleanForward, threshold: float) -> dict[str, Tensor]:
        """Site → [C]: at how many positions a component's lower importance exceeds ``threshold``.

        Gates count while they compute; the importances of other functions are made whole.

        Raises:
            UserError: as of :meth:`causal_importances`.
        """
        whole = None if self.global_ci_fn is None else self.causal_importances(clean)
        counts = {}
        for name, site in self.sites.items():
            network = self.ci_fns[_key(name)] if whole is None else None
            if isinstance(network, MLPGate) and site.kind != "embedding":
                counts[name] = ops.gate_counts(
                    *self._read(site, clean), network.weights, network.biases, threshold,
                    sigmoid=self.sigmoid, gate_eval=self.gate_eval, backend=self.backend,
                )  # fmt: skip
                continue
            known = self._local_importances(site, clean, None) if whole is None else whole[name]
            counts[name] = (known.lower > threshold).flatten(0, -2).sum(0)
        return counts

    def _read(self, site: Site, clean: CleanForward) -> tuple[Tensor, Tensor]:
        """(x, V) of a linear site, or two smaller factors of the same h = x V."""
        x, V = clean.inputs.held[site.name], self.V(site.name)
        if isinstance(x, Factored) and not x.sums:
            rows, matrix = x.rows()
            return rows, matrix @ V
        return dense(x), V

    def _inner(self, site: Site, x: Tensor) -> Tensor:
        """h [..., C] of a site's input."""
        if site.kind == "embedding":
            return ops.embedding_inner(x, self.V(site.name), backend=self.backend)
        return x @ self.V(site.name)

    def _local_importances(
        self, site: Site, clean: CleanForward, penalty: Penalty | None
    ) -> SiteImportances:
        network = self.ci_fns[_key(site.name)]
        if not isinstance(network, MLPGate):
            x = clean.inputs[site.name]
            return self._from_logits(site, x, network(x), None, penalty)
        gate_eval: GateEval = "exact"
        if site.kind == "embedding":
            x = clean.inputs[site.name]
            inner = self._inner(site, x)
            out = self._gate_inner(network, inner, penalty)
        else:
            gate_eval = self.gate_eval
            x, V = self._read(site, clean)
            inner, *rest = ops.gate(
                x, V, network.weights, network.biases,
                sigmoid=self.sigmoid, penalty=penalty, gate_eval=gate_eval, backend=self.backend,
            )  # fmt: skip

            out = (rest[0], rest[1])

        def logits() -> Tensor:
            evaluated = definite_eval(gate_eval, self.backend, x, network.weights, self.sigmoid)

            def run(h: Tensor) -> tuple[Tensor]:
                return (ops.gate_logits(h, network.weights, network.biases, evaluated),)

            (s,) = _by_rows(network, inner, run)
            return _joined(s).reshape(inner.shape)

        return SiteImportances(
            *out, logits=logits, sigmoid=self.sigmoid, inner=lambda: inner, known_inner=inner
        )

    def _gate_inner(
        self, gate: MLPGate, inner: Tensor, penalty: Penalty | None
    ) -> tuple[Tensor, Tensor]:
        """Lower importances and penalty sums of h; on a CPU the hidden layer is formed."""

        def run(h: Tensor) -> tuple[Tensor, Tensor]:
            return ops.gate_inner(
                h, gate.weights, gate.biases,
                sigmoid=self.sigmoid, penalty=penalty, backend=self.backend,
            )  # fmt: skip

        lower, sums = _by_rows(gate, inner, run)
        return _joined(lower).reshape(inner.shape), torch.stack(sums).sum(dim=0)

    def _from_logits(
        self,
        site: Site,
        x: Tensor,
        logits: Tensor,
        inner: Tensor | None,
        penalty: Penalty | None,
    ) -> SiteImportances:
        out = ops.importances(logits, sigmoid=self.sigmoid, penalty=penalty, backend=self.backend)
        return SiteImportances(
            out.lower,
            out.penalty_sum,
            logits=lambda: logits,
            sigmoid=self.sigmoid,
            inner=lambda: self._inner(site, x),
            known_inner=inner,
        )

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
        from ``importances``, where they know them. A dict given as ``inputs`` is filled with the
        inputs that the masked sites receive.

        Raises:
            UserError: an unknown site.
        """
        names = list(self.sites) if sites is None else list(sites)
        for name in names:
            if name not in self.sites:
                raise UserError(f"unknown site {name!r}; nearest: {nearest(name, self.sites)}")
        forwards = {path: _factored(W) for path, W in self.widening().items()}
        factors = bool(forwards)
        first = None  # the first masked site sees what it saw in the clean forward
        if clean is not None and self._prefixes is not None:
            first = next((n for n in clean.inputs if n in names), None)
            for path in self._prefixes[first] if first is not None else ():
                if path in clean.outputs:
                    forwards[path] = _constant(clean.outputs[path])
        for name in sorted(names, key=lambda n: self.sites[n].kind == "identity"):
            site, inner = self.sites[name], None
            if importances is not None and name == first:
                inner = importances[name].known_inner
            masked = self._masked(site, masking, inner, inputs, factors)
            if site.kind == "identity":
                inside = forwards.get(site.module, self._submodules[site.module].forward)
                masked = _before(masked, inside)
            forwards[site.module] = masked
        with overridden_forwards(self._submodules, forwards):
            return self.caller(batch)

    def _masked(
        self,
        site: Site,
        masking: Masking,
        inner: Tensor | None,
        inputs: dict[str, Tensor] | None,
        factors: bool,
    ) -> Forward:
        name = site.name

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = _input(args, kwargs)
            if inputs is not None:
                inputs[name] = dense(x)
            if site.kind == "embedding":
                return ops.component_embedding(
                    x, self.V(name), self.U(name), masking.recipe(site),
                    weight=site.weight.T, inner=inner, backend=self.backend, site_name=name,
                )  # fmt: skip
            recipe = masking.recipe(site)
            if isinstance(x, Factored):
                # x Wᵀ in place of x pays where it is narrower.
                if not recipe.needs_weight or site.d_out < site.d_in:
                    return self._masked_reading(site, x, recipe, inner)
                x = dense(x)
            elif factors and site.bias is None and site.d_out >= WIDENS * site.components:
                return self._masked_writing(site, x, recipe, inner)
            return ops.component_linear(
                x, self.V(name), self.U(name), recipe,
                weight=site.weight, bias=site.bias, inner=inner,
                backend=self.backend, site_name=name,
            )  # fmt: skip

        return forward

    def _masked_reading(
        self, site: Site, x: Factored, recipe: MaskRecipe, inner: Tensor | None
    ) -> Tensor:
        """A masked site that reads a factored stream: h = x V and x Wᵀ come from the factors."""
        U = self.U(site.name)
        if inner is None:
            inner = x.times(self.V(site.name), keep=False)
        # Beside h the operation needs x Wᵀ at most, which stands for x, with I for W. V is not
        # read: Uᵀ has its shape.
        if recipe.needs_weight:
            W = site.weight
            rows = x.times(W.T)
            weight = torch.eye(site.d_out, dtype=W.dtype, device=W.device)
        else:
            weight = None
            rows = inner.new_empty(site.d_out).expand(*x.shape[:-1], site.d_out)
        return ops.component_linear(
            rows, U.T, U, recipe, weight=weight, bias=site.bias, inner=inner,
            backend=self.backend, site_name=site.name,
        )  # fmt: skip

    def _masked_writing(
        self, site: Site, x: Tensor, recipe: MaskRecipe, inner: Tensor | None
    ) -> Factored:
        """A masked site that writes to a stream, y = a U + (δ̃ x) Wᵀ: a is a recipe as its mask is,
        so whoever reads y M has the operation compute it with U M in place of U."""
        V, U, C = self.V(site.name), self.U(site.name), site.components

        def masked_sum(M: Tensor | None) -> Tensor:
            to = U if M is None else U @ M
            nothing = x.new_zeros(to.shape[1], site.d_in) if recipe.needs_weight else None
            return ops.component_linear(
                x, V, to, recipe, weight=nothing, inner=inner,
                backend=self.backend, site_name=site.name,
            )  # fmt: skip

        shape = torch.Size((*x.shape[:-1], site.d_out))
        if not recipe.needs_weight:
            return Factored(shape, sums=(masked_sum,))
        check_site(x, V, U, recipe, inner, site.weight, None, site.name)
        passed = x * recipe.passed(C, x.shape[:-1], x.dtype)[..., None]
        return Factored(shape, (Product(passed, site.weight.T),), (masked_sum,))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write V, U and the importance functions (never the target) into ``folder``."""
        from spd_fast.model.pretrained import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the same to a repository of the Hugging Face hub; its address.

        ``options``: ``private``, ``token``, ``commit_message``.

        Raises:
            UserError: huggingface_hub is not installed, or the hub refuses.
        """
        from spd_fast.model.pretrained import push_to_hub

        return push_to_hub(self, repo_id, **options)

    @staticmethod
    def from_pretrained(
        source: str | Path,
        target: nn.Module | str | Path | None = None,
        *,
        revision: str | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> DecomposedModel:
        """What :meth:`save_pretrained` or :meth:`push_to_hub` wrote, on the same target; None loads
        the Hugging Face model that it names. ``options``: ``output``, ``adapter``.

        Raises:
            UserError: nothing readable there, or a target with other weights.
        """
        from spd_fast.model.pretrained import load_pretrained

        return load_pretrained(source, target, revision=revision, backend=backend, **options)

    def matrices(self, site: str) -> Tensor:
        """u_c v_cᵀ of every component, [C, d_out, d_in]."""
        return torch.einsum("ic,co->coi", self.V(site), self.U(site))

    def component_outputs(self, site: str, x: Tensor) -> Tensor:
        """h_c u_c of every component, [N, C, d_out], in float64."""
        return torch.einsum("nc,co->nco", x.double() @ self.V(site).double(), self.U(site).double())

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


def _by_rows(
    gate: MLPGate, inner: Tensor, run: Callable[[Tensor], tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """What ``run`` returns over the rows of h [..., C], the parts of each; on a CPU there are
    several: of a hidden layer that it forms no more than one is ever in memory, and none is kept
    for the backward, which forms it again."""
    neurons = inner.shape[-1] * max(b.shape[1] for b in gate.biases)
    rows = inner.reshape(-1, inner.shape[-1])
    if inner.is_cuda:
        return [(out,) for out in run(rows)]
    parts = (
        checkpoint(run, part, use_reentrant=False, preserve_rng_state=False)
        for part in rows.split(max(NEURONS // neurons, 1))
    )
    return list(zip(*parts, strict=True))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Those that could write to a factored stream: wide linear layers without a bias."""
    found: dict[str, nn.Linear] = {}
    for path, module in modules.items():
        # A subclass may compute something else.
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            wide = module.out_features >= WIDENS * module.in_features
            if wide and module.bias is None:
                found[path] = module
    return found


def _factored(W: Tensor) -> Forward:
    """x Wᵀ as a product that is not formed."""

    def forward(*args: Any, **kwargs: Any) -> Factored:
        x = dense(_input(args, kwargs))
        return Factored(torch.Size((*x.shape[:-1], W.shape[0])), (Product(x, W.T),))

    return forward


def _first(x: Any) -> Any:
    """A vector input or output at the first positions, [CHECKED or fewer, d]."""
    if isinstance(x, Factored):
        return x.first(CHECKED)
    return x.reshape(-1, x.shape[-1])[:CHECKED] if isinstance(x, Tensor) else x


def _before(masked: Forward, module: Forward) -> Forward:
    """``module`` with ``masked`` applied to its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = masked(*args, **kwargs)
        return (
            module(y, *args[1:], **kwargs) if args else module(**kwargs | {next(iter(kwargs)): y})
        )

    return forward


def _check_module(site: Site, x: Tensor, y: Any) -> None:
    """Raise UserError where a site's module gave something else than its weight and bias do."""
    if site.kind == "embedding":
        expected = F.embedding(x, site.weight.T)
    elif not x.isfinite().all():
        raise UserError(f"the target's own activations are not finite from site {site.name!r} on")
    else:
        expected = F.linear(x, site.weight, site.bias)
    same = isinstance(y, Tensor) and y.shape == expected.shape
    scale = expected.abs().max() if expected.numel() else expected.sum()
    if not same or not ((y - expected).abs() <= 1e-2 * scale).all():
        raise UserError(
            f"site {site.name!r} computes something else than its weight and bias say, so it "
            "cannot be decomposed: leave it out of `sites`"
        )
