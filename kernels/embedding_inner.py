"""Embedding sites: h = V[token], a gather in the place of the product x V.

The gather's forward is one read and one write of N·C elements, which the library's own kernel does
at memory speed. Its gradient V̄[t] = Σ_{n: token_n = t} h̄_n is a scatter, which atomics would make
different from run to run: rows are sorted by token, stably, and each token's rows are added in a
fixed order. Every position has a program, which has nothing to do unless it is its token's first:
no number of occurring tokens has to reach the host. V̄ is filled with zeros before that. (A program
for every row of V̄, which writes the zeros too, would be 402,000 programs for 8,192 positions of
a vocabulary of 50,257, nearly all without work: 2.0 ms on an H200, for 0.05 of traffic.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.configs import Config, launch, pick


@triton.jit
def embedding_backward_kernel(
    grad, g_row, g_col, ordered, order, ends, table_bar, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """V̄ of one token, if this position is its first: the sum of its rows of ``grad``, BLOCK_N at a
    time."""
    first = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_cols = (cols < C)[None, :]
    token = tl.load(ordered + first)
    leads = tl.load(ordered + first - 1, mask=first > 0, other=-1) != token
    end = tl.where(leads, tl.load(ends + first), first)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        rows = tl.load(order + position, mask=position < end, other=0)
        at = rows[:, None] * g_row + cols[None, :] * g_col  # [BN, BC]
        inside = (position < end)[:, None] & in_cols
        total += tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(table_bar + token * C + cols, tl.sum(total, axis=0), mask=tl.where(leads, cols, C) < C)


def embedding_forward(tokens: Tensor, V: Tensor) -> Tensor:
    """h [N, C] of int64 ``tokens`` [N] and V [vocabulary, C]."""
    return V.index_select(0, tokens)


def embedding_backward(grad: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """V̄ [vocabulary, C] in fp32 of h̄ [N, C], the same bits at every run."""
    N, C = grad.shape
    out = torch.zeros(vocabulary, C, device=grad.device)
    if N == 0 or C == 0 or vocabulary == 0:
        return out
    ordered, order = torch.sort(tokens, stable=True)
    ends = torch.searchsorted(ordered, ordered, right=True)  # [N]

    def run(config: Config) -> None:
        grid = (N, triton.cdiv(C, config.blocks["BLOCK_C"]))
        launch(embedding_backward_kernel, grad, grid, grad, *grad.stride(), ordered, order, ends,
               out, C, config=config)  # fmt: skip

    run(pick("embedding_backward", "any", grad, (N, C), run))
    return out
