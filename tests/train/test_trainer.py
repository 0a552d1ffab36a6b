"""The training loop."""

from __future__ import annotations

import json
import re

import pytest
import torch

from spd_fast.data.streams import StreamBatches
from spd_fast.errors import Diverged, UserError
from spd_fast.losses import LOSSES, faithfulness
from spd_fast.model import DecomposedModel
from spd_fast.targets import TMS
from spd_fast.train import Trainer, parse_config
from spd_fast.train.schedules import learning_rate
from tests import toys

LOSS_KEYS = ["faithfulness", "stochastic_recon", "stochastic_recon_layerwise"]


def config(**changes):
    minimality = {"coeff": 1e-2, "p": 2, "p_final": 1} | changes.pop("minimality", {})
    data = {
        "name": "toy",
        "preset": "paper",
        "target": {"kind": "tms", "features": 5, "hidden": 2},
        "sites": toys.SITES,
        "losses": {"importance_minimality": minimality} | changes.pop("losses", {}),
        "lr": 1e-2,
        "steps": 12,
        "batch_size": 9,
        "log_every": 4,
        "checkpoint_every": 6,
    }
    return parse_config(data | changes)


def batches(step):
    return toys.batch(100 + step, dtype=torch.float32)


def trainer(out=None, model_seed=0, batches=batches, quiet=True, **changes):
    target = toys.Net(model_seed, torch.float32)
    model = DecomposedModel(target, toys.SITES, ci_hidden=(3,), backend="reference")
    return Trainer(model, config(**changes), batches, out=out, quiet=quiet)


def metrics(folder, but=()):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in but} for line in lines]


