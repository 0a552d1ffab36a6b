"""Gate logits by interpolation: each gate is a function of one number, so a grid of it will do.

Component c's logit s_c(h) (one hidden layer) is replaced by cubic Hermite pieces through its values
and derivatives at the multiples of a spacing D_c. The error of a piece is at most

    D⁴/384 · max|s''''|,   |s''''| ≤ 4 φ(0) Σ_j |o_j| w_j⁴     (|GELU''''| is largest at 0)

and D_c is the largest power of 2^¼, at most 1, that keeps this below :data:`GRID_ERROR`. The nodes
reach from min(h, 0) to max(h, 0) of the batch. Where they would be more than a quarter of the rows,
or more than :data:`MAX_NODES`, or where h or a weight is not finite, the component is exact.

Gradients are those of the interpolant, exactly: of h through the pieces, of the gate's parameters
through values and derivatives at the nodes. The grid itself is a constant.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GRID_ERROR", "MAX_NODES", "grid_spacing", "interpolated_logits"]

GRID_ERROR = 5e-6
MAX_NODES = 2048
FINEST_SPACING = 2.0**-20
ROWS_PER_NODE = 4
# |h| / D below this: the fraction keeps some digits in float32.
FARTHEST_NODE = 2.0**20


def grid_spacing(w_in: Tensor, w_out: Tensor) -> Tensor:
    """D [C] in float64 from w_in, w_out [C, H]; 0 where no spacing keeps the bound."""
    fourth = 4 * (2 * math.pi) ** -0.5 * (w_out.double().abs() * w_in.double() ** 4).sum(dim=1)
    widest = (384 * GRID_ERROR / fourth) ** 0.25
    mantissa, exponent = torch.frexp(widest.clamp(max=1.0))  # widest = mantissa · 2^exponent
    steps = mantissa.new_tensor([0.5, 2**-0.75, 2**-0.5, 2**-0.25])
    below = torch.bucketize(mantissa, steps, right=True) - 1
    spacing = torch.ldexp(steps[below.clamp(min=0)], exponent)
    return torch.where(widest >= FINEST_SPACING, spacing, 0.0)


def _values_and_slopes(
    x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor]:
    """s and ds/dh [K, C] at x [K, C]."""
    z = x.unsqueeze(-1) * w_in + b_in  # [K, C, H]
    density = torch.exp(-0.5 * z * z) * (2 * math.pi) ** -0.5
    slope = 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * density
    return (F.gelu(z) * w_out).sum(-1) + b_out, (slope * (w_in * w_out)).sum(-1)


def interpolated_logits(
    inner: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, exact: Tensor
) -> Tensor:
    """s [N, C] of inner h [N, C] by interpolation, ``exact`` s [N, C] where that is not allowed.

    Args:
        w_in, b_in, w_out: [C, H]. b_out: [C].
    """
    N = inner.shape[0]
    count = min(N // ROWS_PER_NODE, MAX_NODES)
    if count < 2:
        return exact
    with torch.no_grad():
        spacing = grid_spacing(w_in, w_out).to(inner)
        inverse = 1 / spacing
        low = inner.amin(dim=0).clamp(max=0) * inverse
        high = inner.amax(dim=0).clamp(min=0) * inverse
        first, last = torch.floor(low), torch.floor(high)
        # Comparisons with NaN are false, and 0 · ∞ is NaN.
        within = (high < FARTHEST_NODE) & (-low < FARTHEST_NODE)
        usable = (spacing > 0) & (last - first + 2 <= count) & within
        spacing = torch.where(usable, spacing, 1.0)
        inverse = torch.where(usable, inverse, 1.0)
        first = torch.where(usable, first, 0.0)
        nodes = (first + torch.arange(count, device=inner.device)[:, None]) * spacing  # [K, C]
    value, slope = _values_and_slopes(nodes, w_in, b_in, w_out, b_out)
    slope = slope * spacing
    u = torch.where(usable, inner, 0.0) * inverse
    whole = torch.floor(u.detach())
    t = u - whole
    left = (whole - first).long()
    s0, s1 = value.gather(0, left), value.gather(0, left + 1)
    d0, d1 = slope.gather(0, left), slope.gather(0, left + 1)
    rise = s1 - s0
    s = s0 + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return torch.where(usable, s, exact)
