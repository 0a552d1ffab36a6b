"""A decomposition on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel, Stochastic
from spd_fast.model.pretrained import target_hash
from spd_fast.ops import make_key
from spd_fast.targets import TMS
from tests import toys
from tests.model import test_kinds as kinds


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
        {"gate_eval": "interpolated"},
    ],
)
def test_what_comes_back_computes_the_same(tmp_path, options):
    model = saved(tmp_path, **options)
    again = DecomposedModel.from_pretrained(tmp_path, toys.Net(), backend="reference")
    x = toys.batch(1)
    assert again.options == model.options
    assert torch.equal(output(again, x), output(model, x))


def test_the_folder_holds_three_files(tmp_path):
    saved(tmp_path / "made" / "for it")
    found = sorted(p.name for p in (tmp_path / "made" / "for it").iterdir())
    assert found == ["README.md", "config.json", "model.safetensors"]


def test_every_importance_function_comes_back(tmp_path):
    for kind in ("vector_mlp", "shared_mlp", "global_mlp", "transformer"):
        model = saved(tmp_path, ci_fn=kind, ci_hidden=(5,))
        again = DecomposedModel.from_pretrained(tmp_path, toys.Net(), backend="reference")
        assert again.options == model.options
        assert torch.equal(output(again, toys.batch(1)), output(model, toys.batch(1)))


def test_every_kind_of_site_comes_back(tmp_path):
    model = DecomposedModel(kinds.Tokens(), kinds.SITES, delta=True)
    model.save_pretrained(tmp_path)
    again = DecomposedModel.from_pretrained(tmp_path, kinds.Tokens())
    assert {n: s.kind for n, s in again.sites.items()} == {
        n: s.kind for n, s in model.sites.items()
    }
    assert torch.equal(output(again, kinds.TOKENS), output(model, kinds.TOKENS))


class Named(toys.Net):
    def forward(self, x):
        return {"y": super().forward(x)}


def test_an_output_selector_comes_back(tmp_path):
    toys.DecomposedModel(Named(), toys.SITES, output="y").save_pretrained(tmp_path)
    again = DecomposedModel.from_pretrained(tmp_path, Named())
    assert again.clean_forward(toys.batch(1)).output.shape == (9, 3)


def test_a_callable_output_is_given_again(tmp_path):
    toys.DecomposedModel(Named(), toys.SITES, output=lambda o: o["y"]).save_pretrained(tmp_path)
    again = DecomposedModel.from_pretrained(tmp_path, Named(), output=lambda o: o["y"])
    assert again.clean_forward(toys.batch(1)).output.shape == (9, 3)


def test_what_an_earlier_version_wrote_can_be_read(tmp_path):
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    digest = hashlib.sha256()
    for name, site in model.sites.items():
        digest.update(name.encode() + site.weight.numpy().tobytes())
    for key in ("target", "output", "spd_fast"):
        del config[key]
    config |= {"format": 1, "target_weights_sha256": digest.hexdigest()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = DecomposedModel.from_pretrained(tmp_path, toys.Net(), backend="reference")
    assert torch.equal(output(again, toys.batch(1)), output(model, toys.batch(1)))
    with pytest.raises(UserError, match="made of a target with other weights"):
        DecomposedModel.from_pretrained(tmp_path, toys.Net(seed=1))


def test_a_target_that_differs_outside_the_sites_is_another_target(tmp_path):
    DecomposedModel(toys.Net(), {"head": 3}).save_pretrained(tmp_path)
    other = toys.Net()
    with torch.no_grad():
        other.blocks[0].up.bias[0] += 1
    with pytest.raises(UserError, match=r"with other weights than this one \(Net, sha256"):
        DecomposedModel.from_pretrained(tmp_path, other)


def test_a_compiled_target_is_the_same_target():
    assert target_hash(torch.compile(toys.Net())) == target_hash(toys.Net())


def test_a_target_that_nobody_can_load_has_to_be_given(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="needs its target: pass it"):
        DecomposedModel.from_pretrained(tmp_path)


def test_a_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_names_target_and_sites(tmp_path):
    saved(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# Decomposition of Net" in card
    assert "| `blocks.0.up` | linear | 4 → 6 | 7 |" in card


class FakeHub:
    """What huggingface_hub does, on a folder."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def HfApi(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.root is None:
            raise OSError("403 Forbidden")
        self.calls.append(("upload", commit_message))
        shutil.copytree(folder_path, self.root / repo_id)

    def snapshot_download(self, repo_id, *, revision, allow_patterns):
        if not (self.root / repo_id).is_dir():
            raise OSError("404 not found")
        self.calls.append(("download", revision, *allow_patterns))
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_a_pushed_decomposition_comes_back(hub):
    model = toys.decomposed(delta=True)
    url = model.push_to_hub("me/toy", private=True, token="secret", commit_message="first")
    assert url == "hub/me/toy"
    assert hub.calls == [("token", "secret"), ("create", "me/toy", True, True), ("upload", "first")]
    again = DecomposedModel.from_pretrained(
        "me/toy", toys.Net(), revision="v1", backend="reference"
    )
    assert hub.calls[-1] == ("download", "v1", "config.json", "model.safetensors")
    assert torch.equal(output(again, toys.batch(1)), output(model, toys.batch(1)))
    assert "Decomposition of Net" in (hub.root / "me/toy/README.md").read_text()


def test_a_repository_that_is_not_there_is_an_error(hub):
    with pytest.raises(UserError, match="no decomposition at the folder or hub id me/no: 404"):
        DecomposedModel.from_pretrained("me/no", toys.Net())


def test_a_hub_that_refuses_is_an_error(hub):
    hub.root = None
    with pytest.raises(UserError, match="cannot push to me/toy: 403 Forbidden"):
        toys.decomposed().push_to_hub("me/toy")


def test_without_huggingface_hub_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub: pip install"):
        toys.decomposed().push_to_hub("me/toy")


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
    with pytest.raises(UserError, match="made of a target with other weights"):
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
    change_config(tmp_path, format=3)
    with pytest.raises(UserError, match="has another format; need 2"):
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
