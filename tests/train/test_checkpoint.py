"""Checkpoints: whole or not there, whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spd_fast.errors import UserError
from spd_fast.train.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    numbered_checkpoints,
    prune_checkpoints,
    save_checkpoint,
)
from tests.train.test_trainer import trainer


def checkpoint(step: int, size: int = 4) -> Checkpoint:
    """Every number in it is its step."""
    full = torch.full((size, size), float(step))
    return Checkpoint(step, {"V": full, "U": full + 0}, {"0.exp_avg": full + 0}, "run")


def assert_whole(path: Path | None) -> int:
    """The step of a checkpoint of which nothing is missing or mixed up."""
    assert path is not None
    found = load_checkpoint(path)
    assert path.name == f"step_{found.step}"
    assert sorted(found.model) == ["U", "V"]
    assert list(found.optimizer) == ["0.exp_avg"]
    for tensor in (*found.model.values(), *found.optimizer.values()):
        assert (tensor == found.step).all()
    return found.step


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=2)
    assert path == tmp_path / "step_7"
    found = load_checkpoint(path)
    assert (found.step, found.run) == (7, "run")
    assert assert_whole(path) == 7


def test_a_folder_that_is_missing_is_made(tmp_path):
    save_checkpoint(tmp_path / "some" / "where", checkpoint(1), keep=1)
    assert assert_whole(latest_checkpoint(tmp_path / "some" / "where")) == 1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path, keep):
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step), keep)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {f"step_{n}" for n in (8, 9, 10, 100)[-keep:]}


def test_what_a_kill_left_of_a_removal_goes_with_the_next(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=4)
    (tmp_path / ".step_0.gone").mkdir()
    (tmp_path / ".step_0.gone" / "state.json").touch()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_3", "step_4"]


def test_a_removal_that_is_cut_short_leaves_no_half_under_a_steps_name(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)

    def killed(path, ignore_errors=False):
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spd_fast.train.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=1)
    assert [p.name for p in numbered_checkpoints(tmp_path)] == ["step_2"]
    prune_checkpoints(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]


def test_the_latest_is_the_one_of_most_steps(tmp_path):
    for step in (100, 9):
        save_checkpoint(tmp_path, checkpoint(step), keep=5)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100"


@pytest.mark.parametrize("make", [lambda f: None, lambda f: (f / "step_x").mkdir(parents=True)])
def test_without_checkpoints_there_is_no_latest(tmp_path, make):
    make(tmp_path / "checkpoints")
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, checkpoint(5, size=2), keep=1)
    save_checkpoint(tmp_path, checkpoint(5, size=3), keep=1)
    assert load_checkpoint(tmp_path / "step_5").model["V"].shape == (3, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


def test_what_a_kill_left_behind_does_not_stand_in_the_way(tmp_path):
    for name in (".step_5.tmp", ".step_5.old"):
        (tmp_path / name / "sub").mkdir(parents=True)
    save_checkpoint(tmp_path, checkpoint(5), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


FILES = ("state.json", "model.safetensors", "optimizer.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_says_what_to_do(tmp_path, name, kept):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(len(data) * kept)])
    match = r"step_7 cannot be read .*remove that folder to begin anew"
    with pytest.raises(UserError, match=match) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    (tmp_path / "step_3").mkdir()
    with pytest.raises(UserError, match="remove that folder to resume from the one before it"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error(tmp_path, name):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    (path / name).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("state", [[], 3, {}, {"format": 1}, {"format": 1, "step": "x", "run": ""}])
def test_a_foreign_state_is_an_error(tmp_path, state):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="step_7"):
        load_checkpoint(path)


def test_another_format_is_an_error_that_names_both(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    (path / "state.json").write_text(json.dumps({"format": 9, "step": 7, "run": "run"}))
    with pytest.raises(UserError, match="has format 9, need 1"):
        load_checkpoint(path)


def test_a_pickle_in_place_of_tensors_is_not_loaded(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    torch.save({"V": torch.zeros(2)}, path / "model.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path)


def test_a_file_in_place_of_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "step_7").write_text("no folder")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "step_7")


class Disk:
    """A disk that is full at the n-th operation that needs it, and, if it lasts, from then on."""

    def __init__(self, full_at: int | None = None, lasts: bool = True) -> None:
        self.operations, self.full_at, self.lasts = 0, full_at, lasts

    def need(self) -> None:
        n, self.operations = self.operations, self.operations + 1
        if self.full_at is not None and (n == self.full_at or (self.lasts and n > self.full_at)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def before(self, function: Callable) -> Callable:
        def checked(*args, **kwargs):
            self.need()
            return function(*args, **kwargs)

        return checked

    def opening(self, function: Callable) -> Callable:
        """Files opened for writing take half of what they are given when the disk is full."""

        def opened(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return function(path, mode, *args, **kwargs)
            self.need()
            file = function(path, mode, *args, buffering=0, **kwargs)
            return Written(file, self)

        return opened

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", self.before(os.fsync))
        for name in ("mkdir", "rename", "replace"):
            monkeypatch.setattr(Path, name, self.before(getattr(Path, name)))
        monkeypatch.setattr(Path, "open", self.opening(Path.open))


class Written:
    def __init__(self, file, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        try:
            self.disk.need()
        except OSError:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def operations_of_one_save(folder: Path, step: int) -> int:
    disk = Disk()
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk.install(monkeypatch)
        save_checkpoint(folder, checkpoint(step), keep=1)
    return disk.operations


@pytest.mark.parametrize(("step", "lasts"), [(2, True), (2, False), (1, False)])
def test_a_full_disk_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step, lasts):
    save_checkpoint(tmp_path / "trial", checkpoint(1), keep=1)
    operations = operations_of_one_save(tmp_path / "trial", step)
    assert operations >= 3 * 4 + 3  # each file: open, write, fsync, replace; folder: mkdir, …
    for n in range(operations):
        folder = tmp_path / str(n)
        save_checkpoint(folder, checkpoint(1), keep=1)
        with monkeypatch.context() as patch:
            Disk(n, lasts).install(patch)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(folder, checkpoint(step), keep=1)
        assert assert_whole(latest_checkpoint(folder)) in (1, step)


def test_after_a_full_disk_nothing_half_written_is_left(tmp_path):
    operations = operations_of_one_save(tmp_path / "trial", 2)
    for n in range(1, operations):
        folder = tmp_path / str(n)
        save_checkpoint(folder, checkpoint(1), keep=2)
        with pytest.MonkeyPatch.context() as patch:
            Disk(full_at=n).install(patch)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(folder, checkpoint(2), keep=2)
        assert {p.name for p in folder.iterdir()} <= {"step_1", "step_2"}


def in_a_child(action: Callable[[], None]) -> int:
    """Process id of a fork that does nothing but ``action``."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def killed(child: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")


