"""The per-component gate: product, scalar MLP, sigmoids and penalty sums in one pass.

    h = x V,   z_j = w_j h + β_j,   s = Σ_j o_j GELU(z_j) + β_o,   g = lower(s),   S_c = Σ_n ψ(g⁺)

The hidden layer [N, C, H] lives in registers, one neuron at a time. Forward traffic beside the
product: write h and g. Backward: read h, ḡ (and h̄), write h̄ + the gate's part; the sums over rows
are made per tile and added in a fixed order, so two runs agree bit for bit.

At 19 instructions a neuron the MLP outweighs its product below d_in ≈ 3600 at H = 16
(docs/kernels.md); it bounds this kernel, not memory. So the backward evaluates the polynomial of
the GELU twice rather than keeping N·C·H values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels import regimes, scalar
from spd_fast.kernels.configs import Config, by_divisibility, launch, operand_class, pick
from spd_fast.kernels.product import addmm, mm, precision, product_tile, tile_of


@triton.jit
def _logit(h, cols, in_cols, w_in, b_in, w_out, b_out, HIDDEN: tl.constexpr):
    """s [BN, BC] of h [BN, BC]; parameters [C, H] of components ``cols``."""
    s = tl.zeros_like(h) + tl.load(b_out + cols, mask=in_cols, other=0.0)[None, :]
    if HIDDEN == 0:  # linear gate
        return tl.fma(h, tl.zeros_like(h) + tl.load(w_out + cols, mask=in_cols, other=0.0), s)
    for j in range(HIDDEN):
        at = cols * HIDDEN + j
        w = tl.load(w_in + at, mask=in_cols, other=0.0)[None, :]  # [1, BC]
        b = tl.load(b_in + at, mask=in_cols, other=0.0)[None, :]
        o = tl.load(w_out + at, mask=in_cols, other=0.0)[None, :]
        z = tl.fma(h, tl.zeros_like(h) + w, tl.zeros_like(h) + b)
        s = tl.fma(scalar.gelu(z), tl.zeros_like(h) + o, s)
    return s


@triton.jit
def gate_forward_kernel(
    x, V, inner, lower, partial, counts, w_in, b_in, w_out, b_out,
    N, C, d_in, x_row, x_col, v_row, v_col, power, eps, threshold,
    HIDDEN: tl.constexpr, SIGMOID: tl.constexpr, PENALTY: tl.constexpr, POWER: tl.constexpr,
    COUNT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_of(tl.program_id(0), N, C, BLOCK_N, BLOCK_C, 8)
    rows = row_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = cols < C
    inside = (rows < N)[:, None] & in_cols[None, :]
    at = rows[:, None] * C + cols[None, :]  # [BN, BC]

    if PRODUCT:
        h = product_tile(x, x_row, x_col, V, v_row, v_col, rows, cols, N, C, d_in,
                         BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)  # fmt: skip
        stored = h.to(inner.dtype.element_ty)
        tl.store(inner + at, stored, mask=inside)
        # The gate sees h as stored, so that the backward's recomputation takes the same branches.
        h = stored.to(tl.float32)
    else:
        h = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
    s = _logit(h, cols, in_cols, w_in, b_in, w_out, b_out, HIDDEN)
    g = scalar.lower(s, SIGMOID)
    tl.store(lower + at, g.to(lower.dtype.element_ty), mask=inside)
    if PENALTY != 0:
        psi = scalar.penalty(scalar.upper(s), power, eps, PENALTY, POWER)
        total = tl.sum(tl.where(inside, psi, 0.0), axis=0)  # [BC]
        tl.store(partial + row_tile.to(tl.int64) * C + cols, total, mask=in_cols)
    if COUNT:
        # A sum of floats: exact in a tile, and LLVM takes a sum of bits through the stack.
        live = tl.sum(tl.where(inside & (g > threshold), 1.0, 0.0), axis=0)
        tl.store(counts + row_tile.to(tl.int64) * C + cols, live.to(tl.int32), mask=in_cols)


def gate_forward(
    x: Tensor, V: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor,
    sigmoid: str, penalty: str, power: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """inner [N, C] and lower [N, C] in the dtype of x, penalty_sum [C] in the dtype of V."""
    inner, lower, sums, _ = gate_forward_counted(
        x, V, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps, None
    )
    return inner, lower, sums


def gate_forward_counted(
    x: Tensor, V: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor,
    sigmoid: str, penalty: str, power: float, eps: float, threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """:func:`gate_forward` and the L0 counts [C]: positions with g above ``threshold``."""
    N, C = x.shape[0], V.shape[1]
    V_x = V.to(x.dtype)
    in_kernel = regimes.gate_product_in_kernel(x, C)
    inner = x.new_empty(N, C) if in_kernel else mm(x, V_x, x.dtype)
    lower, sums, live = _forward(
        x, V_x, inner, (w_in, b_in, w_out, b_out), in_kernel, sigmoid, penalty, power, eps,
        threshold,
    )  # fmt: skip
    return inner, lower, sums.to(V.dtype), live


def gate_counts(
    x: Tensor, V: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor,
    sigmoid: str, threshold: float,
) -> Tensor:  # fmt: skip
    """L0 counts [C] int64 over the rows of ``x``, of which a part is worked on at a time."""
    C = V.shape[1]
    total = torch.zeros(C, dtype=torch.int64, device=x.device)
    for rows in x.split(max(regimes.CHUNK_ELEMENTS // max(C, 1), 128)):
        counts = gate_forward_counted(
            rows, V, w_in, b_in, w_out, b_out, sigmoid, "none", 1.0, 0.0, threshold
        )[3]
        assert counts is not None
        total += counts
    return total


def gate_inner_forward(
    inner: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor,
    sigmoid: str, penalty: str, power: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """lower [N, C] in the dtype of ``inner`` [N, C], penalty_sum [C] in the dtype of w_out."""
    h = inner.contiguous()
    gate = (w_in, b_in, w_out, b_out)
    lower, sums, _ = _forward(h, h, h, gate, False, sigmoid, penalty, power, eps, None)
    return lower, sums.to(w_out.dtype)


def _forward(
    x: Tensor, V: Tensor, inner: Tensor, gate: tuple[Tensor, ...], product: bool, sigmoid: str,
    penalty: str, power: float, eps: float, threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(lower, penalty sums in fp32, counts); ``inner`` is written where the product is made here,
    read where not."""
    (N, d_in), C = x.shape, inner.shape[1]
    lower = torch.empty_like(inner)
    gate = tuple(t.contiguous() for t in gate)
    special = scalar.specialisation(sigmoid, penalty, power)
    partial = counts = None

    def run(config: Config) -> None:
        nonlocal partial, counts
        tiles = triton.cdiv(N, config.blocks["BLOCK_N"])
        partial = torch.empty(tiles, C, dtype=torch.float32, device=x.device)
        counts = (
            torch.empty(tiles, C, dtype=torch.int32, device=x.device)
            if threshold is not None
            else None
        )
        if N and C:
            grid = (tiles * triton.cdiv(C, config.blocks["BLOCK_C"]),)
            launch(
                gate_forward_kernel, x, grid, x, V, inner, lower, partial,
                partial if counts is None else counts, *gate, N, C, d_in, *x.stride(),
                *V.stride(), float(power), float(eps), float(threshold or 0.0),
                HIDDEN=gate[0].shape[1], COUNT=counts is not None, PRODUCT=product,
                PRECISION=precision(x), **special,
                config=config if product else config.without_product(),
            )  # fmt: skip

    operands = operand_class(x) if product else "any"
    addresses = (t.data_ptr() for t in gate)
    operands = by_divisibility("gate_forward", operands, C, d_in, x, V, *addresses)
    run(pick("gate_forward", operands, x, (N, d_in, C), run))
    assert partial is not None
    sums = partial.sum(0) if penalty != "none" and N else partial.new_zeros(C)
    return lower, sums, None if counts is None else counts.sum(0)


