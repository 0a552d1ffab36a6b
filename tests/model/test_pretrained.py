"""A decomposition on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel, Stochastic
from spd_fast.ops import make_key
from spd_fast.targets import TMS
from tests import toys


def saved(folder, **options):
    model = toys.decomposed(**options)
    model.save_pretrained(folder)
    return model


def output(model, x):
    ci = model.causal_importances(model.clean_forward(x))
    return model.masked_forward(x, Stochastic(ci, make_key(1, 2), delta=model.delta))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ci_fn": "linear", "sigmoid": "2026", "init": "2026", "delta": True},
        {"ci_hidden": (4, 3), "sigmoid": "hard"},
    ],
)
def test_what_comes_back_computes_the_same(tmp_path, options):
    model = saved(tmp_path, **options)
    again = DecomposedModel.from_pretrained(tmp_path, toys.Net(), backend="reference")
    x = toys.batch(1)
    assert again.options == model.options
    assert torch.equal(output(again, x), output(model, x))


def test_the_folder_holds_two_files(tmp_path):
    saved(tmp_path / "made" / "for it")
    found = sorted(p.name for p in (tmp_path / "made" / "for it").iterdir())
    assert found == ["config.json", "model.safetensors"]


def test_the_targets_weights_are_not_stored(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(name.split(".")[0] in ("components", "ci_fns") for name in tensors)
    assert tensors["components.blocks-0-up.V"].shape == (4, 7)


@pytest.mark.parametrize("C", [1, 4])
def test_tied_components_come_back_tied(tmp_path, C):
    sites = {"linear1": C, "linear2": C}
    target = TMS(5, 2)
    model = DecomposedModel(target, sites)
    model.save_pretrained(tmp_path)
    again = DecomposedModel.from_pretrained(tmp_path, target)
    assert torch.equal(again.V("linear1"), model.V("linear1"))
    assert again.V("linear1").data_ptr() == again.U("linear2").data_ptr()


def test_a_bfloat16_target_can_be_saved(tmp_path):
    target = nn.Sequential(nn.Linear(3, 2)).bfloat16()
    DecomposedModel(target, {"0": 2}).save_pretrained(tmp_path)
    assert DecomposedModel.from_pretrained(tmp_path, target).V("0").dtype == torch.bfloat16


def test_a_target_with_other_weights_is_an_error(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="made of a target with other weights"):
        DecomposedModel.from_pretrained(tmp_path, toys.Net(seed=1))


def test_a_target_without_the_sites_is_an_error(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=r"'blocks.0.up' matches no module"):
        DecomposedModel.from_pretrained(tmp_path, TMS(5, 2))


def test_a_target_of_another_shape_is_an_error(tmp_path):
    saved(tmp_path)
    target = toys.Net()
    target.head = nn.Linear(4, 2).double()
    with pytest.raises(UserError, match=r"no readable decomposition in .*size mismatch"):
        DecomposedModel.from_pretrained(tmp_path, target)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no readable decomposition in"):
        DecomposedModel.from_pretrained(tmp_path, toys.Net())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_truncated_file_is_an_error(tmp_path, name, length):
    saved(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="no readable decomposition in"):
        DecomposedModel.from_pretrained(tmp_path, toys.Net())


def test_another_format_is_an_error(tmp_path):
    saved(tmp_path)
    change_config(tmp_path, format=2)
    with pytest.raises(UserError, match="has another format; need 1"):
        DecomposedModel.from_pretrained(tmp_path, toys.Net())


@pytest.mark.parametrize(
    "changes", [{"sites": None}, {"sites": [1]}, {"extra": 1}, {"ci_hidden": 3}, {"backend": "cpu"}]
)
def test_a_foreign_config_is_an_error(tmp_path, changes):
    saved(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError):
        DecomposedModel.from_pretrained(tmp_path, toys.Net())


def test_a_config_that_is_no_object_is_an_error(tmp_path):
    saved(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="no readable decomposition in"):
        DecomposedModel.from_pretrained(tmp_path, toys.Net())
