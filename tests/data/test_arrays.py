"""Rows of arrays as batches: every row once an epoch, at a position that follows from the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spd_fast.data import ArrayBatches, load_tokens
from spd_fast.data.arrays import check_range
from spd_fast.errors import UserError

ROWS = np.arange(60, dtype=np.uint16).reshape(10, 6)


def seen(batches, steps):
    return [tuple(row) for step in range(steps) for row in batches(step).tolist()]


def test_an_epoch_shows_every_row_once():
    rows = seen(ArrayBatches(ROWS, 2), 5)
    assert sorted(rows) == [tuple(row) for row in ROWS.tolist()]
    assert rows != sorted(rows)


def test_epochs_have_orders_of_their_own():
    rows = seen(ArrayBatches(ROWS, 2), 10)
    assert sorted(rows[:10]) == sorted(rows[10:])
    assert rows[:10] != rows[10:]


def test_a_batch_may_lie_across_epochs():
    rows = seen(ArrayBatches(ROWS, 4), 5)
    assert sorted(rows[:10]) == sorted(rows[10:])


def test_a_batch_follows_from_its_step_alone():
    once, again = ArrayBatches(ROWS, 3, seed=7), ArrayBatches(ROWS, 3, seed=7)
    for step in (9, 2, 5):
        assert torch.equal(once(step), again(step))


@pytest.mark.parametrize("change", [{"seed": 1}, {"stream": "evaluate"}])
def test_seed_and_stream_change_the_order(change):
    assert seen(ArrayBatches(ROWS, 2), 5) != seen(ArrayBatches(ROWS, 2, **change), 5)


def test_unshuffled_rows_keep_their_order():
    assert seen(ArrayBatches(ROWS, 2, shuffle=False), 5) == [tuple(r) for r in ROWS.tolist()]


def test_long_rows_are_cut():
    batches = ArrayBatches(ROWS, 4, length=2, shuffle=False)
    assert len(batches) == 30
    assert batches(0).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(ArrayBatches(ROWS, 4, length=4)) == 10


def test_a_stream_is_cut_into_rows():
    batches = ArrayBatches(ROWS.reshape(-1)[:-1], 2, length=7, shuffle=False)
    assert len(batches) == 8
    assert batches(1).tolist() == [[*range(14, 21)], [*range(21, 28)]]


def test_token_ids_are_int64():
    assert ArrayBatches(ROWS, 2)(0).dtype == torch.int64
    assert ArrayBatches(torch.zeros(4, 3, dtype=torch.int32), 2)(0).dtype == torch.int64


def test_tensors_of_floats_stay_what_they_are():
    x = torch.randn(6, 3, 2)
    batch = ArrayBatches(x, 6, shuffle=False)(0)
    assert torch.equal(batch, x)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS.reshape(-1), {}, "needs the length of a sequence"),
        (ROWS, {"length": 7}, "data.length is 7, but the rows have 6 positions"),
        (ROWS[:1], {}, "1 sequences do not fill a batch of 2"),
        (ROWS.tolist(), {}, "an array or a tensor, got a list"),
        (ROWS, {"length": 0}, "must be at least 1, got 2 and 0"),
    ],
)
def test_what_makes_no_batches_is_an_error(rows, options, message):
    with pytest.raises(UserError, match=message):
        ArrayBatches(rows, 2, **options)


def test_npy_files_are_memory_mapped(tmp_path):
    np.save(tmp_path / "t.npy", ROWS)
    tokens = load_tokens(tmp_path / "t.npy")
    assert isinstance(tokens, np.memmap)
    assert np.array_equal(tokens, ROWS)


def test_bin_files_are_memory_mapped(tmp_path):
    ROWS.astype(np.uint32).tofile(tmp_path / "t.bin")
    tokens = load_tokens(tmp_path / "t.bin", "uint32")
    assert isinstance(tokens, np.memmap)
    assert np.array_equal(tokens, ROWS.reshape(-1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"1 2 3", "must be an .npy or a .bin"),
        ("t.npy", b"no array", "no readable .npy array"),
        ("t.bin", b"odd", "3 bytes, which are no whole number of uint16"),
        ("t.bin", b"", "0 bytes"),
    ],
)
def test_what_is_no_token_file_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokens(tmp_path / name)


def test_a_missing_token_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no token file"):
        load_tokens(tmp_path / "t.npy")


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2, 2), int), np.zeros(0, int)])
def test_arrays_that_are_no_tokens_are_an_error(tmp_path, array):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(UserError, match="need"):
        load_tokens(tmp_path / "t.npy")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "t.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="no readable"):
        load_tokens(tmp_path / "t.npy")


def test_a_token_out_of_range_is_named_with_its_place():
    with pytest.raises(UserError, match=r"token 30 at row 5, position 0, .* vocabulary has 30"):
        check_range(ROWS, 30, "t.npy")
    with pytest.raises(UserError, match="token 30 at position 30"):
        check_range(ROWS.reshape(-1), 30, "t.bin")
    check_range(ROWS, 60, "t.npy")
