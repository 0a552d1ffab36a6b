"""Reconstruction divergences with gradient: squared error, KL(target ‖ masked).

    MSE = Σ (q − p)² / numel                          q̄ = 2 (q − p) / numel
    KL  = mean_n Σ_v P (log P − log Q)                q̄ = (Q − P) / N       P = softmax(p), …

Each reads its operands once forward and once backward and writes the gradient once; nothing of
their size is kept between the two (KL keeps four numbers a row). Forward KL is one pass: with
running maxima, X = Σ e^{p − max p} ((p − max p) − (q − max q)) is rescaled as the softmax sums Z
are, and KL_n = X / Z_p − log Z_p + log Z_q. The softmax of a row is e^{(v − max) − log Z}, of its
norm (max, log Z): kept as one sum, an offset of the logits would cost log Z its digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.configs import Config, launch, pick

# Programs of the squared error at most: their partial sums are added in a fixed order afterwards.
SEGMENTS = 1024


@triton.jit
def squared_error_kernel(a, b, partial, size, BLOCK: tl.constexpr):
    """One strided share of Σ (a − b)²."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    start = program * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    while start < size:
        at = start + tl.arange(0, BLOCK)
        left = tl.load(a + at, mask=at < size, other=0.0).to(tl.float32)
        right = tl.load(b + at, mask=at < size, other=0.0).to(tl.float32)
        total += (left - right) * (left - right)
        start += step
    tl.store(partial + program, tl.sum(total, axis=0))


@triton.jit
def squared_error_backward_kernel(a, b, scale, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(a + at, mask=at < size, other=0.0).to(tl.float32)
    right = tl.load(b + at, mask=at < size, other=0.0).to(tl.float32)
    grad = (left - right) * tl.load(scale)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=at < size)


def mse_forward(prediction: Tensor, target: Tensor) -> Tensor:
    """A scalar in fp32."""
    prediction, target = prediction.contiguous(), target.contiguous()
    size = prediction.numel()
    if size == 0:
        return torch.full((), float("nan"), device=prediction.device)
    partial = torch.empty(0, device=prediction.device)

    def run(config: Config) -> None:
        nonlocal partial
        segments = min(SEGMENTS, triton.cdiv(size, config.blocks["BLOCK"]))
        partial = torch.empty(segments, device=prediction.device)
        launch(squared_error_kernel, prediction, (segments,), prediction, target, partial, size,
               config=config)  # fmt: skip

    run(pick("squared_error", "any", prediction, (size,), run))
    return partial.sum() / size


def mse_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    out = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    prediction, target = prediction.contiguous(), target.contiguous()
    size = prediction.numel()
    scale = grad.float() * (2 / max(size, 1))

    def run(config: Config) -> None:
        grid = (triton.cdiv(size, config.blocks["BLOCK"]),)
        launch(squared_error_backward_kernel, prediction, grid, prediction, target, scale, out,
               size, config=config)  # fmt: skip

    if size:
        run(pick("squared_error", "any", prediction, (size,), run))
    return out


