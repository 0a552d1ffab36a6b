"""Progress: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import io
import itertools

import pytest

from spd_fast.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds of time.perf_counter, set by the test."""
    now = [0.0]
    monkeypatch.setattr("spd_fast.train.progress.time.perf_counter", lambda: now[0])
    return now


def lines(clock, seconds: int, interval: float) -> list[int]:
    """The seconds at which a loop of one step a second says something."""
    file = io.StringIO()
    with Progress("train", seconds + 1, file=file, interval=interval) as progress:
        for done in range(1, seconds + 1):
            clock[0] = done
            progress.update(done, f"loss {done}")
    return [int(line.split("loss ")[1]) for line in file.getvalue().splitlines()]


def test_the_first_line_comes_after_a_second_and_then_one_every_interval(clock):
    assert lines(clock, 40, interval=10) == [1, 11, 21, 31]


def test_a_day_has_a_few_hundred_lines(clock):
    said = lines(clock, 24 * 60 * 60, interval=15)
    assert 100 < len(said) < 300
    assert max(b - a for a, b in itertools.pairwise(said)) == 600


def test_the_end_is_told_once(clock):
    file = io.StringIO()
    with Progress("train", 3, file=file, interval=10) as progress:
        for done in (1, 3, 3, 3):
            progress.update(done)
    assert file.getvalue() == "train: 3/3  ETA 00:00\n"


def test_a_line_tells_steps_eta_and_text(clock):
    file = io.StringIO()
    with Progress("train", 400, file=file, interval=10) as progress:
        clock[0] = 30.0
        progress.update(100, "loss 1e-3")
    assert file.getvalue() == "train: 100/400  ETA 01:30  loss 1e-3\n"


def test_the_eta_of_a_resumed_loop_counts_its_own_steps(clock):
    file = io.StringIO()
    with Progress("train", 400, 300, file=file, interval=10) as progress:
        clock[0] = 30.0
        progress.update(350, "x")
    assert "ETA 00:30" in file.getvalue()


@pytest.mark.parametrize(("interval", "etas"), [(1, ["?", "00:49"]), (0, ["13:03", "06:46"])])
def test_the_first_step_tells_nothing_of_the_others(clock, interval, etas):
    """It takes longer; with an interval of 0 it is a run, one like the others."""
    file = io.StringIO()
    with Progress("train", 40, file=file, interval=interval) as progress:
        for done, seconds in ((1, 20.1), (2, 21.4)):
            clock[0] = seconds
            progress.update(done)
    assert [line.split()[-1] for line in file.getvalue().splitlines()] == etas


def test_the_last_step_always_has_its_line(clock):
    file = io.StringIO()
    with Progress("train", 3, file=file) as progress:
        for done in (1, 2, 3):
            progress.update(done, f"loss {done}")
    assert file.getvalue().splitlines() == ["train: 3/3  ETA 00:00  loss 3"]


def test_steps_without_text_show_the_last_one(clock):
    file = io.StringIO()
    with Progress("train", 30, file=file, interval=1) as progress:
        for done, text in ((10, ""), (20, "loss 1"), (30, "")):
            clock[0] += 10
            progress.update(done, text)
    assert file.getvalue().splitlines() == [
        "train: 10/30  ETA 00:20", "train: 20/30  ETA 00:10  loss 1",
        "train: 30/30  ETA 00:00  loss 1",
    ]  # fmt: skip


def test_lines_have_no_control_characters(clock):
    file = io.StringIO()
    with Progress("train", 1, file=file) as progress:
        progress.update(1, "x")
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_a_terminal_shows_a_bar_with_the_text():
    file = Terminal()
    with Progress("train", 10, file=file) as progress:
        progress.update(4, "loss 1e-3")
        progress.update(10)
    assert "train" in file.getvalue()
    assert "10/10" in file.getvalue()
    assert "loss 1e-3" in file.getvalue()


def test_a_resumed_bar_starts_where_it_was():
    file = Terminal()
    with Progress("train", 10, 7, file=file):
        pass
    assert "7/10" in file.getvalue()


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_quiet_says_nothing(file):
    with Progress("train", 10, file=file, quiet=True) as progress:
        progress.update(10, "x")
    assert file.getvalue() == ""


def test_an_error_inside_goes_through():
    with pytest.raises(RuntimeError, match="inside"), Progress("train", 10, file=Terminal()):
        raise RuntimeError("inside")


def test_the_default_is_standard_error(capsys):
    with Progress("train", 1) as progress:
        progress.update(1, "x")
    assert capsys.readouterr() == ("", "train: 1/1  ETA 00:00  x\n")
