"""APD's components and attributions (Braun et al. 2025, arXiv 2501.14926).

A component c spans every site: at site l it is a whole matrix P_cl = A_cl B_cl of inner rank m, and
a sample uses the few components to which the target's own outputs are attributed.

Cost of a step in multiply-adds, for N samples, C components, O outputs, K = k N kept pairs
(sample, component) and R rows of the most used component (K / C ≤ R ≤ N), summed over sites:

    attributions     N C m (d_in + d_out) + N O C d_out, and O backward passes through the target,
                     batched; at a site after which the target is linear but for a ReLU at the very
                     end, N C m (d_in + O) + C m d_out O and two backward passes instead
    kept forward     C R m (d_in + d_out), thrice with its backward; dense it would have N in
                     place of R
    faithfulness     3 C m d_in d_out

Memory: C m (d_in + d_out) parameters a site, with gradients and two Adam moments four times that;
C R (d_in + m + d_out) for the kept forward; attributions hold a forward of the whole
batch, and take its rows in chunks of at most :data:`CHUNK` numbers, and on a CPU what is squared in
blocks of :data:`BLOCK`. On a GPU the host waits twice a step, for R and for the test of linearity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast import backends, ops
from spd_fast._seeds import mixed_seed
from spd_fast.errors import UserError
from spd_fast.model.replay import overridden_forwards
from spd_fast.model.sites import Site, SiteModel, resolve_sites

__all__ = ["BLOCK", "CHUNK", "ROWS", "APDModel", "Attributed", "batch_topk", "routes"]

# Numbers that the attributions of one chunk of rows may hold: 256 MB in float32.
CHUNK = 2**26
# Numbers that a CPU's cache keeps between three passes over them: 1 MB in float32.
BLOCK = 2**18
# Rows of a block at the least: fewer would read a component's matrices again for too little work.
ROWS = 64


@dataclass(frozen=True)
class Attributed:
    """The target's own forward on N samples.

    Attributes:
        output: [N, O]. outputs: site → its clean output, bias included, [N, d_out].
        inputs: site → x [N, d_in].
        attributions: a [N, C].
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    attributions: Tensor


@dataclass(frozen=True)
class _Slopes:
    """As in :class:`Attributed`, and every site's ∂f/∂post.

    Attributes:
        on: bool [N, O]. shared: site → M [O, d_out] where ∂f_o/∂post of row n is M_o or, where
            on_no is false, zero.
        gradients: any other site → ∂f/∂post [O, N, d_out].
    """

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    on: Tensor
    shared: dict[str, Tensor]
    gradients: dict[str, Tensor]


class _Factors(nn.Module):
    """The parameters A [C, d_in, m] and B [C, m, d_out] of one site.

    Initialised by torch's Xavier rule for tensors of these shapes, as in the authors' code: A has
    variance 2 / (m (d_in + C)), B 2 / (d_out (m + C)).
    """

    def __init__(self, site: Site, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        C = site.components
        # In memory [d_in, C, m]: the sum over components is then one matrix product.
        A = torch.randn(site.d_in, C, rank, generator=generator).transpose(0, 1)
        B = torch.randn(C, rank, site.d_out, generator=generator)
        A = A * (2 / (rank * (site.d_in + C))) ** 0.5
        B = B * (2 / (site.d_out * (rank + C))) ** 0.5
        self.A = nn.Parameter(A.to(site.weight))
        self.B = nn.Parameter(B.to(site.weight))


def batch_topk(attributions: Tensor, k: float) -> Tensor:
    """Which of the attributions [N, C] are among the ⌊k N⌋ largest of them all: bool [N, C].

    Exactly that many are kept: of equal ones the first in row order. No gradient passes. What is
    not a number is kept first, and so is seen in the output.

    Raises:
        UserError: k is negative or not finite.
    """
    if not 0 <= k < math.inf:
        raise UserError(f"batch_topk: k needs to be a number from 0 on, got {k}")
    flat = attributions.detach().flatten()
    flat = torch.where(flat.isnan(), math.inf, flat)
    count = min(int(k * attributions.shape[0] + 1e-9), flat.numel())
    if count == 0:
        return torch.zeros_like(attributions, dtype=torch.bool)
    least = flat.topk(count, sorted=False).values.min()
    above, equal = flat > least, flat == least
    kept = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return kept.view(attributions.shape)


def routes(kept: Tensor) -> Tensor:
    """For every component the rows that keep it, from bool [N, C]: int64 [C, R], filled up with N.

    R is the largest number of rows that keep the same component.
    """
    N, C = kept.shape
    counts = kept.sum(dim=0)
    component, row = kept.T.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=kept.device) - (counts.cumsum(0) - counts)[component]
    rows = row.new_full((C, int(counts.max())), N)
    rows[component, slot] = row
    return rows


