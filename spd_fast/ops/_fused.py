"""Ties the fused backends to the primitives that the operations declare."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spd_fast import backends
from spd_fast.backends import constant_when_compiled
from spd_fast.ops._library import LIBRARY

__all__ = [
    "autocast",
    "before_recording",
    "differentiable",
    "kernel",
    "load",
    "per_component",
    "resolve_on_gpu",
    "unsupported_dtype",
    "unsupported_weight",
]

PRIMITIVES = (
    "gate_forward",
    "gate_backward",
    "gate_interpolated_forward",
    "gate_interpolated_backward",
    "component_linear_forward",
    "component_linear_backward",
    "layer_forward",
    "layer_backward",
    "faithfulness_forward",
    "faithfulness_backward",
)
# Operations that the extension can also differentiate by itself.
DIFFERENTIABLE = ("gate", "component_linear", "faithfulness")


@constant_when_compiled
def load(backend: str) -> None:
    """Register the kernels of ``backend`` for its device; the second call does nothing."""
    # torch.compile calls it while tracing and keeps nothing of it in the graph.
    _register(backend)


@functools.cache
def _register(backend: str) -> None:
    if backend == "cpu":
        from spd_fast import _extension

        module = _extension.module()
        for name in PRIMITIVES:
            LIBRARY.impl(name, getattr(module, name), "CPU")
        return
    if backend == "triton":
        from spd_fast.kernels import primitives

        for name, function in primitives.TABLE.items():
            LIBRARY.impl(name, function, "CUDA")
        return
    raise NotImplementedError(f"no kernels for backend {backend!r}")


def _runs_the_extension(tensor: Tensor) -> bool:
    """Whether the extension computes on ``tensor`` and nothing traces."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def kernel(name: str, tensor: Tensor) -> Callable[..., Any]:
    """What computes primitive ``name`` for ``tensor``: the registered operation, or, where nothing
    traces, the extension's function behind it (the dispatcher costs more than a small kernel)."""
    if _runs_the_extension(tensor):
        return _extension_function(name)
    return getattr(torch.ops.spd_fast, name)


def differentiable(
    backend: str, name: str, tensor: Tensor, function: type[torch.autograd.Function]
) -> Callable[..., Any]:
    """What computes operation ``name`` with its gradients, with the arguments of ``function``:
    ``function`` itself, or, for the backend "cpu" where nothing traces, its like in the extension
    (a passage through Python, forward and backward, costs more than a small kernel)."""
    if backend == "cpu" and _runs_the_extension(tensor):
        return _extension_function(name)
    return function.apply


@functools.cache
def _extension_function(name: str) -> Callable[..., Any]:
    from spd_fast import _extension

    return getattr(_extension.module(), name)


def before_recording() -> None:
    """Find out by trying, on the current device, what a stream that records a graph cannot."""
    if backends.unavailable_reason("triton") is None:
        from spd_fast.kernels import product

        product.widening(torch.empty(0, dtype=torch.bfloat16, device="cuda"))


# Device types with kernels for the operations of :func:`resolve_on_gpu`.
GPU_DEVICES = ("cuda",)


def resolve_on_gpu(
    backend: str | None,
    tensor: Tensor,
    operation: str,
    unsupported: Callable[[str], str | None],
) -> str:
    """:func:`spd_fast.backends.resolve` of an operation for which torch's own few passes are what
    every backend computes with on a CPU: nothing falls back there."""
    if tensor.device.type not in GPU_DEVICES:
        backends.check_backend(backend, tensor.device)
        return "reference"
    return backends.resolve(backend, tensor.device, operation, unsupported)


def per_component(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty [rows, columns] in the layout of the device's kernels: columns together on a CPU,
    rows together elsewhere."""
    if like.device.type == "cpu":
        return like.new_empty(columns, rows).t()
    return like.new_empty(rows, columns)


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of an active autocast on a GPU: the kernels take fp32 parameters as is."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return x.to(torch.get_autocast_dtype("cuda"))
    return x


def unsupported_weight(weight: Tensor | None) -> str | None:
    """Why no fused backend can take ``weight``, or None."""
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "it computes no gradient of the weight"
    return None


def unsupported_dtype(backend: str, tensor: Tensor) -> str | None:
    """Why ``backend`` cannot compute in the dtype of ``tensor``, or None."""
    if backend == "cpu" and tensor.dtype not in (torch.float32, torch.float64):
        return f"it computes in float32 and float64, not {tensor.dtype}"
    if backend == "triton" and tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 and bfloat16, not {tensor.dtype}"
    return None
