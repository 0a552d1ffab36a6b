"""Routes the operations through the Triton kernels, in the interpreter where there is no GPU.

TRITON_INTERPRET is read when a kernel is decorated, so these tests need a process of their own:
``TRITON_INTERPRET=1 pytest tests/kernels``. Without it and without a GPU they are skipped.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The public operations computed by the Triton launchers on CPU tensors."""
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from spd_fast import backends
    from spd_fast.kernels import primitives
    from spd_fast.ops import _fused

    monkeypatch.setattr(_fused, "GPU_DEVICES", ("cpu",))
    monkeypatch.setattr(backends, "resolve", lambda *_: "triton")
    monkeypatch.setattr(_fused, "load", lambda _: None)
    monkeypatch.setattr(_fused, "kernel", lambda name, _: primitives.TABLE[name])
    return torch.device("cpu")


@pytest.fixture(params=["small", "in_kernel", "library"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way a shape can be computed, whatever its size."""
    pytest.importorskip("triton")
    from spd_fast.kernels import regimes

    in_kernel = request.param != "library"
    monkeypatch.setattr(regimes, "small", lambda *_: request.param == "small")
    monkeypatch.setattr(regimes, "gate_product_in_kernel", lambda *_: in_kernel)
    monkeypatch.setattr(regimes, "dual_in_kernel", lambda *_: in_kernel)
    # Two pieces of C from 129 components on.
    monkeypatch.setattr(regimes, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(regimes, "NARROW_ELEMENTS", 1)
    return request.param
