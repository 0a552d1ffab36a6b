"""Runs on language models: a tiny Llama made here, and the pretrained one where it is laid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spd_fast.cli import main
from spd_fast.errors import UserError
from spd_fast.experiments import language_configuration, recipe
from spd_fast.experiments.language import load_language_run, run_language
from spd_fast.report.language import language_table, write_components, write_language_report
from spd_fast.train import set_keys

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
STORIES = Path(os.environ.get("SPD_FAST_SHARED", ROOT.parent / "shared")) / "models/stories260k"
VOCABULARY, CONTEXT = 40, 16
LOSSES = {
    "faithfulness": 10.0,
    "stochastic_recon_layerwise": 0,
    "stochastic_recon_subset": 0.5,
    "persistent_pgd_recon": {"coeff": 0.2, "lr": 0.02, "n_warmup": 1, "scope": "per_position"},
    "importance_minimality": {"coeff": 1e-3, "p": 1.0, "beta": 0.1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama and its tokens, as a person would have them."""
    import torch

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    rng = np.random.default_rng(0)
    np.save(folder / "train.npy", rng.integers(0, VOCABULARY, (40, 12)).astype(np.uint16))
    np.save(folder / "eval.npy", rng.integers(0, VOCABULARY, (10, 12)).astype(np.uint16))
    np.save(folder / "far.npy", np.full((10, 12), VOCABULARY, np.uint16))
    np.save(folder / "long.npy", np.zeros((10, CONTEXT + 1), np.uint16))
    return folder


def settings(folder, **changes):
    data = {
        "name": "tiny",
        "preset": "2026",
        "target": {"kind": "hf", "path": str(folder)},
        "data": {"kind": "tokens", "path": "train.npy", "eval_path": "eval.npy"},
        "sites": {"model.layers.*.mlp.up_proj": 10, "model.layers.*.self_attn.o_proj": 8},
        "ci_hidden": [4],
        "losses": LOSSES,
        "warm_up": {"steps": 5},
        "lr": 1e-2,
        "steps": 12,
        "batch_size": 4,
        "log_every": 3,
        "checkpoint_every": 4,
        "keep_checkpoints": 5,
        "evaluation": {"batches": 2, "batch_size": 3, "pgd_steps": [1, 3]},
    }
    return data | changes


def configured(folder, **changes):
    return language_configuration(settings(folder, **changes))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    return run_language(configured(folder), tmp_path_factory.mktemp("run") / "r", quiet=True)


def test_the_evaluation_has_every_masking(finished):
    found = finished.evaluation()
    maskings = ["unmasked", "ci", "rounded", "stochastic", "pgd_1", "pgd_3", "zero"]
    assert list(found["ce"]) == ["target", *maskings]
    assert list(found["kl"]) == maskings
    assert list(found["groups"]) == [
        "model.layers.*.self_attn.o_proj",
        "model.layers.*.mlp.up_proj",
    ]
    assert len(found["sites"]) == 4
    assert found["positions"] == 2 * 3 * 12
    assert found["l0"] == pytest.approx(sum(s["l0"] for s in found["sites"].values()))
    assert found["kl"]["pgd_3"] >= found["kl"]["pgd_1"] > 0


def test_the_frontier_has_a_point_a_checkpoint(finished):
    found = finished.evaluation()
    assert [p["step"] for p in found["frontier"]] == [4, 8, 12]


def test_the_pages_hold_every_site_and_nothing_from_outside(finished):
    page = write_language_report(finished).read_text()
    components = write_components(finished, list(finished.model.sites), top=3, contexts=2)
    for html in (page, components.read_text()):
        for site in finished.model.sites:
            assert site in html
        assert "http://" not in html.replace("http://www.w3.org", "")
        assert "https://" not in html
    assert "over target" in language_table(finished.evaluation())


def test_a_finished_run_opens_again(finished):
    opened = load_language_run(finished.folder)
    for name, parameter in opened.model.state_dict().items():
        assert parameter.equal(finished.model.state_dict()[name])


def test_a_dataset_on_disk_is_packed_into_sequences(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [[int(i) % VOCABULARY for i in range(7 * n, 9 * n + 3)] for n in range(30)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "data"))
    config = configured(
        folder,
        data={"kind": "huggingface", "path": str(tmp_path / "data"), "length": 8},
        steps=3,
        warm_up={"steps": 1},
        evaluation={"batches": 1, "batch_size": 2, "pgd_steps": []},
    )
    found = run_language(config, tmp_path / "r", quiet=True).evaluation()
    assert found["steps"] == 3
    assert found["positions"] == 2 * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "tokens", "path": "far.npy"}}, "token 40 at row 0, position 0"),
        ({"data": {"kind": "tokens", "path": "long.npy"}}, "longer than the model's context of 16"),
        ({"data": {"kind": "tokens", "path": "none.npy"}}, "no token file none.npy"),
        ({"target": {"kind": "hf", "path": "/nowhere/at/all"}}, "no folder"),
        ({"sites": {"model.layers.*.mlp.up": 3}}, "matches no module; closest: 'model.layers"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(folder, tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        run_language(configured(folder, **changes), tmp_path / "r", quiet=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


def test_a_target_without_logits_is_found_before_anything_is_written(folder, tmp_path):
    target = transformers.LlamaForCausalLM.from_pretrained(folder).model
    target.save_pretrained(tmp_path / "target")
    config = configured(
        tmp_path / "target",
        target={"kind": "hf", "path": str(tmp_path / "target"), "output": "last_hidden_state"},
        data={"kind": "tokens", "path": str(folder / "train.npy")},
        sites={"layers.*.mlp.up_proj": 10},
    )
    message = r"needs logits \[4, 12, 40\], but the target's output is \[4, 12, 16\]"
    with pytest.raises(UserError, match=message):
        run_language(config, tmp_path / "r", quiet=True)
    assert not (tmp_path / "r").exists()


def test_a_target_that_is_not_finite_is_found_before_anything_is_written(folder, tmp_path):
    target = transformers.LlamaForCausalLM.from_pretrained(folder)
    target.model.norm.weight.data[3] = float("nan")
    target.save_pretrained(tmp_path / "target")
    data = {"kind": "tokens", "path": str(folder / "train.npy")}
    config = configured(tmp_path / "target", data=data)
    with pytest.raises(UserError, match=r"^the target's own output is not finite$"):
        run_language(config, tmp_path / "r", quiet=True)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "tokens", "pth": "x"}}, "unknown key 'data.pth'; nearest .* 'path'"),
        ({"evaluation": {"batchs": 1}}, "unknown key 'evaluation.batchs'"),
        ({"target": {"kind": "hf", "pth": "x"}}, "unknown key 'target.pth'"),
        ({"data": {"kind": "huggingface", "path": "x"}}, "missing key 'data.length'"),
    ],
)  # fmt: skip
def test_a_wrong_key_names_the_nearest(folder, changes, message):
    with pytest.raises(UserError, match=message):
        configured(folder, **changes)


