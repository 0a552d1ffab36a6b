"""The masked embedding of one site: the masked linear layer of a one-hot input.

    h = V[t],   a = h ⊙ (m − δ) where routed, else 0,   y = a U + δ̃ ⊙ W[t]

with δ̃ = δ where routed, else 1 (the paper, eq. 4 and appendix A.1, for x one-hot). The weight delta
δ · Δ[t] = δ · (W[t] − h U) folds into a as it does in :mod:`spd_fast.ops.component_linear`, whose
kernels make a U; the gathered rows are added to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spd_fast.ops import _fused
from spd_fast.ops.component_linear import component_linear
from spd_fast.ops.embedding_inner import check_tokens, embedding_inner
from spd_fast.ops.masks import MaskRecipe, delta_source

__all__ = ["component_embedding"]


def component_embedding(
    tokens: Tensor,
    V: Tensor,
    U: Tensor,
    mask: MaskRecipe,
    *,
    weight: Tensor | None = None,
    inner: Tensor | None = None,
    backend: str | None = None,
    site_name: str | None = None,
) -> Tensor:
    """y = (h ⊙ m) U + δ · Δ[t] where routed, W[t] elsewhere.

    Args:
        tokens: int64 or int32 [...]. V: [vocabulary, C]. U: [C, d].
        mask: recipe of m, δ and the routing.
        weight: W [vocabulary, d] without gradient; needed when the recipe has a delta or routing.
        inner: h = V[tokens] [..., C] where the caller has it already; its gradient then flows into
            ``inner`` and V gets none from here.
        site_name: named in error messages.

    Returns:
        y [..., d].

    Raises:
        ValueError: shapes that do not fit, or a missing weight. UserError: backend.
    """
    where = f" (site {site_name!r})" if site_name else ""
    check_tokens(tokens)
    if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[0]:
        raise ValueError(f"V {tuple(V.shape)} and U {tuple(U.shape)} do not share C{where}")
    if mask.needs_weight:
        need = (V.shape[0], U.shape[1])
        if weight is None:
            raise ValueError(f"a mask with a weight delta or routing needs the weight{where}")
        if weight.shape != need:
            raise ValueError(f"weight is {tuple(weight.shape)}, need {need}{where}")
    if inner is None:
        inner = embedding_inner(tokens, V, backend=backend)
    inner = _fused.autocast(inner)
    if mask.delta is True:
        # δ is drawn once, for it is needed twice.
        assert mask.random is not None
        rows, C = tokens.numel(), V.shape[1]
        delta = delta_source(mask.random, rows, C, inner.dtype).reshape(tokens.shape)
        mask = replace(mask, delta=delta)
    # One column of zeros for x and the weight: the layer's own term of the weight is zero.
    zero = inner.new_zeros(1)
    y = component_linear(
        zero.expand(*tokens.shape, 1), zero.expand(1, V.shape[1]), U, mask,
        weight=zero.expand(U.shape[1], 1) if mask.needs_weight else None, inner=inner,
        backend=backend, site_name=site_name,
    )  # fmt: skip
    if not mask.needs_weight or weight is None:
        return y
    rows_of_weight = weight[tokens].to(y.dtype)
    if isinstance(mask.delta, Tensor):
        one = torch.ones((), dtype=y.dtype, device=y.device)
        delta = mask.delta.to(y.dtype)
        scale = delta if mask.routing is None else torch.where(mask.routing, delta, one)
    else:
        assert mask.routing is not None
        scale = (~mask.routing).to(y.dtype)
    return torch.addcmul(y, scale[..., None], rows_of_weight)
