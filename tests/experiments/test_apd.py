"""A run of APD: the folder, the target and the evaluation are those of SPD's runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spd_fast.baselines import APDConfig, APDModel
from spd_fast.cli import main
from spd_fast.errors import UserError
from spd_fast.experiments import configuration, evaluate_run, load_run, recipe, run
from spd_fast.report import results_table
from spd_fast.train import load_config, set_keys
from tests.experiments.conftest import SMALL, tree


def small(*changes: str, name: str = "apd/tms_5-2") -> APDConfig:
    return configuration(set_keys(recipe(name), [*SMALL, *changes]))


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("rival") / "run"
    run(small(), folder, quiet=True)
    return folder


def test_the_folder_is_that_of_spd(rival, finished):
    # SPD's model has a card of its own; both get theirs from the report.
    assert set(tree(rival)) == set(tree(finished)) - {"README.md"}


def test_the_target_is_that_of_spds_run_with_the_same_seed(rival, finished):
    for name in ("target/model.safetensors", "target/config.json", "target/losses.json"):
        assert (rival / name).read_bytes() == (finished / name).read_bytes()


def test_another_seed_trains_another_target(rival, tmp_path):
    run(small("seed=5"), tmp_path / "run", quiet=True)
    name = "target/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() != (rival / name).read_bytes()


def test_the_evaluation_has_the_fields_of_spds(rival, finished):
    ours, theirs = (json.loads((f / "eval.json").read_text()) for f in (rival, finished))
    assert list(ours) == list(theirs)
    for site in theirs["sites"]:
        assert list(ours["sites"][site]) == list(theirs["sites"][site])
    assert (ours["name"], ours["seed"], ours["steps"]) == ("apd/tms_5-2", 2, 20)
    assert list(ours["reconstruction"]) == ["topk", "unmasked", "zero"]
    assert ours["sites"]["linear1"]["components"] == 5


def test_metrics_have_the_fields_of_spds(rival, finished):
    ours, theirs = (
        json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in (rival, finished)
    )
    assert list(ours) == list(theirs)
    assert set(ours["losses"]) == {"faithfulness", "topk_recon", "schatten", "total"}


def test_a_run_is_opened_and_evaluated_again(rival, tmp_path):
    folder = Path(shutil.copytree(rival, tmp_path / "run"))
    before = json.loads((folder / "eval.json").read_text())
    opened = load_run(folder)
    assert isinstance(opened.model, APDModel)
    assert opened.config == small() == configuration(load_config(folder / "config.yaml"))
    timing = {"peak_memory_mb"}
    again = evaluate_run(opened)
    assert {k: v for k, v in again.items() if k not in timing} == {
        k: v for k, v in before.items() if k not in timing
    }


def test_a_residual_mlp_can_be_run(tmp_path):
    config = configuration(set_keys(recipe("apd/resid_mlp2"), [
        "steps=6", "batch_size=16", "components=6", "target.features=6", "target.d_embed=12",
        "target.d_mlp=4", "target.steps=3", "target.batch_size=16",
    ]))  # fmt: skip
    found = run(config, tmp_path / "run", quiet=True).evaluation()
    assert {n: s["expected"] for n, s in found["sites"].items()} == {
        "layers.0.mlp_in": ["identity", 6], "layers.0.mlp_out": ["dense", 4],
        "layers.1.mlp_in": ["identity", 6], "layers.1.mlp_out": ["dense", 4],
    }  # fmt: skip
    assert set(found["neuron_contributions"]) == {"r2", "slope", "layers"}


def test_a_folder_of_the_other_method_is_refused(finished, rival):
    spd = load_run(finished).config
    for config, folder in ((small(), finished), (spd, rival)):
        before = tree(folder)
        with pytest.raises(UserError, match="already holds a different run"):
            run(config, folder, quiet=True, resume=True)
        assert tree(folder) == before


def test_a_site_that_is_not_there_is_one_line_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match=r"site pattern 'linear3' matches no module"):
        run(small("sites=[linear3]"), tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_papers_row_of_apd(rival):
    line = results_table([json.loads((rival / "eval.json").read_text())]).splitlines()[2]
    assert line.startswith("apd/tms_5-2")
    assert "0.998 " in line
    assert "0.893 ± .004" in line
    assert "0.993" not in line


def test_the_list_shows_it(capsys):
    with pytest.raises(SystemExit) as done:
        main(["list"])
    assert done.value.code == 0
    assert "\napd/tms_5-2-id " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "apd/tms_5-3"], "unknown experiment 'apd/tms_5-3'; nearest: 'apd/tms_5-2'"),
        (["run", "apd/tms_5-2", "topk=1"], "unknown key 'topk'; nearest valid key: 'top_k'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"spd-fast: error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
