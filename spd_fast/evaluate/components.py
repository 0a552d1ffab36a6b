"""What components stand for: the contexts that make them most important, and how they go together.

Two passes over the data, in memory that does not grow with it: the first finds how important every
component is, the second looks at the few chosen ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_fast.errors import UserError, nearest
from spd_fast.model import DecomposedModel

__all__ = ["Context", "Harvest", "component_cosines", "harvest", "head_norms"]

# What a site of an attention layer is, by the end of its name.
_ATTENTION = re.compile(
    r"(?:^|\.)(?:(?P<q>q_proj|query)|(?P<kv>[kv]_proj|key|value)|(?P<three>attn\.c_attn)"
    r"|(?P<joint>attention\.query_key_value)"
    r"|(?P<o>o_proj|attn\.(?:c_proj|out_proj)|attention\.(?:output\.)?dense))$"
)
# A component counts as active where its lower importance exceeds this.
ACTIVE = 0.01


@dataclass(frozen=True)
class Context:
    """Tokens around a position, with the component's importance at each; ``at`` is the position's
    index in them."""

    tokens: list[int]
    importances: list[float]
    at: int


@dataclass(frozen=True)
class Harvest:
    """What was found at a site.

    Attributes:
        components: the chosen ones, most important first.
        mean: [C] mean importance. frequency: [C] fraction of positions at which it is active.
        peak: [C] largest importance. norm: [C] ‖v_c‖ ‖u_c‖. For all components.
        contexts: a list per chosen component, highest importance first, each of another sequence.
        tokens: per chosen component (token, share of its importance, lift): lift is the mean
            importance at the token over the mean at all positions.
        together: [k, k] cosine of the chosen components' importances over positions.
        cosines: [k, k] cosine of the chosen components' matrices.
        heads: [k, heads] of an attention matrix: share of the norm in each head; None elsewhere.
    """

    site: str
    positions: int
    components: list[int]
    mean: Tensor
    frequency: Tensor
    peak: Tensor
    norm: Tensor
    contexts: list[list[Context]]
    tokens: list[list[tuple[int, float, float]]]
    together: Tensor
    cosines: Tensor
    heads: Tensor | None


def component_cosines(V: Tensor, U: Tensor) -> Tensor:
    """cos(v_i u_iᵀ, v_j u_jᵀ) = cos(v_i, v_j) · cos(u_i, u_j), [C, C], of V [d_in, C] and
    U [C, d_out]."""
    tiny = torch.finfo(V.dtype).tiny
    v = V / V.norm(dim=0, keepdim=True).clamp_min(tiny)
    u = U / U.norm(dim=1, keepdim=True).clamp_min(tiny)
    return (v.T @ v) * (u @ u.T)


def head_norms(model: DecomposedModel, site: str, components: list[int]) -> Tensor | None:
    """Share of ‖u_c‖² in each head of q, k and v (of all three where one matrix makes them), of
    ‖v_c‖² in each head of o, [k, heads]; None for a site that is none of them, going by the names
    of transformers' models (Llama, GPT-2, GPT-NeoX, BERT, OPT and those that follow them)."""
    config = getattr(model.target, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or not (found := _ATTENTION.search(site)):
        return None
    matrix = found.lastgroup
    if matrix == "kv":
        heads = getattr(config, "num_key_value_heads", None) or heads
    vectors = model.V(site).T if matrix == "o" else model.U(site)  # [C, heads · width]
    # In GPT-2's q, k and v each have their heads; in GPT-NeoX's each head has its q, k and v.
    outer = 3 if matrix == "three" else 1
    if vectors.shape[1] % (outer * heads) or (
        matrix == "joint" and vectors.shape[1] != 3 * model.sites[site].d_in
    ):
        return None
    squares = vectors[components].detach().square().unflatten(1, (outer, heads, -1)).sum(dim=(1, 3))
    return squares / squares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)


