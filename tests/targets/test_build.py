"""Targets made, trained, saved and loaded by their configuration."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_fast.errors import UserError
from spd_fast.targets import (
    TMS,
    ResidMLP,
    feature_data,
    load_target,
    make_target,
    save_target,
    train_target,
)
from spd_fast.train.config import ResidMLPTarget, TMSTarget

TMS_CONFIG = TMSTarget(features=5, hidden=2, identity_layers=1, steps=5, batch_size=8, starts=1)
MLP_CONFIG = ResidMLPTarget(features=4, d_embed=9, d_mlp=3, layers=2, steps=5, batch_size=8)
CONFIGS = pytest.mark.parametrize("config", [TMS_CONFIG, MLP_CONFIG], ids=["tms", "resid_mlp"])


def saved(config, folder):
    model, _ = train_target(config, seed=1)
    save_target(model, config, folder)
    return model


def test_the_kind_decides_the_network():
    tms, mlp = make_target(TMS_CONFIG, 0), make_target(MLP_CONFIG, 0)
    assert isinstance(tms, TMS)
    assert (tms.linear1.in_features, tms.linear1.out_features, len(tms.hidden_layers)) == (5, 2, 1)
    assert isinstance(mlp, ResidMLP)
    assert (mlp.W_E.shape, len(mlp.layers)) == ((4, 9), 2)


@pytest.mark.parametrize(("config", "low"), [(TMS_CONFIG, 0.0), (MLP_CONFIG, -1.0)])
def test_data_is_the_targets_distribution(config, low):
    data = feature_data(config, 32, 7, "decompose")
    assert (data.features, data.low, data.high) == (config.features, low, 1.0)
    assert (data.probability, data.batch_size, data.seed) == (config.probability, 32, 7)


@CONFIGS
def test_a_trained_target_comes_with_its_losses_and_tells_its_progress(config):
    done = []
    model, losses = train_target(config, 1, done.append)
    assert done == [1, 2, 3, 4, 5]
    assert len(losses) == 5
    assert not any(p.requires_grad for p in model.parameters())


@CONFIGS
def test_what_comes_back_computes_the_same(tmp_path, config):
    model = saved(config, tmp_path / "made" / "for it")
    again = load_target(config, tmp_path / "made" / "for it")
    x = feature_data(config, 16, 0, "evaluate")(0)
    assert torch.equal(again(x), model(x))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_tied_weight_is_stored_once_and_comes_back_tied(tmp_path):
    saved(TMS_CONFIG, tmp_path)
    assert "linear2.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_target(TMS_CONFIG, tmp_path)
    assert again.linear2.weight.data_ptr() == again.linear1.weight.data_ptr()


@CONFIGS
def test_how_it_was_trained_does_not_matter_for_loading(tmp_path, config):
    saved(config, tmp_path)
    load_target(config.model_copy(update={"steps": 99, "lr": 1.0}), tmp_path)


@CONFIGS
def test_another_architecture_is_an_error_that_shows_both(tmp_path, config):
    saved(config, tmp_path)
    with pytest.raises(UserError, match=r"'features': \d.* but the configuration asks for .*11"):
        load_target(config.model_copy(update={"features": 11}), tmp_path)


@CONFIGS
def test_an_empty_folder_is_an_error(tmp_path, config):
    with pytest.raises(UserError, match="no readable target in"):
        load_target(config, tmp_path)


@CONFIGS
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_an_error(tmp_path, config, name):
    saved(config, tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3])
    with pytest.raises(UserError, match="no readable target in"):
        load_target(config, tmp_path)


@CONFIGS
@pytest.mark.parametrize("config_json", ["[]", "3", "{}"])
def test_a_foreign_config_is_an_error(tmp_path, config, config_json):
    saved(config, tmp_path)
    (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(UserError, match="but the configuration asks for"):
        load_target(config, tmp_path)


@CONFIGS
def test_foreign_tensors_are_an_error_of_one_line(tmp_path, config):
    saved(config, tmp_path)
    save_file({"other": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not fit") as caught:
        load_target(config, tmp_path)
    assert "\n" not in str(caught.value)


@CONFIGS
def test_tensors_of_another_shape_are_an_error(tmp_path, config):
    saved(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: torch.zeros(3, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load_target(config, tmp_path)


def test_the_config_names_only_the_architecture(tmp_path):
    saved(MLP_CONFIG, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "kind": "resid_mlp", "features": 4, "d_embed": 9, "d_mlp": 3, "layers": 2,
    }  # fmt: skip
