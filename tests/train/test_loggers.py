"""TensorBoard and Weights & Biases, of which neither is installed here: what they are told."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from spd_fast.errors import Diverged, UserError
from spd_fast.train.loggers import numbers
from tests.train.test_trainer import batches, config, trainer


class Writer:
    """torch's SummaryWriter: tag → [(step, value)] of every one made."""

    made: list[Writer]

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.scalars, self.closed = log_dir, purge_step, {}, False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def close(self):
        self.closed = True


class WandB:
    """Runs of wandb by id; a step before a run's last one is lost, as it is there."""

    def __init__(self):
        self.asked, self.lines, self.exits = [], {}, []

    def init(self, **options):
        self.asked.append(options)
        lines = self.lines.setdefault(options["id"], {})
        run = SimpleNamespace(step=max(lines, default=-1) + 1)

        def log(values, step):
            assert step >= run.step
            lines[step], run.step = values, step

        run.log, run.finish = log, lambda exit_code: self.exits.append(exit_code)
        return run


@pytest.fixture
def writers(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = type("W", (Writer,), {"made": []})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module.SummaryWriter.made


@pytest.fixture
def wandb(monkeypatch):
    fake = WandB()
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fake.init))
    return fake


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_gets_every_number_of_every_line(tmp_path, writers):
    trainer(tmp_path, log_to=["tensorboard"]).fit()
    (writer,) = writers
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.closed
    held = lines(tmp_path)
    assert [line["step"] for line in held] == [4, 8, 12]
    assert set(writer.scalars) == {
        "lr", "p", "ms_per_step",
        *(f"losses/{n}" for n in held[0]["losses"]),
        *(f"{key}/{n}" for key in ("l0", "live") for n in held[0]["l0"]),
    }  # fmt: skip
    total = [(line["step"], line["losses"]["total"]) for line in held]
    assert writer.scalars["losses/total"] == total


def test_wandb_gets_name_settings_and_every_line(tmp_path, wandb):
    trainer(tmp_path, log_to=["wandb"]).fit()
    (asked,) = wandb.asked
    assert (asked["name"], asked["project"], asked["dir"]) == (
        "toy-seed0", "spd_fast", str(tmp_path),
    )  # fmt: skip
    assert asked["config"]["lr"] == 1e-2
    assert wandb.lines[asked["id"]] == {line["step"]: numbers(line) for line in lines(tmp_path)}
    assert wandb.exits == [0]


def test_a_killed_run_goes_on_as_the_same_run_of_wandb(tmp_path, wandb, writers):
    def killed(step):
        if step == 9:
            raise KeyboardInterrupt
        return batches(step)

    both = {"log_to": ["wandb", "tensorboard"]}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, batches=killed, **both).fit()
    assert wandb.exits == [1]
    assert writers[0].closed
    again = trainer(tmp_path, **both)
    assert again.resume()
    again.fit()
    assert len({asked["id"] for asked in wandb.asked}) == 1
    assert all(asked["resume"] == "allow" for asked in wandb.asked)
    assert list(wandb.lines[wandb.asked[0]["id"]]) == [4, 8, 12]
    # Its files are written anew from metrics.jsonl.
    assert [step for step, _ in writers[1].scalars["lr"]] == [4, 8, 12]
    assert writers[1].purge_step == 0


def test_a_part_is_told_when_the_training_goes_on(tmp_path, wandb):
    run = trainer(tmp_path, log_to=["wandb"])
    run.fit(6)
    assert wandb.asked == []
    run.fit()
    assert list(wandb.lines[wandb.asked[0]["id"]]) == [4, 6, 8, 12]


def test_a_run_that_diverges_has_failed(tmp_path, wandb):
    with pytest.raises(Diverged):
        trainer(tmp_path, log_to=["wandb"], lr=1e30).fit()
    assert wandb.exits == [1]


def test_where_the_lines_go_is_no_part_of_the_run(tmp_path, wandb):
    plain, logged = config(), config(log_to=["wandb"])
    assert logged.log_to == ("wandb",)
    assert plain.to_yaml() == logged.to_yaml()
    trainer(tmp_path).fit(6)
    again = trainer(tmp_path, log_to=["wandb"])
    assert again.resume()


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'spd_fast\[{name}\]'$") as caught:
        trainer(tmp_path, log_to=[name])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_logger_without_a_folder_is_an_error(wandb):
    with pytest.raises(UserError, match="log_to 'wandb' needs a folder"):
        trainer(log_to=["wandb"])


def test_an_unknown_logger_is_an_error():
    with pytest.raises(UserError, match=r"log_to.0: input should be 'wandb' or 'tensorboard'"):
        config(log_to=["wand"])


def test_a_wandb_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"^wandb does not start \(api_key .*\(no-tty\)\); "):
        trainer(tmp_path, log_to=["wandb"]).fit()


def test_nobody_is_told_without_log_to(tmp_path, wandb, writers):
    trainer(tmp_path).fit()
    assert (wandb.asked, writers) == ([], [])
    assert not (tmp_path / "wandb.id").exists()
