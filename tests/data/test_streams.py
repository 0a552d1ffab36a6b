"""Iterables and packed rows as batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from spd_fast.data import PackedTokens, StreamBatches, dataset_rows
from spd_fast.errors import UserError

LIST = [torch.full((2,), i) for i in range(4)]


def first(batches, steps):
    return [batches(step)[0].item() for step in steps]


def test_batches_come_in_order_and_again_from_the_start():
    assert first(StreamBatches(LIST), range(10)) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_resumed_run_skips_to_its_position():
    assert first(StreamBatches(LIST), [6, 7, 8]) == [2, 3, 0]


def test_an_earlier_batch_comes_again():
    assert first(StreamBatches(LIST), [2, 0, 0, 1]) == [2, 0, 0, 1]


def test_a_loader_is_an_iterable():
    loader = DataLoader(torch.arange(6), batch_size=2)
    assert first(StreamBatches(loader), range(4)) == [0, 2, 4, 0]


def test_a_loader_that_cannot_be_resumed_says_so():
    with pytest.warns(UserWarning, match="no resumed run continues exactly"):
        StreamBatches(DataLoader(torch.arange(6), batch_size=2, shuffle=True))


def test_a_shuffled_loader_with_a_generator_resumes():
    def loader():
        generator = torch.Generator().manual_seed(3)
        return DataLoader(torch.arange(6), batch_size=2, shuffle=True, generator=generator)

    whole, resumed = StreamBatches(loader()), StreamBatches(loader())
    expected = [whole(step).tolist() for step in range(7)]
    assert [resumed(step).tolist() for step in (5, 6)] == expected[5:]


def test_a_generator_goes_once():
    batches = StreamBatches(iter(LIST))
    assert first(batches, [0, 0, 1]) == [0, 0, 1]
    with pytest.raises(UserError, match="batch 0 is past"):
        batches(0)
    with pytest.raises(UserError, match="ended after 4 batches"):
        batches(4)


def test_nothing_is_an_error():
    with pytest.raises(UserError, match="no batch"):
        StreamBatches([])(0)


ROWS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11, 12, 13]]


def test_rows_are_laid_end_to_end():
    batches = [b.tolist() for b in PackedTokens(ROWS, 2, 3)]
    assert batches == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]


datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    made = datasets.Dataset.from_dict({"input_ids": ROWS, "text": ["a", "b", "c", "d"]})
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "d"))
    return str(tmp_path / "d")


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_on_disk(folder, streaming):
    rows = dataset_rows(folder, streaming=streaming)
    assert [list(r) for r in rows] == ROWS
    assert [list(r) for r in rows] == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_seed_shuffles_the_same_way_every_time(folder, streaming):
    rows = dataset_rows(folder, streaming=streaming, seed=1)
    once = [list(r) for r in rows]
    assert once == [list(r) for r in rows]
    assert sorted(once) == sorted(ROWS)


def test_a_resumed_stream_goes_on_where_it_was(folder):
    def batches():
        return StreamBatches(PackedTokens(dataset_rows(folder, streaming=True, seed=3), 1, 2))

    whole = batches()
    expected = [whole(step).tolist() for step in range(9)]
    assert batches()(7).tolist() == expected[7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "no split 'trian'; nearest: 'train'"),
        ({"column": "input_id"}, "no column 'input_id'; nearest: 'input_ids'"),
    ],
)
def test_a_wrong_name_is_an_error(folder, options, message):
    with pytest.raises(UserError, match=message):
        dataset_rows(folder, **options)


def test_a_missing_dataset_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no readable dataset"):
        dataset_rows(str(tmp_path / "nothing"))
