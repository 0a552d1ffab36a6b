"""Parity at real sizes by the 2× rule, repeatability, memory, addressing, integration.

``place`` is a GPU with real sizes (marker gpu), or the interpreter with small ones: what a test
does has then run before it meets a device. The tests of the device itself have no such double.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_fast.ops import (
    MaskRecipe,
    Penalty,
    RandomSource,
    component_embedding,
    component_linear,
    divergence,
    embedding_inner,
    faithfulness,
    gate,
    importances,
    linear_kl,
    make_key,
    uniform,
)
from spd_fast.ops.random import uniform_column
from tests.kernels import every_kernel

ROOT = Path(__file__).parent.parent.parent
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu = pytest.mark.usefixtures("_gpu")
SITE = {"draw": 2, "site": 3, "row_offset": 1000}
# What a result may be off in norm, whatever the eager error is: half a step of its dtype.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-9}


@pytest.fixture(params=[pytest.param("gpu", marks=on_a_gpu)])
def _gpu() -> None:
    """Marks a test that only a device can run."""


@dataclass(frozen=True)
class Place:
    """Where the tests compute, and how much of it."""

    device: str
    real: bool

    def size(self, real: int, small: int) -> int:
        return real if self.real else small


@pytest.fixture(params=[pytest.param("gpu", marks=on_a_gpu), "interpreter"])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "gpu":
        return Place("cuda", True)
    request.getfixturevalue("triton_ops")
    return Place("cpu", False)


@pytest.fixture(params=[(r, d) for r in every_kernel.REGIMES for d in every_kernel.DTYPES], ids=str)
def regime_and_dtype(
    request: pytest.FixtureRequest, place: Place, monkeypatch: pytest.MonkeyPatch
) -> torch.dtype:
    """Every regime whatever the size, the large ones in several chunks, in every dtype; in the
    interpreter one of each product's place."""
    name, dtype = request.param
    if not place.real and request.param not in (
        ("large", torch.bfloat16), ("library", torch.float32)
    ):  # fmt: skip
        pytest.skip("a device's")
    from spd_fast.kernels import regimes

    for setting, value in every_kernel.REGIMES[name].items():
        monkeypatch.setattr(regimes, setting, value)
    return dtype


@pytest.fixture
def matmul_precision() -> Iterator[Callable[[str], None]]:
    """torch's setting for fp32 products, put back afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def inputs(N: int, d_in: int, C: int, d_out: int, H: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    return {
        "x": normal(N, d_in), "V": normal(d_in, C, scale=d_in**-0.5),
        "U": normal(C, d_out, scale=C**-0.5), "W0": normal(C, 1, H), "b0": normal(C, H, scale=0.5),
        "W1": normal(C, H, 1, scale=H**-0.5), "b1": normal(C, 1, scale=0.5),
        "weight": normal(d_out, d_in, scale=d_in**-0.5), "bias": normal(d_out),
    }  # fmt: skip


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def layer(t: dict[str, Tensor], backend: str, key: Tensor | None = None) -> Tensor:
    """Gate, stochastic mask with delta, masked sum; a scalar of output and penalty sums."""
    out = gate(t["x"], t["V"], [t["W0"], t["W1"]], [t["b0"], t["b1"]], sigmoid="paper",
               penalty=Penalty("lp", 2.0), backend=backend)  # fmt: skip
    source = RandomSource(make_key(5, 7, t["x"].device) if key is None else key, **SITE)
    y = component_linear(t["x"], t["V"], t["U"], MaskRecipe(out.lower, source, True),
                         weight=t["weight"], bias=t["bias"], inner=out.inner,
                         backend=backend)  # fmt: skip
    return wide(y).square().mean() + 1e-4 * wide(out.penalty_sum).mean()


def streamed(t: dict[str, Tensor], backend: str) -> Tensor:
    """The masked sum of a routed part, h made again from x: nothing of the gate's is kept."""
    routing = torch.arange(t["x"].shape[0], device=t["x"].device) % 3 != 0
    source = RandomSource(make_key(5, 7, t["x"].device), binomial=True, **SITE)
    y = component_linear(t["x"], t["V"], t["U"], MaskRecipe(None, source, True, routing),
                         weight=t["weight"], bias=t["bias"], backend=backend)  # fmt: skip
    return wide(y).square().mean()


