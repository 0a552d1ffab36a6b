"""Gate and masked component sum in one operation that keeps nothing of size N·C: streaming mode.

    h = x V,   s = MLP_c(h),   g = lower(s),   S_c = Σ_n ψ(upper(s)_nc)
    m = g + (1 − g) r,   a = h ⊙ (m − δ) where routed, else 0
    y = a U + δ̃ ⊙ (x Wᵀ) + b        δ̃ = δ where routed, else 1

The numbers are those of :func:`~spd_fast.ops.gate` followed by
:func:`~spd_fast.ops.component_linear`, but a mask on its own importances can be made, used and
forgotten chunk by chunk of components, and again in the backward: one product x V more. The C++
engine does; on a GPU the two run one after the other and keep g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast import backends
from spd_fast.ops import _fused
from spd_fast.ops._library import primitive
from spd_fast.ops.component_linear import component_linear
from spd_fast.ops.gate import STREAMED, check_layers, fused_layers, gate, unsupported
from spd_fast.ops.masks import MaskRecipe
from spd_fast.ops.penalty import Penalty
from spd_fast.ops.sigmoids import SigmoidKind, check_sigmoid

__all__ = ["LayerOutput", "layer"]


class LayerOutput(NamedTuple):
    """y [..., d_out] and penalty_sum S [C]."""

    y: Tensor
    penalty_sum: Tensor


_ARGUMENTS = (
    "Tensor x, Tensor V, Tensor U, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, "
    "str sigmoid, str penalty, float power, float eps, Tensor? key, int draw, int site, "
    "int row_offset, bool binomial, Tensor? delta, bool random_delta, Tensor? weight, "
    "Tensor? bias, Tensor? routing"
)


@primitive(f"layer_forward({_ARGUMENTS}) -> (Tensor, Tensor)")
def _(x: Tensor, V: Tensor, U: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], U.shape[1]), x.new_empty(U.shape[0])


@primitive(
    f"layer_backward(Tensor grad_y, Tensor? grad_penalty, {_ARGUMENTS}, bool need_x) -> "
    "(Tensor?, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor?)"
)
def _(
    grad_y: Tensor, grad_penalty: Tensor | None, x: Tensor, V: Tensor, U: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    bias, need_x = rest[-3], rest[-1]
    return (
        x.new_empty(x.shape) if need_x else None,
        *(t.new_empty(t.shape) for t in (V, U, *rest[:4])),
        None if bias is None else bias.new_empty(bias.shape),
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, V: Tensor, U: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor,
        b_out: Tensor, bias: Tensor | None, key: Tensor | None, delta: Tensor | None,
        weight: Tensor | None, routing: Tensor | None, gate_options: tuple[Any, ...],
        draw_options: tuple[Any, ...], random_delta: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, V, U, w_in, b_in, w_out, b_out, bias, key, delta, weight, routing
        )  # fmt: skip
        ctx.options = gate_options, draw_options, random_delta
        return _fused.kernel("layer_forward", x)(
            x, V, U, w_in, b_in, w_out, b_out, *gate_options, key, *draw_options, delta,
            random_delta, weight, bias, routing,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_y is None and grad_sums is None:
            return (None,) * 15
        *first, bias, key, delta, weight, routing = ctx.saved_tensors
        gate_options, draw_options, random_delta = ctx.options
        x, U = first[0], first[2]
        if grad_y is None:
            grad_y = x.new_zeros(x.shape[0], U.shape[1])
        *grads, grad_bias = _fused.kernel("layer_backward", x)(
            grad_y, grad_sums, *first, *gate_options, key, *draw_options, delta, random_delta,
            weight, bias, routing, ctx.needs_input_grad[0],
        )  # fmt: skip
        return (*grads, grad_bias, *(None,) * 7)


def _reason(
    backend: str, x: Tensor, weights: Sequence[Tensor], sigmoid: SigmoidKind, mask: MaskRecipe,
    weight: Tensor | None,
) -> str | None:  # fmt: skip
    if backend == "cuda":
        return "it has no streamed layer"
    if backend == "triton":  # the two operations, whatever they cover
        return unsupported(backend, x, weights, sigmoid) or _fused.unsupported_weight(
            weight if mask.needs_weight else None
        )
    if isinstance(mask.delta, Tensor) and mask.delta.requires_grad and torch.is_grad_enabled():
        return "its streamed layer computes no gradient of delta"
    return (
        unsupported(backend, x, weights, sigmoid)
        or _fused.unsupported_weight(weight if mask.needs_weight else None)
    )  # fmt: skip


def layer(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    mask: MaskRecipe,
    *,
    sigmoid: SigmoidKind,
    penalty: Penalty | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> LayerOutput:
    """Masked output and penalty sums of one site whose masks come from its own input.

    Args:
        x: [..., d_in]. V: [d_in, C]. U: [C, d_out].
        weights, biases: of the gates, as in :func:`~spd_fast.ops.gate`.
        mask: source (random, or None: m = g), δ and routing; its ``lower`` is computed here.
        sigmoid, penalty: as in :func:`~spd_fast.ops.gate`.
        weight: W [d_out, d_in] without gradient; needed where δ or a routing is on.
        bias: [d_out].

    Raises:
        ValueError: shapes that do not fit, a missing weight, a recipe with importances or explicit
            sources. UserError: unknown sigmoid, backend.
    """
    check_sigmoid(sigmoid)
    if mask.lower is not None or isinstance(mask.source, Tensor):
        raise ValueError("a layer makes its own importances: the recipe's lower must be None, "
                         "its source random or None")  # fmt: skip
    if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[0]:
        raise ValueError(f"V {tuple(V.shape)} and U {tuple(U.shape)} do not share C")
    if x.shape[-1] != V.shape[0]:
        raise ValueError(f"V has d_in {V.shape[0]} but x has {x.shape[-1]} columns")
    if mask.needs_weight and weight is None:
        raise ValueError("a mask with a weight delta or routing needs the weight")
    check_layers(weights, biases, U.shape[0])
    penalty = penalty or Penalty()
    chosen = backends.resolve(
        backend, x.device, "layer", lambda name: _reason(name, x, weights, sigmoid, mask, weight)
    )
    if chosen != "cpu":
        # On a GPU two operations, which share h until it is large: g is all that is kept then.
        out = gate(x, V, weights, biases, sigmoid=sigmoid, penalty=penalty, backend=chosen)
        inner = out.inner if chosen == "reference" or out.inner.numel() <= STREAMED else None
        y = component_linear(
            x, V, U, replace(mask, lower=out.lower), weight=weight, bias=bias, inner=inner,
            backend=chosen,
        )  # fmt: skip
        return LayerOutput(y, out.penalty_sum)
    _fused.load(chosen)
    random = mask.random
    delta = mask.delta if isinstance(mask.delta, Tensor) else None
    y, sums = _Layer.apply(
        x.reshape(-1, x.shape[-1]), V, U, *fused_layers(weights, biases), bias,
        None if random is None else random.key,
        None if delta is None else delta.reshape(-1),
        weight if mask.needs_weight else None,
        None if mask.routing is None else mask.routing.reshape(-1),
        (sigmoid, penalty.kind, penalty.power, penalty.eps),
        (0, 0, 0, False) if random is None
        else (random.draw, random.site, random.row_offset, random.binomial),
        mask.delta is True,
    )  # fmt: skip
    return LayerOutput(y.reshape(*x.shape[:-1], U.shape[1]), sums)
