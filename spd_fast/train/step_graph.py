"""A training step as one CUDA graph: recorded once, replayed with other numbers.

A toy's step is bound by its hundreds of launches, not by arithmetic; a replay is one. What changes
from step to step (batch, key of the random masks, learning rates) is read from device tensors that
are written before the replay; everything else is the same in every step of a recording. Where that
changes (coefficients and penalties that are annealed), steps run unrecorded until it stays again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from spd_fast._adamw import AdamW
from spd_fast.errors import UserError
from spd_fast.ops import make_key
from spd_fast.ops._fused import before_recording

__all__ = ["StepGraph", "record_cuda_graph"]

T = TypeVar("T")
Record = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]

# Steps that run as they are before one is recorded: libraries set themselves up, kernels compile.
UNRECORDED = 3


def record_cuda_graph(function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """(what ``function`` returned while it was recorded, the replay that computes it again)."""
    before_recording()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay


class StepGraph(Generic[T]):
    """Runs a step that reads its batch, key and learning rates where this object writes them.

    Args:
        update: (batch, step) → what the step returns; all from the forward to the optimiser's step.
        optimizer: its learning rates become device tensors.
        seed: of the key (seed, step).
        record: how a step is recorded; a test's double needs no GPU.
    """

    def __init__(
        self,
        update: Callable[[Tensor, int], T],
        optimizer: AdamW | torch.optim.Optimizer,
        seed: int,
        device: torch.device,
        record: Record[T] = record_cuda_graph,
    ) -> None:
        self.update, self.optimizer, self.seed, self.record = update, optimizer, seed, record
        self.key = make_key(seed, 0, device)
        self.usable = True
        self._stream: torch.cuda.Stream | None = None
        self._constants: Hashable = None
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
            if device.type == "cuda":
                group["capturable"] = True
        self.forget()

    def forget(self) -> None:
        """Record anew: what was recorded holds the addresses of the old moments."""
        self._seen = 0
        self._batch: Tensor | None = None
        self._recorded: tuple[T, Callable[[], None]] | None = None

    def run(self, index: int, batch: Any, constants: Hashable = None) -> T:
        """The step ``index`` on ``batch``; its results are valid until the next step.
        ``constants``: the numbers that a recording would keep."""
        device = self.key.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._run(index, batch, constants)

    def _run(self, index: int, batch: Any, constants: Hashable) -> T:
        self.key.copy_(make_key(self.seed, index))
        if constants != self._constants:
            self.forget()
            self._constants = constants
        if not self.usable or not isinstance(batch, Tensor) or self._seen < UNRECORDED:
            self._seen += 1
            return self._aside(batch, index)
        if self._batch is None or self._batch.shape != batch.shape:
            self._batch, self._recorded = batch.clone(), None
        self._batch.copy_(batch)
        if self._recorded is None:
            static = self._batch
            try:
                self._recorded = self.record(lambda: self.update(static, index))
            # A target that cannot be recorded looks like one that cannot take the batch.
            except (RuntimeError, UserError) as error:
                self.usable = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"the training step runs without a CUDA graph: {reason}")
                return self.update(batch, index)
        result, replay = self._recorded
        replay()
        return result

    def _aside(self, batch: Any, index: int) -> T:
        """On a stream of its own, as a recording needs its predecessors to be."""
        if self.key.device.type != "cuda":
            return self.update(batch, index)
        # One for all steps: the allocator keeps what is freed for each stream apart.
        stream = self._stream = self._stream or torch.cuda.Stream()
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            result = self.update(batch, index)
        main.wait_stream(stream)
        return result
