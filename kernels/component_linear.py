"""The masked linear layer of one site, forward and backward, from the mask's recipe.

    h = x V,   m = g + (1 − g) r,   a = h ⊙ (m − δ) where routed,   y = a U + (δ̃ ⊙ x) Wᵀ + b
    ā = ȳ Uᵀ,  h̄ = ā ⊙ (m − δ),     ḡ = ā ⊙ h ⊙ (1 − r),            r̄ = ā ⊙ h ⊙ (1 − g)

Three regimes, by shape (regimes.py):

*small*    forward in one kernel: x V tile → mask → a U tile, nothing of size N·C leaves the chip.
*in-kernel* product tile with the masking epilogue (backward: two product tiles, one epilogue).
*library*  library product into the chunk's buffer, then the masking kernel on it in place.

The last two write the masked activations of one chunk of components once, and the library
multiplies them by U with fp32 accumulation. Why not rebuild the mask in a prologue of the second
product instead? On an H200 (4.3 TB/s, 790 TFLOP/s measured):

- writing a and reading it back: 2 · 2 bytes an element, 0.93 ps.
- a prologue serves a tile of d_out columns only, so it runs d_out / 128 times an element. Each run
  reads h and g (4 bytes, from L2 at best) and draws r: about 20 integer instructions an element,
  0.60 ps at 33.5 T instructions/s, against 2 · 128 flops = 0.32 ps of the product it feeds. One
  repetition already costs more time than its share of the product, and it keeps the operand out of
  the copy engine's path from memory to the matrix units.

At d_out = 128 the prologue would cost 0.60 ps against 0.93; from d_out = 256 on, 1.20 ps or more.
Writing once wins wherever the large regimes are used; with d_out ≤ 64 the prologue wins, and is
what the small kernel does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels import random, regimes
from spd_fast.kernels.configs import Config, by_divisibility, launch, operand_class, pick
from spd_fast.kernels.product import addmm, dot, mm, precision, product_tile, tile_of

# How r is known: m = 1 or g, a tensor, drawn, drawn and rounded to {0, 1}.
SOURCE = {"none": 0, "given": 1, "uniform": 2, "binomial": 3}


@triton.jit
def _source_tile(
    source, s_row, s_col, key, rows, cols, first_column, inside, draw, site, row_offset,
    SOURCE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """r [BN, BC]; only called where there is a source."""
    if SOURCE == 1:
        at = rows[:, None] * s_row + cols[None, :] * s_col
        r = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    else:
        r = random.uniform_tile(key, rows, first_column, draw, site, row_offset, BLOCK_C)
        if SOURCE == 3:
            r = tl.where(r >= 0.5, 1.0, 0.0)
    return r


@triton.jit
def _mask_tile(
    lower, l_row, l_col, source, s_row, s_col, key, rows, cols, first_column, inside, draw, site,
    row_offset, LOWER: tl.constexpr, SOURCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """m, ∂m/∂g = 1 − r and ∂m/∂r = 1 − g, each [BN, BC]."""
    m = tl.full((BLOCK_N, BLOCK_C), 1.0, tl.float32)
    by_lower, by_source = m, m
    if LOWER:
        at = rows[:, None] * l_row + cols[None, :] * l_col
        m = tl.load(lower + at, mask=inside, other=0.0).to(tl.float32)
        by_source = 1.0 - m
    if SOURCE != 0:
        r = _source_tile(source, s_row, s_col, key, rows, cols, first_column, inside, draw, site,
                         row_offset, SOURCE, BLOCK_C)  # fmt: skip
        if LOWER:
            by_lower = 1.0 - r
            m = m + by_source * r
        else:
            m = r
    return m, by_lower, by_source


@triton.jit
def _row_terms(delta, routing, rows, N, DELTA: tl.constexpr, ROUTING: tl.constexpr,
               BLOCK_N: tl.constexpr):  # fmt: skip
    """δ and whether routed, each [BN]."""
    d = tl.zeros((BLOCK_N,), tl.float32)
    routed = rows < N
    if DELTA:
        d = tl.load(delta + rows, mask=rows < N, other=0.0).to(tl.float32)
    if ROUTING:
        routed = tl.load(routing + rows, mask=rows < N, other=0).to(tl.int1)
    return d, routed


@triton.jit(do_not_specialize=["draw", "site", "row_offset"])
def mask_forward_kernel(
    x, x_row, x_col, V, v_row, v_col, inner, i_row, i_col, a,
    lower, l_row, l_col, source, s_row, s_col, key, draw, site, row_offset, delta, routing,
    N, first, count, d_in,
    PRODUCT: tl.constexpr, LOWER: tl.constexpr, SOURCE: tl.constexpr, DELTA: tl.constexpr,
    ROUTING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a [N, count] of components first … first + count; inner and V start at ``first``."""
    row_tile, col_tile = tile_of(tl.program_id(0), N, count, BLOCK_N, BLOCK_C, 8)
    rows = row_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = col_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (local < count)[None, :]

    if PRODUCT:
        h = product_tile(x, x_row, x_col, V, v_row, v_col, rows, local, N, count, d_in,
                         BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)  # fmt: skip
    else:
        at = rows[:, None] * i_row + local[None, :] * i_col
        h = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
    m, _, _ = _mask_tile(lower, l_row, l_col, source, s_row, s_col, key, rows, first + local,
                         first + col_tile.to(tl.int64) * BLOCK_C, inside, draw, site, row_offset,
                         LOWER, SOURCE, BLOCK_N, BLOCK_C)  # fmt: skip
    d, routed = _row_terms(delta, routing, rows, N, DELTA, ROUTING, BLOCK_N)
    out = tl.where(routed[:, None], h * (m - d[:, None]), 0.0)
    tl.store(a + rows[:, None] * count + local[None, :], out.to(a.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["draw", "site", "row_offset"])
def mask_backward_kernel(
    x, x_row, x_col, V, v_row, v_col, inner, i_row, i_col,
    grad, y_row, y_col, U, u_row, u_col, a_bar, ab_row, a, h_bar, hb_row, g_bar, r_bar, d_bar,
    lower, l_row, l_col, source, s_row, s_col, key, draw, site, row_offset, delta, routing,
    N, C, first, count, d_in, d_out,
    PRODUCT_H: tl.constexpr, PRODUCT_A: tl.constexpr, LOWER: tl.constexpr, SOURCE: tl.constexpr,
    DELTA: tl.constexpr, ROUTING: tl.constexpr,
    WRITE_A: tl.constexpr, WRITE_H: tl.constexpr, WRITE_G: tl.constexpr, WRITE_R: tl.constexpr,
    WRITE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a, h̄ [N, count] of one chunk; ḡ, r̄ into their columns of [N, C]; rowsums of ā ⊙ h per tile.

    a may be inner's buffer and h̄ may be ā's: a program reads its tile before it writes it.
    """
    row_tile, col_tile = tile_of(tl.program_id(0), N, count, BLOCK_N, BLOCK_C, 8)
    rows = row_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = col_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (local < count)[None, :]
    at = rows[:, None] * count + local[None, :]
    at_site = rows[:, None] * C + (first + local)[None, :]

    if PRODUCT_A:
        ab = product_tile(grad, y_row, y_col, U, u_col, u_row, rows, local, N, count, d_out,
                          BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)  # fmt: skip
    else:
        ab_at = rows[:, None] * ab_row + local[None, :]
        ab = tl.load(a_bar + ab_at, mask=inside, other=0.0).to(tl.float32)
    if PRODUCT_H:
        h = product_tile(x, x_row, x_col, V, v_row, v_col, rows, local, N, count, d_in,
                         BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)  # fmt: skip
    else:
        i_at = rows[:, None] * i_row + local[None, :] * i_col
        h = tl.load(inner + i_at, mask=inside, other=0.0).to(tl.float32)
    m, by_lower, by_source = _mask_tile(
        lower, l_row, l_col, source, s_row, s_col, key, rows, first + local,
        first + col_tile.to(tl.int64) * BLOCK_C, inside, draw, site, row_offset,
        LOWER, SOURCE, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    d, routed = _row_terms(delta, routing, rows, N, DELTA, ROUTING, BLOCK_N)
    keep = m - d[:, None]
    ab = tl.where(routed[:, None], ab, 0.0)
    if WRITE_A:
        masked = tl.where(routed[:, None], h * keep, 0.0)
        tl.store(a + at, masked.to(a.dtype.element_ty), mask=inside)
    if WRITE_H:
        hb_at = rows[:, None] * hb_row + local[None, :]
        tl.store(h_bar + hb_at, (ab * keep).to(h_bar.dtype.element_ty), mask=inside)
    ah = ab * h
    if WRITE_G:
        tl.store(g_bar + at_site, (ah * by_lower).to(g_bar.dtype.element_ty), mask=inside)
    if WRITE_R:
        tl.store(r_bar + at_site, (ah * by_source).to(r_bar.dtype.element_ty), mask=inside)
    if WRITE_D:
        tl.store(d_bar + col_tile.to(tl.int64) * N + rows, tl.sum(ah, axis=1), mask=rows < N)


@triton.jit(do_not_specialize=["draw", "site", "row_offset"])
def small_forward_kernel(
    x, x_row, x_col, V, v_row, v_col, inner, i_row, i_col, U, u_row, u_col, W, w_row, w_col, bias,
    y, lower, l_row, l_col, source, s_row, s_col, key, draw, site, row_offset, delta, routing,
    N, C, d_in, d_out,
    PRODUCT: tl.constexpr, LOWER: tl.constexpr, SOURCE: tl.constexpr, DELTA: tl.constexpr,
    ROUTING: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y [BN, BLOCK_O]: the whole layer in one kernel. DELTA: 0 none, 1 given, 2 drawn."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    outs = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_rows, in_outs = (rows < N)[:, None], (outs < d_out)[None, :]
    d, routed = _row_terms(delta, routing, rows, N, DELTA == 1, ROUTING, BLOCK_N)
    if DELTA == 2:
        d = random.uniform_column(key, rows, C, draw, site, row_offset)

    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C).to(tl.int64)
        inside = in_rows & (cols < C)[None, :]
        if PRODUCT:
            h = product_tile(x, x_row, x_col, V, v_row, v_col, rows, cols, N, C, d_in,
                             BLOCK_N, BLOCK_C, BLOCK_K, PRECISION)  # fmt: skip
        else:
            at = rows[:, None] * i_row + cols[None, :] * i_col
            h = tl.load(inner + at, mask=inside, other=0.0).to(tl.float32)
        m, _, _ = _mask_tile(
            lower, l_row, l_col, source, s_row, s_col, key, rows, cols, start, inside,
            draw, site, row_offset, LOWER, SOURCE, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        a = tl.where(routed[:, None], h * (m - d[:, None]), 0.0)
        u_at = cols[:, None] * u_row + outs[None, :] * u_col  # [BC, BO]
        u = tl.load(U + u_at, mask=(cols < C)[:, None] & in_outs, other=0.0)
        total = dot(a.to(u.dtype), u, total, PRECISION)
    if DELTA != 0 or ROUTING:
        original = product_tile(x, x_row, x_col, W, w_col, w_row, rows, outs, N, d_out, d_in,
                                BLOCK_N, BLOCK_O, BLOCK_K, PRECISION)  # fmt: skip
        total += tl.where(routed, d, 1.0)[:, None] * original
    if BIAS:
        total += tl.load(bias + outs, mask=outs < d_out, other=0.0).to(tl.float32)[None, :]
    y_at = rows[:, None] * d_out + outs[None, :]
    tl.store(y + y_at, total.to(y.dtype.element_ty), mask=in_rows & in_outs)


class _Recipe:
    """The mask's arguments as every kernel takes them; ``dummy`` stands where there is none."""

    def __init__(
        self, dummy: Tensor, lower: Tensor | None, source: Tensor | None, key: Tensor | None,
        draw: int, site: int, row_offset: int, binomial: bool, delta: Tensor | None,
        random_delta: bool, routing: Tensor | None,
    ) -> None:  # fmt: skip
        if key is not None and (key.dtype != torch.int64 or key.numel() != 2):
            raise ValueError(f"the key is {key.dtype} {tuple(key.shape)}, need int64 (2,)")
        if routing is not None and routing.dtype != torch.bool:
            raise ValueError(f"mask.routing is {routing.dtype}, need bool")
        kind = "none" if source is None else "given"
        if key is not None:
            kind = "binomial" if binomial else "uniform"
        self.place = (draw, site, row_offset)
        # The kernels read two neighbouring words; a contiguous key stays the live one.
        self.key, self.random_delta = None if key is None else key.contiguous(), random_delta
        self.delta = None if delta is None else delta.contiguous()
        self.routing = None if routing is None else routing.contiguous()
        self.lower, self.source = lower, source
        self.dummy = dummy
        self.constants = {
            "LOWER": lower is not None,
            "SOURCE": SOURCE[kind],
            "ROUTING": routing is not None,
        }

    def draw_delta(self, N: int, C: int) -> None:
        """Have a random δ in memory: [N] once instead of one Philox call a row and tile."""
        if self.random_delta and self.key is not None:
            self.delta = random.delta_mask(self.key, N, C, *self.place)
            self.random_delta = False

    def row_scale(self, dtype: torch.dtype) -> Tensor | None:
        """δ̃ [N, 1]: the weight of the original layer's output; None where it takes no part."""
        if self.routing is None:
            return None if self.delta is None else self.delta.to(dtype)[:, None]
        if self.delta is None:
            return (~self.routing).to(dtype)[:, None]
        return torch.where(self.routing, self.delta, 1.0).to(dtype)[:, None]

    def facts(self) -> tuple[int | Tensor | None, ...]:
        """What the choice of a tile has to know of (configs.by_divisibility)."""
        vectors = (self.key, self.delta, self.routing)
        addresses = (None if t is None else t.data_ptr() for t in vectors)
        return (self.lower, self.source, *addresses)

    def arguments(self) -> tuple[object, ...]:
        def strided(t: Tensor | None) -> tuple[object, ...]:
            return (self.dummy, 0, 0) if t is None else (t, *t.stride())

        return (
            *strided(self.lower), *strided(self.source),
            self.dummy if self.key is None else self.key, *self.place,
            self.dummy if self.delta is None else self.delta,
            self.dummy if self.routing is None else self.routing.view(torch.uint8),
        )  # fmt: skip


def component_linear_forward(
    x: Tensor, inner: Tensor | None, V: Tensor | None, U: Tensor, lower: Tensor | None,
    source: Tensor | None, key: Tensor | None, draw: int, site: int, row_offset: int,
    binomial: bool, delta: Tensor | None, random_delta: bool, weight: Tensor | None,
    bias: Tensor | None, routing: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [N, d_out] in the dtype of x."""
    N, (C, d_out) = x.shape[0], U.shape
    recipe = _Recipe(x, lower, source, key, draw, site, row_offset, binomial, delta, random_delta,
                     routing)  # fmt: skip
    U_x = U.to(x.dtype)
    V_x = None if V is None else V.to(x.dtype)
    if N and d_out and C and regimes.small(x, C, d_out, inner is None):
        return _small_forward(x, inner, V_x, U_x, recipe, weight, bias)

    recipe.draw_delta(N, C)
    scale = recipe.row_scale(x.dtype)
    pieces = regimes.chunks(N, C, regimes.CHUNK_ELEMENTS)
    wide = torch.float32 if len(pieces) + (scale is not None) > 1 else x.dtype
    y = None
    if scale is not None:
        assert weight is not None
        # δ̃ ⊙ (x Wᵀ) = (δ̃ ⊙ x) Wᵀ accumulates in the product: no second pass over y.
        y = addmm(None, scale * x, weight.to(x.dtype).t(), wide)
    for first, count in pieces:
        a = _masked_chunk(x, inner, V_x, recipe, first, count)
        y = addmm(y, a, U_x[first : first + count], wide)
        del a  # before the next chunk's
    if y is None:
        y = x.new_zeros(N, d_out)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _masked_chunk(
    x: Tensor, inner: Tensor | None, V: Tensor | None, recipe: _Recipe, first: int, count: int
) -> Tensor:
    """a [N, count] of one chunk of components."""
    (N, d_in), C = x.shape, count
    some_V = None if V is None else V[:, first : first + count]
    in_kernel = inner is None and regimes.mask_product_in_kernel(x, C)
    if inner is not None:
        h = inner[:, first : first + count]
    elif in_kernel:
        h = x
    else:
        assert some_V is not None
        h = mm(x, some_V, x.dtype)
    # The chunk's own h is overwritten by a; a caller's inner is not.
    a = (
        h
        if inner is None and not in_kernel
        else torch.empty(N, count, dtype=x.dtype, device=x.device)
    )
    v = x if some_V is None else some_V

    def run(config: Config, a: Tensor = a) -> None:
        config = config if in_kernel else config.without_product()
        tiles = triton.cdiv(N, config.blocks["BLOCK_N"]) * triton.cdiv(
            count, config.blocks["BLOCK_C"]
        )
        launch(
            mask_forward_kernel, x, (tiles,), x, *x.stride(), v, *v.stride(), h, *h.stride(), a,
            *recipe.arguments(), N, first, count, d_in, PRODUCT=in_kernel,
            DELTA=recipe.delta is not None, PRECISION=precision(x), **recipe.constants,
            config=config,
        )  # fmt: skip

    operands = operand_class(x) if in_kernel else "any"
    factors = (d_in, x, v) if in_kernel else (h,)
    operands = by_divisibility("mask_forward", operands, count, *factors, *recipe.facts())
    run(pick("mask_forward", operands, x, (N, count, d_in), lambda c: run(c, torch.empty_like(a))))
    return a


def _small_forward(
    x: Tensor, inner: Tensor | None, V: Tensor | None, U: Tensor, recipe: _Recipe,
    weight: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    (N, d_in), (C, d_out) = x.shape, U.shape
    y = torch.empty(N, d_out, dtype=x.dtype, device=x.device)
    W = x if weight is None else weight.to(x.dtype)
    h, v = (x if t is None else t for t in (inner, V))
    delta = 2 if recipe.random_delta else int(recipe.delta is not None)
    block_o = min(max(triton.next_power_of_2(d_out), 16), 64)

    def run(config: Config) -> None:
        grid = (triton.cdiv(N, config.blocks["BLOCK_N"]), triton.cdiv(d_out, block_o))
        launch(
            small_forward_kernel, x, grid, x, *x.stride(), v, *v.stride(), h, *h.stride(),
            U, *U.stride(), W, *W.stride(), x if bias is None else bias.contiguous(), y,
            *recipe.arguments(), N, C, d_in, d_out, PRODUCT=inner is None, DELTA=delta,
            BIAS=bias is not None, PRECISION=precision(x), BLOCK_O=block_o, **recipe.constants,
            config=config,
        )  # fmt: skip

    operands = by_divisibility(
        "small_forward", operand_class(x), C, d_in, d_out, x, inner, V, U, W,
        None if bias is None else bias.data_ptr(), *recipe.facts(),
    )  # fmt: skip
    run(pick("small_forward", operands, x, (N, C, d_in, d_out), run))
    return y


def component_linear_backward(
    grad: Tensor, x: Tensor, inner: Tensor | None, V: Tensor | None, U: Tensor,
    lower: Tensor | None, source: Tensor | None, key: Tensor | None, draw: int, site: int,
    row_offset: int, binomial: bool, delta: Tensor | None, random_delta: bool,
    weight: Tensor | None, bias: Tensor | None, routing: Tensor | None,
    need_x: bool, need_inner: bool, need_V: bool, need_U: bool, need_lower: bool,
    need_source: bool, need_delta: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(x̄, h̄, V̄, Ū, ḡ, r̄, δ̄, b̄), None where not asked for; h̄ is an output only with ``inner``."""
    N, C = x.shape[0], U.shape[0]
    recipe = _Recipe(x, lower, source, key, draw, site, row_offset, binomial, delta, random_delta,
                     routing)  # fmt: skip
    recipe.draw_delta(N, C)
    grad = grad.to(x.dtype)
    U_x = U.to(x.dtype)
    V_x = None if V is None else V.to(x.dtype)
    W_x = None if weight is None else weight.to(x.dtype)
    scale = recipe.row_scale(x.dtype)

    def per_component(needed: bool) -> Tensor | None:
        return torch.empty(N, C, dtype=x.dtype, device=x.device) if needed else None

    h_bar, g_bar, r_bar = map(per_component, (need_inner, need_lower, need_source))
    grad_V = (
        torch.zeros_like(V, memory_format=torch.contiguous_format)
        if need_V and V is not None
        else None
    )
    grad_U = torch.zeros_like(U, memory_format=torch.contiguous_format) if need_U else None
    d_bar = torch.zeros(N, device=x.device) if need_delta else None
    through_V = need_x and V is not None
    # Only x̄ is a sum over chunks: without it there is nothing to gain from wide ones.
    pieces = regimes.chunks(N, C, regimes.CHUNK_ELEMENTS if through_V else regimes.NARROW_ELEMENTS)
    wide = torch.float32 if len(pieces) * through_V + (scale is not None) > 1 else x.dtype
    x_bar = None
    if need_x and scale is not None and W_x is not None:
        x_bar = addmm(None, scale * grad, W_x, wide)
    for first, count in pieces:
        part = slice(first, first + count)
        a, some_h_bar, some_d_bar = _backward_chunk(
            grad, x, inner, V_x, U_x, recipe, first, count, need_U, need_V or through_V,
            h_bar, g_bar, r_bar, need_delta,
        )  # fmt: skip
        if grad_U is not None:
            grad_U[part] = mm(a.t(), grad, U.dtype)
        if grad_V is not None:
            grad_V[:, part] = mm(x.t(), some_h_bar, V.dtype)
        if through_V:
            x_bar = addmm(x_bar, some_h_bar, V_x[:, part].t(), wide)
        if d_bar is not None:
            d_bar -= some_d_bar
        del a, some_h_bar  # before the next chunk's
    if d_bar is not None:
        assert W_x is not None
        d_bar += (grad.float() * mm(x, W_x.t(), x.dtype).float()).sum(-1)
        if recipe.routing is not None:
            d_bar = torch.where(recipe.routing, d_bar, 0.0)
        d_bar = d_bar.to(x.dtype)
    if need_x:
        x_bar = (
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            if x_bar is None
            else x_bar.to(x.dtype)
        )
    b_bar = None
    if need_bias and bias is not None:
        b_bar = grad.sum(0, dtype=torch.float32).to(bias.dtype)
    return x_bar, h_bar, grad_V, grad_U, g_bar, r_bar, d_bar, b_bar


def _backward_chunk(
    grad: Tensor, x: Tensor, inner: Tensor | None, V: Tensor | None, U: Tensor, recipe: _Recipe,
    first: int, count: int, need_a: bool, need_h_bar: bool, h_bar: Tensor | None,
    g_bar: Tensor | None, r_bar: Tensor | None, need_delta: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(a [N, count], h̄ [N, count], rowsum(ā ⊙ h) [N]); those not needed hold nothing."""
    (N, d_in), (C, d_out) = x.shape, U.shape
    part = slice(first, first + count)
    some_U = U[part]
    some_V = None if V is None else V[:, part]
    depth = d_out + (d_in if inner is None else 0)
    in_kernel = regimes.dual_in_kernel(x, count, depth)
    product_h = in_kernel and inner is None

    def buffer(needed: bool) -> Tensor:
        return torch.empty(N, count, dtype=x.dtype, device=x.device) if needed else x

    # Where h̄ is a result of its own, its columns hold ā first.
    own_h_bar = None if h_bar is None else h_bar[:, part]
    a_bar = x if in_kernel else mm(grad, some_U.t(), x.dtype, own_h_bar)
    if inner is not None:
        h = inner[:, part]
    else:
        assert some_V is not None
        h = x if in_kernel else mm(x, some_V, x.dtype)
    own_h = inner is None and not in_kernel
    a = h if own_h else buffer(need_a)
    if own_h_bar is not None:
        out = own_h_bar
    elif in_kernel:
        out = buffer(need_h_bar)
    else:
        out = a_bar
    v = x if some_V is None else some_V
    rowsums = x

    def run(config: Config, a: Tensor = a, out: Tensor = out) -> None:
        nonlocal rowsums
        config = config if in_kernel else config.without_product()
        col_tiles = triton.cdiv(count, config.blocks["BLOCK_C"])
        if need_delta:
            rowsums = torch.empty(col_tiles, N, device=x.device)
        launch(
            mask_backward_kernel, x, (triton.cdiv(N, config.blocks["BLOCK_N"]) * col_tiles,),
            x, *x.stride(), v, *v.stride(), h, *h.stride(), grad, *grad.stride(), some_U,
            *some_U.stride(), a_bar, a_bar.stride(0), a, out, out.stride(0),
            x if g_bar is None else g_bar, x if r_bar is None else r_bar, rowsums,
            *recipe.arguments(), N, C, first, count, d_in, d_out, PRODUCT_H=product_h,
            PRODUCT_A=in_kernel, DELTA=recipe.delta is not None,
            WRITE_A=need_a, WRITE_H=need_h_bar or h_bar is not None, WRITE_G=g_bar is not None,
            WRITE_R=r_bar is not None, WRITE_D=need_delta, PRECISION=precision(x),
            **recipe.constants, config=config,
        )  # fmt: skip

    operands = operand_class(x) if in_kernel else "any"
    outer = (d_out, grad, some_U) if in_kernel else (a_bar,)
    factors = (d_in, x, v) if product_h else (h,)
    operands = by_divisibility(
        "mask_backward", operands, C, count, *outer, *factors, *recipe.facts()
    )
    # A trial must not overwrite its own inputs: it writes to buffers of its own.
    run(pick("mask_backward", operands, x, (N, count, depth),
             lambda c: run(c, torch.empty_like(a), torch.empty_like(out))))  # fmt: skip
    return a, out, rowsums.sum(0) if need_delta else rowsums