def state(trainer):
    found = {f"model.{k}": v.clone() for k, v in trainer.model.state_dict().items()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{k}": v.clone() for k, v in values.items()}
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# One step.


def test_the_gradient_is_that_of_the_weighted_sum_of_losses():
    coefficients = {"faithfulness": 0.7, "stochastic_recon": 2.0, "stochastic_recon_layerwise": 0.3}
    ours, theirs = (trainer(losses=coefficients) for _ in range(2))
    ours.train_step(0)
    step = theirs.forwards(0)
    coefficients["importance_minimality"] = 1e-2
    total = sum(c * LOSSES[name](step) for name, c in coefficients.items())
    expected = torch.autograd.grad(total, list(theirs.model.parameters()))
    for parameter, gradient in zip(ours.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_first_step_is_adams():
    run = trainer()
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train_step(0)
    for old, new in zip(before, run.model.parameters(), strict=True):
        # Adam's first step is lr · sign(g), up to its eps of 1e-8.
        moved = torch.where(new.grad.abs() > 1e-4, 1e-2 * new.grad.sign(), old - new.detach())
        torch.testing.assert_close(old - new.detach(), moved, rtol=1e-3, atol=1e-6)


def test_losses_that_take_no_part_are_not_computed(monkeypatch):
    def not_asked_for(_):
        raise AssertionError("computed")

    monkeypatch.setitem(LOSSES, "stochastic_recon_layerwise", not_asked_for)
    losses, _ = trainer(losses={"stochastic_recon_layerwise": 0}).train_step(0)
    assert list(losses) == ["faithfulness", "stochastic_recon", "importance_minimality"]


def test_without_minimality_there_are_no_penalty_sums():
    step = trainer(minimality={"coeff": 0}).forwards(0)
    assert not any(s.penalty_sum.any() for s in step.importances.values())


def test_the_learning_rate_follows_its_schedule():
    run = trainer(lr_schedule="cosine")
    seen = []
    for index in range(12):
        run.train_step(index)
        seen.append({group["lr"] for group in run.optimizer.param_groups})
    assert seen == [{learning_rate("cosine", 1e-2, t, 12)} for t in range(12)]


def test_p_anneals_with_the_steps():
    run = trainer(minimality={"p": 2, "p_final": 1})
    step = run.forwards(6)  # halfway: p = 1.5
    upper = step.importances["head"].upper
    expected = ((upper + 1e-12) ** 1.5).sum(dim=0)
    torch.testing.assert_close(step.importances["head"].penalty_sum, expected)


def test_masks_are_a_function_of_seed_and_step():
    assert trainer(seed=3).forwards(5).key.tolist() == [3, 5]


def test_a_step_reads_no_value_back(monkeypatch):
    run = trainer()
    run.train_step(0)  # the target's structure is looked at once

    def read(*_):
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    run.train_step(1)


# The loop.


def test_fit_asks_for_every_batch_in_order():
    asked = []

    def remembered(step):
        asked.append(step)
        return batches(step)

    trainer(batches=remembered).fit()
    assert asked == list(range(12))


def test_fit_lowers_the_loss(tmp_path):
    trainer(tmp_path, steps=60, log_every=1).fit()
    totals = [line["losses"]["total"] for line in metrics(tmp_path)]
    assert sum(totals[-5:]) < 0.5 * sum(totals[:5])


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer()
    run.fit()
    assert run.step == 12
    assert list(tmp_path.iterdir()) == []


def test_its_folder_is_made_and_may_be_a_string(tmp_path):
    trainer(str(tmp_path / "a" / "run"), steps=1).fit()
    assert (tmp_path / "a" / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("given", [[batches(0)], batches(0)])
def test_batches_that_are_no_function_of_the_step_say_what_makes_one(given):
    with pytest.raises(UserError, match=r"function of the step, got a \w+: .*StreamBatches"):
        trainer(batches=given)


def test_metrics_are_written_every_few_steps_and_at_the_end(tmp_path):
    trainer(tmp_path, log_every=5).fit()
    assert [line["step"] for line in metrics(tmp_path)] == [5, 10, 12]


def test_a_line_of_metrics_holds_what_a_report_needs(tmp_path):
    trainer(tmp_path).fit()
    line = metrics(tmp_path)[1]
    assert list(line) == ["step", "lr", "p", "losses", "l0", "live", "ms_per_step"]
    assert line["step"] == 8
    assert line["lr"] == learning_rate("quarter_cosine", 1e-2, 7, 12)
    assert line["p"] == pytest.approx(2 - 7 / 12)
    assert list(line["losses"]) == [*LOSS_KEYS, "importance_minimality", "total"]
    assert list(line["l0"]) == list(line["live"]) == [
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head",
    ]  # fmt: skip
    assert line["ms_per_step"] > 0


def test_the_total_is_the_weighted_sum(tmp_path):
    trainer(tmp_path, losses={"faithfulness": 3}).fit()
    losses = metrics(tmp_path)[-1]["losses"]
    expected = 3 * losses["faithfulness"] + losses["stochastic_recon"]
    expected += losses["stochastic_recon_layerwise"] + 1e-2 * losses["importance_minimality"]
    assert losses["total"] == pytest.approx(expected, rel=1e-6)


def test_l0_and_live_components_count_importances_above_a_hundredth(tmp_path):
    run = trainer(tmp_path)
    losses, step = run.train_step(0)
    run.log(run.checked(losses, step), step, 1.0)
    lower = step.importances["head"].lower
    line = metrics(tmp_path)[0]
    assert line["l0"]["head"] == pytest.approx((lower > 0.01).sum().item() / 9)
    assert line["live"]["head"] == (lower > 0.01).any(dim=0).sum().item()


def test_progress_off_a_terminal_is_plain_lines(capsys):
    trainer(quiet=False).fit()
    out, err = capsys.readouterr()
    assert out == ""
    # A machine that takes more than a second for it shows lines before the last one.
    *earlier, last = err.splitlines()
    line = r"decompose: 12/12  ETA 00:00  loss \d\.\d{3}e[+-]\d\d  L0 \d+\.\d\d  \d+\.\d ms/step"
    assert re.fullmatch(line, last)
    assert all(re.match(r"decompose: \d+/12  ETA ", text) for text in earlier)


def test_quiet_says_nothing(capsys):
    trainer(quiet=True).fit()
    assert capsys.readouterr() == ("", "")


# Warm-up.

WARM_UP = {"steps": 5, "lr": 0.01, "weight_decay": 0.1}


def test_warm_up_is_adamw_on_faithfulness():
    ours, theirs = trainer(warm_up=WARM_UP), trainer()
    ours.warm_up()
    optimizer = torch.optim.AdamW(theirs.model.components.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        faithfulness(theirs.model).backward()
        optimizer.step()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_start_from_inputs_comes_before_the_first_step():
    def started():
        built = trainer(warm_up=WARM_UP)
        built.model.awaits_inputs = True
        return built

    ours, theirs = started(), started()
    theirs.model.start_from_inputs(map(theirs.batches, range(theirs.config.steps)))
    assert not theirs.model.awaits_inputs
    changed = [n for n, p in started().model.named_parameters()
               if not torch.equal(p, dict(theirs.model.named_parameters())[n])]  # fmt: skip
    assert changed
    assert all(n.startswith("components") for n in changed)
    ours.warm_up()
    theirs.warm_up()
    assert_same(state(ours), state(theirs))


def test_a_start_from_inputs_leaves_a_generators_other_batches_to_the_training():
    plain = trainer()
    stream = StreamBatches(batches(step) for step in range(plain.config.steps))
    run = trainer(batches=stream)
    run.model.awaits_inputs = True
    run.fit()
    assert run.step == plain.config.steps


def test_warm_up_leaves_the_gates_alone():
    run = trainer(warm_up=WARM_UP)
    before = {k: v.clone() for k, v in run.model.ci_fns.state_dict().items()}
    run.warm_up()
    assert_same(before, run.model.ci_fns.state_dict())


def test_warm_up_lowers_faithfulness():
    run = trainer(warm_up=WARM_UP | {"steps": 100})
    before = faithfulness(run.model).item()
    run.warm_up()
    assert faithfulness(run.model).item() < 0.5 * before


def test_warm_ups_moments_are_forgotten():
    run = trainer(warm_up=WARM_UP)
    run.warm_up()
    assert run.optimizer.state_dict()["state"] == {}


def test_fit_warms_up_before_the_first_step_only(monkeypatch):
    run, calls = trainer(), []
    monkeypatch.setattr(run, "warm_up", lambda: calls.append(run.step))
    run.fit()
    run.config = config(steps=14)
    run.fit()
    assert calls == [0]


# What goes wrong.


def poisoned(at):
    return lambda step: batches(step) * (float("nan") if step == at else 1)


NAN_LOSS = (
    r"loss 'stochastic_recon' is nan at step 7 \(the target's own activations are not finite "
    r"from site 'blocks.0.up' on\); .*lower lr"
)


def test_a_loss_that_is_not_finite_names_itself_the_step_and_the_site(tmp_path):
    run = trainer(tmp_path, batches=poisoned(6), log_every=100, checkpoint_every=3)
    with pytest.raises(Diverged, match=NAN_LOSS):
        run.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_3", "step_6"]


def test_a_loss_that_is_not_finite_is_not_in_the_metrics(tmp_path):
    with pytest.raises(UserError):
        trainer(tmp_path, batches=poisoned(6), log_every=1).fit()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 7))


def test_a_loss_seen_late_says_between_which_steps_it_began(monkeypatch):
    run = trainer(batches=poisoned(6), log_every=5)
    monkeypatch.setattr(run, "sees_every_step", lambda: False)  # as on a GPU
    began = r"loss .* is nan, noticed at step 10 \(it began at one of steps 6 to 10\)"
    with pytest.raises(Diverged, match=began):
        run.fit()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    run = trainer(tmp_path, batches=poisoned(7), log_every=12, checkpoint_every=3)
    monkeypatch.setattr(run, "sees_every_step", lambda: False)
    began = r"parameter .* is not finite, noticed at step 9 \(it began at one of steps 7 to 9\)"
    with pytest.raises(Diverged, match=began):
        run.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_3", "step_6"]


# Resume, in one process.


class Stop(Exception):
    pass


def until(last):
    def stopping(step):
        if step == last:
            raise Stop
        return batches(step)

    return stopping


def interrupted(folder, *stops, **changes):
    for last in stops:
        run = trainer(folder, batches=until(last), **changes)
        run.resume()
        with pytest.raises(Stop):
            run.fit()


@pytest.mark.parametrize("stops", [(8,), (3, 8), (7, 11)])
def test_a_resumed_run_ends_as_one_that_was_not(tmp_path, stops):
    changes = {"checkpoint_every": 3, "log_every": 2, "warm_up": WARM_UP, "delta": True}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = trainer(tmp_path / "a", **changes)
    whole.fit()
    interrupted(tmp_path / "b", *stops, **changes)
    resumed = trainer(tmp_path / "b", **changes)
    assert resumed.resume()
    resumed.fit()
    assert_same(state(whole), state(resumed))
    assert metrics(tmp_path / "a", ["ms_per_step"]) == metrics(tmp_path / "b", ["ms_per_step"])


def tied(folder, batches):
    target = TMS(5, 2)
    with torch.no_grad():
        target.linear1.weight.copy_(toys.batch(1, 2, 5))
        target.linear2.bias.zero_()
    model = DecomposedModel(target, {"linear1": 6, "linear2": 6})
    return Trainer(model, config(checkpoint_every=3), batches, out=folder, quiet=True)


def test_a_resumed_run_of_tied_sites_ends_as_one_that_was_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def features(step):
        return toys.batch(step, 9, 5, dtype=torch.float32)

    def stopping(step):
        if step == 8:
            raise Stop
        return features(step)

    whole = tied(tmp_path / "a", features)
    whole.fit()
    with pytest.raises(Stop):
        tied(tmp_path / "b", stopping).fit()
    resumed = tied(tmp_path / "b", features)
    resumed.resume()
    resumed.fit()
    assert_same(state(whole), state(resumed))


def test_resume_continues_at_the_step_of_the_newest_checkpoint(tmp_path):
    interrupted(tmp_path, 10)
    run = trainer(tmp_path)
    assert run.resume()
    assert run.step == 6


def test_resume_without_a_folder_is_an_error():
    with pytest.raises(UserError, match="make the trainer with `out`"):
        trainer().resume()


def test_resume_without_a_checkpoint_starts_over(tmp_path):
    interrupted(tmp_path, 5)
    assert metrics(tmp_path)
    run = trainer(tmp_path)
    assert not run.resume()
    assert run.step == 0
    assert metrics(tmp_path) == []


def test_resume_drops_metrics_past_the_checkpoint_and_a_line_cut_short(tmp_path):
    interrupted(tmp_path, 10, log_every=2)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 10, "lr": 0.0')
    trainer(tmp_path, log_every=2).resume()
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6]


def test_a_finished_run_resumes_to_its_end(tmp_path):
    done = trainer(tmp_path)
    done.fit()
    again = trainer(tmp_path)
    again.resume()
    again.fit()
    assert_same(state(done), state(again))


@pytest.mark.parametrize("changes", [{"lr": 2e-2}, {"seed": 1}, {"steps": 13}, {"model_seed": 1}])
def test_a_checkpoint_of_another_run_is_an_error(tmp_path, changes):
    interrupted(tmp_path, 8)
    with pytest.raises(UserError, match="step_6 belongs to another configuration or target"):
        trainer(tmp_path, **changes).resume()


@pytest.mark.parametrize("changes", [{"log_every": 3}, {"checkpoint_every": 5}, {"name": "other"}])
def test_how_often_one_looks_does_not_make_it_another_run(tmp_path, changes):
    interrupted(tmp_path, 8)
    assert trainer(tmp_path, **changes).resume()


def test_a_checkpoint_that_does_not_fit_the_model_is_an_error(tmp_path):
    interrupted(tmp_path, 8)
    run = trainer(tmp_path)
    run.model = DecomposedModel(run.model.target, dict.fromkeys(toys.SITES, 2))
    with pytest.raises(UserError, match="step_6 does not fit the model"):
        run.resume()


def test_a_truncated_checkpoint_is_an_error(tmp_path):
    interrupted(tmp_path, 8)
    path = tmp_path / "checkpoints" / "step_6" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="step_6 cannot be read"):
        trainer(tmp_path).resume()
