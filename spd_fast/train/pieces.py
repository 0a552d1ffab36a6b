"""A batch in pieces, for gradient accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from spd_fast.errors import UserError

__all__ = ["Piece", "pieces"]


@dataclass(frozen=True)
class Piece:
    """``samples`` samples from ``start`` on, of ``total`` in the whole batch."""

    batch: Any
    start: int
    samples: int
    total: int

    @property
    def share(self) -> float:
        return self.samples / self.total


def pieces(batch: Any, count: int) -> list[Piece]:
    """``batch`` cut along the first dimension of its tensors, which may sit in mappings, tuples and
    lists; one piece is the batch itself, whatever it is.

    Raises:
        UserError: no tensors, tensors of different lengths, or fewer samples than pieces.
    """
    if count == 1:
        return [Piece(batch, 0, 1, 1)]
    lengths = {t.shape[0] if t.ndim else 0 for t in _tensors(batch)}
    if len(lengths) != 1:
        what = "no tensors" if not lengths else f"tensors of lengths {sorted(lengths)}"
        raise UserError(f"accumulation cuts a batch along its first dimension, but it has {what}")
    (total,) = lengths
    if total < count:
        raise UserError(f"a batch of {total} samples cannot be worked through in {count} pieces")
    edges = [round(i * total / count) for i in range(count + 1)]
    return [Piece(_cut(batch, a, b), a, b - a, total) for a, b in pairwise(edges)]


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in _tensors(value)]
    if isinstance(batch, tuple | list):
        return [t for value in batch for t in _tensors(value)]
    return []


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: _cut(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_cut(value, start, stop) for value in batch)
    return batch