Loss = Callable[[dict[str, Tensor], str], Tensor]


def gradients(
    t: dict[str, Tensor], backend: str, dtype: torch.dtype, loss: Loss = layer,
    fixed: tuple[str, ...] = ("weight",),
) -> dict[str, Tensor]:  # fmt: skip
    """The loss and its gradient in every input it depends on."""
    leaves = {
        k: v.to(dtype).requires_grad_(k not in fixed) if v.is_floating_point() else v
        for k, v in t.items()
    }
    value = loss(leaves, backend)
    names = [k for k, v in leaves.items() if v.requires_grad]
    grads = torch.autograd.grad(value, [leaves[k] for k in names], allow_unused=True)
    named = {k: g for k, g in zip(names, grads, strict=True) if g is not None}
    return {"loss": value.detach(), **named}


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def assert_right(
    t: dict[str, Tensor], dtype: torch.dtype, loss: Loss = layer,
    fixed: tuple[str, ...] = ("weight",),
) -> None:  # fmt: skip
    """Every error of ours is at most twice that of the eager reference in the same dtype."""
    t = {k: v.to(dtype) if v.is_floating_point() else v for k, v in t.items()}
    got, eager = (gradients(t, b, dtype, loss, fixed) for b in ("triton", "reference"))
    truth = gradients(t, "reference", torch.float64, loss, fixed)
    assert got.keys() == truth.keys()
    for name in truth:
        allowed = 2 * relative(eager[name], truth[name]) + FLOOR[dtype]
        error = relative(got[name], truth[name])
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


# Real: toys, a wide gate, a transformer's layer, the bar's own workload. Small: tails everywhere.
REAL = [
    (4096, 5, 20, 2, 16), (2048, 1000, 100, 50, 16), (2048, 100, 500, 17, 128),
    (1024, 768, 1024, 768, 16), (8192, 768, 4096, 3072, 16),
]  # fmt: skip
SMALL = [(37, 5, 20, 2, 4), (9, 40, 33, 17, 20)]
MODES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("index", range(len(REAL)))
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_twice_the_eager_one(index, mode, place, matmul_precision):
    if not place.real and (index >= len(SMALL) or mode == "tf32"):
        pytest.skip("a real size, or a matrix unit")
    matmul_precision("high" if mode == "tf32" else "highest")
    shape = REAL[index] if place.real else SMALL[index]
    assert_right(inputs(*shape, place.device), MODES[mode])


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_error_of_a_streamed_routed_layer_is_at_most_twice_the_eager_one(mode, place):
    shape = REAL[3] if place.real else SMALL[0]
    of_the_sum = ("x", "V", "U", "weight", "bias")
    t = {k: v for k, v in inputs(*shape, place.device).items() if k in of_the_sum}
    assert_right(t, MODES[mode], streamed)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_error_of_importances_is_at_most_twice_the_eager_one(mode, place):
    generator = torch.Generator(place.device).manual_seed(0)
    s = torch.randn(place.size(8192, 37), place.size(4096, 33), generator=generator,
                    device=place.device)  # fmt: skip

    def loss(t: dict[str, Tensor], backend: str) -> Tensor:
        out = importances(t["s"], sigmoid="2026", penalty=Penalty("lp", 2.0), backend=backend)
        return wide(out.lower).square().mean() + wide(out.penalty_sum).mean()

    assert_right({"s": s}, MODES[mode], loss)


