"""L0 counts of the per-component gates: at how many positions each component is active.

    n_c = #{n : g_nc > threshold},   g = lower(s_c(x_n V_c))

What the mean L0 of a site is made of: Σ_c n_c / N. On a GPU the counts are made in the epilogue of
the gate's kernel, a part of the rows at a time: no pass over g, and no [N, C] that outlives a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spd_fast import backends
from spd_fast.ops import _fused
from spd_fast.ops._library import primitive
from spd_fast.ops.gate import GateEval, check, fused_layers, gate, unsupported
from spd_fast.ops.sigmoids import SigmoidKind

__all__ = ["gate_counts"]


@primitive(
    "gate_counts_forward(Tensor x, Tensor V, Tensor w_in, Tensor b_in, Tensor w_out, "
    "Tensor b_out, str sigmoid, float threshold) -> Tensor"
)
def _(x: Tensor, V: Tensor, *_: Any) -> Tensor:
    return x.new_empty(V.shape[1], dtype=torch.int64)


@torch.no_grad()
def gate_counts(
    x: Tensor,
    V: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    threshold: float,
    *,
    sigmoid: SigmoidKind,
    gate_eval: GateEval = "exact",
    backend: str | None = None,
) -> Tensor:
    """Positions of ``x`` [..., d_in] at which g exceeds ``threshold``: int64 [C], no gradient.

    The kernel compares in float32; elsewhere g is compared in the dtype it comes in.

    Args:
        x, V, weights, biases, sigmoid, gate_eval: as of :func:`spd_fast.ops.gate`.

    Raises:
        ValueError: shapes that do not fit. UserError: unknown sigmoid, gate_eval or backend.
    """
    options: dict[str, Any] = {"sigmoid": sigmoid, "gate_eval": gate_eval, "backend": backend}
    check(x, V, weights, biases, sigmoid, gate_eval)
    chosen = backends.resolve(
        backend, x.device, "gate_counts",
        lambda name: unsupported(name, x, weights, sigmoid, gate_eval),
    )  # fmt: skip
    if chosen != "triton":
        lower = gate(x, V, weights, biases, **options).lower
        return (lower > threshold).reshape(lower.shape[:-1].numel(), V.shape[1]).sum(0)
    _fused.load(chosen)
    rows = _fused.autocast(x.reshape(-1, x.shape[-1]))
    return _fused.kernel("gate_counts_forward", rows)(
        rows, V, *fused_layers(weights, biases), sigmoid, float(threshold)
    )
