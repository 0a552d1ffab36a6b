"""Runs of the authors' code, imported as runs of ours: evaluated, reported, continued."""

from __future__ import annotations

import json

import pytest
import torch

from spd_fast.cli import main
from spd_fast.experiments import load_run
from tests.targets.test_authors import FORMATS, of_tms, write

SETTINGS = ("--as", "tms_5-2-id", "--set", "batch_size=8", "--set", "log_every=1")


def call(*arguments):
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    return left.value.code or 0


@pytest.mark.parametrize("kind", FORMATS)
def test_an_imported_run_is_evaluated_reported_and_continued(tmp_path, kind, capsys):
    model = of_tms(sigmoid=kind, init=kind, ci_hidden=(6,))
    source, out = write(tmp_path / "source", FORMATS[kind](model), step=3), tmp_path / "out"
    assert call("import", source, "--out", out, *SETTINGS, "--set", "steps=5") == 0
    held = load_run(out).model.state_dict()
    assert all(torch.equal(held[n], t) for n, t in model.state_dict().items())
    assert call("eval", out) == 0
    assert call("report", out) == 0
    assert (out / "report.html").is_file()
    assert call("run", out / "config.yaml", "--out", out, "--resume") == 0
    assert "resuming at step 3 of 5" in capsys.readouterr().out
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5]
    # It goes on from the imported components: two steps of 1e-3 move nothing far.
    for name, tensor in load_run(out).model.state_dict().items():
        assert (tensor - held[name]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((*SETTINGS, "--set", "steps=3"), "3 steps behind it and the settings end at 3"),
        ((*SETTINGS, "--set", "lrr=1"), "unknown key 'lrr'"),
        (("--as", "tms_5"), "unknown experiment 'tms_5'"),
        (("--set", "lr=1"), "--set goes with --as"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, match):
    source = write(tmp_path / "source", FORMATS["paper"](of_tms(sigmoid="paper")), step=3)
    assert call("import", source, "--out", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert match in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()
