"""A run: what it checks, writes, loads and evaluates."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from spd_fast import targets
from spd_fast.errors import UserError
from spd_fast.experiments import Run, evaluate_run, load_run, run
from spd_fast.experiments.records import read_evaluation
from spd_fast.experiments.runs import check_device, environment
from spd_fast.model import DecomposedModel
from spd_fast.train import load_config, parse_config
from tests.conftest import needs_extension
from tests.experiments.conftest import small, tree


def assert_refused(match, config, out, **options):
    """``run`` raises one line, and nothing under the folder that holds ``out`` changes."""
    around = out.parent
    while not around.is_dir():
        around = around.parent
    before = tree(around)
    folders = sorted(p for p in around.rglob("*") if p.is_dir())
    with pytest.raises(UserError, match=match) as caught:
        run(config, out, quiet=True, **options)
    assert "\n" not in str(caught.value)
    assert tree(around) == before
    assert sorted(p for p in around.rglob("*") if p.is_dir()) == folders


# What a run writes.


def test_a_run_writes_its_folder(finished):
    assert set(tree(finished)) == {
        "config.yaml", "env.json", "config.json", "model.safetensors", "metrics.jsonl",
        "README.md", "eval.json", "target/config.json", "target/model.safetensors",
        "target/losses.json",
        *(f"checkpoints/step_{n}/{name}" for n in (10, 20)
          for name in ("model.safetensors", "optimizer.safetensors", "state.json")),
    }  # fmt: skip


def test_the_config_is_resolved(finished):
    assert parse_config(load_config(finished / "config.yaml")) == small()


def test_a_run_can_interpolate_its_gates(tmp_path):
    run(small("gate_eval=interpolated", "batch_size=512", "steps=5"), tmp_path / "run", quiet=True)
    run(small("gate_eval=exact", "batch_size=512", "steps=5"), tmp_path / "exact", quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["gate_eval"] == "interpolated"
    ours, exact = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["losses"]
        for name in ("run", "exact")
    )
    assert ours != exact
    for name, loss in exact.items():
        assert ours[name] == pytest.approx(loss, rel=1e-4), name


def test_the_model_holds_no_weight_of_the_target(finished):
    names = load_file(finished / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"components", "ci_fns"}


def test_the_target_has_its_losses(finished):
    assert len(json.loads((finished / "target" / "losses.json").read_text())) == 20


def test_the_environment_names_versions_and_machine():
    found = environment()
    assert list(found) == [
        "date", "spd_fast", "python", "torch", "platform", "processor", "threads", "cuda",
        "command",
    ]  # fmt: skip
    assert found["torch"] == torch.__version__
    assert found["processor"]


def test_the_environment_does_without_proc(monkeypatch):
    monkeypatch.setattr("platform.processor", lambda: "abacus")

    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr("spd_fast.experiments.runs.Path.read_text", missing)
    assert environment()["processor"] == "abacus"


SITE_KEYS = [
    "mmcs", "mmcs_std", "ml2r", "ml2r_std", "mmcs_any", "ml2r_any", "mechanisms_found",
    "components", "live_components", "expected", "ci_error", "ci_error_0p2", "ci_margins",
    "ci_contradictions", "l0", "faithfulness", "relative_error",
]  # fmt: skip


def test_the_evaluation_holds_what_it_should(finished):
    found = read_evaluation(finished)
    assert list(found) == [
        "name", "recovered", "recovered_0p2", "target_represents_all_features",
        "features_not_represented", "sites", "neuron_contributions", "reconstruction", "steps",
        "seconds", "ms_per_step", "starts", "peak_memory_mb", "backend", "device", "seed",
    ]  # fmt: skip
    assert {name: list(site) for name, site in found["sites"].items()} == {
        "linear1": SITE_KEYS, "linear2": SITE_KEYS,
    }  # fmt: skip
    assert (found["name"], found["steps"], found["seed"]) == ("tms_5-2", 20, 2)
    assert found["device"] == "cpu"
    assert found["backend"] in ("cpu", "reference")
    assert found["peak_memory_mb"] > 10


def test_seconds_are_the_steps_times_their_milliseconds(copied):
    rest = {"lr": 1e-3, "p": 1.0, "losses": {}, "l0": {}, "live": {}}
    lines = [rest | {"step": s, "ms_per_step": ms} for s, ms in ((8, 2.0), (16, 3.0), (20, 5.0))]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = evaluate_run(load_run(copied))
    assert found["seconds"] == pytest.approx(0.016 + 0.024 + 0.02)
    assert found["ms_per_step"] == pytest.approx(3.0)


def test_a_residual_mlp_can_be_run(tmp_path):
    config = parse_config({
        "name": "mlp", "preset": "2026", "steps": 6, "batch_size": 16, "lr": 1e-3,
        "losses": {"importance_minimality": {"coeff": 1e-5, "p": 2}}, "warm_up": {"steps": 2},
        "target": {"kind": "resid_mlp", "features": 6, "d_embed": 12, "d_mlp": 4, "layers": 2,
                   "steps": 3, "batch_size": 16},
        "sites": {"layers.*.mlp_in": 6, "layers.*.mlp_out": 5},
    })  # fmt: skip
    found = run(config, tmp_path / "run", quiet=True).evaluation()
    assert {n: s["expected"] for n, s in found["sites"].items()} == {
        "layers.0.mlp_in": ["identity", 6], "layers.0.mlp_out": ["dense", 4],
        "layers.1.mlp_in": ["identity", 6], "layers.1.mlp_out": ["dense", 4],
    }  # fmt: skip
    assert list(found["neuron_contributions"]) == ["r2", "slope", "layers"]
    assert len(found["neuron_contributions"]["layers"]) == 2
    assert [s["mechanisms_found"] for s in found["sites"].values()] == [None] * 4


@pytest.mark.parametrize(("r2", "recovered"), [(0.99, True), (0.98, False)])
def test_a_residual_mlp_is_recovered_only_with_its_neurons(tmp_path, monkeypatch, r2, recovered):
    monkeypatch.setattr("spd_fast.evaluate.Expected.error", lambda *_: 0)
    monkeypatch.setattr(
        "spd_fast.experiments.runs.neuron_contributions",
        lambda _: SimpleNamespace(r2=r2, slope=1.0, by_layer=list),
    )
    config = parse_config({
        "name": "mlp", "preset": "paper", "steps": 1, "batch_size": 8, "lr": 1e-3,
        "losses": {"importance_minimality": {"coeff": 1e-5, "p": 2}},
        "target": {"kind": "resid_mlp", "features": 4, "d_embed": 6, "d_mlp": 3, "layers": 1},
        "sites": {"layers.*": 4}, "ci_fn": "linear",
    })  # fmt: skip
    model = DecomposedModel(targets.ResidMLP(4, 6, 3, 1, 0), config.sites, ci_fn="linear")
    found = evaluate_run(Run(tmp_path, config, model))
    assert found["recovered"] is recovered


def test_a_run_says_nothing_when_quiet(tmp_path, capsys):
    run(small(), tmp_path / "run", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_run_shows_its_target_and_its_steps(tmp_path, capsys):
    run(small(), tmp_path / "run")
    out, err = capsys.readouterr()
    assert out == ""
    target, decompose = err.splitlines()
    assert target.startswith("train target: 20/20")
    assert decompose.startswith("decompose: 20/20")


# A given target.


def given(folder, seed=5, **changes):
    config = small().target.model_copy(update=changes)
    target, _ = targets.train_target(config, seed)
    targets.save_target(target, config, folder)
    return target


def test_a_given_target_is_used_and_kept_in_the_folder(tmp_path):
    target = given(tmp_path / "given")
    done = run(small(f"target.path={tmp_path / 'given'}"), tmp_path / "run", quiet=True)
    assert torch.equal(done.target.linear1.weight, target.linear1.weight)
    for name in ("model.safetensors", "config.json"):
        ours, theirs = tmp_path / "run" / "target" / name, tmp_path / "given" / name
        assert ours.read_bytes() == theirs.read_bytes()
    assert not (tmp_path / "run" / "target" / "losses.json").exists()


def test_a_run_loads_without_the_folder_its_target_came_from(tmp_path):
    given(tmp_path / "given")
    run(small(f"target.path={tmp_path / 'given'}"), tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "given")
    load_run(tmp_path / "run")


def test_a_given_target_of_another_architecture_is_refused(tmp_path):
    given(tmp_path / "given", features=4)
    config = small(f"target.path={tmp_path / 'given'}")
    assert_refused("but the configuration asks for", config, tmp_path / "run")


def test_a_given_target_that_is_missing_is_refused(tmp_path):
    config = small(f"target.path={tmp_path / 'none'}")
    assert_refused("no readable target in", config, tmp_path / "run")


def test_a_given_target_that_changed_is_refused_on_resume(tmp_path):
    given(tmp_path / "given")
    config = small(f"target.path={tmp_path / 'given'}")
    run(config, tmp_path / "run", quiet=True)
    given(tmp_path / "given", seed=6)
    match = "belongs to another configuration or target"
    assert_refused(match, config, tmp_path / "run", resume=True)


# What a run refuses.


def test_sites_without_a_match_are_refused(tmp_path):
    assert_refused("'nope' matches no module", small("sites.nope=3"), tmp_path / "run")


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    assert_refused("is a file", small(), tmp_path / "run")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    assert_refused("is no folder that can be written to", small(), tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert_refused("is no folder that can be written to", small(), tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert_refused("is not empty and holds no run", small(), tmp_path / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_a_different_run_is_refused(copied, resume):
    match = r"already holds a different run \(lr: [\d.e-]+ there, 0.5 here\); choose"
    assert_refused(match, small("lr=0.5"), copied, resume=resume)
    match = r"\(.*; .*; 1 more\)"
    assert_refused(match, small("lr=0.5", "seed=9", "batch_size=7"), copied, resume=resume)


def test_a_run_of_before_a_setting_existed_is_the_same_run(copied):
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace("lr_warm_up: 0.0\n", ""))
    assert_refused("already holds this run; pass --resume", small(), copied)
    path.write_text(path.read_text() + "colour: red\n")
    assert_refused(r"already holds a different run \(unknown key 'colour'", small(), copied)


def test_a_folder_of_the_same_run_needs_resume(copied):
    assert_refused("already holds this run; pass --resume", small(), copied)


def test_a_damaged_config_in_the_folder_is_refused(copied):
    (copied / "config.yaml").write_text("a: [")
    assert_refused("is not plain YAML", small(), copied, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_refused(copied, name):
    path = copied / "checkpoints" / "step_20" / name
    path.write_bytes(path.read_bytes()[:-9])
    assert_refused("step_20 cannot be read", small(), copied, resume=True)


def test_a_foreign_checkpoint_is_refused(copied):
    state = copied / "checkpoints" / "step_20" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"run": "0" * 16}))
    assert_refused("belongs to another configuration or target", small(), copied, resume=True)


def test_a_damaged_target_in_the_folder_is_refused(copied):
    path = copied / "target" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    match = r"no readable target .*; without .*target it is trained again"
    assert_refused(match, small(), copied, resume=True)
    shutil.rmtree(copied / "target")
    shutil.rmtree(copied / "checkpoints")
    run(small(), copied, resume=True, quiet=True)


def test_the_checkpoint_before_a_damaged_one_serves_once_it_is_removed(copied, finished):
    shutil.rmtree(copied / "checkpoints" / "step_20")
    run(small(), copied, quiet=True, resume=True)
    name = "model.safetensors"
    assert (copied / name).read_bytes() == (finished / name).read_bytes()


@needs_extension
def test_what_the_chosen_backend_cannot_do_is_refused(tmp_path):
    match = "backend 'cpu' does not support this gate"
    assert_refused(match, small("sigmoid=hard"), tmp_path / "run", backend="cpu")


def test_an_unknown_backend_in_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SPD_FAST_BACKEND", "gpu")
    assert_refused("unknown backend 'gpu'", small(), tmp_path / "run")


@pytest.mark.parametrize("prepare", [lambda f: None, lambda f: f.mkdir()])
def test_a_new_or_empty_folder_is_taken(tmp_path, prepare):
    prepare(tmp_path / "run")
    run(small("steps=1"), tmp_path / "run", quiet=True)


def test_a_folder_that_a_kill_left_before_its_config_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").write_text("name: tm")
    run(small("steps=1"), tmp_path / "run", quiet=True, resume=True)


# Resume.


def test_a_finished_run_that_is_resumed_stays_the_same(copied, finished):
    said = []
    run(small(), copied, resume=True, say=said.append)
    assert said == ["resuming at step 20 of 20"]
    for name in ("model.safetensors", "metrics.jsonl", "config.yaml", "target/model.safetensors"):
        assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_what_a_run_was_begun_with_stays(copied, monkeypatch):
    held = json.loads((copied / "env.json").read_text())
    evaluation = json.loads((copied / "eval.json").read_text())
    monkeypatch.setattr("spd_fast.experiments.runs.environment", lambda: {"date": "later"})
    monkeypatch.setattr("spd_fast.experiments.runs.peak_memory_mb", lambda _: -1.0)
    run(small(), copied, quiet=True, resume=True, backend="reference")
    assert json.loads((copied / "env.json").read_text()) == held
    again = json.loads((copied / "eval.json").read_text())
    for key in ("peak_memory_mb", "backend", "device"):
        assert again[key] == evaluation[key]


def test_a_process_that_takes_more_steps_is_named_beside_the_first(copied, monkeypatch):
    held = json.loads((copied / "env.json").read_text())
    monkeypatch.setattr("spd_fast.experiments.runs.environment", lambda: {"date": "later"})
    for _ in range(2):
        shutil.rmtree(copied / "checkpoints" / "step_20")
        run(small(), copied, quiet=True, resume=True)
    later = {"step": 10, "date": "later"}
    assert json.loads((copied / "env.json").read_text()) == held | {"resumed": [later, later]}


def test_a_kill_while_the_target_is_kept_costs_no_curve(tmp_path, monkeypatch):
    save = targets.save_target
    monkeypatch.setattr(targets, "save_target", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(small(), tmp_path / "run", quiet=True)
    monkeypatch.setattr(targets, "save_target", save)
    run(small(), tmp_path / "run", quiet=True, resume=True)
    assert json.loads((tmp_path / "run" / "target" / "losses.json").read_text())


def test_a_run_whose_target_is_gone_trains_it_again(copied, finished):
    shutil.rmtree(copied / "target")
    run(small(), copied, quiet=True, resume=True)
    name = "target/model.safetensors"
    assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_resume_in_a_new_folder_starts_a_run(tmp_path):
    said = []
    run(small("steps=2"), tmp_path / "run", quiet=True, resume=True, say=said.append)
    assert said == []


# Devices.


def test_the_cpu_is_the_default_without_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_device(None, None) == torch.device("cpu")


def test_cuda_is_the_default_where_there_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert check_device(None, None) == torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("gpu", "unknown device 'gpu'; use cpu, cuda or cuda:N"),
        ("meta", "device 'meta' is not supported; use cpu or cuda"),
        ("cuda", "--device cuda: torch sees no CUDA device; use --device cpu"),
        ("cuda:1", "--device cuda:1: torch sees no CUDA device"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(monkeypatch, device, match):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=match):
        check_device(device, None)


def test_a_cuda_device_past_the_last_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:2: there are 2 devices"):
        check_device("cuda:2", None)


# Opening a run.


def test_an_opened_run_computes_the_same(finished):
    opened = load_run(finished)
    assert opened.config == small()
    assert len(opened.metrics()) == 3
    x = targets.feature_data(opened.config.target, 16, 0, "evaluate")(0)
    again = load_run(finished)
    ours, theirs = (m.clean_forward(x).output for m in (opened.model, again.model))
    assert torch.equal(ours, theirs)
    tensors = load_file(finished / "model.safetensors")
    assert torch.equal(opened.model.V("linear1"), tensors["components.linear1.V"])


def test_an_opened_run_evaluates_the_same(copied, finished):
    changing = ("peak_memory_mb",)
    found = evaluate_run(load_run(copied))
    before = read_evaluation(finished)
    assert {k: v for k, v in found.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert read_evaluation(copied) == json.loads(json.dumps(found))


def test_a_run_without_metrics_has_none(copied):
    (copied / "metrics.jsonl").unlink()
    assert load_run(copied).metrics() == []
    assert evaluate_run(load_run(copied))["steps"] == 0


def test_damaged_metrics_are_an_error(copied):
    with (copied / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2')
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged .*--resume"):
        load_run(copied).metrics()


def test_a_folder_without_a_run_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(no config.yaml\)"):
        load_run(tmp_path)


def test_an_unfinished_run_cannot_be_opened(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is not finished: continue it with"):
        load_run(copied)


def test_a_run_with_a_changed_target_cannot_be_opened(copied):
    given(copied / "target")
    with pytest.raises(UserError, match="made of a target with other weights"):
        load_run(copied)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "tms_5-2"}', "{"])
def test_an_evaluation_that_is_none_is_an_error(tmp_path, text):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"eval.json is (damaged|not the evaluation)"):
        read_evaluation(tmp_path)


# The verdict.


def solved(folder, lost=None):
    """A run whose components are the target's features, but for one that may be lost."""
    config = parse_config({
        "name": "solved", "preset": "paper", "steps": 1, "batch_size": 8, "lr": 1e-3,
        "losses": {"importance_minimality": {"coeff": 1e-3, "p": 1}},
        "target": {"kind": "tms", "features": 3, "hidden": 3},
        "sites": {"linear1": 4, "linear2": 4}, "ci_fn": "linear",
    })  # fmt: skip
    target = targets.TMS(3, 3)
    with torch.no_grad():
        target.linear1.weight.copy_(torch.eye(3))
        target.linear2.bias.zero_()
    model = DecomposedModel(target, config.sites, ci_fn="linear")
    with torch.no_grad():
        model.V("linear1").copy_(torch.eye(3, 4))
        model.U("linear1").copy_(torch.eye(4, 3))
        for site in model.sites:
            gate = model.ci_fn(site)
            gate.weights[0].fill_(10)  # s = 10 h − 1: on where the feature is
            gate.biases[0].fill_(-1)
            if lost is not None:
                gate.weights[0][lost] = 0
    return Run(folder, config, model)


