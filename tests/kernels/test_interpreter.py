"""The interpreter's bf16, as conftest.py mends it, is torch's: what the other tests lean on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.configs import launch
from tests.checks import normal

pytestmark = pytest.mark.usefixtures("triton_ops")


@triton.jit
def _product_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, tile.to(out.dtype.element_ty))


@triton.jit
def _round_kernel(a, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(a + at).to(tl.float32).to(out.dtype.element_ty))


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    launch(_round_kernel, values, (1,), values, out, SIZE=values.numel())
    return out


def test_conversions_round_as_torch_does():
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, float("inf"), float("-inf"), 1e-40]
    values = torch.cat([torch.tensor(special), normal(1, 24).float()])
    assert torch.equal(_rounded(values, torch.bfloat16), values.bfloat16())
    assert torch.equal(_rounded(values.bfloat16(), torch.float32), values.bfloat16().float())
    assert _rounded(torch.full((2,), float("nan")), torch.bfloat16).isnan().all()


def test_tile_products_of_bf16_are_those_of_its_values():
    a, b = normal(1, 16, 16).bfloat16(), normal(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    launch(_product_kernel, a, (1,), a, b, out, SIZE=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-6)