def _probe(outputs: int, like: Tensor) -> Tensor:
    """Weights in (0.5, 1.5) of which no two are equal: the golden ratio's multiples, [O]."""
    order = torch.arange(outputs, dtype=torch.float64, device=like.device)
    return (0.5 + (0.6180339887498949 * order).frac()).to(like.dtype)


class APDModel(SiteModel):
    """A target and C components, each a matrix A_cl B_cl at every site l.

    The target stays outside the module tree and is frozen; its biases are kept as they are. A site
    tied to another has no parameters: there A' = Bᵀ and B' = Aᵀ.

    Args:
        target: a network from [N, features] to [N, O] with ``nn.Linear`` submodules.
        sites: dotted module path or glob → C, the same everywhere.
        rank: inner rank m, or None for the rank of each site's matrix plus ``extra_rank``.
        extra_rank: see ``rank``.
        seed: of the initialisation.
        backend: who computes faithfulness.

    Raises:
        UserError: a pattern without match, sites of different C, a rank below 1, or a backend that
            cannot run here or on the target's device.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Mapping[str, int],
        *,
        rank: int | None = None,
        extra_rank: int = 0,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "target", target)
        target.requires_grad_(False)
        self.sites = resolve_sites(target, sites)
        backends.check_backend(backend, next(iter(self.sites.values())).weight.device)
        self._submodules = {name: target.get_submodule(name) for name in self.sites}
        counts = {name: site.components for name, site in self.sites.items()}
        if len(set(counts.values())) != 1:
            raise UserError(f"APD's components span all sites, which need the same C, got {counts}")
        self.components = next(iter(counts.values()))
        for name, value, least in (("rank", rank, 1), ("extra_rank", extra_rank, 0)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise UserError(f"{name} needs to be a whole number from {least} on, got {value!r}")
        self.options = {"rank": rank, "extra_rank": extra_rank, "seed": seed}
        self.backend = backend
        generator = torch.Generator().manual_seed(mixed_seed(seed, "initialise components"))
        self.factors = nn.ModuleDict()
        for name, site in self.sites.items():
            if site.tied_to is None:
                m = min(site.d_in, site.d_out) + extra_rank if rank is None else rank
                self.factors[name.replace(".", "-")] = _Factors(site, m, generator)

    def _factors(self, site: str) -> tuple[Tensor, Tensor]:
        owner = self.sites[site].tied_to
        factors = self.factors[(owner or site).replace(".", "-")]
        A, B = factors.A, factors.B
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        return (A, B) if owner is None else (B.mT, A.mT)

    def A(self, site: str) -> Tensor:
        """[C, d_in, m]."""
        return self._factors(site)[0]

    def B(self, site: str) -> Tensor:
        """[C, m, d_out]."""
        return self._factors(site)[1]

    def V(self, site: str) -> Tensor:
        """A with all components side by side, [d_in, C·m]: Σ_c A_c B_c = V U."""
        A = self.A(site).transpose(0, 1)
        return A.reshape(A.shape[0], -1)

    def U(self, site: str) -> Tensor:
        """B with all components one below the other, [C·m, d_out]."""
        return self.B(site).flatten(0, 1)

    def matrices(self, site: str) -> Tensor:
        """(A_c B_c)ᵀ of every component, [C, d_out, d_in]."""
        return torch.bmm(self.A(site), self.B(site)).mT

    def component_outputs(self, site: str, x: Tensor) -> Tensor:
        """P_c x of every component, [N, C, d_out], in float64."""
        inner = torch.einsum("ni,cim->ncm", x.double(), self.A(site).double())
        return torch.einsum("ncm,cmo->nco", inner, self.B(site).double())

    def faithfulness(self) -> dict[str, Tensor]:
        """Site name → ‖W − (Σ_c A_c B_c)ᵀ‖²."""
        found: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            if site.tied_to is None:
                found[name] = ops.faithfulness(
                    self.V(name), self.U(name), site.weight, backend=self.backend
                )
            else:  # the owner's, transposed
                found[name] = found[site.tied_to]
        return found

    def free_sites(self) -> dict[str, int]:
        """Sites with parameters of their own → how many sites share them."""
        return {
            name: 1 + sum(s.tied_to == name for s in self.sites.values())
            for name, site in self.sites.items()
            if site.tied_to is None
        }

    @torch.no_grad()
    def attribute(self, batch: Tensor) -> Attributed:
        """The target's forward on ``batch`` [N, features], and the gradient attributions
        a_c = Σ_o (Σ_l ∂f_o/∂post_l · (P_cl pre_l))²: the derivative of every output f_o in the
        direction in which component c moves all sites' outputs at once (arXiv 2501.14926).

        Raises:
            UserError: a batch of another shape, or without a sample.
        """
        if batch.ndim != 2 or not len(batch):
            raise UserError(f"attribute needs a batch [N, features], got {list(batch.shape)}")
        outputs = self.target(batch[:1]).shape[-1]
        width = sum(site.d_out for site in self.sites.values())
        C = self.components
        ranks = sum(self.B(name).shape[1] for name in self.sites)
        per_row = (outputs + C) * width + outputs * C + C * ranks
        rows = max(CHUNK // per_row, 1)
        slopes = self._slopes(batch, rest=len(batch) <= rows)
        if len(slopes.shared) == len(self.sites) or len(batch) <= rows:
            return self._attributed(slopes)
        parts = [self._attributed(self._slopes(part)) for part in batch.split(rows)]
        return Attributed(
            torch.cat([p.output for p in parts]),
            {n: torch.cat([p.inputs[n] for p in parts]) for n in self.sites},
            {n: torch.cat([p.outputs[n] for p in parts]) for n in self.sites},
            torch.cat([p.attributions for p in parts]),
        )

    def _attributed(self, slopes: _Slopes) -> Attributed:
        if len(slopes.shared) == len(self.sites):
            attributions = self._shared_squares(slopes)
        else:
            total = slopes.output.new_zeros(*slopes.output.shape, self.components)
            for name in slopes.outputs:
                total += self._directional(name, slopes)
            attributions = total.square_().sum(dim=1)
        return Attributed(slopes.output, slopes.inputs, slopes.outputs, attributions)

    @torch.no_grad()
    def shares(self, batch: Tensor) -> dict[str, Tensor]:
        """Site → how much of the site's effect on the outputs each component has, [N, C].

        With D_c = ∂f/∂post · (P_c pre) and D = ∂f/∂post · (W pre), both [O]: ⟨D_c, D⟩ / ‖D‖²; the
        components of a faithful decomposition add up to 1. 0 where the site has no effect.
        """
        slopes = self._slopes(batch)
        found = {}
        for name, site in self.sites.items():
            parts = self._directional(name, slopes)  # [N, O, C]
            clean = slopes.inputs[name] @ site.weight.T
            if name in slopes.shared:
                whole = clean @ slopes.shared[name].T * slopes.on
            else:
                whole = torch.einsum("ond,nd->no", slopes.gradients[name], clean)
            size = whole.square().sum(dim=1, keepdim=True)
            share = torch.einsum("noc,no->nc", parts, whole) / size
            found[name] = torch.where(size > 0, share, 0)
        return found

    def _captured(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The target's output, and every site's input and output, a leaf or node of the graph."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def captured(name: str, site: Site) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                y = F.linear(x, site.weight, site.bias)
                if not y.requires_grad:  # nothing before it does: a leaf of the graph
                    y.requires_grad_()
                inputs[name], outputs[name] = x.detach(), y
                return y

            return forward

        forwards = {name: captured(name, site) for name, site in self.sites.items()}
        with torch.enable_grad(), overridden_forwards(self._submodules, forwards):
            return self.target(batch), inputs, outputs

    def _slopes(self, batch: Tensor, *, rest: bool = True) -> _Slopes:
        """Where what follows a site is linear, but for a ReLU at the very end, all rows share one
        matrix M. Whether it is so is tried, not assumed: one row an output, on which it is on,
        gives M; a gradient of all outputs at once, weighted, must then be M's in every row.

        ``rest``: whether to take the gradients of the other sites.
        """
        output, inputs, outputs = self._captured(batch)
        values, N, width = output.detach(), *output.shape
        on = (values > 0) | (values.min() < 0)  # a ReLU's derivative, or all rows
        first = on.to(torch.uint8).argmax(dim=0)
        rows, _, sites = self._captured(batch.index_select(0, first))
        # Samples do not mix: row o of this batch has the gradient of output o alone.
        picks = torch.eye(width, dtype=output.dtype, device=output.device)
        matrices = torch.autograd.grad(rows, list(sites.values()), picks)
        weights = _probe(width, values)
        found = torch.autograd.grad(
            output, list(outputs.values()), weights.expand(N, width), retain_graph=True
        )
        eps = 4 * width * torch.finfo(output.dtype).eps
        off = [
            (g - on * weights @ M).abs().max() > eps * M.abs().max()
            for g, M in zip(found, matrices, strict=True)
        ]
        shared = {
            name: M
            for name, M, other in zip(outputs, matrices, torch.stack(off).tolist(), strict=True)
            if not other
        }
        others = {name: y for name, y in outputs.items() if rest and name not in shared}
        gradients: tuple[Tensor, ...] = ()
        if others:
            with torch.enable_grad():
                summed = output.sum(dim=0)
            gradients = torch.autograd.grad(
                summed, list(others.values()), picks, is_grads_batched=True
            )
        return _Slopes(
            values,
            inputs,
            {n: y.detach() for n, y in outputs.items()},
            on,
            shared,
            dict(zip(others, gradients, strict=True)),
        )

    def _inner(self, name: str, x: Tensor) -> Tensor:
        """A_c x of every component and row, [C, N, m]."""
        C, m, _ = self.B(name).shape
        return (x @ self.V(name)).view(-1, C, m).transpose(0, 1)

    def _read(self, name: str, slopes: _Slopes) -> Tensor:
        """How the outputs read what :meth:`_inner` gives, [C, m, O]."""
        C, m, _ = self.B(name).shape
        return (self.U(name) @ slopes.shared[name].T).view(C, m, -1)

    def _shared_squares(self, slopes: _Slopes) -> Tensor:
        """The attributions [N, C] where all sites share their slopes."""
        reads = {name: self._read(name, slopes) for name in slopes.shared}
        (N, width), C = slopes.output.shape, self.components
        found = slopes.output.new_empty(C, N)
        rows = max(CHUNK // (C * (width + sum(read.shape[1] for read in reads.values()))), 1)
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            products = [(self._inner(n, slopes.inputs[n][part]), r) for n, r in reads.items()]
            self._squares(products, slopes.on[part], found[:, part])
        return found.T.contiguous()

    def _squares(self, products: list[tuple[Tensor, Tensor]], on: Tensor, found: Tensor) -> None:
        """The squares of what all sites together do to the outputs that are on, [C, N]."""
        (N, width), C = on.shape, self.components
        rows, group = N, C
        if found.device.type == "cpu":
            rows = min(max(BLOCK // (width * C), ROWS), N)
            group = min(max(BLOCK // (width * rows), 1), C)
        moved = found.new_empty(group, rows, width)
        for first in range(0, C, group):
            some = slice(first, min(first + group, C))
            for start in range(0, N, rows):
                block = slice(start, min(start + rows, N))
                part = moved[: some.stop - first, : block.stop - start]
                for i, (inner, read) in enumerate(products):
                    torch.baddbmm(part, inner[some, block], read[some], beta=min(i, 1), out=part)
                torch.sum(part.square_().mul_(on[block]), dim=2, out=found[some, block])

    @torch.no_grad()
    def _directional(self, name: str, slopes: _Slopes) -> Tensor:
        """∂f_o/∂post · (P_c pre) for every sample, output and component, [N, O, C]."""
        if name in slopes.shared:
            moved = torch.bmm(self._inner(name, slopes.inputs[name]), self._read(name, slopes))
            return moved.permute(1, 2, 0) * slopes.on[:, :, None]
        x, gradient, B = slopes.inputs[name], slopes.gradients[name], self.B(name)
        moved = torch.bmm(self._inner(name, x), B)  # [C, N, d_out]
        return torch.bmm(gradient.transpose(0, 1), moved.permute(1, 2, 0))

    def kept_forward(self, batch: Tensor, kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The target's output with each sample using its kept components alone at every site, and
        every site's output. ``kept``: bool [N, C].

        Components are applied to the rows that keep them, not masked out in the others.

        Raises:
            UserError: ``kept`` of another shape.
        """
        if kept.shape != (len(batch), self.components):
            raise UserError(
                f"kept needs the shape {[len(batch), self.components]}, got {list(kept.shape)}"
            )
        rows, outputs = routes(kept), dict[str, Tensor]()

        def routed(name: str, site: Site) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                N, C = kept.shape
                padded = F.pad(x, (0, 0, 0, 1))  # row N, which fills up, is zero
                own = padded.index_select(0, rows.flatten()).view(C, -1, site.d_in)
                part = torch.bmm(torch.bmm(own, self.A(name)), self.B(name))  # [C, R, d_out]
                y = x.new_zeros(N + 1, site.d_out)
                y = y.index_add(0, rows.flatten(), part.flatten(0, 1))[:N]
                outputs[name] = y if site.bias is None else y + site.bias
                return outputs[name]

            return forward

        forwards = {name: routed(name, site) for name, site in self.sites.items()}
        with overridden_forwards(self._submodules, forwards):
            return self.target(batch), outputs

    def whole_forward(self, batch: Tensor) -> Tensor:
        """The target's output with the sum of all components at every site."""

        def summed(name: str, site: Site) -> Callable[[Tensor], Tensor]:
            return lambda x: F.linear(x, (self.V(name) @ self.U(name)).T, site.bias)

        forwards = {name: summed(name, site) for name, site in self.sites.items()}
        with overridden_forwards(self._submodules, forwards):
            return self.target(batch)

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale every column A_clm to length 1 (zero stays zero)."""
        for name in self.free_sites():
            A = self.A(name)
            A /= A.norm(dim=1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)

    @torch.no_grad()
    def remove_parallel_gradients(self) -> None:
        """Take from the gradient of every unit column A_clm its part along the column, which would
        only change the length."""
        for name in self.free_sites():
            A = self.A(name)
            if A.grad is not None:
                A.grad -= A * (A * A.grad).sum(dim=1, keepdim=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write A and B (never the target) into ``folder``."""
        from spd_fast.baselines.pretrained import save_pretrained

        save_pretrained(self, folder)

    @staticmethod
    def from_pretrained(
        folder: str | Path, target: nn.Module, *, backend: str | None = None
    ) -> APDModel:
        """What :meth:`save_pretrained` wrote, on the same target.

        Raises:
            UserError: nothing readable there, or a target with other weights.
        """
        from spd_fast.baselines.pretrained import load_pretrained

        return load_pretrained(folder, target, backend=backend)
