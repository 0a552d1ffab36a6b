"""Counter-based random sources: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3").

A number is a pure function of (seed, training step, draw, site, row, column), so every backend,
tiling and recomputation sees the same mask, and a run resumes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spd_fast.ops._library import composite

__all__ = ["RandomSource", "make_key", "philox_4x32", "uniform", "uniform_column"]

_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


@dataclass(frozen=True, eq=False)
class RandomSource:
    """Where a site's random numbers come from.

    Attributes:
        key: int64 [2] on the device of the computation: (seed, training step).
        draw: index of the forward within the step.
        site: index of the site.
        row_offset: global index of row 0, over all ranks and accumulation steps.
        binomial: component sources in {0, 1} instead of [0, 1).
    """

    key: Tensor
    draw: int = 0
    site: int = 0
    row_offset: int = 0
    binomial: bool = False


def make_key(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The key (seed, step) as the int64 [2] tensor that every kernel reads."""
    return torch.tensor([seed & _MASK32, step & _MASK32], dtype=torch.int64, device=device)


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # The 64-bit product wraps in int64; shift and mask recover its unsigned halves.
    product = x * constant
    return (product >> 32) & _MASK32, product & _MASK32


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10 of four 32-bit counter words, which broadcast against one another.

    Args:
        counter: four int64 tensors holding unsigned 32-bit values.
        key: int64 [2].

    Returns:
        four int64 tensors holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK32, key[1] & _MASK32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def _words(source: RandomSource, rows: int, groups: Tensor) -> Tensor:
    """Words [rows, len(groups), 4] of the column groups (four columns each)."""
    device = source.key.device
    row = torch.arange(rows, device=device, dtype=torch.int64) + source.row_offset
    draw = torch.full((1, 1), source.draw, device=device, dtype=torch.int64)
    site = torch.full((1, 1), source.site, device=device, dtype=torch.int64)
    # Both cut to 32 bits: row because it may be larger, groups because torch.compile would else
    # fold range · constant into an index of 32 bits, which overflows.
    counter = (groups[None, :] & _MASK32, row[:, None] & _MASK32, draw, site)
    words = philox_4x32(counter, source.key)
    return torch.stack(words, dim=-1)


def _to_unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    # 24 bits: every value is exact in float32, so all dtypes and backends agree bit for bit.
    # Narrower dtypes round that value: 2²⁴ itself is beyond float16.
    exact = dtype if dtype == torch.float64 else torch.float32
    return ((words >> 8).to(exact) * 2.0**-24).to(dtype)


def uniform(
    source: RandomSource, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """u [rows, columns] in [0, 1): u = (word >> 8) · 2⁻²⁴.

    Counter = (column // 4, global row, draw, site), lane = column % 4. ``source.binomial`` is
    not applied here: these are the numbers before it.
    """
    groups = torch.arange((columns + 3) // 4, device=source.key.device, dtype=torch.int64)
    words = _words(source, rows, groups)
    return _to_unit(words.flatten(1)[:, :columns], dtype)


def uniform_column(
    source: RandomSource, rows: int, column: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Column ``column`` of :func:`uniform`, [rows]. Column C of a site is its delta mask."""
    group = torch.full((1,), column // 4, device=source.key.device, dtype=torch.int64)
    return _to_unit(_words(source, rows, group)[:, 0, column % 4], dtype)


@composite(
    "uniform(Tensor key, int draw, int site, int row_offset, int rows, int columns, "
    "ScalarType dtype) -> Tensor"
)
def _reference(
    key: Tensor, draw: int, site: int, row_offset: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return uniform(RandomSource(key, draw, site, row_offset), rows, columns, dtype)
