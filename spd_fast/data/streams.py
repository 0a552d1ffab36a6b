"""Batches of any iterable, and token sequences packed from rows of any length."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from spd_fast.errors import UserError, nearest

__all__ = ["PackedTokens", "StreamBatches", "dataset_rows"]


class StreamBatches:
    """step → batch of any iterable of batches, which must give the same ones whenever it is
    iterated. At its end it is iterated again.

    A resumed run skips the batches that it has had: they are read, not computed on. A DataLoader
    that shuffles without a generator of its own gives others then: a warning says so.

    Raises:
        UserError: an empty iterable; one that can be iterated only once and is asked for an earlier
            batch, or for more than it has.
    """

    def __init__(self, batches: Iterable[Any], device: str = "cpu") -> None:
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            warnings.warn(
                "a DataLoader that shuffles without a generator has another order every time, "
                "so that no resumed run continues exactly: give it "
                "generator=torch.Generator().manual_seed(N)",
                stacklevel=2,
            )
        self.batches, self.device = batches, device
        self._iterator: Iterator[Any] = iter(batches)
        # A generator is its own iterator: once only.
        self._again = self._iterator is not batches
        self._next = 0
        self._last: Any = None

    @property
    def repeats(self) -> bool:
        """Whether the batches can be had again."""
        return self._again

    def __call__(self, step: int) -> Any:
        """The batch of a step."""
        if step == self._next - 1:  # asked for twice in a row: the trial before a run
            return self._last
        if step < self._next:
            if not self._again:
                raise UserError(
                    f"batch {step} is past: a generator gives its batches once; give a list, a "
                    "DataLoader or an object with __iter__"
                )
            self._iterator, self._next = iter(self.batches), 0
        while self._next <= step:
            self._last = self._take()
            self._next += 1
        return self._last

    def _take(self) -> Any:
        try:
            return _to(next(self._iterator), self.device)
        except StopIteration:
            if not self._again:
                raise UserError(
                    f"the data ended after {self._next} batches; a generator gives them once"
                ) from None
        self._iterator = iter(self.batches)
        try:
            return _to(next(self._iterator), self.device)
        except StopIteration:
            raise UserError("the data holds no batch") from None


def _to(batch: Any, device: str) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch


class PackedTokens:
    """Batches [batch_size, length] of token rows of any lengths, laid end to end.

    Holds one batch and one row in memory.
    """

    def __init__(self, rows: Iterable[Iterable[int]], batch_size: int, length: int) -> None:
        self.rows, self.batch_size, self.length = rows, batch_size, length

    def __iter__(self) -> Iterator[Tensor]:
        need = self.batch_size * self.length
        held: list[int] = []
        for row in self.rows:
            held.extend(row)
            while len(held) >= need:
                taken, held = held[:need], held[need:]
                yield torch.tensor(taken, dtype=torch.int64).reshape(self.batch_size, self.length)


class _Column:
    """A column of a dataset, iterated anew every time."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __iter__(self) -> Iterator[Any]:
        return (row[self.column] for row in self.dataset)


def dataset_rows(
    path: str,
    *,
    split: str = "train",
    column: str = "input_ids",
    streaming: bool = False,
    seed: int | None = None,
) -> Iterable[Iterable[int]]:
    """Token rows of a Hugging Face dataset: a folder of ``save_to_disk``, a folder of data files,
    or a hub id; shuffled by ``seed`` (streaming: within a buffer), in order where it is None.

    Raises:
        UserError: ``datasets`` is not installed; nothing readable there, no such split or column.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("Hugging Face datasets need `pip install spd_fast[hf]`") from None
    folder = Path(path)
    on_disk = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
    try:
        if on_disk:
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise UserError(
                        f"dataset {path} has no split {split!r}; nearest: {nearest(split, found)}"
                    )
                found = found[split]
            if streaming:
                found = found.to_iterable_dataset()
        else:
            found = datasets.load_dataset(path, split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of its own of many kinds
        raise UserError(f"no readable dataset {path}: {' '.join(str(error).split())}") from None
    columns = found.column_names
    if columns is not None and column not in columns:
        raise UserError(
            f"dataset {path} has no column {column!r}; nearest: {nearest(column, columns)}"
        )
    if seed is not None:
        found = found.shuffle(seed=seed)
    return _Column(found, column)
