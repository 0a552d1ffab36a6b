"""Ties the fused backends to the primitives that the operations declare."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spd_fast.ops._library import LIBRARY

__all__ = ["load", "unsupported_dtype"]

PRIMITIVES = (
    "gate_forward",
    "gate_backward",
    "component_linear_forward",
    "component_linear_backward",
    "faithfulness_forward",
    "faithfulness_backward",
)


@functools.cache
def load(backend: str) -> None:
    """Register the kernels of ``backend`` for its device; the second call does nothing."""
    if backend == "cpu":
        from spd_fast import _extension

        module = _extension.module()
        for name in PRIMITIVES:
            LIBRARY.impl(name, getattr(module, name), "CPU")
        return
    raise NotImplementedError(f"no kernels for backend {backend!r}")


def unsupported_dtype(backend: str, tensor: Tensor) -> str | None:
    """Why ``backend`` cannot compute in the dtype of ``tensor``, or None."""
    if backend == "cpu" and tensor.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {tensor.dtype}"
    return None
