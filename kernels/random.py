"""Random sources: tiles of u = (word >> 8) · 2⁻²⁴ from Philox-4x32-10, bit-equal to the reference.

Counter = (column // 4, global row, draw, site), lane = column % 4. One call makes the four columns
of a group, so a tile of BLOCK_C columns costs BLOCK_C / 4 calls a row: about 80 integer
instructions for four numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.configs import launch


@triton.jit
def _unit(word):
    # 24 bits fit in int32, whose conversion to float is the cheap one.
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _words(key, group, row, draw, site):
    k0 = tl.load(key) & 0xFFFFFFFF
    k1 = tl.load(key + 1) & 0xFFFFFFFF
    zero = (group + row) * 0  # every counter word needs the tile's shape
    return tl.philox(
        k0 | (k1 << 32),
        (zero + group).to(tl.uint32),
        (zero + row).to(tl.uint32),
        (zero + draw).to(tl.uint32),
        (zero + site).to(tl.uint32),
    )


@triton.jit
def uniform_tile(key, rows, first_column, draw, site, row_offset, BLOCK_C: tl.constexpr):
    """u [BLOCK_N, BLOCK_C] of int64 ``rows`` and columns first_column … (a multiple of four)."""
    group = (first_column // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.int64)[None, :]
    w0, w1, w2, w3 = _words(key, group, (rows + row_offset)[:, None], draw, site)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [BN, BC]
    return _unit(words)


@triton.jit
def uniform_column(key, rows, column, draw, site, row_offset):
    """u [BLOCK_N] of one column; column C of a site is its delta mask."""
    group = tl.zeros_like(rows) + column // 4
    w0, w1, w2, w3 = _words(key, group, rows + row_offset, draw, site)
    lane = column % 4
    low = tl.where(lane == 0, w0, w1)
    high = tl.where(lane == 2, w2, w3)
    return _unit(tl.where(lane < 2, low, high))


@triton.jit(do_not_specialize=["column", "draw", "site", "row_offset"])
def uniform_column_kernel(out, key, N, column, draw, site, row_offset, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    u = uniform_column(key, rows, column, draw, site, row_offset)
    tl.store(out + rows, u, mask=rows < N)


@triton.jit(do_not_specialize=["draw", "site", "row_offset"])
def uniform_kernel(
    out, key, N, C, draw, site, row_offset, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C)
    u = uniform_tile(key, rows, first, draw, site, row_offset, BLOCK_C)
    mask = (rows < N)[:, None] & (columns < C)[None, :]
    tl.store(out + rows[:, None] * C + columns[None, :], u, mask=mask)


def delta_mask(key: Tensor, rows: int, column: int, draw: int, site: int, offset: int) -> Tensor:
    """δ [N] in float32."""
    out, key = torch.empty(rows, device=key.device), key.contiguous()
    if rows:
        launch(uniform_column_kernel, out, (triton.cdiv(rows, 256),), out, key,
               rows, column, draw, site, offset, BLOCK_N=256)  # fmt: skip
    return out


def uniform(key: Tensor, rows: int, columns: int, draw: int, site: int, offset: int) -> Tensor:
    """u [rows, columns] in float32: for tests and for looking at masks."""
    out, key = torch.empty(rows, columns, device=key.device), key.contiguous()
    if out.numel():
        grid = (triton.cdiv(rows, 32), triton.cdiv(columns, 64))
        launch(uniform_kernel, out, grid, out, key, rows, columns, draw, site, offset,
               BLOCK_N=32, BLOCK_C=64)  # fmt: skip
    return out
