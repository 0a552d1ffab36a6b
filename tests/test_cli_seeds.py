"""``spd-fast run NAME --seeds``: what it prints and what it refuses."""

from __future__ import annotations

import json

import pytest

from spd_fast.cli import main
from tests.experiments.conftest import SMALL

TINY = [a for a in SMALL if not a.startswith(("seed", "steps"))] + ["steps=2", "target.steps=2"]


def call(*arguments):
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return left.value.code


def test_seeds_are_run_reported_and_summed_up(tmp_path, capsys):
    out = tmp_path / "out"
    assert call("run", "tms_5-2", *TINY, "--seeds", "1", "--out", str(out), "--quiet") == 0
    assert (out / "seed1" / "report.html").is_file()
    assert json.loads((out / "seed1" / "eval.json").read_text())["seed"] == 1
    printed = capsys.readouterr().out
    assert printed.count("tms_5-2  ") == 1
    assert "tms_5-2: recovered on" in printed
    assert str(out / "aggregate.json") in printed
    # A kill between evaluation and report.
    (out / "seed1" / "report.html").unlink()
    evaluation = (out / "seed1" / "eval.json").read_bytes()
    assert call("run", "tms_5-2", *TINY, "--seeds", "1", "--out", str(out), "--quiet") == 0
    assert (out / "seed1" / "report.html").is_file()
    assert (out / "seed1" / "eval.json").read_bytes() == evaluation


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--seeds", "4-0"], "ends before it begins"),
        (["--seeds", "x"], "needs numbers such as 0-4"),
        (["--seeds", "0-1", "--seed", "1"], "give one of them"),
        (["--jobs", "2"], "--jobs goes with --seeds"),
        (["--seeds", "0", "--jobs", "0"], "--jobs needs at least 1"),
        (["--seeds", "0", "--set", "lrr=1"], "unknown key 'lrr'"),
        (["--seeds", "0", "--set", "sites.nope=3"], "matches no module"),
        (["--seeds", "0", "--device", "abacus"], "unknown device"),
    ],
)
def test_bad_input_is_one_line_status_two_and_nothing_written(tmp_path, capsys, arguments, match):
    out = tmp_path / "out"
    assert call("run", "tms_5-2", *arguments, "--out", str(out)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [text for text in said.err.splitlines() if not text.startswith("tms_5-2")]
    assert match in line
    assert list(tmp_path.iterdir()) == []
