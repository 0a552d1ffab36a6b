"""Matrix products: which ones a workload requires, their flops, their bare time, the peak.

The required flops are those of the matrix products alone; everything else must hide
behind them. For an operation they are written down in the registry; for a training step they are
the ones that the reference executes where it keeps residual streams as their factors, which it does
not when it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.registry import OPERATIONS, OperationWorkload, Shape

__all__ = ["Product", "bare_products", "flops", "matmul_peak", "record", "required", "site_flops"]

# Letters of the formulas → rows and columns, as attributes of Shape.
DIMENSIONS = {
    "x": ("N", "d_in"),
    "V": ("d_in", "C"),
    "h̄": ("N", "C"),
    "a": ("N", "C"),
    "U": ("C", "d_out"),
    "ȳ": ("N", "d_out"),
    "W": ("d_out", "d_in"),
    "Δ": ("d_out", "d_in"),
}


@dataclass(frozen=True)
class Product:
    """[m, k] @ [k, n]; whether an operand lies transposed in memory."""

    m: int
    k: int
    n: int
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


def _operand(text: str, shape: Shape) -> tuple[int, int, bool]:
    transposed = text.endswith("ᵀ")
    rows, columns = (getattr(shape, d) for d in DIMENSIONS[text.removesuffix("ᵀ")])
    return (columns, rows, True) if transposed else (rows, columns, False)


def _parse(text: str, shape: Shape) -> list[Product]:
    products = []
    for pair in text.split(", "):
        (m, k, left), (k2, n, right) = (_operand(name, shape) for name in pair.split(" "))
        assert k == k2, f"{pair}: {k} columns meet {k2} rows"
        products.append(Product(m, k, n, left, right))
    return products


def required(workload: OperationWorkload) -> list[Product]:
    """The matrix products that the operation cannot do without."""
    operation = OPERATIONS[workload.operation]
    products = _parse(operation.forward, workload.shape)
    return products + (_parse(operation.backward, workload.shape) if workload.backward else [])


def flops(products: Iterable[Product]) -> int:
    return sum(p.flops for p in products)


def site_flops(shape: Shape, *, backward: bool = True, weight: bool = False) -> int:
    """Required flops of one site: 6 N C (d_in + d_out) forward and backward, a third of that
    forward; with delta or routing also x Wᵀ and, backward, ȳ W."""
    through_components = 2 * shape.N * shape.C * (shape.d_in + shape.d_out)
    through_weight = 2 * shape.N * shape.d_in * shape.d_out if weight else 0
    if not backward:
        return through_components + through_weight
    return 3 * through_components + 2 * through_weight


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            self._add(args[0], args[1])
        elif func is torch.ops.aten.addmm.default:
            self._add(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _add(self, a: Tensor, b: Tensor) -> None:
        (m, k), n = a.shape, b.shape[1]
        self.products.append(Product(m, k, n, a.stride(1) != 1, b.stride(1) != 1))


def record(call: Callable[[], object]) -> list[Product]:
    """The matrix products that ``call`` executes through torch, forward and backward.

    Batched ones are left out: they are how the reference computes its gates, N·C·hidden
    multiplications that count as elementwise work.
    """
    with _Recorder() as recorder:
        call()
    return recorder.products


def bare_products(
    products: list[Product], dtype: torch.dtype, device: str = "cpu"
) -> Callable[[], None]:
    """A call that does nothing but these products: operands and results are allocated here, and
    products of the same operand sizes share them."""
    held: dict[tuple[int, int, bool, bool], Tensor] = {}

    def matrix(rows: int, columns: int, transposed: bool, result: bool = False) -> Tensor:
        key = (rows, columns, transposed, result)
        if key not in held:
            size = (columns, rows) if transposed else (rows, columns)
            # Ordinary numbers: denormal ones would slow the products down.
            t = torch.rand(size, device=device).to(dtype)
            held[key] = t.T if transposed else t
        return held[key]

    calls = [
        (
            matrix(p.m, p.k, p.left_transposed),
            matrix(p.k, p.n, p.right_transposed),
            matrix(p.m, p.n, False, result=True),
        )
        for p in products
    ]

    def run() -> None:
        for a, b, out in calls:
            torch.mm(a, b, out=out)

    return run


def matmul_peak(dtype: torch.dtype, size: int = 2048, repetitions: int = 5) -> float:
    """GFLOP/s of the best of several square CPU products: the peak that shares refer to."""
    run = bare_products([Product(size, size, size)], dtype)
    run()
    best = float("inf")
    for _ in range(repetitions):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return 2e-9 * size**3 / best
