"""The truth: the formulas of the paper as naively as they can be written.

Explicit weight deltas, explicit masks, one position at a time, Philox in Python integers, no import
from spd_fast. In float64 this decides what is right; in float32 it is the eager implementation
whose error a kernel may at most double.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WORD = 2**32


@functools.cache
def philox_4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Ten rounds of Philox-4x32 on one counter (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product1 // WORD) ^ c[1] ^ k[0],
            product1 % WORD,
            (product0 // WORD) ^ c[3] ^ k[1],
            product0 % WORD,
        ]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


def uniform(seed: int, step: int, draw: int, site: int, row: int, column: int) -> float:
    """u of one (row, column): counter (column // 4, row, draw, site), lane column % 4, 24 bits."""
    words = philox_4x32((column // 4, row, draw, site), (seed, step))
    return (words[column % 4] // 2**8) / 2**24


def uniforms(
    seed: int, step: int, draw: int, site: int, rows: range, columns: range
) -> Tensor:  # [len(rows), len(columns)]
    values = [[uniform(seed, step, draw, site, r, c) for c in columns] for r in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(columns))


class _Elementwise(torch.autograd.Function):
    """A scalar function with its backward rule, applied to one number at a time."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, value: Callable[[float], float], rule: Callable[[float, float], float]
    ) -> Tensor:
        ctx.save_for_backward(s)
        ctx.rule = rule
        return s.new_tensor([value(v) for v in s.flatten().tolist()]).reshape(s.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (s,) = ctx.saved_tensors
        pairs = zip(s.flatten().tolist(), grad.flatten().tolist(), strict=True)
        return s.new_tensor([ctx.rule(v, g) for v, g in pairs]).reshape(s.shape), None, None


def _clamp(s: float) -> float:
    return min(max(s, 0.0), 1.0)


def _logistic(s: float) -> float:
    return 1 / (1 + math.exp(-s))


def _lower_2026_rule(s: float, grad: float) -> float:
    if s <= 0:
        return 0.01 * grad if grad < 0 else 0.0
    return grad if s <= 1 else 0.0


def lower_importance(s: Tensor, kind: str) -> Tensor:
    if kind == "paper":
        return _Elementwise.apply(
            s,
            lambda v: 0.01 * v if v <= 0 else min(v, 1.0),
            lambda v, grad: 0.01 * grad if v <= 0 else grad if v <= 1 else 0.0,
        )
    if kind == "2026":
        return _Elementwise.apply(s, _clamp, _lower_2026_rule)
    if kind == "hard":
        return _Elementwise.apply(s, _clamp, lambda v, grad: grad if 0 <= v <= 1 else 0.0)
    if kind == "normal":
        return _Elementwise.apply(
            s, _logistic, lambda v, grad: grad * _logistic(v) * (1 - _logistic(v))
        )
    raise ValueError(kind)


def upper_importance(s: Tensor, kind: str) -> Tensor:
    if kind in ("paper", "2026"):
        return _Elementwise.apply(
            s,
            lambda v: 1 + 0.01 * (v - 1) if v > 1 else _clamp(v),
            lambda v, grad: 0.01 * grad if v > 1 else grad if v >= 0 else 0.0,
        )
    return lower_importance(s, kind)


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def gate_logits(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """s [N, C]: component c's own MLP on the scalar h_c."""
    columns = []
    for c in range(h.shape[1]):
        z = h[:, c : c + 1]
        for layer, (W, b) in enumerate(zip(weights, biases, strict=True)):
            z = (gelu(z) if layer > 0 else z) @ W[c] + b[c]
        columns.append(z[:, 0])
    return torch.stack(columns, dim=1)


def grid_spacing(w_in: Tensor, w_out: Tensor) -> float | None:
    """The largest power of 2^¼, D ≤ 1, with D⁴/384 · 4 φ(0) Σ_j |o_j| w_j⁴ ≤ 5e-6, for one
    component; None where it is below 2⁻²⁰."""
    fourth = sum(abs(o) * w**4 for w, o in zip(w_in.tolist(), w_out.tolist(), strict=True))
    spacing, quarters = 1.0, 0
    while spacing**4 / 384 * 4 / math.sqrt(2 * math.pi) * fourth > 5e-6:
        quarters -= 1
        spacing = 2 ** (quarters / 4)
    return spacing if spacing >= 2.0**-20 else None


def interpolated_logits(
    h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, list[bool]]:
    """s [N, C] of gates with one hidden layer: every row's cubic Hermite piece from the values and
    derivatives at the two multiples of D around it; and which components are interpolated."""
    exact = gate_logits(h, weights, biases)
    columns, interpolated = [], []
    for c in range(h.shape[1]):
        w, b, o = weights[0][c, 0], biases[0][c], weights[1][c, :, 0]
        D = grid_spacing(w, o)
        reach = torch.cat([h[:, c].detach().double(), torch.zeros(1).double()])
        nodes = float("inf")
        if D is not None and reach.isfinite().all():
            nodes = math.floor(reach.max() / D) - math.floor(reach.min() / D) + 2
        interpolated.append(D is not None and nodes <= min(h.shape[0] / 4, 2048))
        if not interpolated[-1]:
            columns.append(exact[:, c])
            continue
        assert D is not None
        k = torch.floor(h[:, c].detach() / D)
        t = h[:, c] / D - k

        def value(x: Tensor, w: Tensor = w, b: Tensor = b, o: Tensor = o, c: int = c) -> Tensor:
            return gelu(x[:, None] * w + b) @ o + biases[1][c, 0]

        def slope(x: Tensor, w: Tensor = w, b: Tensor = b, o: Tensor = o) -> Tensor:
            z = x[:, None] * w + b
            density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
            return ((1 + torch.erf(z / math.sqrt(2))) / 2 + z * density) @ (o * w)

        columns.append(
            value(k * D) * (1 + 2 * t) * (1 - t) ** 2
            + value(k * D + D) * t**2 * (3 - 2 * t)
            + D * slope(k * D) * t * (1 - t) ** 2
            - D * slope(k * D + D) * t**2 * (1 - t)
        )
    return torch.stack(columns, dim=1), interpolated


def penalty_sums(upper: Tensor, kind: str, power: float, eps: float) -> Tensor:
    """S [C] = Σ over positions of ψ."""
    if kind == "none":
        return 0 * upper.sum(dim=0)
    if kind == "lp":
        return ((upper + eps) ** power).sum(dim=0)
    return (upper**2 / (upper**2 + power**2)).sum(dim=0)


def gate(
    x: Tensor,
    V: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sigmoid: str,
    penalty: tuple[str, float, float],
    gate_eval: str = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    h = x @ V
    s = gate_logits(h, weights, biases)
    if gate_eval == "interpolated":
        s, _ = interpolated_logits(h, weights, biases)
    return (
        h,
        lower_importance(s, sigmoid),
        penalty_sums(upper_importance(s, sigmoid), *penalty),
    )


def mask(lower: Tensor | None, source: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """m = g + (1 − g) r; without importances g = 0, without a source r = 0, without both m = 1."""
    if lower is None and source is None:
        return torch.ones(shape, dtype=torch.float64)
    g = torch.zeros_like(source) if lower is None else lower
    r = torch.zeros_like(g) if source is None else source
    return g + (1 - g) * r


def component_linear(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    mask: Tensor,
    delta: Tensor | None = None,
    routing: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = (h ⊙ m) U + δ (x Δᵀ) + b where routed, x Wᵀ + b elsewhere."""
    rows = []
    if delta is not None:
        weight_delta = weight - (V @ U).T
    for n in range(x.shape[0]):
        if routing is not None and not routing[n]:
            y = weight @ x[n]
        else:
            y = ((x[n] @ V) * mask[n]) @ U
            if delta is not None:
                y = y + delta[n] * (weight_delta @ x[n])
        rows.append(y if bias is None else y + bias)
    return torch.stack(rows)


def faithfulness(V: Tensor, U: Tensor, weight: Tensor) -> Tensor:
    total = weight.new_zeros(())
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            total = total + (weight[o, i] - V[i] @ U[:, o]) ** 2
    return total


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).sum() / prediction.numel()


def kl(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of Σ p (log p − log q)."""
    log_p = target - torch.logsumexp(target, dim=-1, keepdim=True)
    log_q = prediction - torch.logsumexp(prediction, dim=-1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def linear_kl(prediction: Tensor, target: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """KL of the logits that one row of the head at a time makes."""
    offset = head.new_zeros(head.shape[0]) if bias is None else bias
    logits = [
        torch.stack([rows @ head[v] + offset[v] for v in range(head.shape[0])], dim=-1)
        for rows in (prediction, target)
    ]
    return kl(*logits)


def embedding_inner(tokens: Tensor, V: Tensor) -> Tensor:
    """One-hot rows times V."""
    one_hot = V.new_zeros(*tokens.shape, V.shape[0])
    one_hot.scatter_(-1, tokens[..., None].long(), 1.0)
    return one_hot @ V
