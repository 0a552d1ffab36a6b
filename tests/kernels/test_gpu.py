"""On a GPU: parity at real sizes by the 2× rule, repeatability, memory, addressing, integration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spd_fast.ops import (
    MaskRecipe,
    Penalty,
    RandomSource,
    component_linear,
    divergence,
    gate,
    make_key,
    uniform,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(4096, 5, 20, 2, 16), (2048, 1000, 100, 50, 16), (1024, 768, 1024, 768, 16)]
SITE = {"draw": 2, "site": 3, "row_offset": 1000}


def inputs(
    N: int, d_in: int, C: int, d_out: int, H: int, device: str = "cuda"
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    return {
        "x": normal(N, d_in), "V": normal(d_in, C, scale=d_in**-0.5),
        "U": normal(C, d_out, scale=C**-0.5), "W0": normal(C, 1, H), "b0": normal(C, H, scale=0.5),
        "W1": normal(C, H, 1, scale=H**-0.5), "b1": normal(C, 1, scale=0.5),
        "weight": normal(d_out, d_in, scale=d_in**-0.5), "bias": normal(d_out),
    }  # fmt: skip


def layer(t: dict[str, Tensor], backend: str, delta: bool = True) -> Tensor:
    """Gate, stochastic mask with delta, masked sum; a scalar of output and penalty sums."""
    out = gate(t["x"], t["V"], [t["W0"], t["W1"]], [t["b0"], t["b1"]], sigmoid="paper",
               penalty=Penalty("lp", 2.0), backend=backend)  # fmt: skip
    source = RandomSource(make_key(5, 7, t["x"].device), **SITE)
    recipe = MaskRecipe(out.lower, source, delta or None)
    y = component_linear(t["x"], t["V"], t["U"], recipe, weight=t["weight"], bias=t["bias"],
                         inner=out.inner, backend=backend)  # fmt: skip
    return y.square().mean() + 1e-4 * out.penalty_sum.mean()


def gradients(t: dict[str, Tensor], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {k: v.to(dtype).requires_grad_(k != "weight") for k, v in t.items()}
    loss = layer(leaves, backend)
    names = [k for k in leaves if k != "weight"]
    grads = torch.autograd.grad(loss, [leaves[k] for k in names])
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16"])
def test_error_is_at_most_twice_the_eager_one(shape, mode, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", mode == "tf32")
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    t = {k: v.to(dtype) for k, v in inputs(*shape).items()}
    got, eager = gradients(t, "triton", dtype), gradients(t, "reference", dtype)
    truth = gradients(t, "reference", torch.float64)
    for name in truth:
        allowed = 2 * relative(eager[name], truth[name]) + 1e-6
        assert relative(got[name], truth[name]) <= allowed, name


def test_masks_are_bit_equal_to_the_reference():
    from spd_fast.kernels import random

    key = make_key(5, 7, "cuda")
    got = random.uniform(key, 513, 1027, 2, 3, 1000)
    assert torch.equal(got.cpu(), uniform(RandomSource(key.cpu(), **SITE), 513, 1027))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_repeats_are_bit_equal(dtype):
    t = inputs(1000, 96, 512, 160, 8)
    first = gradients(t, "triton", dtype)
    for _ in range(100):
        again = gradients(t, "triton", dtype)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_peak_memory_stays_under_the_formula():
    N, d_in, C, d_out = 4096, 512, 32768, 512
    t = {k: v.bfloat16() for k, v in inputs(N, d_in, C, d_out, 16).items()}
    gradients(t, "triton", torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(t, "triton", torch.bfloat16)
    from spd_fast.kernels.regimes import CHUNK_ELEMENTS

    # h, g and their two gradients; three chunk buffers; the parameters' gradients, copied once;
    # the gate's partial sums in fp32 (tiles of 32 rows at least) of one chunk.
    parameters = sum(v.numel() for v in t.values())
    partial = 4 * (N // 32) * (3 * 16 + 1) * min(C, CHUNK_ELEMENTS // N)
    ceiling = 2 * (4 * N * C + 3 * CHUNK_ELEMENTS + 4 * N * (d_in + d_out)) + 12 * parameters
    assert torch.cuda.max_memory_allocated() - before < ceiling + partial


def test_addresses_beyond_two_to_the_31():
    N, C = 70_000, 32_768  # N · C = 2.29e9
    x = torch.randn(N, 16, device="cuda", dtype=torch.bfloat16)
    V = torch.randn(16, C, device="cuda", dtype=torch.bfloat16) / 4
    U = torch.randn(C, 16, device="cuda", dtype=torch.bfloat16) / 128
    gates = [torch.randn(C, 1, 1, device="cuda")], [torch.randn(C, 1, device="cuda")]
    out = gate(x, V, *gates, sigmoid="2026", backend="triton")
    tail = gate(x[-64:], V, *gates, sigmoid="2026", backend="triton")
    assert torch.equal(out.lower[-64:], tail.lower)
    y = component_linear(x, V, U, MaskRecipe(out.lower), inner=out.inner, backend="triton")
    last = component_linear(x[-64:], V, U, MaskRecipe(tail.lower), inner=tail.inner,
                            backend="triton")  # fmt: skip
    assert relative(y[-64:], last.double()) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    t = inputs(256, 32, 64, 48, 4, "cuda:1")
    truth = gradients(t, "reference", torch.float64)["V"]
    assert relative(gradients(t, "triton", torch.float32)["V"], truth) < 1e-4


def test_a_stream_that_is_not_the_default_one():
    t = inputs(256, 32, 64, 48, 4)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = gradients(t, "triton", torch.float32)
    stream.synchronize()
    expected = gradients(t, "triton", torch.float32)
    assert all(torch.equal(got[k], expected[k]) for k in got)


def test_autocast_computes_in_bf16_with_fp32_gradients():
    t = {k: v.requires_grad_(k != "weight") for k, v in inputs(256, 64, 128, 64, 4).items()}
    with torch.autocast("cuda", torch.bfloat16):
        loss = layer(t, "triton")
    grads = torch.autograd.grad(loss, [t["V"], t["U"], t["W0"]])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_compiles_without_graph_breaks():
    t = {k: v.requires_grad_(k != "weight") for k, v in inputs(256, 64, 128, 64, 4).items()}
    expected = torch.autograd.grad(layer(t, "triton"), t["V"])[0]
    compiled = torch.compile(lambda: layer(t, "triton"), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(), t["V"])[0], expected)


def test_forward_and_backward_are_captured_in_a_graph():
    t = {k: v.requires_grad_(k != "weight") for k, v in inputs(512, 64, 128, 64, 4).items()}
    key = make_key(5, 7, "cuda")

    def step() -> Tensor:
        recipe = MaskRecipe(None, RandomSource(key, **SITE))
        y = component_linear(t["x"], t["V"], t["U"], recipe, backend="triton")
        return torch.autograd.grad(y.square().mean(), t["V"])[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    key[1] += 1  # a replay reads the key: the next training step's masks
    graph.replay()
    torch.testing.assert_close(out, step())


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_divergences_at_a_vocabularys_size(kind):
    q = torch.randn(64, 50257, device="cuda", requires_grad=True)
    p = torch.randn(64, 50257, device="cuda")
    got = torch.autograd.grad(divergence(q, p, kind), q)[0]
    wide = q.detach().double().requires_grad_()
    truth = torch.autograd.grad(divergence(wide, p.double(), kind), wide)[0]
    assert relative(got, truth) < 1e-5
