"""Operands of the tile product."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux alone")
import triton.language as tl  # noqa: E402

from spd_fast.kernels import product  # noqa: E402

pytestmark = [pytest.mark.usefixtures("triton_ops"), pytest.mark.without_kernels]
LARGEST = torch.finfo(torch.float32).max


@triton.jit
def kernel(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, product.as_tf32(tl.load(x + at)))


def rounded(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    kernel[(1,)](x, y, len(x))
    return y


def test_tf32_is_the_nearest_number_of_ten_bits():
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    y = rounded(x)
    assert ((y.view(torch.int32) & 0x1FFF) == 0).all()
    assert ((y - x) / x).abs().max() <= 2**-11
    # Neither up nor down on the whole, as cutting off would be.
    assert abs((y.abs() / x.abs() - 1).mean()) < 2e-5
    tie = torch.tensor([1 + 2.0**-11, 1 + 2.0**-12] * 2)
    assert rounded(tie).tolist() == [1 + 2**-10, 1.0] * 2


def test_tf32_keeps_infinities_nans_and_zeros():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    assert rounded(bits.view(torch.float32)).isnan().all()
    special = torch.tensor([float("inf"), -float("inf"), 0.0, LARGEST])
    assert rounded(special).tolist() == [float("inf"), -float("inf"), 0.0, float("inf")]
