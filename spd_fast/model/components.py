"""Rank-one components of a site: V [d_in, C] and U [C, d_out], W ≈ (V U)ᵀ."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd_fast.errors import UserError
from spd_fast.model.sites import Site

__all__ = ["INITS", "Components", "Init", "TiedComponents"]

Init = Literal["paper", "2026"]
INITS: tuple[Init, ...] = ("paper", "2026")


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


class Components(nn.Module):
    """The parameters V and U of one site."""

    def __init__(self, site: Site, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        if init not in INITS:
            raise UserError(f"unknown init {init!r}; known: {', '.join(INITS)}")
        V, U = (_paper_init if init == "paper" else _2026_init)(site, generator)
        self.V = nn.Parameter(V.to(site.weight))
        self.U = nn.Parameter(U.to(site.weight))


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