def tokens_of(place: Place, rows: int, vocabulary: int) -> Tensor:
    """Some tokens often, some never."""
    generator = torch.Generator(place.device).manual_seed(0)
    drawn = torch.rand(rows, generator=generator, device=place.device)
    return (drawn**4 * vocabulary).long()


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_error_of_a_masked_embedding_is_at_most_twice_the_eager_one(mode, place):
    N, vocabulary, C, d = (4096, 50257, 512, 768) if place.real else (33, 50, 20, 18)
    generator = torch.Generator(place.device).manual_seed(1)
    t = {
        "tokens": tokens_of(place, N, vocabulary),
        "V": torch.randn(vocabulary, C, generator=generator, device=place.device),
        "U": torch.randn(C, d, generator=generator, device=place.device) * C**-0.5,
        "weight": torch.randn(vocabulary, d, generator=generator, device=place.device),
    }

    def loss(t: dict[str, Tensor], backend: str) -> Tensor:
        source = RandomSource(make_key(5, 7, place.device), **SITE)
        y = component_embedding(t["tokens"], t["V"], t["U"], MaskRecipe(None, source, True),
                                weight=t["weight"], backend=backend)  # fmt: skip
        return wide(y).square().mean()

    assert_right(t, MODES[mode], loss)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_error_of_a_chunked_linear_kl_is_at_most_twice_the_eager_one(mode, place, monkeypatch):
    from spd_fast.kernels import linear_kl as kernels

    monkeypatch.setattr(kernels, "LOGITS", place.size(2**24, 300))
    N, d, vocabulary = (1024, 768, 50257) if place.real else (9, 16, 67)
    generator = torch.Generator(place.device).manual_seed(1)
    x, target = torch.randn(2, N, d, generator=generator, device=place.device).unbind()
    head = torch.randn(vocabulary, d, generator=generator, device=place.device) * d**-0.5

    def loss(t: dict[str, Tensor], backend: str) -> Tensor:
        return linear_kl(t["x"], t["target"], t["head"], backend=backend)

    t = {"x": x, "target": target, "head": head}
    assert_right(t, MODES[mode], loss, ("target", "head"))


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_divergences_are_right_at_a_vocabularys_size(kind, place):
    generator = torch.Generator(place.device).manual_seed(1)
    shape = (place.size(512, 3), place.size(50257, 301))
    q, p = torch.randn(2, *shape, generator=generator, device=place.device).unbind()
    leaf, wide = q.clone().requires_grad_(), q.double().requires_grad_()
    got = torch.autograd.grad(divergence(leaf, p, kind), leaf)[0]
    truth = wide - p.double()
    if kind == "kl":
        truth = torch.softmax(wide, -1) - torch.softmax(p.double(), -1)
    truth = truth * (2 / q.numel() if kind == "mse" else 1 / shape[0])
    assert relative(got, truth) < 1e-5


def test_masks_are_bit_equal_to_the_reference(place):
    from spd_fast.kernels import random

    key = make_key(5, 7, place.device)
    rows, columns = place.size(513, 33), place.size(1027, 35)
    on_cpu = RandomSource(key.cpu(), **SITE)
    got = random.uniform(key, rows, columns, 2, 3, 1000)
    assert torch.equal(got.cpu(), uniform(on_cpu, rows, columns))
    got = random.delta_mask(key, rows, columns, 2, 3, 1000)
    assert torch.equal(got.cpu(), uniform_column(on_cpu, rows, columns))


# More than 128 components: with chunks as small as they get, more than one.
CHUNKED = (3, 2, 130, 2, 1)


def test_repeats_of_the_layer_are_bit_equal(regime_and_dtype, place):
    dtype = regime_and_dtype
    t = inputs(*((1000, 96, 512, 160, 8) if place.real else CHUNKED), place.device)
    first = gradients(t, "triton", dtype)
    for _ in range(place.size(100, 1)):
        again = gradients(t, "triton", dtype)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_repeats_of_a_streamed_layer_are_bit_equal(regime_and_dtype, place):
    dtype = regime_and_dtype
    t = inputs(*((1000, 96, 512, 160, 8) if place.real else CHUNKED), place.device)
    t = {k: t[k] for k in ("x", "V", "U", "weight", "bias")}
    first = gradients(t, "triton", dtype, streamed)
    for _ in range(place.size(100, 1)):
        again = gradients(t, "triton", dtype, streamed)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_repeats_of_every_kernel_are_bit_equal(regime_and_dtype, place):
    dtype = regime_and_dtype
    sizes = every_kernel.SIZES if place.real else every_kernel.SMALL_SIZES
    first = every_kernel.run(place.device, dtype, sizes)
    assert first.isfinite()
    for _ in range(place.size(100, 0)):
        assert torch.equal(every_kernel.run(place.device, dtype, sizes), first)


def test_error_in_every_regime_is_at_most_twice_the_eager_one(regime_and_dtype, place):
    shape = (1000, 96, 512, 160, 8) if place.real else CHUNKED
    assert_right(inputs(*shape, place.device), regime_and_dtype)


