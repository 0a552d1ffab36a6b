"""Which way a shape is computed: where each product runs, and how much of C at a time."""

from __future__ import annotations

from torch import Tensor

from spd_fast.kernels.configs import operand_class

# Elements of one transient [N, chunk] buffer: 128 MiB in bf16, whatever C is. Where chunks are
# summed in fp32, fewer of them mean fewer trips of the sum.
CHUNK_ELEMENTS = 2**26
# Where they are not: 32 MiB, still wide enough for the library's products.
NARROW_ELEMENTS = 2**24
# Below this many multiply-adds a launch costs more than the arithmetic: one kernel does it all,
SMALL_PRODUCTS = 2**29
# unless a program would take more steps of its loops than this, one after the other, while most of
# the device has nothing to do.
SMALL_STEPS = 32
STEP = 16
# Inner sizes up to which a tile product that saves one trip of its result through memory beats
# the library's product (docs/kernels.md, "prologue or write once").
IN_KERNEL_DEPTH = 768
IN_KERNEL_DEPTH_DUAL = 1024


def chunks(N: int, C: int, elements: int) -> list[tuple[int, int]]:
    """(first, count) of the pieces of C that are worked on at a time; none where empty."""
    if N == 0 or C == 0:
        return []
    size = max(elements // N // 128 * 128, 128)
    return [(first, min(size, C - first)) for first in range(0, C, size)]


def _steps(size: int) -> int:
    return -(-size // STEP)


def _tiny(N: int, C: int, depth: int, steps: int) -> bool:
    return N * C * depth <= SMALL_PRODUCTS and steps <= SMALL_STEPS


def gate_product_in_kernel(x: Tensor, C: int) -> bool:
    N, d_in = x.shape
    # Otherwise the library's: tiles of a product and the registers of a gate's arithmetic do not go
    # together (0.83 ms at mlp_in on an H200, where the gate alone is bound by 0.31).
    return _tiny(N, C, d_in, _steps(d_in))


def mask_product_in_kernel(x: Tensor, C: int) -> bool:
    N, d_in = x.shape
    # fp32 products off the matrix units are for toys only: the library's blocking is far better.
    return _tiny(N, C, d_in, _steps(d_in)) or (
        operand_class(x) == "mma" and d_in <= IN_KERNEL_DEPTH
    )


def small(x: Tensor, C: int, d_out: int, product: bool) -> bool:
    """One kernel for the whole forward: both products, mask and sum on chip."""
    d_in = x.shape[1] if product else 0
    return _tiny(x.shape[0], C, d_out + d_in, _steps(C) * (1 + _steps(d_in)))


def dual_in_kernel(x: Tensor, C: int, depth: int) -> bool:
    """x V (if needed) and ȳ Uᵀ as tile products inside the masking kernel."""
    return _tiny(x.shape[0], C, depth, _steps(depth)) or (
        operand_class(x) == "mma" and depth <= IN_KERNEL_DEPTH_DUAL
    )
