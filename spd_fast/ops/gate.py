"""The per-component gate: inner activations, causal importances, penalty sums.

    h = x V                                        inner activations
    z_j = w_j h + β_j,   s = Σ_j o_j GELU(z_j) + β_o   one scalar MLP per component
    g = lower(s),   g⁺ = upper(s),   S_c = Σ_n ψ(g⁺_nc)

(the paper, §2.4 and appendix A.2; GELU in its exact erf form). Further hidden layers are allowed;
with none, s = w h + β (the code of the paper at hidden width 0).

``gate_eval`` says how s is evaluated: ``exact``, or ``interpolated`` on a grid per component within
1e-5 (``spd_fast.ops.interpolation``); that applies to gates of one hidden layer, others stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast import backends
from spd_fast.errors import UserError, nearest
from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive
from spd_fast.ops.interpolation import interpolated_logits
from spd_fast.ops.penalty import Penalty, penalty_sums
from spd_fast.ops.sigmoids import SigmoidKind, check_sigmoid, lower_importance, upper_importance

__all__ = [
    "GATE_EVALS",
    "GateEval",
    "GateOutput",
    "check",
    "check_gate_eval",
    "check_layers",
    "definite_eval",
    "fused_layers",
    "gate",
    "gate_logits",
    "unsupported",
]

GateEval = Literal["auto", "exact", "interpolated"]
GATE_EVALS: tuple[GateEval, ...] = ("auto", "exact", "interpolated")


def check_gate_eval(gate_eval: str) -> None:
    """Raise UserError for an unknown way of evaluating gates."""
    if gate_eval not in GATE_EVALS:
        raise UserError(
            f"unknown gate_eval {gate_eval!r}; nearest: {nearest(gate_eval, GATE_EVALS)}"
        )


class GateOutput(NamedTuple):
    """inner h [..., C], lower g [..., C], penalty_sum S [C]."""

    inner: Tensor
    lower: Tensor
    penalty_sum: Tensor


def gate_logits(
    inner: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gate_eval: GateEval = "exact",
) -> Tensor:
    """s [N, C] from h [N, C]: layer l has W [C, in, out] and b [C, out], in = 1 at the first
    layer and out = 1 at the last, GELU (erf) between layers."""
    z = inner.unsqueeze(-1)  # [N, C, in]
    for index, (W, b) in enumerate(zip(weights, biases, strict=True)):
        if index:
            z = F.gelu(z)
        if W.shape[1] == 1:
            z = z * W[:, 0] + b
        else:
            z = torch.einsum("nci,cio->nco", z, W) + b
    s = z.squeeze(-1)
    if gate_eval == "interpolated" and len(weights) == 2:
        (w_in, w_out), (b_in, b_out) = weights, biases
        return interpolated_logits(inner, w_in[:, 0], b_in, w_out[:, :, 0], b_out[:, 0], s)
    return s


@composite(
    "gate(Tensor x, Tensor V, Tensor[] weights, Tensor[] biases, str sigmoid, str penalty, "
    "float power, float eps, str gate_eval='exact') -> (Tensor, Tensor, Tensor)"
)
def _reference(
    x: Tensor,
    V: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    sigmoid: SigmoidKind,
    penalty: Any,
    power: float,
    eps: float,
    gate_eval: GateEval = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    inner = x @ V
    logits = gate_logits(inner, weights, biases, gate_eval)
    sums = penalty_sums(upper_importance(logits, sigmoid), Penalty(penalty, power, eps))
    return inner, lower_importance(logits, sigmoid), sums


def _fake_forward(
    x: Tensor, V: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape[0], V.shape[1]
    return (
        _fused.per_component(x, rows, columns),
        _fused.per_component(x, rows, columns),
        V.new_empty(columns),
    )


def _fake_backward(
    grad_inner: Tensor | None,
    grad_lower: Tensor | None,
    grad_penalty: Tensor | None,
    x: Tensor,
    V: Tensor,
    inner: Tensor | None,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    sigmoid: str,
    penalty: str,
    power: float,
    eps: float,
    need_grad_x: bool,
) -> tuple[Tensor | None, ...]:
    grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in
             (V, w_in, b_in, w_out, b_out))  # fmt: skip
    return (x.new_empty(x.shape) if need_grad_x else None, *grads)


# The primitives of each way of evaluating.
_PRIMITIVES: dict[GateEval, tuple[str, str]] = {
    "exact": ("gate_forward", "gate_backward"),
    "interpolated": ("gate_interpolated_forward", "gate_interpolated_backward"),
}
for _forward, _backward in _PRIMITIVES.values():
    primitive(
        f"{_forward}(Tensor x, Tensor V, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, "
        "str sigmoid, str penalty, float power, float eps) -> (Tensor, Tensor, Tensor)"
    )(_fake_forward)
    primitive(
        f"{_backward}(Tensor? grad_inner, Tensor? grad_lower, Tensor? grad_penalty, Tensor x, "
        "Tensor V, Tensor? inner, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, "
        "str sigmoid, str penalty, float power, float eps, bool need_grad_x) -> "
        "(Tensor?, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )(_fake_backward)


# Hidden neurons of a GPU's widest gate: offsets of the sums of 2¹⁹ components are 32 bits then.
WIDEST_ON_GPU = 1024
# Above this many elements a GPU's backward makes h again, chunk by chunk, instead of keeping it.
STREAMED = 2**28


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, V: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor,
        sigmoid: str, penalty: str, power: float, eps: float, gate_eval: GateEval,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.options, ctx.gate_eval = (sigmoid, penalty, power, eps), gate_eval
        forward = _fused.kernel(_PRIMITIVES[gate_eval][0], x)
        layers = _flat(w_in, b_in, w_out, b_out)
        inner, lower, sums = forward(x, V, *layers, *ctx.options)
        streamed = x.device.type != "cpu" and inner.numel() > STREAMED
        kept = None if streamed else inner
        ctx.save_for_backward(x, V, kept, *layers)
        return inner, lower, sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_inner: Tensor | None, grad_lower: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_inner is None and grad_lower is None and grad_sums is None:
            return (None,) * 11
        backward = _fused.kernel(_PRIMITIVES[ctx.gate_eval][1], ctx.saved_tensors[0])
        x, V, w_in, b_in, w_out, b_out = backward(
            grad_inner, grad_lower, grad_sums, *ctx.saved_tensors, *ctx.options,
            ctx.needs_input_grad[0],
        )  # fmt: skip
        layers = w_in.unsqueeze(1), b_in, w_out.unsqueeze(2), b_out.unsqueeze(1)
        return (x, V, *layers, None, None, None, None, None)


def _chosen_eval(
    gate_eval: GateEval, backend: str, x: Tensor, weights: Sequence[Tensor]
) -> GateEval:
    """``auto`` made definite: interpolated where that is faster, which is on the CPU's kernels."""
    if gate_eval != "auto":
        return gate_eval
    faster = backend == "cpu" and len(weights) == 2 and x.dtype == torch.float32
    return "interpolated" if faster else "exact"