def test_repeats_of_an_embeddings_gradient_are_bit_equal(place):
    rows, vocabulary, C = (16384, 50257, 256) if place.real else (33, 50, 20)
    tokens = tokens_of(place, rows, vocabulary)
    V = torch.randn(vocabulary, C, device=place.device, requires_grad=True)
    grad = torch.randn(rows, C, device=place.device)
    h = embedding_inner(tokens, V, backend="triton")
    first = torch.autograd.grad(h, V, grad, retain_graph=True)[0]
    for _ in range(place.size(100, 1)):
        assert torch.equal(torch.autograd.grad(h, V, grad, retain_graph=True)[0], first)


def test_the_last_rows_are_those_of_a_small_problem(place):
    # On a GPU N · C = 2.29e9: element indices are beyond 31 bits.
    N, C = (70_000, 32_768) if place.real else (70, 36)
    needed = 6 * 2 * N * C  # h, g, ḡ and what their sums and differences pass through, in bf16
    if place.real and (free := torch.cuda.mem_get_info()[0]) < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, has {free / 1e9:.0f}")
    dtype = torch.bfloat16 if place.real else torch.float32
    t = {k: v.to(dtype) for k, v in inputs(N, 16, C, 16, 1, place.device).items()}
    key = make_key(5, 7, place.device)

    def run(rows: slice, offset: int) -> tuple[Tensor, ...]:
        x = t["x"][rows].clone().requires_grad_()
        out = gate(x, t["V"], [t["W0"], t["W1"]], [t["b0"], t["b1"]], sigmoid="2026",
                   backend="triton")  # fmt: skip
        lower = out.lower.detach().requires_grad_()
        recipe = MaskRecipe(lower, RandomSource(key, row_offset=offset))
        y = component_linear(x, t["V"], t["U"], recipe, inner=out.inner, backend="triton")
        x_bar, g_bar = torch.autograd.grad(wide(y).square().sum(), (x, lower))
        return out.lower[-32:].detach(), y[-32:].detach(), x_bar[-32:], g_bar[-32:]

    whole, tail = run(slice(None), 0), run(slice(N - 32, None), N - 32)
    for got, expected in zip(whole, tail, strict=True):
        assert relative(got, expected.double()) < (1e-2 if place.real else 1e-5)


@gpu
@pytest.mark.parametrize("index", [0, 2])
def test_peak_memory_stays_under_the_formula(index):
    from bench import gpu as bench

    work = bench.WORKLOADS[index]
    step = bench.step_of(work, "triton", "cuda")
    step(True)  # the library's workspaces come with its first products
    _, extra = bench._timed(step, True)
    # Blocks of the allocator are whole 2 MiB: some tens of tensors.
    assert extra < bench.ceiling(work) + 64


@gpu
def test_linear_kl_holds_no_logits_in_fp32():
    N, d, vocabulary = 8192, 512, 50257
    x = torch.randn(N, d, device="cuda").bfloat16().requires_grad_()
    t, head = torch.randn(N, d, device="cuda").bfloat16(), torch.randn(vocabulary, d, device="cuda")
    head = head.bfloat16()
    linear_kl(x, t, head, backend="triton").backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_kl(x, t, head, backend="triton").backward()
    torch.cuda.synchronize()
    # Two chunks of 2²⁶ logits in bf16, where [N, vocabulary] in fp32 is 1647 MB.
    assert torch.cuda.max_memory_allocated() - before < 2 * 2 * 2**26 + 64e6


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    t = inputs(256, 32, 64, 48, 4, "cuda:1")
    truth = gradients(t, "reference", torch.float64)["V"]
    assert relative(gradients(t, "triton", torch.float32)["V"], truth) < 1e-4


