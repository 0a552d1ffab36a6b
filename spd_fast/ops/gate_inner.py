"""The per-component gate of inner activations that are there already, as at an embedding site.

    z_j = w_j h + β_j,   s = Σ_j o_j GELU(z_j) + β_o,   g = lower(s),   S_c = Σ_n ψ(g⁺_nc)

The mathematics of :mod:`spd_fast.ops.gate` without its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive
from spd_fast.ops.gate import check_layers, fused_layers, gate_logits, unsupported
from spd_fast.ops.importances import ImportancesOutput
from spd_fast.ops.penalty import Penalty, penalty_sums
from spd_fast.ops.sigmoids import SigmoidKind, check_sigmoid, lower_importance, upper_importance

__all__ = ["gate_inner"]

_OPTIONS = "str sigmoid, str penalty, float power, float eps"


@composite(
    f"gate_inner(Tensor inner, Tensor[] weights, Tensor[] biases, {_OPTIONS}) -> (Tensor, Tensor)"
)
def _reference(
    inner: Tensor, weights: list[Tensor], biases: list[Tensor], sigmoid: SigmoidKind, penalty: Any,
    power: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = gate_logits(inner, weights, biases)
    sums = penalty_sums(upper_importance(logits, sigmoid), Penalty(penalty, power, eps))
    return lower_importance(logits, sigmoid), sums


_LAYERS = "Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out"


@primitive(f"gate_inner_forward(Tensor inner, {_LAYERS}, {_OPTIONS}) -> (Tensor, Tensor)")
def _(inner: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return inner.new_empty(inner.shape), w_out.new_empty(w_out.shape[0])


@primitive(
    "gate_inner_backward(Tensor? grad_lower, Tensor? grad_penalty, Tensor inner, "
    f"{_LAYERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _(
    grad_lower: Tensor | None, grad_penalty: Tensor | None, inner: Tensor, *layers: Any
) -> tuple[Tensor, ...]:
    return (
        inner.new_empty(inner.shape),
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in layers[:4]),
    )


class _GateInner(torch.autograd.Function):
    """Keeps h, which the caller keeps for the masked sum anyway."""

    @staticmethod
    def forward(
        ctx: Any, inner: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor,
        sigmoid: str, penalty: str, power: float, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.options = (sigmoid, penalty, power, eps)
        ctx.save_for_backward(inner, w_in, b_in, w_out, b_out)
        forward = _fused.kernel("gate_inner_forward", inner)
        return forward(inner, w_in, b_in, w_out, b_out, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lower: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_lower is None and grad_sums is None:
            return (None,) * 9
        backward = _fused.kernel("gate_inner_backward", ctx.saved_tensors[0])
        grads = backward(grad_lower, grad_sums, *ctx.saved_tensors, *ctx.options)
        return (*grads, None, None, None, None)


def gate_inner(
    inner: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    sigmoid: SigmoidKind,
    penalty: Penalty | None = None,
    backend: str | None = None,
) -> ImportancesOutput:
    """Lower importances g and penalty sums S of one site from its inner activations.

    On a CPU every backend computes it with torch's own passes.

    Args:
        inner: h [..., C].
        weights, biases, sigmoid, penalty: as of :func:`spd_fast.ops.gate`.

    Raises:
        ValueError: shapes that do not fit. UserError: unknown sigmoid or backend.
    """
    check_sigmoid(sigmoid)
    if inner.ndim == 0:
        raise ValueError("inner is a scalar, need [..., C]")
    components = inner.shape[-1]
    check_layers(weights, biases, components)
    penalty = penalty or Penalty()
    chosen = _fused.resolve_on_gpu(
        backend, inner, "gate_inner", lambda name: unsupported(name, inner, weights, sigmoid)
    )
    options = (sigmoid, penalty.kind, penalty.power, penalty.eps)
    rows = inner if inner.ndim == 2 else inner.reshape(-1, components)
    if chosen == "reference":
        lower, sums = _reference(rows, list(weights), list(biases), *options)
    else:
        _fused.load(chosen)
        lower, sums = _GateInner.apply(rows, *fused_layers(weights, biases), *options)
    return ImportancesOutput(lower if inner.ndim == 2 else lower.reshape(inner.shape), sums)
