"""APD's training step."""

from __future__ import annotations

import json

import pytest
import torch

from spd_fast import targets
from spd_fast.baselines import APDModel, APDTrainer
from spd_fast.baselines.losses import LOSSES
from spd_fast.experiments import configuration, recipe
from spd_fast.train import set_keys
from spd_fast.train.schedules import learning_rate

SMALL = ["batch_size=32", "steps=40", "log_every=10", "checkpoint_every=20"]


def make(*changes: str, name: str = "apd/tms_5-2", out=None) -> APDTrainer:
    config = configuration(set_keys(recipe(name), [*SMALL, *changes]))
    torch.manual_seed(0)  # of an untrained target
    target = targets.make_target(config.target, config.seed)
    model = APDModel(
        target, dict.fromkeys(config.sites, config.components), rank=config.rank,
        extra_rank=config.extra_rank, seed=config.seed,
    )  # fmt: skip
    data = targets.feature_data(config.target, config.batch_size, config.seed, "decompose")
    return APDTrainer(model, config, data, out=out, quiet=True)


def test_the_learning_rate_rises_from_zero_and_follows_its_schedule():
    run = make("steps=100", "lr_warm_up=0.1", "lr_schedule=quarter_cosine", "lr=0.5")
    assert [run.lr_at(i) for i in (0, 5, 9)] == [0, 0.25, 0.45]
    for i in (10, 50, 99):
        assert run.lr_at(i) == learning_rate("quarter_cosine", 0.5, i - 10, 90)
    assert run.lr_at(10) == 0.5
    assert run.lr_at(99) == pytest.approx(0, abs=1e-15)
    assert make("lr_warm_up=0").lr_at(0) == 0.03


def test_a_step_is_adam_on_the_weighted_sum_of_the_losses():
    run, twin = make("lr_warm_up=0"), make("lr_warm_up=0")
    config = twin.config
    optimizer = torch.optim.Adam(twin.model.parameters(), lr=config.lr)
    for i in range(3):
        run.train_step(i)
        step = twin.forwards(i)
        assert int(step.kept.sum()) == int(config.top_k * 32)
        total = (
            LOSSES["faithfulness"](step)
            + config.losses.topk_recon.coeff * LOSSES["topk_recon"](step)
            + config.losses.schatten.coeff * LOSSES["schatten"](step)
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for a, b in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_loss_without_coefficient_is_not_computed():
    losses, _ = make("losses.schatten.coeff=0").train_step(1)
    assert set(losses) == {"faithfulness", "topk_recon"}


def test_with_unit_norm_a_step_starts_from_unit_columns_and_moves_across_them():
    run = make("unit_norm=true", "lr_warm_up=0")
    gradients = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (  # type: ignore[method-assign]
        gradients.append((A.detach() * A.grad).sum(dim=1)),
        norms.append(A.detach().norm(dim=1)),
        step(),
    )
    A, norms = run.model.A("linear1"), []
    run.train_step(0)
    run.train_step(1)
    for norm, parallel in zip(norms, gradients, strict=True):
        torch.testing.assert_close(norm, torch.ones_like(norm))
        assert parallel.abs().max() < 1e-6


def test_without_unit_norm_lengths_are_free():
    run = make("lr_warm_up=0")
    before = run.model.A("linear1").detach().norm(dim=1)
    run.train_step(0)
    assert (run.model.A("linear1").norm(dim=1) - before).abs().max() > 1e-3


def test_training_lowers_the_losses(tmp_path):
    run = make("steps=300", "log_every=100", out=tmp_path)
    run.fit()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [100, 200, 300]
    assert lines[-1]["losses"]["faithfulness"] < lines[0]["losses"]["faithfulness"]
    assert lines[0]["p"] == 1
    assert lines[0]["l0"] == dict.fromkeys(("linear1", "linear2"), 6 / 32)
    assert set(lines[0]["live"]) == {"linear1", "linear2"}


@pytest.mark.parametrize("unit_norm", ["true", "false"])
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path, unit_norm):
    """Adam's moments lie in memory as A does, which is not row by row."""
    settings = [f"unit_norm={unit_norm}", "keep_checkpoints=9"]
    whole = make(*settings, out=tmp_path)
    whole.fit()
    (tmp_path / "checkpoints" / "step_40").rename(tmp_path / "aside")
    again = make(*settings, out=tmp_path)
    assert again.resume()
    assert again.step == 20
    again.fit()
    for name, a in whole.model.state_dict().items():
        assert torch.equal(a, again.model.state_dict()[name])


def test_residual_mlps_train_with_activation_reconstruction():
    run = make(
        "target.d_embed=12", "components=5", "losses.activation_recon=1", name="apd/resid_mlp1"
    )
    losses, step = run.train_step(1)
    assert set(losses) == set(LOSSES)
    assert all(loss.isfinite() for loss in losses.values())
    assert list(step.outputs) == ["layers.0.mlp_in", "layers.0.mlp_out"]