class _Best:
    """The highest importances of k components so far, with what surrounds them."""

    def __init__(self, count: int, window: int) -> None:
        self.count, self.window = count, window
        self.value: Tensor | None = None
        self.tokens: Tensor
        self.around: Tensor

    def add(self, lower: Tensor, tokens: Tensor) -> None:
        """lower [B, T, k], tokens [B, T]. A sequence counts with its best position alone: contexts
        that overlap show nothing new."""
        B, _, k = lower.shape
        side = self.window
        highest = lower.max(dim=1)  # over positions, [B, k]
        value, row = highest.values.topk(min(self.count, B), dim=0)  # [m, k]
        column = highest.indices.gather(0, row)
        # Beyond a sequence's ends there is no token.
        padded = torch.nn.functional.pad(tokens, (side, side), value=-1)
        beside = torch.nn.functional.pad(lower.permute(2, 0, 1), (side, side))  # [k, B, T + 2 side]
        offsets = torch.arange(2 * side + 1, device=lower.device)
        place = column[..., None] + offsets  # [m, k, window]
        found_tokens = padded[row[..., None], place]
        which = torch.arange(k, device=lower.device)[None, :, None]
        around = beside[which, row[..., None], place]
        if self.value is not None:
            value = torch.cat([self.value, value])
            found_tokens = torch.cat([self.tokens, found_tokens])
            around = torch.cat([self.around, around])
        value, order = value.topk(min(self.count, len(value)), dim=0)
        wide = order[..., None].expand(-1, -1, 2 * side + 1)
        self.value = value
        self.tokens, self.around = found_tokens.gather(0, wide), around.gather(0, wide)

    def contexts(self, component: int) -> list[Context]:
        found = []
        assert self.value is not None
        for i in range(len(self.value)):
            if self.value[i, component] <= ACTIVE:
                continue
            tokens, around = self.tokens[i, component], self.around[i, component]
            inside = tokens >= 0
            at = int(inside[: self.window].sum())
            found.append(Context(tokens[inside].tolist(), around[inside].tolist(), at))
        return found


@torch.no_grad()
def harvest(
    model: DecomposedModel,
    site: str,
    batches: Callable[[], Iterable[Any]],
    *,
    top: int = 16,
    contexts: int = 6,
    window: int = 10,
    statistics: int = 8,
    tokens_of: Callable[[Any], Tensor] = lambda batch: batch,
) -> Harvest:
    """Look at the ``top`` components of a site by mean importance.

    Args:
        batches: gives the same batches each time it is called: of tokens [B, T], or of whatever
            ``tokens_of`` finds them in.
        contexts: kept per component. window: tokens on each side of the position.
        statistics: tokens named per component.

    Raises:
        UserError: an unknown site, or no positions.
    """
    if site not in model.sites:
        raise UserError(f"unknown site {site!r}; nearest: {nearest(site, model.sites)}")
    C = model.sites[site].components
    total = torch.zeros(C, dtype=torch.float64)
    active = torch.zeros(C, dtype=torch.float64)
    peak = torch.zeros(C)
    positions, vocabulary = 0, 0
    for batch in batches():
        lower, tokens = _importances(model, site, batch, tokens_of)
        flat = lower.flatten(0, -2)
        total += flat.sum(dim=0, dtype=torch.float64).cpu()
        active += (flat > ACTIVE).sum(dim=0).double().cpu()
        peak = torch.maximum(peak, flat.amax(dim=0).float().cpu())
        positions += flat.shape[0]
        vocabulary = max(vocabulary, int(tokens.max()) + 1)
    if positions == 0:
        raise UserError("no data to look at components on")
    mean = total / positions
    chosen = mean.argsort(descending=True, stable=True)[:top].tolist()

    best = _Best(contexts, window)
    product = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    by_token = torch.zeros(vocabulary, len(chosen), dtype=torch.float64)
    seen = torch.zeros(vocabulary, dtype=torch.float64)
    for batch in batches():
        lower, tokens = _importances(model, site, batch, tokens_of)
        lower = lower[..., chosen]
        best.add(lower, tokens)
        flat, ids = lower.flatten(0, -2).double().cpu(), tokens.reshape(-1).cpu()
        product += flat.T @ flat
        by_token.index_add_(0, ids, flat)
        seen.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))
    scale = product.diagonal().clamp_min(1e-30).sqrt()
    V, U = model.V(site).detach(), model.U(site).detach()
    return Harvest(
        site=site,
        positions=positions,
        components=chosen,
        mean=mean.float(),
        frequency=(active / positions).float(),
        peak=peak,
        norm=(V.norm(dim=0) * U.norm(dim=1)).cpu(),
        contexts=[best.contexts(i) for i in range(len(chosen))],
        tokens=[_common(by_token[:, i], seen, positions, statistics) for i in range(len(chosen))],
        together=(product / scale / scale[:, None]).float(),
        cosines=component_cosines(V[:, chosen], U[chosen]).cpu(),
        heads=head_norms(model, site, chosen),
    )


def _importances(
    model: DecomposedModel, site: str, batch: Any, tokens_of: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor]:
    tokens = tokens_of(batch)
    lower = model.causal_importances(model.clean_forward(batch))[site].lower
    # The paper's lower sigmoid reaches a little below zero, where a component is off.
    return lower.reshape(*tokens.shape, lower.shape[-1]).clamp_min(0), tokens


def _common(
    by_token: Tensor, seen: Tensor, positions: int, count: int
) -> list[tuple[int, float, float]]:
    """(token, share of the importance, lift) of the tokens that hold most of it."""
    whole = by_token.sum().item()
    if whole <= 0:
        return []
    found = []
    for token in by_token.argsort(descending=True, stable=True)[:count].tolist():
        share = by_token[token].item() / whole
        if share > 0:
            found.append((token, share, share * positions / seen[token].item()))
    return found