@triton.jit
def _before(sums, in_cols, start):
    """What this program has left at ``sums`` [BC] in its earlier row tiles."""
    return tl.load(sums, mask=in_cols & (start > 0), other=0.0)


@triton.jit
def gate_backward_kernel(
    inner, grad_inner, grad_lower, grad_sum, h_bar, partial, w_in, b_in, w_out, b_out,
    N, first, count, tiles, gi_row, gi_col, gl_row, gl_col, in_row, in_col, power, eps,
    HIDDEN: tl.constexpr, SIGMOID: tl.constexpr, PENALTY: tl.constexpr, POWER: tl.constexpr,
    GRAD_INNER: tl.constexpr, GRAD_LOWER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """h̄ [N, count] of components first … first + count, and sums over this program's row tiles.

    A program takes ``tiles`` row tiles in turn and adds to its own sums, neuron by neuron, in
    memory (in truth in the caches). One warp: a thread holds several rows of a column, so that a
    sum over rows is additions in registers and few exchanges, not a trip through shared memory and
    two barriers a neuron.
    """
    group = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    cols = first + local
    in_cols = local < count
    # [group, field, count]: b_out, then w_in, b_in and w_out of every neuron (one w_out if linear).
    FIELDS: tl.constexpr = 3 * HIDDEN + 1 if HIDDEN > 0 else 2
    sums = partial + group.to(tl.int64) * FIELDS * count + local

    first_row = group.to(tl.int64) * tiles * BLOCK_N
    for start in range(0, tl.minimum(tiles * BLOCK_N, N - first_row), BLOCK_N):
        tl.debug_barrier()  # the last tile's sums are there
        rows = first_row + start + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & in_cols[None, :]
        r, c = rows[:, None], cols[None, :]
        h_at = r * in_row + local[None, :] * in_col  # [BN, BC]
        h = tl.load(inner + h_at, mask=inside, other=0.0).to(tl.float32)
        s = _logit(h, cols, in_cols, w_in, b_in, w_out, b_out, HIDDEN)
        grad = tl.zeros_like(h)
        if GRAD_LOWER:
            gl_at = r * gl_row + c * gl_col
            grad = tl.load(grad_lower + gl_at, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros_like(h)
        if PENALTY != 0:
            total += tl.load(grad_sum + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        s_bar = scalar.logit_backward(s, grad, total, power, eps, SIGMOID, PENALTY, POWER)
        s_bar = tl.where(inside, s_bar, 0.0)
        out = tl.zeros_like(h)
        if GRAD_INNER:
            gi_at = r * gi_row + c * gi_col
            out = tl.load(grad_inner + gi_at, mask=inside, other=0.0).to(tl.float32)

        s_sum = _before(sums, in_cols, start) + tl.sum(s_bar, axis=0)
        tl.store(sums, s_sum, mask=in_cols)
        if HIDDEN == 0:  # linear gate
            o_sum = _before(sums + count, in_cols, start) + tl.sum(s_bar * h, axis=0)
            tl.store(sums + count, o_sum, mask=in_cols)
            out += s_bar * tl.load(w_out + cols, mask=in_cols, other=0.0)[None, :]
        for j in range(HIDDEN):
            # All loads before anything is stored: one behind a store that it may not pass waits.
            at = cols * HIDDEN + j
            w = tl.load(w_in + at, mask=in_cols, other=0.0)[None, :]
            b = tl.load(b_in + at, mask=in_cols, other=0.0)[None, :]
            o = tl.load(w_out + at, mask=in_cols, other=0.0)[None, :]
            of_w = sums + (1 + j) * count
            of_b, of_o = of_w + HIDDEN * count, of_w + 2 * HIDDEN * count
            w_sum = _before(of_w, in_cols, start)
            b_sum = _before(of_b, in_cols, start)
            o_sum = _before(of_o, in_cols, start)
            z = tl.fma(h, tl.zeros_like(h) + w, tl.zeros_like(h) + b)
            value, slope = scalar.gelu_with_slope(z)
            z_bar = s_bar * o * slope  # [BN, BC]
            out = tl.fma(z_bar, tl.zeros_like(h) + w, out)
            tl.store(of_w, w_sum + tl.sum(z_bar * h, axis=0), mask=in_cols)
            tl.store(of_b, b_sum + tl.sum(z_bar, axis=0), mask=in_cols)
            tl.store(of_o, o_sum + tl.sum(s_bar * value, axis=0), mask=in_cols)
        tl.store(h_bar + r * count + local[None, :], out.to(h_bar.dtype.element_ty), mask=inside)


# Programs of one backward launch: about four waves of what an H200 holds at a time. More row tiles
# a program than that leaves multiprocessors idle, fewer only add partial sums.
PROGRAMS = 4096


def backward_groups(N: int, count: int, block_n: int, block_c: int) -> tuple[int, int]:
    """(programs over rows, row tiles of each) of one backward launch."""
    row_tiles = triton.cdiv(N, block_n)
    wanted = max(PROGRAMS // triton.cdiv(count, block_c), 1)
    tiles = triton.cdiv(row_tiles, min(wanted, row_tiles))
    return triton.cdiv(row_tiles, tiles), tiles


def _side_by_side(matrix: Tensor | None) -> Tensor | None:
    """With unit column stride: the backward spills where it does not know that of every matrix."""
    return matrix if matrix is None or matrix.stride(1) == 1 else matrix.contiguous()


def _backward_chunk(
    h: Tensor, grad_inner: Tensor | None, grad_lower: Tensor | None, grad_penalty: Tensor | None,
    gate: tuple[Tensor, ...], first: int, sigmoid: str, penalty: str, power: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h̄ [N, count], sums over rows [fields, count]) of the components that ``h`` starts at."""
    h, grad_inner, grad_lower = map(_side_by_side, (h, grad_inner, grad_lower))
    (N, count), H = h.shape, gate[0].shape[1]
    fields = 3 * H + 1 if H else 2
    h_bar = torch.empty(N, count, dtype=h.dtype, device=h.device)
    special = scalar.specialisation(sigmoid, penalty, power)
    partial: Tensor | None = None

    def run(config: Config) -> None:
        nonlocal partial
        block_n, block_c = config.blocks["BLOCK_N"], config.blocks["BLOCK_C"]
        groups, tiles = backward_groups(N, count, block_n, block_c)
        partial = torch.empty(groups, fields, count, device=h.device)
        gi = grad_inner if grad_inner is not None else h
        gl = grad_lower if grad_lower is not None else h
        gp = grad_penalty.contiguous() if grad_penalty is not None else h
        launch(
            gate_backward_kernel, h, (groups, triton.cdiv(count, block_c)), h, gi, gl, gp, h_bar,
            partial, *gate, N, first, count, tiles, *gi.stride(), *gl.stride(), *h.stride(),
            float(power), float(eps), HIDDEN=H,
            GRAD_INNER=grad_inner is not None, GRAD_LOWER=grad_lower is not None, **special,
            config=config,
        )  # fmt: skip

    run(pick("gate_backward", "any", h, (N, count, H), run))
    assert partial is not None
    return h_bar, partial.sum(0)


def _parameter_gradients(
    sums: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gate's gradients from ``sums`` [fields, C]."""
    C, H = w_in.shape
    grad_b_out = sums[0].to(b_out.dtype)
    if H == 0:
        grad_w_out = sums[1:].t().to(w_out.dtype).contiguous()
        return torch.zeros_like(w_in), torch.zeros_like(b_in), grad_w_out, grad_b_out
    per_neuron = sums[1:].view(3, H, C).transpose(1, 2)  # [3, C, H]
    w, b, o = (t.contiguous().to(w_in.dtype) for t in per_neuron)
    return w, b, o, grad_b_out


def gate_backward(
    grad_inner: Tensor | None, grad_lower: Tensor | None, grad_penalty: Tensor | None,
    x: Tensor, V: Tensor, inner: Tensor | None, w_in: Tensor, b_in: Tensor, w_out: Tensor,
    b_out: Tensor, sigmoid: str, penalty: str, power: float, eps: float, need_grad_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x̄, V̄ and the gate's gradients. Without ``inner`` each chunk of h is made again from x, V."""
    N, C, H = x.shape[0], V.shape[1], w_in.shape[1]
    V_x = V.to(x.dtype)
    penalty = "none" if grad_penalty is None else penalty
    gate = tuple(t.contiguous() for t in (w_in, b_in, w_out, b_out))
    sums = torch.zeros(3 * H + 1 if H else 2, C, device=x.device)
    grad_V = torch.zeros(V.shape, dtype=V.dtype, device=x.device)
    grad_x, pieces = None, regimes.chunks(N, C, regimes.CHUNK_ELEMENTS)
    wide = torch.float32 if len(pieces) > 1 else x.dtype

    for first, count in pieces:
        part = slice(first, first + count)
        some_V = V_x[:, part]
        h = mm(x, some_V, x.dtype) if inner is None else inner[:, part]
        h_bar, sums[:, part] = _backward_chunk(
            h, grad_inner, grad_lower, grad_penalty, gate, first, sigmoid, penalty, power, eps
        )
        grad_V[:, part] = mm(x.t(), h_bar, V.dtype)
        if need_grad_x:
            grad_x = addmm(grad_x, h_bar, some_V.t(), wide)
        del h, h_bar  # before the next chunk's

    if need_grad_x:
        grad_x = torch.zeros_like(x) if grad_x is None else grad_x.to(x.dtype)
    return grad_x, grad_V, *_parameter_gradients(sums, w_in, b_in, w_out, b_out)


def gate_inner_backward(
    grad_lower: Tensor | None, grad_penalty: Tensor | None, inner: Tensor, w_in: Tensor,
    b_in: Tensor, w_out: Tensor, b_out: Tensor, sigmoid: str, penalty: str, power: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h̄ and the gate's gradients."""
    H, penalty = w_in.shape[1], "none" if grad_penalty is None else penalty
    gate = tuple(t.contiguous() for t in (w_in, b_in, w_out, b_out))
    if inner.numel() == 0:
        h_bar = torch.zeros(inner.shape, dtype=inner.dtype, device=inner.device)
        sums = torch.zeros(3 * H + 1 if H else 2, inner.shape[1], device=inner.device)
    else:
        h_bar, sums = _backward_chunk(
            inner, None, grad_lower, grad_penalty, gate, 0, sigmoid, penalty, power, eps
        )
    return h_bar, *_parameter_gradients(sums, w_in, b_in, w_out, b_out)
