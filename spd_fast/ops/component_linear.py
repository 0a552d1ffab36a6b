"""The masked linear layer of one site, in folded form (the paper, eq. 4 and appendix A.1).

    h = x V,   m = g + (1 − g) r,   a = h ⊙ (m − δ) where routed, else 0
    y = a U + δ̃ ⊙ (x Wᵀ) + b        δ̃ = δ where routed, else 1

The weight delta Δ = W − (V U)ᵀ is never formed: δ · x Δᵀ = δ · x Wᵀ − δ · h U, and the second term
folds into a. Without delta and with everything routed, W is not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast import backends
from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive
from spd_fast.ops.masks import MaskRecipe, component_source, delta_source
from spd_fast.ops.random import RandomSource

__all__ = ["check_site", "component_linear"]

_ARGUMENTS = (
    "Tensor x, Tensor? inner, Tensor? V, Tensor U, Tensor? lower, Tensor? source, Tensor? key, "
    "int draw, int site, int row_offset, bool binomial, Tensor? delta, bool random_delta, "
    "Tensor? weight, Tensor? bias, Tensor? routing"
)


@composite(f"component_linear({_ARGUMENTS}) -> Tensor")
def _reference(
    x: Tensor,
    inner: Tensor | None,
    V: Tensor | None,
    U: Tensor,
    lower: Tensor | None,
    source: Tensor | None,
    key: Tensor | None,
    draw: int,
    site: int,
    row_offset: int,
    binomial: bool,
    delta: Tensor | None,
    random_delta: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    routing: Tensor | None,
) -> Tensor:
    N, C = x.shape[0], U.shape[0]
    if inner is None:
        assert V is not None
        inner = x @ V
    if key is not None:
        random = RandomSource(key, draw, site, row_offset, binomial)
        source = component_source(random, N, C, inner.dtype)
        if random_delta:
            delta = delta_source(random, N, C, inner.dtype)
    if lower is None:
        mask = source
    else:
        mask = lower if source is None else lower + (1 - lower) * source
    if delta is not None:
        mask = (1 if mask is None else mask) - delta[:, None]
    a = inner if mask is None else inner * mask
    if routing is not None:
        a = torch.where(routing[:, None], a, torch.zeros((), dtype=a.dtype, device=a.device))
    y = a @ U
    if delta is not None or routing is not None:
        assert weight is not None
        original = x @ weight.T
        if delta is not None:
            one = torch.ones((), dtype=delta.dtype, device=delta.device)
            scale = delta if routing is None else torch.where(routing, delta, one)
            y = y + scale[:, None] * original
        else:
            assert routing is not None
            y = y + torch.where(routing[:, None], torch.zeros_like(original), original)
    return y if bias is None else y + bias


@primitive(f"component_linear_forward({_ARGUMENTS}) -> Tensor")
def _(x: Tensor, inner: Tensor | None, V: Tensor | None, U: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], U.shape[1])


@primitive(
    f"component_linear_backward(Tensor grad, {_ARGUMENTS}, bool need_x, bool need_inner, "
    "bool need_V, bool need_U, bool need_lower, bool need_source, bool need_delta, bool need_bias)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)"
)
def _(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    (x, _, V, U), bias = args[:4], args[14]
    N, C = x.shape[0], U.shape[0]
    need_x, need_inner, need_V, need_U, need_lower, need_source, need_delta, need_bias = args[-8:]

    def per_component(needed: bool) -> Tensor | None:
        return _fused.per_component(x, N, C) if needed else None

    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None,
        per_component(need_inner),
        V.new_empty(V.shape) if need_V else None,
        U.new_empty(U.shape) if need_U else None,
        per_component(need_lower),
        per_component(need_source),
        x.new_empty(N) if need_delta else None,
        None if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


class _ComponentLinear(torch.autograd.Function):
    """Saves x and the recipe; of size N·C only what the caller handed in (h, g, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: Tensor | None, V: Tensor | None, U: Tensor,
        lower: Tensor | None, source: Tensor | None, key: Tensor | None, draw: int, site: int,
        row_offset: int, binomial: bool, delta: Tensor | None, random_delta: bool,
        weight: Tensor | None, bias: Tensor | None, routing: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(
            x, inner, V, U, lower, source, key, delta, weight, bias, routing
        )  # fmt: skip
        ctx.options = (draw, site, row_offset, binomial, random_delta)
        return _fused.kernel("component_linear_forward", x)(
            x, inner, V, U, lower, source, key, draw, site, row_offset, binomial, delta,
            random_delta, weight, bias, routing,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, V, U, lower, source, key, delta, weight, bias, routing = ctx.saved_tensors
        draw, site, row_offset, binomial, random_delta = ctx.options
        needs = ctx.needs_input_grad
        grad_x, grad_inner, grad_V, grad_U, grad_lower, grad_source, grad_delta, grad_bias = (
            _fused.kernel("component_linear_backward", x)(
                grad, x, inner, V, U, lower, source, key, draw, site, row_offset, binomial, delta,
                random_delta, weight, bias, routing,
                needs[0], needs[1], needs[2], needs[3], needs[4], needs[5], needs[11], needs[14],
            )
        )  # fmt: skip
        return (
            grad_x, grad_inner, grad_V, grad_U, grad_lower, grad_source, None, None, None, None,
            None, grad_delta, None, None, grad_bias, None,
        )  # fmt: skip


def check_site(
    x: Tensor, V: Tensor, U: Tensor, recipe: MaskRecipe, inner: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, site_name: str | None,
) -> None:  # fmt: skip
    """Raise ValueError unless the arguments of :func:`component_linear` fit."""
    where = f" (site {site_name!r})" if site_name else ""
    if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[0]:
        raise ValueError(f"V {tuple(V.shape)} and U {tuple(U.shape)} do not share C{where}")
    if x.shape[-1] != V.shape[0]:
        raise ValueError(f"V has d_in {V.shape[0]} but x has {x.shape[-1]} columns{where}")
    positions, C, d_out = x.shape[:-1], U.shape[0], U.shape[1]
    if recipe.needs_weight and weight is None:
        raise ValueError(f"a mask with a weight delta or routing needs the weight{where}")
    expected = {
        "inner": (inner, (*positions, C)),
        "mask.lower": (recipe.lower, (*positions, C)),
        "mask.source": (recipe.source, (*positions, C)),
        "mask.delta": (recipe.delta, positions),
        "mask.routing": (recipe.routing, positions),
        "weight": (weight, (d_out, x.shape[-1])),
        "bias": (bias, (d_out,)),
    }
    for name, (tensor, shape) in expected.items():
        if isinstance(tensor, Tensor) and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, need {tuple(shape)}{where}")
    if recipe.routing is not None and recipe.routing.dtype != torch.bool:
        raise ValueError(f"mask.routing is {recipe.routing.dtype}, need bool{where}")


def component_linear(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    mask: MaskRecipe,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    inner: Tensor | None = None,
    backend: str | None = None,
    site_name: str | None = None,
) -> Tensor:
    """y = (h ⊙ m) U + δ · (x Δᵀ) + b where routed, x Wᵀ + b elsewhere.

    Args:
        x: [..., d_in]. V: [d_in, C]. U: [C, d_out].
        mask: recipe of m, δ and the routing.
        weight: W [d_out, d_in] without gradient; needed when the recipe has a delta or routing.
        bias: [d_out].
        inner: h = x V [..., C] where the caller has it already; its gradient then flows into
            ``inner`` and V gets none from here.
        site_name: named in error messages.

    Returns:
        y [..., d_out].

    Raises:
        ValueError: shapes that do not fit, or a missing weight. UserError: backend.
    """
    check_site(x, V, U, mask, inner, weight, bias, site_name)
    C, d_out = U.shape
    random = mask.random
    source = mask.source if isinstance(mask.source, Tensor) else None
    delta = mask.delta if isinstance(mask.delta, Tensor) else None

    def flat(t: Tensor | None, columns: int) -> Tensor | None:
        return t if t is None or t.ndim == 2 else t.reshape(-1, columns)

    arguments: tuple[Any, ...] = (
        flat(x, x.shape[-1]),
        flat(inner, C),
        V if inner is None else None,
        U,
        flat(mask.lower, C),
        flat(source, C),
        None if random is None else random.key,
        0 if random is None else random.draw,
        0 if random is None else random.site,
        0 if random is None else random.row_offset,
        random is not None and random.binomial,
        None if delta is None else delta.reshape(-1),
        mask.delta is True,
        weight if mask.needs_weight else None,
        bias,
        None if mask.routing is None else mask.routing.reshape(-1),
    )
    chosen = backends.resolve(
        backend,
        x.device,
        "component_linear",
        lambda name: (
            _fused.unsupported_weight(weight if mask.needs_weight else None)
            or _fused.unsupported_dtype(name, x)
        ),
    )
    if chosen == "reference":
        y = _reference(*arguments)
    else:
        _fused.load(chosen)
        run = _fused.differentiable(chosen, "component_linear", x, _ComponentLinear)
        y = run(_fused.autocast(arguments[0]), *arguments[1:])
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], d_out)