@gpu
def test_a_stream_that_is_not_the_default_one():
    t = inputs(256, 32, 64, 48, 4, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = gradients(t, "triton", torch.float32)
    stream.synchronize()
    expected = gradients(t, "triton", torch.float32)
    assert all(torch.equal(got[k], expected[k]) for k in got)


@gpu
def test_autocast_computes_in_bf16_with_fp32_gradients():
    t = {k: v.requires_grad_(k != "weight") for k, v in inputs(256, 64, 128, 64, 4, "cuda").items()}
    with torch.autocast("cuda", torch.bfloat16):
        loss = layer(t, "triton")
    names = ["V", "U", "W0"]
    grads = torch.autograd.grad(loss, [t[n] for n in names])
    truth = gradients(t, "reference", torch.float64)
    for name, grad in zip(names, grads, strict=True):
        assert grad.dtype == torch.float32
        assert relative(grad, truth[name]) < 5e-2  # bf16 operands; exact kinks may fall otherwise


@gpu
def test_it_compiles_without_graph_breaks():
    t = {k: v.requires_grad_(k != "weight") for k, v in inputs(256, 64, 128, 64, 4, "cuda").items()}
    key = make_key(5, 7, "cuda")
    expected = torch.autograd.grad(layer(t, "triton", key), t["V"])[0]
    compiled = torch.compile(lambda: layer(t, "triton", key), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(), t["V"])[0], expected)


def record(step: Callable[[], tuple[Tensor, ...]], place: Place) -> tuple[tuple[Tensor, ...], Any]:
    """(results, replay): of a CUDA graph; of the interpreter, the step again over its results."""
    if not place.real:
        results = step()

        def again() -> None:
            for old, new in zip(results, step(), strict=True):
                old.copy_(new)

        return results, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return captured, graph.replay


@pytest.mark.parametrize("shape", [(512, 5, 20, 2, 16), (512, 768, 1024, 512, 16)])
def test_forward_and_backward_are_captured_in_a_graph(shape, regime_and_dtype, place):
    if not place.real and shape[1] == 5:
        pytest.skip("one small shape is enough")
    dtype = regime_and_dtype
    fixed = inputs(*(shape if place.real else CHUNKED), place.device)
    t = {k: v.to(dtype).requires_grad_(k != "weight") for k, v in fixed.items()}
    key = make_key(5, 7, place.device)
    leaves = [v for k, v in t.items() if k != "weight"]

    def step() -> tuple[Tensor, ...]:
        loss = layer(t, "triton", key)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    captured, replay = record(step, place)
    replay()
    before = captured[0].clone()
    key[1] += 1  # a replay reads the key: the next training step's masks
    replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    assert not torch.equal(captured[0], before)


def test_an_autocast_leaves_faithfulness_in_fp32(place):
    t = inputs(1, *((768, 64, 512) if place.real else (13, 7, 11)), 1, place.device)
    leaves = [t["V"].requires_grad_(), t["U"].requires_grad_()]
    found = []
    for enabled in (True, False):
        with torch.autocast(place.device, torch.bfloat16, enabled=enabled):
            loss = faithfulness(*leaves, t["weight"], backend="triton")
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert found[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.without_kernels
def test_a_sum_of_products_keeps_the_digits_of_fp32_where_torch_can(place):
    from spd_fast.kernels import product

    a, b = torch.randn(2, 256, 256, device=place.device).bfloat16().unbind()
    total = torch.randn(256, 256, device=place.device)
    truth = total.double() + a.double() @ b.double()
    got = product.addmm(total, a, b, torch.float32)
    assert got.dtype == torch.float32
    # Before torch 2.8 a product passes through bf16.
    assert relative(got, truth) < (1e-5 if product.widening(a).mm else 2**-8)


def test_the_sanitized_script_launches_every_kernel_of_the_registry(place, monkeypatch):
    from spd_fast.kernels import regimes
    from spd_fast.kernels.registry import cases

    launched = set()
    every_kernel.watch(
        monkeypatch, lambda kernel, *_, **__: launched.add(getattr(kernel, "fn", kernel).__name__)
    )
    sizes = every_kernel.SIZES if place.real else (3, 2, 5, 2, 7)
    # The small regime's own kernel takes the place of the masking kernel at these sizes.
    for settings in every_kernel.REGIMES.values():
        for name, value in settings.items():
            monkeypatch.setattr(regimes, name, value)
        assert every_kernel.run(place.device, sizes=sizes).isfinite()
    assert launched == {getattr(c.kernel, "fn", c.kernel).__name__ for c in cases()}


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (str(p) for p in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )


@gpu
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = [
        # Calls that fail by design (is this pointer a device's?) are no findings.
        sanitizer(), "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no",
        sys.executable, "-m", "tests.kernels.every_kernel",
    ]  # fmt: skip
    # Without torch's pool every tensor has bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "every kernel ran" in done.stdout