def definite_eval(
    gate_eval: GateEval,
    backend: str | None,
    x: Tensor,
    weights: Sequence[Tensor],
    sigmoid: SigmoidKind,
) -> GateEval:
    """How :func:`gate` evaluates these gates."""
    if gate_eval != "auto":
        return gate_eval
    chosen = backends.resolve(
        backend, x.device, "gate", lambda name: unsupported(name, x, weights, sigmoid)
    )
    return _chosen_eval(gate_eval, chosen, x, weights)


def unsupported(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    sigmoid: SigmoidKind,
    gate_eval: GateEval = "exact",
) -> str | None:
    """Why ``backend`` cannot compute the gate of ``x``, or None."""
    if gate_eval == "interpolated" and backend != "cpu":
        return f"it evaluates gates exactly, not {gate_eval!r}"
    if len(weights) > 2:
        return f"its gates have one hidden layer, not {len(weights) - 1}"
    hidden = weights[-1].shape[1]
    if backend == "triton" and hidden > WIDEST_ON_GPU:
        return f"its gates have at most {WIDEST_ON_GPU} hidden neurons, not {hidden}"
    if sigmoid not in ("paper", "2026"):
        return f"its sigmoids are 'paper' and '2026', not {sigmoid!r}"
    return _fused.unsupported_dtype(backend, x)


