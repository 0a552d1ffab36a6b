"""Random sources in Triton: the reference's bits."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import RandomSource, make_key, uniform
from spd_fast.ops.random import uniform_column

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("offset", [0, 2**31 - 3, 2**32 - 2, 2**33 + 5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 70)])
def test_tiles_are_bit_equal_to_the_reference(rows, columns, offset):
    from spd_fast.kernels import random

    key = make_key(2**32 - 5, 2**31 + 9)
    source = RandomSource(key, draw=3, site=2**20, row_offset=offset)
    got = random.uniform(key, rows, columns, 3, 2**20, offset)
    assert torch.equal(got, uniform(source, rows, columns))


@pytest.mark.parametrize("column", [0, 1, 2, 3, 70])
def test_columns_are_bit_equal_to_the_reference(column):
    from spd_fast.kernels import random

    key = make_key(1, 2)
    source = RandomSource(key, draw=3, site=4, row_offset=5)
    assert torch.equal(
        random.delta_mask(key, 300, column, 3, 4, 5), uniform_column(source, 300, column)
    )


def test_a_key_with_gaps_in_memory_is_its_copy():
    from spd_fast.kernels import random

    key = torch.tensor([1, 9, 2, 9])[::2]
    source = RandomSource(key.clone())
    assert torch.equal(random.uniform(key, 5, 7, 0, 0, 0), uniform(source, 5, 7))
    assert torch.equal(random.delta_mask(key, 5, 7, 0, 0, 0), uniform_column(source, 5, 7))
