"""Rank-one components of a site: V [d_in, C] and U [C, d_out], W ≈ (V U)ᵀ.

``init`` says how they start: ``paper`` and ``2026`` as the authors' codes do, from random numbers;
``inputs`` from what the site reads (:func:`spread_directions`).
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


def spread_directions(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` unit vectors [d, count] among the directions of the rows of ``x`` [n, d].

    One row after the other is drawn, with probability in proportion to 1 − max cos² of its angle to
    those drawn before, so that every direction that occurs is near one of them: the seeding of
    k-means++ (Arthur and Vassilvitskii, 2007) with lines for points. Once nothing new is left the
    rest are random.
    """
    x = x.detach().to("cpu", torch.float32)
    chosen = torch.randn(x.shape[1], count, generator=generator)
    chosen /= chosen.norm(dim=0, keepdim=True)
    norms = x.norm(dim=1, keepdim=True)
    rows = (x / norms.clamp_min(torch.finfo(torch.float32).tiny))[norms[:, 0] > 0]
    apart = torch.ones(len(rows))
    for k, drawn in enumerate(torch.rand(count, generator=generator).tolist()):
        apart = apart.where(apart > NEAR, 0.0)
        total = apart.cumsum(0, dtype=torch.float64)
        if len(rows) == 0 or total[-1] == 0:
            break
        chosen[:, k] = v = rows[torch.searchsorted(total, drawn * total[-1], right=True)]
        apart = torch.minimum(apart, 1 - (rows @ v).square())
    return chosen


# Two directions whose sine² is below this count as one.
NEAR = 1e-4


class Components(nn.Module):
    """The parameters V and U of one site. With init ``inputs`` those of ``paper``, until
    :meth:`start_from` is called."""

    def __init__(self, site: Site, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        if init not in INITS:
            raise UserError(f"unknown init {init!r}; known: {', '.join(INITS)}")
        V, U = (_2026_init if init == "2026" else _paper_init)(site, generator)
        self.V = nn.Parameter(V.to(site.weight))
        self.U = nn.Parameter(U.to(site.weight))

    @torch.no_grad()
    def start_from(self, x: Tensor, site: Site, generator: torch.Generator) -> None:
        """v_c: directions of the site's inputs ``x`` [n, d_in]. u_c = α W v_c, with the α that
        brings Σ_c v_c u_cᵀ nearest to Wᵀ."""
        weight = site.weight.to("cpu", torch.float32)
        V = spread_directions(x, site.components, generator)
        U = V.T @ weight.T
        total = V @ U
        scale = (total * weight.T).sum() / total.square().sum().clamp_min(1e-30)
        self.V.copy_(V)
        self.U.copy_(scale * U)


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
