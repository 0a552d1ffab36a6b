"""What the Triton backend launches: calls with bytes, flops and instructions, and the memory that
is alive between them.

On meta tensors no kernel runs but every launcher does, at its real sizes: which regime, how many
chunks, which buffers. So predictions need no GPU and cannot drift from the code. On a GPU the same
recorder puts device events around the same calls, and the two columns of docs/kernels.md meet.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spd_fast import backends
from spd_fast.kernels import (
    component_linear,
    divergence,
    embedding_inner,
    gate,
    importances,
    linear_kl,
    primitives,
    product,
    random,
)
from spd_fast.ops import _fused

__all__ = ["Call", "Library", "Memory", "recorded", "simulated", "site_products"]

# Lane instructions, counted in the kernels' source: of a gate's neuron forward; backward, which
# evaluates the tail twice and adds to three accumulators; of an element's random number and mask.
GATE_FORWARD, GATE_BACKWARD = 19, 48
MASK_FORWARD, MASK_BACKWARD = 25, 30
# Of a logit's sigmoids and penalty; of a squared difference; of an element of the KL and of its
# gradient: four and two exponentials, of which a multiprocessor makes 16 a clock (8 instructions).
IMPORTANCES, SQUARED_ERROR, KL_FORWARD, KL_BACKWARD = 10, 4, 32, 16


@dataclass
class Call:
    """One launch: its name in docs/kernels.md and what it costs at least."""

    name: str
    bytes: float
    flops: float = 0.0
    instructions: float = 0.0
    events: tuple[Any, Any] | None = field(default=None, repr=False)

    @property
    def milliseconds(self) -> float:
        """Measured on the device."""
        assert self.events is not None
        return self.events[0].elapsed_time(self.events[1])


def _gate_forward(a: dict[str, Any]) -> Call:
    n, size = a["N"] * a["C"], a["inner"].element_size()
    moved, flops = 2 * size * n, 0.0
    if a["PRODUCT"]:
        moved += size * a["d_in"] * (a["N"] + a["C"])
        flops = 2.0 * n * a["d_in"]
    moved += 4 * a["partial"].numel()
    name = "gate forward" + (" with x V" if a["PRODUCT"] else "")
    return Call(name, moved, flops, GATE_FORWARD * n * a["HIDDEN"])


def _gate_backward(a: dict[str, Any]) -> Call:
    n, size = a["N"] * a["count"], a["inner"].element_size()
    moved = size * n * (2 + a["GRAD_INNER"] + a["GRAD_LOWER"]) + 4 * a["partial"].numel()
    return Call("gate backward", moved, 0.0, GATE_BACKWARD * n * max(a["HIDDEN"], 1))


def _mask_forward(a: dict[str, Any]) -> Call:
    n, size = a["N"] * a["count"], a["a"].element_size()
    moved, flops = size * n * (2 + a["LOWER"]), 0.0
    if a["PRODUCT"]:
        moved += size * (a["d_in"] * (a["N"] + a["count"]) - n)
        flops = 2.0 * n * a["d_in"]
    name = "mask forward" + (" with x V" if a["PRODUCT"] else "")
    return Call(name, moved, flops, MASK_FORWARD * n)


def _mask_backward(a: dict[str, Any]) -> Call:
    n, size = a["N"] * a["count"], a["x"].element_size()
    written = sum(a[f"WRITE_{x}"] for x in "AHGR")
    moved, flops = size * n * (2 + a["LOWER"] + written), 0.0
    for product_of, depth in (("PRODUCT_H", a["d_in"]), ("PRODUCT_A", a["d_out"])):
        if a[product_of]:
            moved += size * (depth * (a["N"] + a["count"]) - n)
            flops += 2.0 * n * depth
    name = "mask backward"
    if a["PRODUCT_A"]:
        name += " with ȳ Uᵀ" + (", x V" if a["PRODUCT_H"] else "")
    return Call(name, moved, flops, MASK_BACKWARD * n)


def _small_forward(a: dict[str, Any]) -> Call:
    N, C, d_in, d_out, size = a["N"], a["C"], a["d_in"], a["d_out"], a["x"].element_size()
    n = N * C
    moved = size * (N * d_out + C * d_out + n * a["LOWER"])
    flops = 2.0 * n * d_out
    if a["PRODUCT"]:
        moved += size * d_in * (N + C)
        flops += 2.0 * n * d_in
    else:
        moved += size * n
    if a["DELTA"] or a["ROUTING"]:
        moved += size * d_in * (N + d_out)
        flops += 2.0 * N * d_in * d_out
    return Call("whole layer forward", moved, flops, MASK_FORWARD * n)


def _importances(a: dict[str, Any]) -> Call:
    n, size = a["N"] * a["C"], a["logits"].element_size()
    if "lower" in a:
        moved = 2 * size * n + (4 * a["partial"].numel() if a["PENALTY"] else 0)
        return Call("importances forward", moved, 0.0, IMPORTANCES * n)
    # Without a gradient of g a single zero stands for it.
    read = n if a["grad_lower"].stride(0) else 0
    return Call("importances backward", size * (2 * n + read), 0.0, IMPORTANCES * n)


def _embedding_backward(a: dict[str, Any]) -> Call:
    # Written: at most a row for each position.
    grad, written = a["grad"], min(a["table_bar"].numel(), a["grad"].numel())
    moved = grad.element_size() * grad.numel() + 4 * written
    moved += 8 * sum(a[name].numel() for name in ("ordered", "order", "ends"))
    return Call("embedding gradient", moved, 0.0, grad.numel())


def _squared_error(a: dict[str, Any]) -> Call:
    size, backward = a["a"].element_size(), "out" in a
    moved = size * a["size"] * (3 if backward else 2)
    name = "squared error " + ("backward" if backward else "forward")
    return Call(name, moved, 0.0, SQUARED_ERROR * a["size"])


def _kl(a: dict[str, Any]) -> Call:
    q, backward = a["q"], "out" in a
    rows = a["norm_q"].shape[0]
    n = rows * a["width"]
    moved = q.element_size() * n * (3 if backward else 2) + (16 if backward else 20) * rows
    name = "KL " + ("backward" if backward else "forward")
    return Call(name, moved, 0.0, (KL_BACKWARD if backward else KL_FORWARD) * n)


COSTS: dict[str, Callable[[dict[str, Any]], Call]] = {
    "gate_forward_kernel": _gate_forward,
    "gate_backward_kernel": _gate_backward,
    "mask_forward_kernel": _mask_forward,
    "mask_backward_kernel": _mask_backward,
    "small_forward_kernel": _small_forward,
    "importances_forward_kernel": _importances,
    "importances_backward_kernel": _importances,
    "embedding_backward_kernel": _embedding_backward,
    "squared_error_kernel": _squared_error,
    "squared_error_backward_kernel": _squared_error,
    "kl_kernel": _kl,
    "kl_backward_kernel": _kl,
    "uniform_column_kernel": lambda a: Call("δ", 4 * a["N"], 0.0, 80 * a["N"]),
}


def _launched(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Call:
    config = constants.pop("config", None)
    named = dict(zip(kernel.arg_names, args, strict=False))
    return COSTS[kernel.__name__]({**named, **(config.blocks if config else {}), **constants})


def site_products(d_in: int, d_out: int) -> Callable[[Tensor, Tensor], str]:
    """Which of a site's products A B is, by its sizes and by what is a transposed view."""

    def name(a: Tensor, b: Tensor) -> str:
        if a.stride(1) != 1:
            # A chunk of components may be as wide as d_in: the right operand tells.
            return "aᵀ ȳ" if b.shape[1] == d_out else "xᵀ h̄"
        transposed = b.stride(1) != 1
        if a.shape[1] in (d_in, d_out):
            return "ȳ Uᵀ" if transposed else "x V"
        return "h̄ Vᵀ" if transposed else "a U"

    return name


