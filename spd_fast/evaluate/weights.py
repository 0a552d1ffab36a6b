"""How well components match the target's weights (the paper, §3.1 and table 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WeightMatch", "match_weights"]


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


def match_weights(V: Tensor, U: Tensor, weight: Tensor) -> WeightMatch:
    """For each input feature j, max over c of cosine(u_c V_jc, W_:j), and at the maximising c
    ‖u_c V_jc‖ / ‖W_:j‖. V [d_in, C], U [C, d_out], weight [d_out, d_in]. Float64 throughout."""
    V, U, weight = (t.detach().double() for t in (V, U, weight))
    tiny = torch.finfo(torch.float64).tiny
    unit_U = U / U.norm(dim=1, keepdim=True).clamp_min(tiny)
    unit_W = weight / weight.norm(dim=0, keepdim=True).clamp_min(tiny)
    cosine = torch.sign(V) * (unit_U @ unit_W).T  # [d_in, C]
    best = cosine.max(dim=1)
    length = V.gather(1, best.indices[:, None])[:, 0].abs() * U.norm(dim=1)[best.indices]
    return WeightMatch(best.indices, best.values, length / weight.norm(dim=0).clamp_min(tiny))