# Several seeds.


def called(*arguments):
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    return left.value.code


@pytest.fixture
def recipe_file(folder, tmp_path):
    path = tmp_path / "tiny.yaml"
    few = {"steps": 2, "warm_up": {"steps": 1}, "losses": LOSSES | {"stochastic_recon_subset": 0}}
    path.write_text(json.dumps(settings(folder, **few)))
    return path


def test_seeds_are_run_reported_and_summed_up(recipe_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("run", recipe_file, "--seeds", "0-1", "--out", out, "--quiet")
    assert called(*arguments) == 0
    together = json.loads((out / "aggregate.json").read_text())
    each = [json.loads((out / f"seed{s}" / "eval.json").read_text()) for s in (0, 1)]
    assert together["seeds"] == [0, 1]
    assert together["kl"]["ci"]["mean"] == pytest.approx(sum(e["kl"]["ci"] for e in each) / 2)
    assert together["l0"]["max"] == max(e["l0"] for e in each)
    assert (out / "seed1" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert "tiny: 2 of 2 seeds finished" in printed
    held = out / "seed0" / "config.yaml"  # of before a setting existed
    held.write_text(held.read_text().replace("lr_warm_up: 0.0\n", ""))
    assert "lr_warm_up" not in held.read_text()
    before = (out / "seed0" / "eval.json").stat().st_mtime_ns
    assert called(*arguments) == 0
    assert (out / "seed0" / "eval.json").stat().st_mtime_ns == before


def test_a_seed_that_lost_its_report_gets_it_again(recipe_file, tmp_path):
    out = tmp_path / "many"
    arguments = ("run", recipe_file, "--seeds", "0-1", "--out", out, "--quiet")
    assert called(*arguments) == 0
    weights = (out / "seed1" / "model.safetensors").read_bytes()
    kept = (out / "seed0" / "report.html").stat().st_mtime_ns
    (out / "seed1" / "report.html").unlink()
    assert called(*arguments) == 0
    assert (out / "seed1" / "report.html").is_file()
    assert (out / "seed1" / "model.safetensors").read_bytes() == weights
    assert (out / "seed0" / "report.html").stat().st_mtime_ns == kept


def test_seeds_of_a_language_model_run_one_after_another(recipe_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert called("run", recipe_file, "--seeds", "0-1", "--jobs", "2", "--out", out) == 2
    assert "one after another" in capsys.readouterr().err
    assert not out.exists()


# Killed and resumed.

PROGRAM = """
import json, sys
from pathlib import Path
from spd_fast.experiments import language_configuration
from spd_fast.experiments.language import run_language

config = language_configuration(json.loads(sys.argv[1]))
run_language(config, Path(sys.argv[2]), quiet=True, resume=True)
"""


def start(data, out):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(data), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_after(process, out, step):
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / f"step_{step}").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_twice_ends_bit_for_bit_as_one_left_alone(folder, tmp_path):
    data = settings(
        folder,
        ci_fn="transformer",
        ci_transformer={"d_model": 8, "heads": 2, "layers": 1},
        steps=100,
        checkpoint_every=10,
        keep_checkpoints=2,
        evaluation={"batches": 1, "batch_size": 3, "pgd_steps": []},
    )
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    whole = start(data, alone)
    kill_after(start(data, resumed), resumed, 20)
    kill_after(start(data, resumed), resumed, 60)
    for process in (start(data, resumed), whole):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
    last = "checkpoints/step_100"
    names = ["model.safetensors", "config.yaml", f"{last}/model.safetensors"]
    names += [f"{last}/optimizer.safetensors", f"{last}/extra.safetensors"]
    for name in names:
        assert (alone / name).read_bytes() == (resumed / name).read_bytes(), name


# The pretrained model.


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model in {STORIES}")
def test_the_small_recipe_learns(tmp_path):
    changes = [f"target.path={STORIES}", "evaluation.pgd_steps=[]", "steps=60"]
    config = language_configuration(set_keys(recipe("stories260k-small"), changes))
    found = run_language(config, tmp_path / "r", quiet=True).evaluation()
    assert 1.1 < found["ce"]["target"] < 1.5  # its README: about 1.28 nats, on longer sequences
    assert found["kl"]["unmasked"] < found["kl"]["ci"] < found["kl"]["zero"]
    first, last = found["frontier"][0], found["frontier"][-1]
    assert last["kl_stochastic"] < first["kl_stochastic"]
