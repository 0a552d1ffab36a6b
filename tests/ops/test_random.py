"""The counter-based random numbers against Philox in Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from spd_fast.ops import RandomSource, make_key, philox_4x32, uniform
from spd_fast.ops.random import uniform_column
from tests import oracle
from tests.conftest import needs_extension

words = st.integers(0, 2**32 - 1)

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(counter: list[int], key: list[int]) -> list[int]:
    tensors = tuple(torch.tensor([word]) for word in counter)
    return [int(word) for word in philox_4x32(tensors, torch.tensor(key))]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(counter, key) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_published_answers(counter, key, answer):
    assert oracle.philox_4x32(tuple(counter), tuple(key)) == answer


@given(st.lists(words, min_size=4, max_size=4), st.lists(words, min_size=2, max_size=2))
def test_philox_is_the_oracles_for_any_counter_and_key(counter, key):
    assert philox(counter, key) == oracle.philox_4x32(tuple(counter), tuple(key))


@given(
    seed=words, step=words, draw=words, site=words, offset=st.integers(0, 2**32 - 4), first=words
)
def test_uniform_follows_the_counter_layout(seed, step, draw, site, offset, first):
    source = RandomSource(make_key(seed, step), draw, site, offset)
    truth = oracle.uniforms(seed, step, draw, site, range(offset, offset + 3), range(6))
    assert torch.equal(uniform(source, 3, 6, torch.float64), truth)


@given(rows=st.integers(0, 9), columns=st.integers(0, 9), seed=words)
def test_uniform_is_in_the_half_open_unit_interval(rows, columns, seed):
    u = uniform(RandomSource(make_key(seed, 0)), rows, columns)
    assert u.shape == (rows, columns)
    assert ((u >= 0) & (u < 1)).all()


@given(seed=words, step=words)
def test_uniform_is_a_function_of_the_source_alone(seed, step):
    first = uniform(RandomSource(make_key(seed, step), 1, 2), 5, 7)
    torch.rand(3)
    assert torch.equal(first, uniform(RandomSource(make_key(seed, step), 1, 2), 5, 7))


@given(rows=st.integers(1, 9), split=st.integers(0, 9), columns=st.integers(1, 9), offset=words)
def test_tiles_by_row_offset_make_the_whole(rows, split, columns, offset):
    split = min(split, rows)
    key = make_key(5, 6)
    whole = uniform(RandomSource(key, row_offset=offset), rows, columns)
    top = uniform(RandomSource(key, row_offset=offset), split, columns)
    bottom = uniform(RandomSource(key, row_offset=offset + split), rows - split, columns)
    assert torch.equal(torch.cat([top, bottom]), whole)


@pytest.mark.parametrize("columns", range(1, 10))
def test_fewer_columns_are_the_first_of_more(columns):
    source = RandomSource(make_key(1, 2))
    assert torch.equal(uniform(source, 4, columns), uniform(source, 4, 12)[:, :columns])


@pytest.mark.parametrize("column", range(9))
def test_uniform_column_is_that_column_of_uniform(column):
    source = RandomSource(make_key(1, 2), 3, 4, 5)
    assert torch.equal(uniform_column(source, 6, column), uniform(source, 6, 9)[:, column])


@pytest.mark.parametrize("field", ["draw", "site", "row_offset"])
def test_each_part_of_the_counter_changes_the_numbers(field):
    key = make_key(0, 0)
    shifted = uniform(RandomSource(key, **{field: 1}), 4, 4)
    assert not (shifted == uniform(RandomSource(key), 4, 4)).all(dim=1).all()


@pytest.mark.parametrize("key", [make_key(1, 0), make_key(0, 1)])
def test_seed_and_step_change_the_numbers(key):
    zero = uniform(RandomSource(make_key(0, 0)), 4, 4)
    assert not torch.equal(uniform(RandomSource(key), 4, 4), zero)


def test_float32_and_float64_hold_the_same_numbers():
    source = RandomSource(make_key(1, 2))
    single, double = uniform(source, 50, 9), uniform(source, 50, 9, torch.float64)
    assert torch.equal(single.double(), double)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_the_same_numbers_rounded(dtype):
    source = RandomSource(make_key(1, 2))
    assert torch.equal(uniform(source, 50, 9, dtype), uniform(source, 50, 9).to(dtype))


def test_uniform_has_the_moments_of_the_uniform_distribution():
    u = uniform(RandomSource(make_key(3, 0)), 1000, 100, torch.float64)
    # Standard errors for 1e5 numbers: 9e-4 of the mean, 2.4e-4 of the variance.
    assert abs(u.mean().item() - 1 / 2) < 4e-3
    assert abs(u.var().item() - 1 / 12) < 1e-3


def test_seed_and_step_are_taken_modulo_a_word():
    assert torch.equal(make_key(2**32 + 5, -1), make_key(5, 2**32 - 1))


def test_row_numbers_wrap_at_a_word():
    wrapped = uniform(RandomSource(make_key(1, 2), row_offset=2**32 - 2), 4, 5)
    assert torch.equal(wrapped[2:], uniform(RandomSource(make_key(1, 2)), 2, 5))


def test_uniform_on_the_meta_device_has_the_shape():
    source = RandomSource(make_key(0, 0, device="meta"))
    u = uniform(source, 3, 5)
    assert (u.device.type, u.shape, u.dtype) == ("meta", (3, 5), torch.float32)


def test_compiled_uniform_is_bit_equal():
    def draw(key):
        return uniform(RandomSource(key, 1, 2, 3), 5, 7)

    key = make_key(8, 9)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key), draw(key))


@needs_extension
def test_the_extension_draws_the_same_bits():
    from spd_fast import _extension

    key = make_key(11, 12)
    extension = _extension.module().uniform(key, 9, 14, 3, 4, 5, torch.float32)
    assert torch.equal(extension, uniform(RandomSource(key, 3, 4, 5), 9, 14))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_uniform(dtype):
    operation = torch.ops.spd_fast.uniform.default
    library.opcheck(operation, (make_key(8, 9), 1, 2, 3, 5, 7, dtype))
    source = RandomSource(make_key(8, 9), 1, 2, 3)
    assert torch.equal(
        operation(make_key(8, 9), 1, 2, 3, 5, 7, dtype), uniform(source, 5, 7, dtype)
    )


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_columns_give_no_numbers(rows, columns):
    assert uniform(RandomSource(make_key(1, 2)), rows, columns).shape == (rows, columns)


def test_a_key_with_a_stride_is_its_copy():
    key = torch.tensor([[3, 4], [5, 6]])[:, 0]
    got = uniform(RandomSource(key), 5, 7)
    assert torch.equal(got, uniform(RandomSource(make_key(3, 5)), 5, 7))