def test_a_solved_network_is_recovered(tmp_path):
    found = evaluate_run(solved(tmp_path))
    assert found["recovered"] is True
    assert found["recovered_0p2"] is True
    assert found["target_represents_all_features"] is True
    for site in found["sites"].values():
        assert (site["ci_error"], site["live_components"]) == (0, 3)
        assert site["mmcs"] == pytest.approx(1)
        assert site["ml2r"] == pytest.approx(1)
        assert site["mechanisms_found"] == 3
        assert site["faithfulness"] == 0
    assert found["reconstruction"]["unmasked"] == 0


def test_a_lost_feature_is_not_a_recovered_network(tmp_path):
    found = evaluate_run(solved(tmp_path, lost=1))
    assert found["recovered"] is False
    assert found["recovered_0p2"] is False
    assert found["sites"]["linear1"]["ci_error"] == 1
    assert found["sites"]["linear1"]["live_components"] == 2


def test_importances_a_little_short_of_one_are_recovered_at_the_wider_tolerance(tmp_path):
    made = solved(tmp_path)
    with torch.no_grad():
        for site in made.model.sites:
            made.model.ci_fn(site).biases[0].fill_(0.85 - 7.5)  # of s = 10 h + β at h = 0.75
    found = evaluate_run(made)
    assert (found["recovered"], found["recovered_0p2"]) == (False, True)
    site = found["sites"]["linear1"]
    assert (site["ci_error"], site["ci_error_0p2"]) == (3, 0)


def test_a_target_without_one_of_its_features_is_told(tmp_path):
    made = solved(tmp_path)
    with torch.no_grad():
        made.target.linear1.weight[1, 1] = 0
    found = evaluate_run(made)
    assert found["target_represents_all_features"] is False
    assert found["features_not_represented"] == [1]


def test_sites_without_a_known_mechanism_have_no_verdict(tmp_path, monkeypatch):
    for module in ("runs", "measures"):
        monkeypatch.setattr(f"spd_fast.experiments.{module}.expected_sites", lambda _: {})
    found = evaluate_run(solved(tmp_path))
    assert found["recovered"] is False
    assert found["sites"]["linear1"]["ci_error"] is None


def test_peak_memory_is_in_megabytes_on_every_system(finished, monkeypatch):
    from spd_fast.experiments import runs

    here = runs.peak_memory_mb(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert runs.peak_memory_mb(torch.device("cpu")) == pytest.approx(here, rel=0.5)
    monkeypatch.setattr(sys, "platform", "darwin")  # counts bytes, not kilobytes
    assert runs.peak_memory_mb(torch.device("cpu")) == pytest.approx(here / 1024, rel=0.5)
