"""Files that are wholly there or not at all."""

from __future__ import annotations

import os

import pytest

from spd_fast import UserError
from spd_fast._files import alone_in, sync_folder, write_bytes


def test_a_file_holds_what_was_written(tmp_path):
    write_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_an_older_file_is_replaced(tmp_path):
    (tmp_path / "a.json").write_bytes(b"an older and longer one")
    write_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_keeps_the_older_file_and_leaves_no_other(tmp_path, monkeypatch, error):
    (tmp_path / "a.json").write_bytes(b"old")

    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_bytes(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.json", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_bytes(path, b"new")
    assert seen == [False]


def test_a_folder_can_be_flushed(tmp_path):
    sync_folder(tmp_path)


def test_a_folder_that_is_missing_cannot_be_flushed(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "none")


fcntl = pytest.importorskip("fcntl")


def test_two_are_not_alone_in_a_folder(tmp_path):
    other = alone_in(tmp_path)
    with alone_in(tmp_path), pytest.raises(UserError, match="another process is working in"):
        other.__enter__()
    with alone_in(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone_in(tmp_path):
        pass
