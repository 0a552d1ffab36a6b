"""Several starts of a run: which one is continued; a kill at any moment changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from spd_fast import targets
from spd_fast.errors import Diverged, UserError
from spd_fast.experiments import evaluate_run, load_run, run
from spd_fast.experiments import starts as module
from spd_fast.experiments.runs import make_trainer, training_time
from spd_fast.experiments.starts import start_config
from spd_fast.train import Trainer
from tests.experiments.conftest import small, tree

# 20 steps, of which each of three starts does the first 8.
# The coefficient is annealed, so that a loss taken with another step's would differ.
THREE = (
    "starts.count=3", "starts.fraction=0.4", "log_every=4", "checkpoint_every=3",
    "losses.importance_minimality.coeff_final=3",
    "losses.importance_minimality.coeff_anneal_end=0.4",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts") / "run"
    run(small(*THREE), folder, quiet=True)
    return folder


def target_of(folder):
    return targets.load_target(small().target, folder / "target")


def record(folder):
    return json.loads((folder / "starts.json").read_text())


def trained(folder):
    """What a run's steps have made: everything but times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k != "ms_per_step"} for line in lines]
    return record(folder), metrics, (folder / "model.safetensors").read_bytes()


def test_the_first_start_is_the_run_itself_and_no_two_are_the_same():
    config = small()
    assert start_config(config, 0) is config
    seeds = {start_config(small(f"seed={s}"), k).seed for s in range(5) for k in range(5)}
    assert len(seeds) == 25
    assert all(0 <= s < 2**32 for s in seeds)
    again = start_config(config, 1)
    assert again == start_config(config, 1)
    assert again.model_dump(exclude={"seed"}) == config.model_dump(exclude={"seed"})


def test_the_start_of_lowest_loss_is_continued(whole):
    config, losses = small(*THREE), []
    for start in range(3):
        alone = make_trainer(start_config(config, start), target_of(whole), None, None, True)
        alone.fit(8)
        assert alone.step == 8
        losses.append(alone.fresh_loss())
    assert len(set(losses)) == 3
    assert record(whole) == {
        "chosen": losses.index(min(losses)),
        "losses": losses,
        "seeds": [start_config(config, start).seed for start in range(3)],
        "steps": 8,
    }


def test_a_start_goes_on_as_a_run_with_its_seed(whole):
    chosen = start_config(small(*THREE), record(whole)["chosen"])
    alone = make_trainer(chosen, target_of(whole), None, None, True)
    alone.fit()
    held = load_file(whole / "model.safetensors")
    parameters = dict(alone.model.components.named_parameters())
    assert parameters
    for name, value in parameters.items():
        assert torch.equal(held[f"components.{name}"], value), name


def test_every_start_is_the_same_run_up_to_its_seed_so_the_lowest_can_be_any(tmp_path, whole):
    """The choice follows the losses, not the order."""
    chosen = {record(whole)["chosen"]}
    for seed in range(4):
        out = tmp_path / str(seed)
        run(small(*THREE, f"seed={seed}", "steps=10"), out, quiet=True)
        found = record(out)
        assert found["losses"][found["chosen"]] == min(found["losses"])
        chosen.add(found["chosen"])
    assert len(chosen) > 1


def test_a_run_with_starts_keeps_their_metrics_and_drops_their_checkpoints(whole):
    names = set(tree(whole))
    for start in range(3):
        assert f"starts/{start}/metrics.jsonl" in names
    assert not any(n.startswith("starts/") and "checkpoints" in n for n in names)


def test_the_evaluation_tells_of_the_starts_and_counts_their_time(whole):
    evaluation = json.loads((whole / "eval.json").read_text())
    assert evaluation["starts"] == record(whole)

    def seconds(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return training_time([json.loads(line) for line in lines])[1]

    others = [whole / "starts" / str(k) for k in range(3) if k != record(whole)["chosen"]]
    assert evaluation["seconds"] == pytest.approx(seconds(whole) + sum(map(seconds, others)))
    assert evaluation["ms_per_step"] == pytest.approx(1e3 * seconds(whole) / 20)


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def with_processes(monkeypatch):
    """Count the processes that starts of a few steps are given."""
    begun = []

    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            begun.append(self)
            super().__init__(command, **options)

    monkeypatch.setattr(module, "SIDE_BY_SIDE_FROM", 1)
    monkeypatch.setattr(subprocess, "Popen", Process)
    return begun


def test_starts_side_by_side_are_the_same(tmp_path, monkeypatch, whole, three_threads):
    (tmp_path / "spd_fast.py").write_text("raise ImportError('another one')")
    monkeypatch.chdir(tmp_path)
    begun = with_processes(monkeypatch)
    steps, step = [], Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, index: (steps.append(index), step(self, index))[1]
    )
    run(small(*THREE), tmp_path / "run", quiet=True)
    assert [process.returncode for process in begun] == [0, 0]
    assert steps == [*range(8), *range(8, 20)]  # the first start and what follows, no other start
    assert trained(tmp_path / "run") == trained(whole)
    assert torch.get_num_threads() == 3


def test_more_starts_than_threads_go_one_after_the_other(tmp_path, monkeypatch, three_threads):
    begun = with_processes(monkeypatch)
    torch.set_num_threads(2)
    run(small(*THREE), tmp_path / "run", quiet=True)
    assert not begun


def test_a_process_that_fails_leaves_its_start_to_the_run(
    tmp_path, monkeypatch, whole, three_threads
):
    begun = with_processes(monkeypatch)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    run(small(*THREE), tmp_path / "run", quiet=True)
    assert len(begun) == 2
    assert trained(tmp_path / "run") == trained(whole)


