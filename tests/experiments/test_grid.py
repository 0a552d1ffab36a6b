"""Many runs in a folder: what is skipped, continued, counted and refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.experiments.grid import outcomes, run_grid
from tests.experiments.conftest import small, tree

FEW = ["steps=2", "target.steps=2", "log_every=1"]
CONFIGS = {"a": small(*FEW), "b": small(*FEW, "lr=0.002")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("grid")
    run_grid(CONFIGS, folder, label="two", quiet=True)
    return folder


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done, tmp_path / "grid")


def test_every_run_has_its_folder_and_outcome(done):
    found = outcomes(CONFIGS, done)
    assert list(found) == ["a", "b"]
    for key, outcome in found.items():
        assert outcome.diverged is None
        assert outcome.evaluation == json.loads((done / key / "eval.json").read_text())


def test_finished_runs_are_not_touched(copied):
    before = tree(copied)
    finished = []
    found = run_grid(CONFIGS, copied, label="two", finish=finished.append, quiet=True)
    assert finished == []
    assert tree(copied) == before
    assert found == outcomes(CONFIGS, copied)


def test_only_what_is_missing_is_run_and_handed_on(copied):
    (copied / "b" / "eval.json").unlink()
    finished = []
    run_grid(CONFIGS, copied, label="two", finish=finished.append, quiet=True)
    assert [r.folder.name for r in finished] == ["b"]
    assert (copied / "b" / "eval.json").exists()


def test_what_a_kill_left_unfinished_is_finished_and_not_trained_again(copied):
    (copied / "a" / "page").write_text("there")
    before = tree(copied)

    def finish(run):
        (run.folder / "page").write_text(str(run.evaluation()["seed"]))

    def unfinished(folder):
        return not (folder / "page").exists()

    options = {"label": "two", "finish": finish, "unfinished": unfinished, "quiet": True}
    found = run_grid(CONFIGS, copied, **options)
    assert list(found) == ["a", "b"]
    assert found == outcomes(CONFIGS, copied)
    assert tree(copied) == before | {"b/page": b"2"}


def test_a_run_that_diverged_has_nothing_to_finish(tmp_path):
    configs = {"bad": small(*FEW, "lr=1e30", "checkpoint_every=1")}
    for _ in range(2):
        finished = []
        found = run_grid(configs, tmp_path, label="one", quiet=True,
                         finish=finished.append, unfinished=lambda _: True)  # fmt: skip
        assert found["bad"].diverged
        assert finished == []


def test_outcomes_come_in_the_order_of_the_runs(copied):
    shutil.rmtree(copied / "a")
    assert list(run_grid(CONFIGS, copied, label="two", quiet=True)) == ["a", "b"]


def test_one_bar_counts_the_runs(copied, capsys):
    shutil.rmtree(copied / "b")
    run_grid(CONFIGS, copied, label="two", quiet=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("two:")]
    assert len(lines) == 1
    assert lines[0].startswith("two: 2/2")
    assert "b: not recovered" in lines[0] or "b: target incomplete" in lines[0]


def test_a_run_that_diverges_is_an_outcome_and_the_others_go_on(tmp_path):
    configs = {"bad": small(*FEW, "lr=1e30", "checkpoint_every=1"), "good": CONFIGS["a"]}
    found = run_grid(configs, tmp_path, label="two", quiet=True)
    assert found["bad"].evaluation is None
    assert "not finite" in found["bad"].diverged or "at step" in found["bad"].diverged
    assert found["good"].evaluation is not None
    stamp = (tmp_path / "bad" / "diverged.json").stat().st_mtime_ns
    assert run_grid(configs, tmp_path, label="two", quiet=True) == found
    assert (tmp_path / "bad" / "diverged.json").stat().st_mtime_ns == stamp


def test_what_is_left_of_a_run_is_named_before_anything_runs(copied):
    shutil.rmtree(copied / "a")
    (copied / "b" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"b has lost its config.yaml; remove it"):
        run_grid(CONFIGS, copied, label="two", quiet=True)
    assert not (copied / "a").exists()


def test_runs_of_other_settings_are_refused_before_anything_runs(copied):
    shutil.rmtree(copied / "a")
    configs = CONFIGS | {"b": small(*FEW, "lr=0.5")}
    with pytest.raises(
        UserError, match=r"b holds a run with other settings \(lr: .* there, 0.5 here\)"
    ):
        run_grid(configs, copied, label="two", quiet=True)
    assert not (copied / "a").exists()


def test_a_run_of_before_a_setting_existed_is_finished(copied):
    path = copied / "b" / "config.yaml"
    path.write_text(path.read_text().replace("lr_warm_up: 0.0\n", ""))
    assert "lr_warm_up" not in path.read_text()
    assert set(outcomes(CONFIGS, copied)) == {"a", "b"}


def test_bad_numbers_of_jobs_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--jobs needs at least 1, got 0"):
        run_grid(CONFIGS, tmp_path, label="two", jobs=0)
    monkeypatch.setattr("spd_fast.experiments.grid.check_device", lambda *_: torch.device("cuda"))
    with pytest.raises(UserError, match="on a GPU run one after another"):
        run_grid(CONFIGS, tmp_path, label="two", jobs=2)


@pytest.mark.slow
def test_jobs_side_by_side_give_the_same_runs(done, tmp_path):
    found = run_grid(CONFIGS, tmp_path, label="two", jobs=2, quiet=True)
    assert list(found) == ["a", "b"]
    for key in CONFIGS:
        name = f"{key}/model.safetensors"
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()
