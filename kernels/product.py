"""The tile product every fused kernel starts from, and the library products around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.configs import tf32_allowed


@triton.jit
def as_tf32(tile):
    """fp32 rounded to the nearest tf32. The matrix units would cut the other 13 bits off: products
    came out up to 7e-4 too small (measured on an H200). A NaN stays one."""
    bits = tile.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(tile == tile, rounded, tile)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b of two tiles of one dtype."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        return tl.dot(as_tf32(a), as_tf32(b), acc, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product_tile(
    a, a_row, a_k, b, b_k, b_col, rows, cols, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(A B)[rows, cols] in fp32; A [M, K] and B [K, N] by strides, rows and cols int64."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptr = a + rows[:, None] * a_row + k[None, :] * a_k  # [BM, BK]
    b_ptr = b + k[:, None] * b_k + cols[None, :] * b_col  # [BK, BN]
    in_rows, in_cols = (rows < M)[:, None], (cols < N)[None, :]
    for start in range(0, K, BLOCK_K):
        left = K - start
        a_tile = tl.load(a_ptr, mask=in_rows & (k < left)[None, :], other=0.0)
        b_tile = tl.load(b_ptr, mask=(k < left)[:, None] & in_cols, other=0.0)
        acc = dot(a_tile, b_tile, acc, PRECISION)
        a_ptr += BLOCK_K * a_k
        b_ptr += BLOCK_K * b_k
    return acc


@triton.jit
def tile_of(pid, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) tile of a program: GROUP row tiles share their column tiles in the L2."""
    row_tiles, col_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    first = pid // (GROUP * col_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = pid % (GROUP * col_tiles)
    return first + inside % size, inside // size


def precision(tensor: Tensor) -> str:
    """Of fp32 operands: "tf32" only where torch's own matmul setting asks for it."""
    allowed = tensor.dtype == torch.float32 and tensor.is_cuda and tf32_allowed()
    return "tf32" if allowed else "ieee"


def as_given(tensor: Tensor) -> AbstractContextManager[None]:
    """Products in the dtype of their operands, whatever an active autocast asks for."""
    kind = tensor.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _works(product: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        return torch.equal(product(), expected)
    except (RuntimeError, TypeError):
        return False


class Widening(NamedTuple):
    """Which products of half-precision matrices torch gives, or adds to a sum, in fp32."""

    mm: bool
    addmm: bool


def probe(device: torch.device, dtype: torch.dtype) -> Widening:
    """Found by trying: versions from 2.8 on know ``out_dtype``, by device and not all for a sum."""
    a = torch.full((16, 16), 1 + 2**-7, device=device).to(dtype)
    total = torch.full((16, 16), 2**-10, device=device)
    product = torch.full((16, 16), 16 * (1 + 2**-7) ** 2, device=device)  # exact in fp32 alone
    return Widening(
        _works(lambda: torch.mm(a, a, out_dtype=torch.float32), product),
        _works(lambda: torch.addmm(total, a, a, out_dtype=torch.float32), total + product),
    )


_FOUND: dict[tuple[torch.device, torch.dtype], Widening] = {}


def widening(like: Tensor) -> Widening:
    """:func:`probe` of the device and dtype of ``like``, once; nothing on a CPU."""
    if not like.is_cuda:
        return Widening(False, False)
    at = like.device, like.dtype
    if at not in _FOUND:
        # What is found by trying has to be read back: a stream that records a graph cannot.
        if torch.cuda.is_current_stream_capturing():
            return Widening(False, False)
        _FOUND[at] = probe(*at)
    return _FOUND[at]


def mm(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A B with fp32 accumulation, in ``dtype``; into ``out`` of the operands' dtype if given."""
    with as_given(a):
        if dtype == a.dtype:
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        if widening(a).mm:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.mm(a, b).to(dtype)


def addmm(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + A B in ``dtype``, into ``total`` where it likes; a first call without total is the
    product alone."""
    if total is None:
        return mm(a, b, dtype)
    with as_given(a):
        if dtype == a.dtype:
            return torch.addmm(total, a, b)
        found = widening(a)
        if found.addmm:
            return torch.addmm(total, a, b, out_dtype=dtype)
        return total.add_(torch.mm(a, b, out_dtype=dtype) if found.mm else torch.mm(a, b))
