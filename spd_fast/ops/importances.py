"""Logits → lower importances and penalty sums, where a network of its own makes the logits
(shared or global MLP, transformer) instead of a gate per component.

    g = lower(s),   g⁺ = upper(s),   S_c = Σ_n ψ(g⁺_nc)

(the paper, §2.4 and appendix A.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive
from spd_fast.ops.penalty import Penalty, penalty_sums
from spd_fast.ops.sigmoids import SigmoidKind, check_sigmoid, lower_importance, upper_importance

__all__ = ["ImportancesOutput", "importances"]


class ImportancesOutput(NamedTuple):
    """lower g [..., C] in the dtype of the logits, penalty_sum S [C] in float32 at least."""

    lower: Tensor
    penalty_sum: Tensor


_ARGUMENTS = "str sigmoid, str penalty, float power, float eps"


@composite(f"importances(Tensor logits, {_ARGUMENTS}) -> (Tensor, Tensor)")
def _reference(
    logits: Tensor, sigmoid: SigmoidKind, penalty: Any, power: float, eps: float
) -> tuple[Tensor, Tensor]:
    # Sums over positions in float32 at least: bf16 stops counting at 256.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sums = penalty_sums(upper_importance(wide, sigmoid), Penalty(penalty, power, eps))
    return lower_importance(logits, sigmoid), sums


@primitive(f"importances_forward(Tensor logits, {_ARGUMENTS}) -> (Tensor, Tensor)")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = logits.new_empty(logits.shape[1], dtype=torch.float32)
    return logits.new_empty(logits.shape), sums


@primitive(
    "importances_backward(Tensor? grad_lower, Tensor? grad_penalty, Tensor logits, "
    f"{_ARGUMENTS}) -> Tensor"
)
def _(grad_lower: Tensor | None, grad_penalty: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


class _Importances(torch.autograd.Function):
    """Keeps the logits, which their network's last layer does not need for its own backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, sigmoid: str, penalty: str, power: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.options = (sigmoid, penalty, power, eps)
        ctx.save_for_backward(logits)
        return _fused.kernel("importances_forward", logits)(logits, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lower: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_lower is None and grad_sums is None:
            return (None,) * 5
        (logits,) = ctx.saved_tensors
        backward = _fused.kernel("importances_backward", logits)
        return backward(grad_lower, grad_sums, logits, *ctx.options), None, None, None, None


def _unsupported(backend: str, logits: Tensor, sigmoid: SigmoidKind) -> str | None:
    if sigmoid not in ("paper", "2026"):
        return f"its sigmoids are 'paper' and '2026', not {sigmoid!r}"
    return _fused.unsupported_dtype(backend, logits)


def importances(
    logits: Tensor,
    *,
    sigmoid: SigmoidKind,
    penalty: Penalty | None = None,
    backend: str | None = None,
) -> ImportancesOutput:
    """Lower importances g and penalty sums S of one site from its logits.

    On a CPU every backend computes it with torch's own elementwise passes.

    Args:
        logits: s [..., C].
        sigmoid: preset of the pair of leaky sigmoids.
        penalty: ψ of the penalty sums; None leaves them zero.

    Raises:
        ValueError: logits without a dimension of components. UserError: unknown sigmoid or backend.
    """
    check_sigmoid(sigmoid)
    if logits.ndim == 0:
        raise ValueError("logits is a scalar, need [..., C]")
    penalty = penalty or Penalty()
    chosen = _fused.resolve_on_gpu(
        backend, logits, "importances", lambda name: _unsupported(name, logits, sigmoid)
    )
    options = (sigmoid, penalty.kind, penalty.power, penalty.eps)
    rows = logits if logits.ndim == 2 else logits.reshape(-1, logits.shape[-1])
    if chosen == "reference":
        lower, sums = _reference(rows, *options)
    else:
        _fused.load(chosen)
        lower, sums = _Importances.apply(rows, *options)
    return ImportancesOutput(lower if logits.ndim == 2 else lower.reshape(logits.shape), sums)