def _first_and_last(
    weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_in [C, 1, H], b_in [C, H], w_out [C, H, 1], b_out [C, 1]; the linear gate has H = 0 and
    w_out [C, 1, 1]."""
    if len(weights) > 1:
        return weights[0], biases[0], weights[-1], biases[-1]
    C = weights[0].shape[0]
    return weights[0].new_empty(C, 1, 0), biases[0].new_empty(C, 0), weights[0], biases[0]


def _flat(
    w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return w_in.squeeze(1), b_in, w_out.squeeze(2), b_out.squeeze(1)


def fused_layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_in, b_in, w_out [C, H] and b_out [C]; the linear gate has H = 0 and w_out [C, 1]."""
    return _flat(*_first_and_last(weights, biases))


def check_layers(weights: Sequence[Tensor], biases: Sequence[Tensor], components: int) -> None:
    """Raise ValueError where the layers are no MLP 1 → … → 1 for each of ``components``."""
    width = 1
    for index, (W, b) in enumerate(zip(weights, biases, strict=True)):
        if W.ndim != 3 or W.shape[:2] != (components, width) or b.shape != (components, W.shape[2]):
            raise ValueError(
                f"gate layer {index}: need W [{components}, {width}, out] and b [{components}, "
                f"out], got {tuple(W.shape)} and {tuple(b.shape)}"
            )
        width = W.shape[2]
    if width != 1 or not weights:
        raise ValueError(f"the gate's last layer must have one output, got {width}")


def check(
    x: Tensor,
    V: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sigmoid: str,
    gate_eval: str,
) -> None:
    """Raise where :func:`gate` takes no such arguments."""
    check_sigmoid(sigmoid)
    check_gate_eval(gate_eval)
    if V.ndim != 2:
        raise ValueError(f"V is {tuple(V.shape)}, need [d_in, C]")
    if x.shape[-1] != V.shape[0]:
        raise ValueError(f"V has d_in {V.shape[0]} but x has {x.shape[-1]} columns")
    check_layers(weights, biases, V.shape[1])


def gate(
    x: Tensor,
    V: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    sigmoid: SigmoidKind,
    penalty: Penalty | None = None,
    gate_eval: GateEval = "exact",
    backend: str | None = None,
) -> GateOutput:
    """Inner activations, lower importances and penalty sums of one site.

    Args:
        x: site inputs [..., d_in]. V: [d_in, C].
        weights, biases: the per-component MLP, layer by layer: W [C, in, out], b [C, out];
            in = 1 at the first layer and out = 1 at the last.
        sigmoid: preset of the pair of leaky sigmoids.
        penalty: ψ of the penalty sums; None leaves them zero.
        gate_eval: ``exact``; ``interpolated``: s within 1e-5, with the interpolant's gradients;
            ``auto``: interpolated in float32 on the ``cpu`` backend, exact elsewhere.

    Raises:
        ValueError: shapes that do not fit. UserError: unknown sigmoid, gate_eval or backend.
    """
    check(x, V, weights, biases, sigmoid, gate_eval)
    components = V.shape[1]
    penalty = penalty or Penalty()
    rows = x.reshape(-1, x.shape[-1])
    chosen = backends.resolve(
        backend, x.device, "gate", lambda name: unsupported(name, x, weights, sigmoid, gate_eval)
    )
    evaluated = _chosen_eval(gate_eval, chosen, x, weights)
    options = (sigmoid, penalty.kind, penalty.power, penalty.eps, evaluated)
    if chosen == "reference":
        out = _reference(rows, V, list(weights), list(biases), *options)
    else:
        _fused.load(chosen)
        run = _fused.differentiable(chosen, "gate", x, _Gate)
        # Layers as they are: to slice them here would be nodes of the graph.
        out = run(_fused.autocast(rows), V, *_first_and_last(weights, biases), *options)
    inner, lower, sums = out
    if x.ndim != 2:
        shape = (*x.shape[:-1], components)
        inner, lower = inner.reshape(shape), lower.reshape(shape)
    return GateOutput(inner, lower, sums)