@needs_fork
def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    def save_and_die(folder: Path, n: int) -> None:
        left = n

        def die(event: str, _: tuple) -> None:
            nonlocal left
            if left >= 0 and (event == "open" or event.startswith(("os.", "shutil."))):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        save_checkpoint(folder, checkpoint(2), keep=1)

    for n in range(200):
        folder = tmp_path / str(n)
        save_checkpoint(folder, checkpoint(1), keep=1)
        child = in_a_child(lambda folder=folder, n=n: save_and_die(folder, n))
        if not killed(child):
            break
        assert assert_whole(latest_checkpoint(folder)) in (1, 2)
        save_checkpoint(folder, checkpoint(2), keep=1)
        assert assert_whole(latest_checkpoint(folder)) == 2
    assert 10 < n < 199


@needs_fork
def test_a_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path):
    draw = random.Random(0)

    def save_on_and_on(first: int) -> None:
        for step in range(first, first + 10_000):
            save_checkpoint(tmp_path, checkpoint(step, size=100), keep=1)

    save_checkpoint(tmp_path, checkpoint(0, size=100), keep=1)
    reached = 0
    for _ in range(10):
        child = in_a_child(lambda first=reached + 1: save_on_and_on(first))
        time.sleep(draw.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        step = assert_whole(latest_checkpoint(tmp_path))
        assert step >= reached
        reached = step
    assert reached > 0


def test_a_checkpoint_with_foreign_tensors_still_loads_as_one(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    save_file({"other": torch.zeros(2)}, path / "model.safetensors")
    assert list(load_checkpoint(path).model) == ["other"]


def test_a_checkpoint_of_before_a_setting_existed_still_belongs(tmp_path, monkeypatch):
    run = trainer(out=tmp_path, steps=4)
    with monkeypatch.context() as patch:
        # As it was written: the configuration had no such key.
        dumped = type(run.config).model_dump
        patch.setattr(
            type(run.config),
            "model_dump",
            lambda *a, **k: {n: v for n, v in dumped(*a, **k).items() if n != "lr_warm_up"},
        )
        run.fit()
    assert trainer(out=tmp_path, steps=4).resume()
    with pytest.raises(UserError, match="another configuration"):
        trainer(out=tmp_path, steps=4, lr_warm_up=0.5).resume()
