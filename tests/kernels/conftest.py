"""Routes the operations through the Triton kernels, in the interpreter where there is no GPU.

TRITON_INTERPRET is read when a kernel is decorated, so these tests need a process of their own:
``TRITON_INTERPRET=1 pytest tests/kernels``. Without it and without a GPU they are skipped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

COMPUTED = pytest.StashKey[list[str]]()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def bf16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round to bf16 and multiply bf16 tiles as the hardware does.

    It holds bf16 as its 16 bits: its own tile product multiplies those bits as integers, and its
    conversion from fp32 cuts digits off where a GPU rounds to nearest even. Kernels stay as they
    are; products are taken of the exact fp32 values and accumulate in fp32.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return handle(widened(src.data), target)
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return handle(values.view(torch.uint16).numpy(), target)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            return handle(np.matmul(widened(a.data), widened(b.data)) + d.data, d.dtype.scalar)
        return dot(self, a, b, d, *options)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)


def _resolve(backend: str | None, *_: Any) -> str:
    return "reference" if backend == "reference" else "triton"


def _noted(computed: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        computed.append(name)
        return function(*args, **options)

    return run


def _no_extension(name: str) -> Callable[..., Any]:
    raise AssertionError(f"{name} was given to the C++ extension")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test of the Triton backend fails where something else computed its results."""
    yield
    nothing = COMPUTED in item.stash and not item.stash[COMPUTED]
    if nothing and item.get_closest_marker("without_kernels") is None:
        pytest.fail("no Triton kernel was launched, nor a primitive of that backend run")


@pytest.fixture
def triton_ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The public operations computed by the Triton launchers on CPU tensors; a test in which no
    kernel and no primitive of theirs ran fails, unless it is marked ``without_kernels``."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    bf16_as_on_a_gpu(monkeypatch)
    from triton.runtime.interpreter import InterpretedFunction

    from spd_fast import backends
    from spd_fast.kernels import primitives
    from spd_fast.ops import _fused

    computed = request.node.stash[COMPUTED] = []
    launch = _noted(computed, "launch", InterpretedFunction.run)
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    monkeypatch.setattr(_fused, "GPU_DEVICES", ("cpu",))
    monkeypatch.setattr(backends, "resolve", _resolve)
    monkeypatch.setattr(_fused, "load", lambda _: None)
    monkeypatch.setattr(_fused, "_extension_function", _no_extension)
    monkeypatch.setattr(
        _fused, "kernel", lambda name, _: _noted(computed, name, primitives.TABLE[name])
    )
    return torch.device("cpu")


@pytest.fixture(params=["small", "in_kernel", "library"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way a shape can be computed, whatever its size."""
    pytest.importorskip("triton")
    from spd_fast.kernels import regimes

    in_kernel = request.param != "library"
    monkeypatch.setattr(regimes, "small", lambda *_: request.param == "small")
    monkeypatch.setattr(regimes, "gate_product_in_kernel", lambda *_: in_kernel)
    monkeypatch.setattr(regimes, "mask_product_in_kernel", lambda *_: in_kernel)
    monkeypatch.setattr(regimes, "dual_in_kernel", lambda *_: in_kernel)
    # Two pieces of C from 129 components on.
    monkeypatch.setattr(regimes, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(regimes, "NARROW_ELEMENTS", 1)
    return request.param
