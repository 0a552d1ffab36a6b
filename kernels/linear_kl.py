"""KL of a language model's head, a chunk of rows at a time: logits never exist whole, nor in fp32.

    q = softmax(x Wᵀ + b),  p = softmax(t Wᵀ + b),  KL = mean_n KL(p_n ‖ q_n),  x̄ = (q − p) W / N

Per chunk: two library products make bf16 logits, one pass reads them for the loss, one more writes
the gradient over the prediction's, one product takes it back to x̄. The gradient is made with the
loss, so no logits are kept or made twice.

Liger-Kernel's FusedLinearJSD at β = 0 is the nearest library kernel; it keeps fp32 logits of a
chunk, also where bf16 logits are given, and is a dependency of its own, so this is written here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.kernels.divergence import kl_forward, kl_gradient
from spd_fast.kernels.product import addmm, mm

# Logits that exist at a time, in elements: 128 MiB in bf16 for each of the two sides.
LOGITS = 2**26


def linear_kl_forward(
    prediction: Tensor, target: Tensor, head: Tensor, bias: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(mean KL in fp32, x̄ in the dtype of x or None) of x, t [N, d] and W [vocabulary, d]."""
    N, vocabulary = prediction.shape[0], head.shape[0]
    W = head.to(prediction.dtype)
    b = None if bias is None else bias.to(prediction.dtype)
    size = max(LOGITS // max(vocabulary, 1), 1)
    total = torch.zeros((), device=prediction.device)
    grad = (
        torch.zeros_like(prediction, memory_format=torch.contiguous_format) if need_grad else None
    )
    scale = torch.full((), 1 / max(N, 1), device=prediction.device)

    def logits(rows: Tensor) -> Tensor:
        return addmm(b, rows, W.t(), W.dtype)

    for first in range(0, N, size):
        part = slice(first, first + size)
        q, p = logits(prediction[part]), logits(target[part].to(prediction.dtype))
        mean, norm_q, norm_p = kl_forward(q, p)
        total += mean * (q.shape[0] / N)
        if grad is not None:
            kl_gradient(scale, q, p, norm_q, norm_p, q)
            grad[part] = mm(q, W, prediction.dtype)
        del q, p  # before the next chunk's
    return total, grad
