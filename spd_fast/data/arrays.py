"""Batches of rows of an array: tokens on disk, or tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spd_fast._seeds import mixed_seed
from spd_fast.errors import UserError, nearest

__all__ = ["ArrayBatches", "load_tokens"]

BIN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
# Tokens that are looked through at once when an array is checked.
_CHUNK = 2**24


def load_tokens(path: str | Path, dtype: str = "uint16") -> NDArray[np.integer]:
    """Token ids, memory-mapped: an ``.npy`` of one or two dimensions, or a ``.bin`` that is nothing
    but ids of ``dtype``.

    Raises:
        UserError: absent, unreadable, empty, or not made of integers.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".bin"):
        raise UserError(f"token file {path} must be an .npy or a .bin")
    if not path.is_file():
        raise UserError(f"no token file {path}")
    if path.suffix == ".bin":
        if dtype not in BIN_DTYPES:
            raise UserError(f"unknown token dtype {dtype!r}; nearest: {nearest(dtype, BIN_DTYPES)}")
        size, width = path.stat().st_size, np.dtype(dtype).itemsize
        if size == 0 or size % width:
            raise UserError(f"{path} holds {size} bytes, which are no whole number of {dtype} ids")
        return np.memmap(path, dtype=dtype, mode="r")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable .npy array: {' '.join(str(error).split())}"
        ) from None
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{path} holds {tokens.dtype}, need integer token ids")
    if tokens.ndim not in (1, 2) or tokens.size == 0:
        raise UserError(f"{path} is {tokens.shape}, need [rows, positions] or [positions]")
    return tokens


def check_range(tokens: NDArray[np.integer], vocabulary: int, source: str) -> None:
    """Raise UserError unless every id is below ``vocabulary``, naming the first that is not."""
    width = tokens.shape[1] if tokens.ndim == 2 else 1
    rows = max(_CHUNK // width, 1)
    for start in range(0, len(tokens), rows):
        chunk = np.asarray(tokens[start : start + rows])
        bad = (chunk >= vocabulary) | (chunk < 0)
        if bad.any():
            first = np.argwhere(bad)[0]
            where = (
                f"row {start + first[0]}, position {first[1]}"
                if tokens.ndim == 2
                else (f"position {start + first[0]}")
            )
            raise UserError(
                f"{source} holds token {int(chunk[tuple(first)])} at {where}, but the target's "
                f"vocabulary has {vocabulary}: these tokens were made for another model"
            )


class ArrayBatches:
    """step → batch: rows of an array in a random order, a new one every epoch.

    The order of epoch e is a function of (seed, stream, e) and the batch of a step follows from the
    step alone, so a run resumes exactly.

    Args:
        rows: array or tensor [rows, ...]; with one dimension, a stream of tokens.
        length: positions of a sequence. A stream is cut into rows of it; longer rows are cut into
            as many, and what is left over is dropped. None keeps rows as they are.
        stream: which random numbers, as in :data:`spd_fast._seeds.STREAMS`.
        shuffle: False keeps the rows' order.

    Raises:
        UserError: no array, a stream without a length, a length above the rows', or fewer rows than
            a batch.
    """

    def __init__(
        self,
        rows: NDArray[Any] | Tensor,
        batch_size: int,
        *,
        length: int | None = None,
        seed: int = 0,
        stream: str = "decompose",
        shuffle: bool = True,
        device: str = "cpu",
    ) -> None:
        if not isinstance(rows, np.ndarray | Tensor):
            raise UserError(f"rows are an array or a tensor, got a {type(rows).__name__}")
        if batch_size < 1 or (length is not None and length < 1):
            raise UserError(
                f"batch_size and length must be at least 1, got {batch_size} and {length}"
            )
        width = rows.shape[1] if rows.ndim > 1 else None
        if width is None and length is None:
            raise UserError("a stream of tokens needs the length of a sequence (data.length)")
        if width is not None and length is not None and length > width:
            raise UserError(f"data.length is {length}, but the rows have {width} positions")
        self.rows, self.batch_size, self.length = rows, batch_size, length
        self.seed, self.stream, self.shuffle, self.device = seed, stream, shuffle, device
        # How many sequences a row makes.
        self.cuts = 1 if length is None or width is None else width // length
        self.count = len(rows) // (length or 1) if width is None else len(rows) * self.cuts
        if self.count < batch_size:
            raise UserError(f"{self.count} sequences do not fill a batch of {batch_size}")
        self._epoch: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return self.count

    def __call__(self, step: int) -> Tensor:
        """The batch of a step, [batch_size, ...]; integers as int64."""
        first = step * self.batch_size
        numbers = range(first, first + self.batch_size)
        picked = [self._order(n // self.count)[n % self.count].item() for n in numbers]
        batch = torch.stack([self._sequence(int(i)) for i in picked])
        return batch.to(self.device)

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            if self.shuffle:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.stream, epoch))
                order = torch.randperm(self.count, generator=generator)
            else:
                order = torch.arange(self.count)
            self._epoch = epoch, order
        return self._epoch[1]

    def _sequence(self, index: int) -> Tensor:
        if self.length is None:
            row = self.rows[index]
        elif self.rows.ndim == 1:
            row = self.rows[index * self.length : (index + 1) * self.length]
        else:
            start = index % self.cuts * self.length
            row = self.rows[index // self.cuts][start : start + self.length]
        if isinstance(row, Tensor):
            return row if row.is_floating_point() else row.long()
        array = np.asarray(row)
        integer = np.issubdtype(array.dtype, np.integer)
        return torch.from_numpy(array.astype(np.int64 if integer else array.dtype))
