"""Inner activations of an embedding site: h = V[token], a gather in the place of x V.

The input of an embedding is a one-hot row x, so row V[token] is x V (the inner activation), and
V̄[t] = Σ_{n: token_n = t} h̄_n.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_fast.ops import _fused
from spd_fast.ops._library import composite, primitive

__all__ = ["check_tokens", "embedding_inner"]


@composite("embedding_inner(Tensor tokens, Tensor V) -> Tensor")
def _reference(tokens: Tensor, V: Tensor) -> Tensor:
    return F.embedding(tokens, V)


@primitive("embedding_forward(Tensor tokens, Tensor V) -> Tensor")
def _(tokens: Tensor, V: Tensor) -> Tensor:
    return V.new_empty(tokens.shape[0], V.shape[1])


@primitive("embedding_backward(Tensor grad, Tensor tokens, SymInt vocabulary) -> Tensor")
def _(grad: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    return grad.new_empty(vocabulary, grad.shape[1], dtype=torch.float32)


class _EmbeddingInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, V: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.vocabulary, ctx.dtype = V.shape[0], V.dtype
        return _fused.kernel("embedding_forward", V)(tokens, V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        backward = _fused.kernel("embedding_backward", grad)
        return None, backward(grad, tokens, ctx.vocabulary).to(ctx.dtype)


def check_tokens(tokens: Tensor) -> None:
    """Raise ValueError where ``tokens`` cannot be indices."""
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens are {tokens.dtype}, need int64 or int32")


def embedding_inner(tokens: Tensor, V: Tensor, *, backend: str | None = None) -> Tensor:
    """h [..., C] = V[tokens], with a gradient of V that is the same bits at every run.

    On a CPU every backend computes it with torch's own gather.

    Args:
        tokens: int64 or int32 [...], each in [0, vocabulary). V: [vocabulary, C].

    Raises:
        ValueError: tokens that are no integers, V that is no matrix. IndexError: a token out of
            range (on a GPU an assertion of the device). UserError: backend.
    """
    check_tokens(tokens)
    if V.ndim != 2:
        raise ValueError(f"V is {tuple(V.shape)}, need [vocabulary, C]")
    chosen = _fused.resolve_on_gpu(
        backend, V, "embedding_inner", lambda name: _fused.unsupported_dtype(name, V)
    )
    if chosen == "reference":
        return _reference(tokens, V)
    _fused.load(chosen)
    flat = tokens.reshape(-1).to(torch.int64)
    h = _EmbeddingInner.apply(flat, V)
    return h if tokens.ndim == 1 else h.reshape(*tokens.shape, V.shape[1])
