"""How well components match the target's weights (the paper, §3.1 and table 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "MECHANISM_COSINE",
    "WeightMatch",
    "match_matrices",
    "match_weights",
    "mechanism_cosines",
]

# A feature's mechanism counts as found where a component is this close to it in direction.
MECHANISM_COSINE = 0.95


@dataclass(frozen=True)
class WeightMatch:
    """Per input feature j: the best component, its cosine and its length ratio, [d_in] each."""

    component: Tensor
    cosine: Tensor
    ratio: Tensor

    @property
    def mmcs(self) -> float:
        """Mean max cosine similarity."""
        return self.cosine.mean().item()

    @property
    def ml2r(self) -> float:
        """Mean L2 ratio."""
        return self.ratio.mean().item()


def match_weights(V: Tensor, U: Tensor, weight: Tensor, among: Tensor | None = None) -> WeightMatch:
    """For each input feature j, max over c of cosine(u_c V_jc, W_:j), and at the maximising c
    ‖u_c V_jc‖ / ‖W_:j‖. V [d_in, C], U [C, d_out], weight [d_out, d_in]. Float64 throughout.

    Args:
        among: bool [C], the components that may match; all where None or none is. A cosine knows
            no length: in few dimensions a component that training has emptied (of length 1e-5,
            say) lies by chance as close to a column as the one that carries it.
    """
    V, U, weight = (t.detach().double() for t in (V, U, weight))
    tiny = torch.finfo(torch.float64).tiny
    unit_U = U / U.norm(dim=1, keepdim=True).clamp_min(tiny)
    unit_W = weight / weight.norm(dim=0, keepdim=True).clamp_min(tiny)
    cosine = torch.sign(V) * (unit_U @ unit_W).T  # [d_in, C]
    if among is not None and among.any():
        cosine = cosine.masked_fill(~among, -torch.inf)
    best = cosine.max(dim=1)
    length = V.gather(1, best.indices[:, None])[:, 0].abs() * U.norm(dim=1)[best.indices]
    return WeightMatch(best.indices, best.values, length / weight.norm(dim=0).clamp_min(tiny))


def match_matrices(components: Tensor, weight: Tensor, among: Tensor | None = None) -> WeightMatch:
    """The same for components that are whole matrices: column j of P_c in place of u_c V_jc.
    components [C, d_out, d_in], weight [d_out, d_in]. Float64 throughout."""
    P, W = components.detach().double(), weight.detach().double()
    tiny = torch.finfo(torch.float64).tiny
    lengths = P.norm(dim=1)  # [C, d_in]
    overlap = torch.einsum("coi,oi->ci", P, W / W.norm(dim=0).clamp_min(tiny))
    cosine = overlap / lengths.clamp_min(tiny)
    if among is not None and among.any():
        cosine = cosine.masked_fill(~among[:, None], -torch.inf)
    best = cosine.max(dim=0)
    length = lengths.gather(0, best.indices[None])[0]
    return WeightMatch(best.indices, best.values, length / W.norm(dim=0).clamp_min(tiny))


def mechanism_cosines(components: Tensor, weight: Tensor) -> Tensor:
    """How purely some component is the mechanism of each input feature.

    The mechanism of feature j is W with every other column zero. Per j, the largest cosine between
    it and a whole component P_c: max over c of ⟨P_c[:, j], W_:j⟩ / (‖P_c‖ ‖W_:j‖). Unlike the
    cosine of :func:`match_weights` it falls where a component serves several features; its length
    does not matter.

    Args:
        components: P [C, d_out, d_in]. weight: W [d_out, d_in].

    Returns:
        [d_in], float64.
    """
    P, W = components.detach().double(), weight.detach().double()
    tiny = torch.finfo(torch.float64).tiny
    overlap = torch.einsum("coi,oi->ci", P, W / W.norm(dim=0).clamp_min(tiny))
    return (overlap / P.flatten(1).norm(dim=1).clamp_min(tiny)[:, None]).amax(dim=0)
