"""Embedding sites: h = V[token], a gather in the place of the product x V.

The gather's forward is one read and one write of N·C elements, which the library's own kernel does
at memory speed. Its gradient V̄[t] = Σ_{n: token_n = t} h̄_n is a scatter, which atomics would make
different from run to run: rows are sorted by token and each token's rows are added in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.configs import Config, launch, pick


@triton.jit
def embedding_segments_kernel(
    grad, g_row, g_col, order, starts, tokens, out, C, BLOCK_C: tl.constexpr
):
    """One token that occurs: the sum of its rows of ``grad``."""
    segment = tl.program_id(0)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros((BLOCK_C,), tl.float32)
    position = first
    while position < end:
        row = tl.load(order + position)
        at = row * g_row + cols * g_col
        total += tl.load(grad + at, mask=cols < C, other=0.0).to(tl.float32)
        position += 1
    token = tl.load(tokens + segment)
    tl.store(out + token * C + cols, total.to(out.dtype.element_ty), mask=cols < C)


def embedding_forward(tokens: Tensor, V: Tensor) -> Tensor:
    """h [N, C] of int64 ``tokens`` [N] and V [vocabulary, C]."""
    return V.index_select(0, tokens)


def embedding_backward(grad: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """V̄ [vocabulary, C] in fp32 of h̄ [N, C], the same bits at every run."""
    N, C = grad.shape
    out = torch.zeros(vocabulary, C, device=grad.device)
    if N == 0 or C == 0:
        return out
    order = torch.sort(tokens, stable=True).indices
    ordered = tokens[order]
    present, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    def run(config: Config) -> None:
        grid = (present.numel(), triton.cdiv(C, config.blocks["BLOCK_C"]))
        launch(embedding_segments_kernel, grad, grid, grad, *grad.stride(), order, starts, present,
               out, C, config=config)  # fmt: skip

    run(pick("embedding_segments", "any", grad, (N, C), run))
    return out
