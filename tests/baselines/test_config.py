"""The configuration of an APD run, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from spd_fast.baselines import APDConfig
from spd_fast.errors import UserError
from spd_fast.experiments import configuration, recipe, recipes
from spd_fast.train import Config, set_keys

NAMES = [name for name in recipes() if name.startswith("apd/")]
ALL = pytest.mark.parametrize("name", NAMES)

# The published recipes (arXiv 2501.14926).
# name: C, top-k, recon, Schatten, p, lr, schedule, warm-up, batch, steps
PUBLISHED = {
    "apd/tms_5-2": (5, 0.211, 1, 0.7, 1, 0.03, "constant", 0.05, 2048, 20_000),
    "apd/tms_40-10": (50, 1, 10, 20, 0.9, 1e-3, "quarter_cosine", 0.05, 2048, 20_000),
    "apd/resid_mlp1": (130, 1.28, 1, 10, 0.9, 1e-3, "quarter_cosine", 0.01, 256, 40_000),
    "apd/resid_mlp2": (200, 1.28, 2, 7, 0.9, 1e-3, "quarter_cosine", 0.01, 256, 10_000),
}


def refused(match, *changes, name="apd/tms_5-2"):
    with pytest.raises(UserError, match=match) as caught:
        configuration(set_keys(recipe(name), list(changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_published_settings(name):
    found = configuration(recipe(name))
    losses = found.losses
    assert PUBLISHED[name] == (
        found.components, found.top_k, losses.topk_recon.coeff, losses.schatten.coeff,
        losses.schatten.p, found.lr, found.lr_schedule, found.lr_warm_up, found.batch_size,
        found.steps,
    )  # fmt: skip
    assert losses.faithfulness == 1
    assert losses.activation_recon == (1 if "resid" in name else 0)
    assert found.unit_norm == (name == "apd/resid_mlp1")
    assert (found.rank, found.extra_rank) == (None, 0 if "resid" in name else 1)


@pytest.mark.parametrize(
    ("name", "components", "top_k"),
    [("tms_5-2", 6, 0.211 + 1 - 0.95**5), ("tms_40-10", 51, 1 + 1 - 0.95**40)],
)
def test_identity_variants_have_one_component_more_for_the_identity(name, components, top_k):
    found, base = (configuration(recipe(f"apd/{n}")) for n in (f"{name}-id", name))
    assert (found.components, found.top_k) == (components, pytest.approx(top_k, abs=5e-4))
    assert "hidden_layers.0" in found.sites
    same = {"name", "target", "sites", "components", "top_k"}
    assert found.model_dump(exclude=same) == base.model_dump(exclude=same)


@ALL
def test_the_target_is_that_of_spds_recipe(name):
    assert configuration(recipe(name)).target == configuration(recipe(name[4:])).target


@ALL
def test_the_sites_are_those_of_spds_recipe(name):
    assert set(configuration(recipe(name)).sites) == set(configuration(recipe(name[4:])).sites)


@ALL
def test_a_recipe_carries_its_name_and_comes_back_from_yaml(name):
    found = configuration(recipe(name))
    assert isinstance(found, APDConfig)
    assert found.name == name
    assert configuration(yaml.safe_load(found.to_yaml())) == found


def test_without_a_method_a_configuration_is_spds():
    assert isinstance(configuration(recipe("tms_5-2")), Config)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("unknown key 'top_K'; nearest valid key: 'top_k'", "top_K=1"),
        ("unknown key 'losses.schatten.coef'; nearest valid key: 'coeff'",
         "losses.schatten.coef=1"),
        ("unknown key 'target.feature'; nearest valid key: 'features'", "target.feature=5"),
        ("unknown key 'delta'", "delta=true"),
        ("name: input should be one word", "name=apd/../x"),
        ("unknown method 'apb'; known: 'apd'", "method=apb"),
        ("unknown method None", "method="),
        ("top_k: input should be greater than 0, got 0", "top_k=0"),
        ("components: .*greater than or equal to 1, got 0", "components=0"),
        ("rank: .*got 0", "rank=0"),
        ("extra_rank: .*got -1", "extra_rank=-1"),
        ("extra_rank: .*got True", "extra_rank=true"),
        ("losses.topk_recon.over_outputs: .*'mean' or 'sum', got 'max'",
         "losses.topk_recon.over_outputs=max"),
        ("lr_warm_up: .*got 2", "lr_warm_up=2"),
        ("sites: .*at least 1 item", "sites=[]"),
        ("losses: every coefficient is 0",
         "losses={faithfulness: 0, topk_recon: {coeff: 0, over_outputs: mean}, "
         "schatten: {coeff: 0, p: 1}}"),
        ("top_k 0.0001 keeps no component of a batch of 2048", "top_k=0.0001"),
        ("top_k 6.0 is more than there are components, 5", "top_k=6"),
        ("activation_recon compares .* residual MLPs only", "losses.activation_recon=1"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(match, change):
    refused(match, change)
