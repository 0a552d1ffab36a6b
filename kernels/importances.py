"""Logits → lower importances and penalty sums, where another network than the gate makes logits.

    g = lower(s),   S_c = Σ_n ψ(upper(s)_nc);     s̄ = g's and S's gradients through both sigmoids

Memory-bound: forward reads s and writes g; backward reads s and ḡ and writes s̄.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels import scalar
from spd_fast.kernels.configs import Config, launch, pick


@triton.jit
def importances_forward_kernel(
    logits, s_row, s_col, lower, partial, N, C, power, eps,
    SIGMOID: tl.constexpr, PENALTY: tl.constexpr, POWER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    s_at = rows[:, None] * s_row + cols[None, :] * s_col  # [BN, BC]
    s = tl.load(logits + s_at, mask=inside, other=0.0).to(tl.float32)
    g = scalar.lower(s, SIGMOID).to(lower.dtype.element_ty)
    tl.store(lower + rows[:, None] * C + cols[None, :], g, mask=inside)
    if PENALTY != 0:
        psi = scalar.penalty(scalar.upper(s), power, eps, PENALTY, POWER)
        total = tl.sum(tl.where(inside, psi, 0.0), axis=0)
        tl.store(partial + row_tile * C + cols, total, mask=cols < C)


@triton.jit
def importances_backward_kernel(
    logits, s_row, s_col, grad_lower, g_row, g_col, grad_sum, s_bar, N, C, power, eps,
    SIGMOID: tl.constexpr, PENALTY: tl.constexpr, POWER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    s_at = rows[:, None] * s_row + cols[None, :] * s_col  # [BN, BC]
    g_at = rows[:, None] * g_row + cols[None, :] * g_col
    s = tl.load(logits + s_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_lower + g_at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros_like(s)
    if PENALTY != 0:
        total += tl.load(grad_sum + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    out = scalar.logit_backward(s, grad, total, power, eps, SIGMOID, PENALTY, POWER)
    at = rows[:, None] * C + cols[None, :]
    tl.store(s_bar + at, out.to(s_bar.dtype.element_ty), mask=inside)


def importances_forward(
    logits: Tensor, sigmoid: str, penalty: str, power: float, eps: float
) -> tuple[Tensor, Tensor]:
    """lower [N, C] in the dtype of ``logits`` [N, C], penalty_sum [C] in fp32."""
    N, C = logits.shape
    lower = torch.empty(N, C, dtype=logits.dtype, device=logits.device)
    special = scalar.specialisation(sigmoid, penalty, power)
    partial = torch.empty(0, C, device=logits.device)

    def run(config: Config) -> None:
        nonlocal partial
        tiles = triton.cdiv(N, config.blocks["BLOCK_N"])
        partial = torch.empty(tiles, C, device=logits.device)
        grid = (tiles, triton.cdiv(C, config.blocks["BLOCK_C"]))
        launch(importances_forward_kernel, logits, grid, logits, *logits.stride(), lower, partial,
               N, C, float(power), float(eps), **special, config=config)  # fmt: skip

    if N and C:
        run(pick("importances", "any", logits, (N, C), run))
    return lower, partial.sum(0) if penalty != "none" else partial.new_zeros(C)


def importances_backward(
    grad_lower: Tensor | None, grad_penalty: Tensor | None, logits: Tensor, sigmoid: str,
    penalty: str, power: float, eps: float,
) -> Tensor:  # fmt: skip
    """s̄ [N, C] in the dtype of ``logits``."""
    N, C = logits.shape
    s_bar = torch.empty(N, C, dtype=logits.dtype, device=logits.device)
    if grad_lower is None:
        grad_lower = logits.new_zeros(()).expand(N, C)
    penalty = "none" if grad_penalty is None else penalty
    sums = s_bar if grad_penalty is None else grad_penalty.contiguous()
    special = scalar.specialisation(sigmoid, penalty, power)

    def run(config: Config) -> None:
        grid = tuple(triton.cdiv(n, config.blocks[b]) for n, b in ((N, "BLOCK_N"), (C, "BLOCK_C")))
        launch(importances_backward_kernel, logits, grid, logits, *logits.stride(), grad_lower,
               *grad_lower.stride(), sums, s_bar, N, C, float(power), float(eps), **special,
               config=config)  # fmt: skip

    if N and C:
        run(pick("importances", "any", logits, (N, C), run))
    return s_bar