def _between(call: Call, function: Callable[[], Any]) -> Any:
    """``function`` between two device events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = function()
    end.record()
    call.events = start, end
    return result


# Operations of torch that make a view, or a tensor without contents: no launch.
_NOTHING = (
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias",
    "view", "_unsafe_view", "expand", "t", "as_strided", "lift_fresh", "_reshape_alias",
)  # fmt: skip


class Library(TorchDispatchMode):
    """Every launch of torch's own inside the block, by the name that ``name`` gives an operation
    and its arguments; each moves its arguments and its results once.

    What :func:`recorded` records as a product in the same block is not recorded again."""

    def __init__(self, calls: list[Call], name: Callable[[str], str], run: bool) -> None:
        super().__init__()
        self.calls, self.name, self.run = calls, name, run
        self.quiet = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def compute() -> Any:
            return function(*args, **(kwargs or {}))

        operation = function.overloadpacket.__name__
        if self.quiet or function.is_view or operation in _NOTHING:
            return compute()
        call = Call(self.name(operation), 0.0)
        self.calls.append(call)
        result = _between(call, compute) if self.run else compute()
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if operation == "index_select":  # the rows that it takes, not the table
            given = [*made, args[2]]
        call.bytes = sum(t.numel() * t.element_size() for t in (*given, *made))
        if operation in ("mm", "addmm"):
            a = given[-2]
            call.flops = 2.0 * a.numel() * made[0].shape[1]
        return result


@contextmanager
def recorded(
    product_of: Callable[[Tensor, Tensor], str], run: bool, library: Library | None = None
) -> Iterator[list[Call]]:
    """Calls of the kernels and of the products around them, in their order, the latter by the name
    that ``product_of`` gives their operands. ``run``: on a GPU, between device events; else the
    kernels among them are left out and the tensors hold nothing. ``library``: records the rest."""
    calls: list[Call] = [] if library is None else library.calls

    @contextmanager
    def known() -> Iterator[None]:
        if library is not None:
            library.quiet = True
        yield
        if library is not None:
            library.quiet = False

    def launch(original: Callable[..., None]) -> Callable[..., None]:
        def recording(kernel: Any, like: Tensor, grid: Any, *args: Any, **constants: Any) -> None:
            call = _launched(kernel, args, dict(constants))
            calls.append(call)
            if run:
                _between(call, lambda: original(kernel, like, grid, *args, **constants))

        return recording

    def products(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(original)

        def recording(*args: Any) -> Tensor:
            given = signature.bind(*args).arguments
            a, b, total = given["a"], given["b"], given.get("total")
            read = [t for t in (a, b, total) if t is not None]
            moved = sum(t.numel() * t.element_size() for t in read)
            moved += a.shape[0] * b.shape[1] * given["dtype"].itemsize
            flops = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
            call = Call(product_of(a, b), moved, flops)
            calls.append(call)
            with known():
                return _between(call, lambda: original(*args)) if run else original(*args)

        return recording

    with ExitStack() as stack:
        for module in (gate, component_linear, random, importances, embedding_inner, divergence):
            stack.enter_context(mock.patch.object(module, "launch", launch(module.launch)))
        for module in (gate, component_linear, linear_kl):
            for name in ("mm", "addmm"):
                wrapped = products(getattr(product, name))
                stack.enter_context(mock.patch.object(module, name, wrapped))
        if library is not None:
            stack.enter_context(library)
        yield calls


@contextmanager
def simulated() -> Iterator[None]:
    """The public operations computed by the Triton launchers on tensors that are on no GPU."""
    with ExitStack() as stack:
        for module, name, patch in (
            (_fused, "GPU_DEVICES", ("cuda", "cpu", "meta")),
            (backends, "resolve", lambda backend, *_: backend),
            (backends, "check_backend", lambda backend, *_: backend),
            (_fused, "load", lambda _: None),
            (_fused, "kernel", lambda name, _: primitives.TABLE[name]),
        ):
            stack.enter_context(mock.patch.object(module, name, patch))
        yield


class Memory(TorchDispatchMode):
    """Bytes of the storages that live, and the most that lived at once, from entering on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs))
                  if isinstance(t, Tensor)}  # fmt: skip
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in before:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