@triton.jit
def kl_kernel(q, q_row, p, p_row, loss, norm_q, norm_p, width, BLOCK: tl.constexpr):
    """One row: KL(P ‖ Q), and the norms of q and p."""
    row = tl.program_id(0).to(tl.int64)
    # Each lane carries its own maxima and sums: one exchange between threads at the end.
    max_q = tl.full((BLOCK,), float("-inf"), tl.float32)
    max_p = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum_q = tl.zeros((BLOCK,), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    # Σ e^{p − max_p} ((p − max_p) − (q − max_q)): from the maxima, so that offsets cost no digits.
    # p = −∞ adds nothing, whatever q is; q = −∞ below another p makes it ∞, as it makes the KL.
    cross = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < width
        vq = tl.load(q + row * q_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        vp = tl.load(p + row * p_row + at, mask=inside, other=float("-inf")).to(tl.float32)
        new_q, new_p = tl.maximum(max_q, vq), tl.maximum(max_p, vp)
        # A lane that has seen only −inf keeps zero sums instead of ∞ − ∞.
        moved_q = tl.where(max_q > float("-inf"), max_q - new_q, 0.0)
        moved_p = tl.where(max_p > float("-inf"), max_p - new_p, 0.0)
        # Asked for equality, because a NaN has to come through.
        down_q = tl.where(vq == float("-inf"), vq, vq - new_q)
        down_p = tl.where(vp == float("-inf"), vp, vp - new_p)
        weight = tl.exp(down_p)
        scale = tl.exp(moved_p)
        term = tl.where(vp == float("-inf"), 0.0, weight * (down_p - down_q))
        cross = scale * (cross + sum_p * (moved_p - moved_q)) + term
        sum_p = sum_p * scale + weight
        sum_q = sum_q * tl.exp(moved_q) + tl.exp(down_q)
        max_q, max_p = new_q, new_p
    top_q, top_p = tl.max(max_q, axis=0), tl.max(max_p, axis=0)
    moved_q = tl.where(max_q > float("-inf"), max_q - top_q, 0.0)
    moved_p = tl.where(max_p > float("-inf"), max_p - top_p, 0.0)
    lanes_p = tl.where(max_p > float("-inf"), tl.exp(moved_p), 0.0)
    lanes_q = tl.where(max_q > float("-inf"), tl.exp(moved_q), 0.0)
    z_p, z_q = tl.sum(sum_p * lanes_p, axis=0), tl.sum(sum_q * lanes_q, axis=0)
    apart = tl.sum(lanes_p * (cross + sum_p * (moved_p - moved_q)), axis=0) / z_p
    log_q, log_p = tl.log(z_q), tl.log(z_p)
    tl.store(loss + row, apart - log_p + log_q)
    tl.store(norm_q + 2 * row, top_q)
    tl.store(norm_q + 2 * row + 1, log_q)
    tl.store(norm_p + 2 * row, top_p)
    tl.store(norm_p + 2 * row + 1, log_p)


@triton.jit
def kl_backward_kernel(q, q_row, p, p_row, norm_q, norm_p, scale, out, width, BLOCK: tl.constexpr):
    """(Q − P) · scale; ``out`` may be q."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    vq = tl.load(q + row * q_row + at, mask=inside, other=0.0).to(tl.float32)
    vp = tl.load(p + row * p_row + at, mask=inside, other=0.0).to(tl.float32)
    q_of = tl.exp((vq - tl.load(norm_q + 2 * row)) - tl.load(norm_q + 2 * row + 1))
    p_of = tl.exp((vp - tl.load(norm_p + 2 * row)) - tl.load(norm_p + 2 * row + 1))
    grad = (q_of - p_of) * tl.load(scale)
    tl.store(out + row * width + at, grad.to(out.dtype.element_ty), mask=inside)


def _rows(logits: Tensor) -> Tensor:
    """[positions, vocabulary] with unit column stride."""
    flat = logits.reshape(-1, logits.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def kl_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean KL in fp32, norm of each row of the prediction [N, 2], of the target [N, 2])."""
    q, p = _rows(prediction), _rows(target)
    N, width = q.shape
    loss = torch.zeros(N, device=q.device)
    norm_q, norm_p = torch.zeros(2, N, 2, device=q.device).unbind()

    def run(config: Config) -> None:
        launch(kl_kernel, q, (N,), q, q.stride(0), p, p.stride(0), loss, norm_q, norm_p, width,
               config=config)  # fmt: skip

    if N and width:
        run(pick("kl", "any", q, (N, width), run))
    return loss.sum() / max(N, 1), norm_q, norm_p


def kl_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, norm_q: Tensor, norm_p: Tensor
) -> Tensor:
    """q̄ in the shape and dtype of ``prediction``."""
    q, p = _rows(prediction), _rows(target)
    out = torch.empty(prediction.shape, dtype=prediction.dtype, device=q.device)
    kl_gradient(grad.float() / max(q.shape[0], 1), q, p, norm_q, norm_p, out)
    return out


def kl_gradient(
    scale: Tensor, q: Tensor, p: Tensor, norm_q: Tensor, norm_p: Tensor, out: Tensor
) -> None:
    """(Q − P) · scale [N, width] into ``out``, which may be q."""
    N, width = q.shape

    def run(config: Config, out: Tensor = out) -> None:
        grid = (N, triton.cdiv(width, config.blocks["BLOCK"]))
        launch(kl_backward_kernel, q, grid, q, q.stride(0), p, p.stride(0), norm_q, norm_p, scale,
               out, width, config=config)  # fmt: skip

    if N and width:
        run(pick("kl", "any", q, (N, width), lambda c: run(c, torch.empty_like(out))))
