"""Rank-one components of a site: V [d_in, C] and U [C, d_out], W ≈ (V U)ᵀ.

``init`` says how they start: ``paper`` and ``2026`` as the authors' codes do, from random numbers;
``inputs`` from what the site reads (:func:`recurring_directions`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd_fast.errors import UserError
from spd_fast.model.sites import Site

__all__ = ["INITS", "Components", "Init", "TiedComponents"]

Init = Literal["paper", "2026", "inputs"]
INITS: tuple[Init, ...] = ("paper", "2026", "inputs")


def _paper_init(site: Site, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit Gaussian vectors v_c, u_c; u_c then scaled by its overlap ⟨v_c u_cᵀ, Wᵀ⟩."""
    weight = site.weight.to("cpu", torch.float32)
    V = torch.randn(site.d_in, site.components, generator=generator)
    U = torch.randn(site.components, site.d_out, generator=generator)
    V = V / V.norm(dim=0, keepdim=True)
    U = U / U.norm(dim=1, keepdim=True)
    overlap = ((weight.T @ U.T) * V).sum(dim=0)  # v_cᵀ Wᵀ u_c, [C]
    return V, U * overlap[:, None]


def _2026_init(site: Site, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """V ~ N(0, 1/d_in), U ~ N(0, 1/C) (variances)."""
    V = torch.randn(site.d_in, site.components, generator=generator) / site.d_in**0.5
    U = torch.randn(site.components, site.d_out, generator=generator) / site.components**0.5
    return V, U


def recurring_directions(x: Tensor, count: int) -> Tensor:
    """Unit vectors [d, up to count] in which rows of ``x`` [n, d] lie again and again.

    The row that recurs most often (cos² ≥ 0.9 to another) is taken, what lies near it (cos² ≥ 1/3)
    is struck out, and so on. It ends where a direction recurs less than a quarter as often as the
    first, or at ``count`` or d of them.
    """
    x = x.detach().to("cpu", torch.float32)
    norms = x.norm(dim=1, keepdim=True)
    rows = (x / norms.clamp_min(torch.finfo(torch.float32).tiny))[norms[:, 0] > 0]
    left = torch.ones(len(rows), dtype=torch.bool)
    again = torch.cat([(r @ rows.T).square_() >= 0.9 for r in rows.split(1024)] or [left[:, None]])
    recurs = again.sum(1) - 1  # without the row itself
    least = max(int(recurs.max()) / 4, 1) if len(rows) else 0
    chosen: list[int] = []
    while len(chosen) < min(count, x.shape[1]) and left.any():
        row = int(recurs.argmax())
        if recurs[row] < least:
            break
        chosen.append(row)
        covered = left & ((rows @ rows[row]).square() >= 1 / 3)
        recurs -= again[:, covered].sum(1)
        left &= ~covered
        recurs[~left] = 0
    return rows[chosen].T


class Components(nn.Module):
    """The parameters V and U of one site. With init ``inputs`` those of ``paper``, until
    :meth:`start_from` replaces the first of them."""

    def __init__(self, site: Site, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        if init not in INITS:
            raise UserError(f"unknown init {init!r}; known: {', '.join(INITS)}")
        V, U = (_2026_init if init == "2026" else _paper_init)(site, generator)
        self.V = nn.Parameter(V.to(site.weight))
        self.U = nn.Parameter(U.to(site.weight))

    @torch.no_grad()
    def start_from(self, x: Tensor, site: Site) -> None:
        """The first components read directions that recur among the site's inputs ``x``
        [n, d_in]; u_c = α W v_c for them, with the α that brings Σ_c v_c u_cᵀ nearest to Wᵀ. The
        others are made to read nothing of the inputs, so that they begin with the rest of W and do
        not compete on the data; where the inputs fill the space they stay as they are."""
        wanted = site.weight.to("cpu", torch.float32).T  # [d_in, d_out]
        V = recurring_directions(x, site.components)
        U, found = V.T @ wanted, V.shape[1]
        total = V @ U
        scale = (total * wanted).sum() / total.square().sum().clamp_min(1e-30)
        rest = self.V[:, found:].to("cpu", torch.float32)
        if found:
            x = x.detach().to("cpu", torch.float64)
            size, axes = torch.linalg.eigh(x.T @ x)  # of the inputs along their principal axes
            span = axes[:, size > 1e-6 * size[-1]].float()
            if span.shape[1] < site.d_in:
                rest = rest - span @ (span.T @ rest)
        self.V.copy_(torch.cat([V, rest], dim=1))
        self.U[:found] = (scale * U).to(self.U)


class TiedComponents(nn.Module):
    """The components of a site whose weight is another site's transpose: V = Uᵀ, U = Vᵀ there.

    One storage, two sets of parameters: each site's gradient goes through its own Adam moments,
    and both updates land in the shared storage, as in the paper's code.
    """

    _owner: Components

    def __init__(self, owner: Components) -> None:
        super().__init__()
        object.__setattr__(self, "_owner", owner)  # a reference, not a second registration
        self.tie()

    def tie(self) -> None:
        """Share the owner's storage (again, after it was moved or copied)."""
        self.V = nn.Parameter(self._owner.U.detach().T)
        self.U = nn.Parameter(self._owner.V.detach().T)

    def _apply(self, fn: Any, recurse: bool = True) -> TiedComponents:
        self.tie()  # the owner comes first in the module list and has been moved already
        return self