def test_a_start_in_a_process_ends_with_its_caller(tmp_path, whole):
    """However that ends: the pipe closes."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copytree(whole / "target", out / "target")
    (out / "config.yaml").write_text(small(*THREE, "steps=1000000").to_yaml())
    command = [sys.executable, "-m", "spd_fast.experiments.start_process", str(out), "1", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        metrics = out / "starts" / "1" / "metrics.jsonl"
        while not metrics.exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 1
    assert not (out / "starts" / "1" / "loss.json").exists()


def test_one_start_is_no_start(finished):
    assert not (finished / "starts").exists()
    assert json.loads((finished / "eval.json").read_text())["starts"] is None


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


@pytest.mark.parametrize("calls", [1, 5, 8, 9, 13, 24, 25, 30])
def test_a_run_stopped_at_any_step_and_resumed_is_the_same(tmp_path, monkeypatch, whole, calls):
    step, done = Trainer.train_step, 0

    def until(self, index):
        nonlocal done
        done += 1
        if done == calls:
            raise Killed
        return step(self, index)

    shutil.copytree(whole / "target", tmp_path / "target")
    config = small(*THREE)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", until)
        with pytest.raises(Killed):
            run(config, tmp_path / "run", quiet=True)
    run(config, tmp_path / "run", quiet=True, resume=True)
    assert trained(tmp_path / "run") == trained(whole)


# Three losses, the choice, the metrics; then the checkpoint.
@pytest.mark.parametrize(
    ("name", "calls"), [*(("write_bytes", n) for n in range(1, 6)), ("save_checkpoint", 1)]
)
def test_a_run_stopped_while_it_chooses_is_the_same(tmp_path, monkeypatch, whole, name, calls):
    kept, done = getattr(module, name), 0

    def stopped(*arguments):
        nonlocal done
        done += 1
        if done == calls:
            raise Killed
        return kept(*arguments)

    config = small(*THREE)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stopped)
        with pytest.raises(Killed):
            run(config, tmp_path / "run", quiet=True)
    run(config, tmp_path / "run", quiet=True, resume=True)
    assert trained(tmp_path / "run") == trained(whole)


def test_the_loss_of_fresh_batches_leaves_the_training_as_it_was(whole):
    config = small()
    one, two = (make_trainer(config, target_of(whole), None, None, True) for _ in range(2))
    for trainer in (one, two):
        trainer.fit(4)
    assert one.fresh_loss() == one.fresh_loss()
    for trainer in (one, two):
        trainer.fit(6)
    for ours, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert one.fresh_loss() == two.fresh_loss()


def test_a_start_that_diverges_is_passed_over(tmp_path, monkeypatch):
    log = Trainer.log

    def diverging(self, losses, step, ms):
        if "starts" in str(self.out) and self.out.name == "0":
            raise Diverged("loss 'total' is nan")
        return log(self, losses, step, ms)

    monkeypatch.setattr(Trainer, "log", diverging)
    run(small(*THREE), tmp_path / "run", quiet=True)
    found = record(tmp_path / "run")
    assert found["losses"][0] is None
    assert found["chosen"] in (1, 2)


def test_starts_that_all_diverge_are_an_error(tmp_path):
    with pytest.raises(Diverged, match=r"all 3 starts diverged; try a lower lr \(1e\+30 now\)"):
        run(small(*THREE, "lr=1e30"), tmp_path / "run", quiet=True)


GOOD = {"chosen": 0, "losses": [1.0, 2.0, None], "seeds": [1, 2, 3], "steps": 8}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]"]
    + [
        json.dumps(GOOD | change)
        for change in (
            {"chosen": 3}, {"chosen": -1}, {"chosen": "first"}, {"chosen": 2}, {"seeds": [1]},
            {"losses": {"0": 1}}, {"losses": [1.0], "seeds": [1]}, {"losses": [float("nan"), 1, 2]},
        )
    ],
)  # fmt: skip
def test_a_damaged_choice_is_an_error(tmp_path, whole, text):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "starts.json").write_text(text)
    with pytest.raises(UserError, match=r"starts\.json is damaged") as caught:
        run(small(*THREE), tmp_path / "run", quiet=True, resume=True)
    assert "\n" not in str(caught.value)


def test_a_lost_choice_is_made_again(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "starts.json").unlink()
    assert evaluate_run(load_run(tmp_path / "run"))["starts"] == record(whole)
    run(small(*THREE), tmp_path / "run", quiet=True, resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == trained(whole)[2]


def test_a_start_without_a_finite_loss_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fresh_loss", lambda _: float("nan"))
    with pytest.raises(Diverged, match="all 3 starts diverged"):
        run(small(*THREE), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "starts" / "0" / "loss.json").read_text() == "null"


@pytest.mark.parametrize("text", ['"low"', "NaN", "", "[1]"])
def test_a_damaged_loss_of_a_start_is_an_error(tmp_path, whole, text):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "starts.json").unlink()
    (tmp_path / "run" / "starts" / "1" / "loss.json").write_text(text)
    with pytest.raises(UserError, match=r"loss\.json is damaged"):
        run(small(*THREE), tmp_path / "run", quiet=True, resume=True)


@pytest.mark.parametrize("assignment", ["starts.count=0", "starts.fraction=0", "starts.fraction=1"])
def test_starts_that_make_no_sense_are_refused(assignment):
    with pytest.raises(UserError, match=r"starts\."):
        small(assignment)
