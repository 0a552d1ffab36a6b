"""Scalar mathematics of the gate: exact-erf GELU, the sigmoid pair, the penalties.

Elementwise device functions on tiles of any shape; the same formulas as csrc/common/*.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Constants that kernels compare their specialisations with.
SIGMOID = {"paper": 0, "2026": 1}
PENALTY = {"none": 0, "lp": 1, "smooth_l0": 2}

_PAPER = tl.constexpr(0)
_LP = tl.constexpr(1)
_SMOOTH_L0 = tl.constexpr(2)


@triton.jit
def normal_tail(a):
    """Q(a) = (1 − erf(a/√2))/2 on [0, 5.6]: the square of a minimax polynomial, 12 fma."""
    p = tl.fma(a, 2.176711966228595e-08, -6.66949745209422e-07)
    p = tl.fma(p, a, 8.362309927179012e-06)
    p = tl.fma(p, a, -5.264058927423321e-05)
    p = tl.fma(p, a, 0.0001508023269707337)
    p = tl.fma(p, a, -1.8867614926421084e-05)
    p = tl.fma(p, a, -0.0005208784132264555)
    p = tl.fma(p, a, -0.0020929728634655476)
    p = tl.fma(p, a, 0.007489578332751989)
    p = tl.fma(p, a, 0.024627147242426872)
    p = tl.fma(p, a, -0.05628836527466774)
    p = tl.fma(p, a, -0.28209277987480164)
    p = tl.fma(p, a, 0.7071067690849304)
    return p * p


@triton.jit
def gelu(z):
    """GELU(z) = max(z, 0) − |z| Q(|z|); error below 3.1e-7 (torch: 3.7e-7). Keeps a NaN."""
    a = tl.minimum(tl.abs(z), 5.6, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(-a, normal_tail(a), tl.maximum(z, 0.0))


@triton.jit
def gelu_with_slope(z):
    """GELU(z) and GELU'(z) = 1 − D(|z|) above 0, D(|z|) below, D = Q − |z| φ(|z|)."""
    a = tl.minimum(tl.abs(z), 5.6, propagate_nan=tl.PropagateNan.ALL)
    tail = normal_tail(a)
    # φ(a) = exp2(−a² log2(e)/2) / √(2π): one special-function call, on a pipe of its own.
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * a * a)
    d = tl.fma(-a, density, tail)
    return tl.fma(-a, tail, tl.maximum(z, 0.0)), tl.where(z > 0, 1.0 - d, d)


@triton.jit
def lower(s, SIGMOID: tl.constexpr):
    capped = tl.minimum(s, 1.0)
    if SIGMOID == _PAPER:
        g = tl.where(s <= 0, 0.01 * s, capped)
    else:
        g = tl.maximum(capped, 0.0)
    return tl.where(s == s, g, s)  # min and max drop a NaN


@triton.jit
def lower_backward(s, grad, SIGMOID: tl.constexpr):
    leak = 0.01 * grad
    below = leak if SIGMOID == _PAPER else tl.minimum(leak, 0.0)
    return tl.where(s <= 0, below, tl.where(s > 1, 0.0, grad))


@triton.jit
def upper(s):
    g = tl.where(s > 1, 1.0 + 0.01 * (s - 1.0), tl.maximum(s, 0.0))
    return tl.where(s == s, g, s)


@triton.jit
def upper_slope(s):
    """The end points 0 and 1 pass the gradient, as torch.clamp does."""
    return tl.where(s > 1, 0.01, tl.where(s >= 0, 1.0, 0.0))


@triton.jit
def penalty(g, power, eps, PENALTY: tl.constexpr, POWER: tl.constexpr):
    """ψ(g). POWER is 1 or 2 where ``power`` is, else 0."""
    if PENALTY == _SMOOTH_L0:
        return g * g / (g * g + power * power)
    base = g + eps
    if POWER == 1:
        return base
    if POWER == 2:
        return base * base
    return tl.exp2(power * tl.log2(base))


@triton.jit
def penalty_slope(g, power, eps, PENALTY: tl.constexpr, POWER: tl.constexpr):
    """ψ'(g)."""
    if PENALTY == _SMOOTH_L0:
        width = power * power
        total = g * g + width
        return 2.0 * width * g / (total * total)
    base = g + eps
    if POWER == 1:
        return tl.full(g.shape, 1.0, tl.float32)
    if POWER == 2:
        return 2.0 * base
    return power * tl.exp2((power - 1.0) * tl.log2(base))


@triton.jit
def logit_backward(
    s, grad_lower, grad_sum, power, eps,
    SIGMOID: tl.constexpr, PENALTY: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """s̄ from ḡ and S̄; PENALTY 0 stands for a penalty without gradient too."""
    s_bar = lower_backward(s, grad_lower, SIGMOID)
    if PENALTY != 0:
        slope = upper_slope(s)
        psi = grad_sum * penalty_slope(upper(s), power, eps, PENALTY, POWER)
        s_bar += tl.where(slope == 0, 0.0, psi * slope)
    return s_bar


def specialisation(sigmoid: str, penalty: str, power: float) -> dict[str, int]:
    """The constexpr arguments shared by every kernel that ends in the sigmoid pair."""
    special = int(power) if penalty == "lp" and power in (1.0, 2.0) else 0
    return {"SIGMOID": SIGMOID[sigmoid], "PENALTY": PENALTY[penalty], "POWER": special}
