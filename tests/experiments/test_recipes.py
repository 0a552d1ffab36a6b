"""The recipes that ship with the package, against the paper's table."""

from __future__ import annotations

import pytest

from spd_fast.errors import UserError
from spd_fast.experiments import expected_sites, language_configuration, recipe, recipes
from spd_fast.targets import make_target
from spd_fast.train import parse_config

TMS = ("tms_5-2", "tms_5-2-id", "tms_40-10", "tms_40-10-id")
MLP = ("resid_mlp1", "resid_mlp2", "resid_mlp3")
NETWORKS = (*TMS, *MLP)
LATER = tuple(f"{name}-2026" for name in NETWORKS)
LANGUAGE = ("stories260k", "stories260k-small", "stories260k-large")
PUBLISHED = ("tms_40-10-id-published",)
ROBUST = ("resid_mlp2-robust", "resid_mlp3-robust")
ALL = pytest.mark.parametrize("name", NETWORKS)
EVERY_RECIPE = pytest.mark.parametrize("name", [*NETWORKS, *LATER, *PUBLISHED, *ROBUST])

# name: C, gate hidden, coefficient (text or code), p, lr, schedule, steps (text or code), batch
PAPER = {
    "tms_5-2": (20, 16, {3e-3}, 1, 1e-3, "quarter_cosine", {40_000}, 4096),
    "tms_5-2-id": (20, 16, {3e-3}, 1, 1e-3, "quarter_cosine", {40_000}, 4096),
    "tms_40-10": (200, 16, {1e-4}, 2, 1e-3, "quarter_cosine", {40_000}, 4096),
    "tms_40-10-id-published": (200, 16, {1e-4}, 2, 1e-3, "quarter_cosine", {40_000}, 4096),
    "resid_mlp1": (100, 16, {1e-5}, 2, 2e-3, "constant", {30_000}, 2048),
    "resid_mlp2": (400, 16, {1e-5, 2e-5}, 2, 1e-3, "constant", {50_000}, 2048),
    "resid_mlp3": (500, 128, {5e-6}, 2, 1e-3, "constant", {100_000, 200_000}, 2048),
}


# The authors' code of 2026: coefficient, lr, schedule, steps.
PRESET_2026 = {
    "tms_5-2": (3e-3, 1e-3, "cosine", 10_000),
    "tms_5-2-id": (3e-3, 1e-3, "cosine", 10_000),
    "tms_40-10": (1e-4, 1e-3, "cosine", 10_000),
    "tms_40-10-id": (1e-4, 1e-3, "cosine", 20_000),
    "resid_mlp1": (1e-5, 2e-3, "constant", 20_000),
    "resid_mlp3": (1e-5, 1e-3, "constant", 50_000),
}


def config(name):
    return parse_config(recipe(name))


def test_every_experiment_of_the_paper_ships_with_both_presets():
    assert {n for n in recipes() if "/" not in n} == {
        *NETWORKS,
        *LATER,
        *PUBLISHED,
        *ROBUST,
        *LANGUAGE,
    }


@pytest.mark.parametrize("name", LANGUAGE)
def test_recipes_of_language_models_are_valid(name):
    found = language_configuration(recipe(name))
    assert found.name == name
    assert found.divergence == "kl"
    assert language_configuration(recipe("tms_5-2")) is None


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_papers_hyperparameters(name):
    C, hidden, coefficients, p, lr, schedule, steps, batch = PAPER[name]
    found = config(name)
    assert set(found.sites.values()) == {C}
    assert found.ci_hidden == (hidden,)
    assert found.losses.importance_minimality.coeff in coefficients
    assert found.losses.importance_minimality.p == p
    assert (found.lr, found.lr_schedule) == (lr, schedule)
    assert found.steps in steps
    assert (found.batch_size, found.draws, found.preset) == (batch, 1, "paper")


def test_only_the_coefficient_of_the_forty_identities_is_not_the_papers():
    ours, published = config("tms_40-10-id"), config("tms_40-10-id-published")
    assert ours.losses.importance_minimality.coeff == 5e-5
    differing = {k for k, v in dict(ours).items() if v != dict(published)[k]}
    assert differing == {"name", "losses"}
    minimality = published.losses.importance_minimality.model_copy(update={"coeff": 5e-5})
    assert ours.losses == published.losses.model_copy(update={"importance_minimality": minimality})


@pytest.mark.parametrize("name", PRESET_2026)
def test_a_recipe_of_2026_has_that_codes_hyperparameters(name):
    coefficient, lr, schedule, steps = PRESET_2026[name]
    found, paper = config(f"{name}-2026"), config(name)
    assert (found.preset, found.sigmoid, found.init, found.delta) == ("2026", "2026", "2026", True)
    assert found.losses.coefficients() == {
        "stochastic_recon": 1,
        "stochastic_recon_layerwise": 1,
        "importance_minimality": coefficient,
    }
    assert (found.warm_up.steps, found.warm_up.lr, found.warm_up.weight_decay) == (200, 0.01, 0.1)
    assert (found.lr, found.lr_schedule, found.steps) == (lr, schedule, steps)
    same = ("target", "sites", "ci_fn", "ci_hidden", "batch_size", "draws")
    assert all(getattr(found, key) == getattr(paper, key) for key in same)
    assert found.losses.importance_minimality.p == paper.losses.importance_minimality.p


def test_two_layers_are_decomposed_otherwise_in_2026():
    found, paper = config("resid_mlp2-2026"), config("resid_mlp2")
    assert (found.preset, found.ci_fn, found.ci_hidden) == ("2026", "shared_mlp", (256,))
    assert found.losses.coefficients() == {
        "faithfulness": 1,
        "stochastic_recon_subset": 2,
        "pgd_recon_subset": 2,
        "importance_minimality": 2e-6,
    }
    minimality, adversary = found.losses.importance_minimality, found.losses.pgd_recon_subset
    assert (minimality.p, minimality.beta) == (2, 5)
    assert (adversary.pgd_steps, adversary.step_size, adversary.init) == (1, 1.0, "random")
    assert adversary.scope == "shared_across_batch"
    assert (found.lr, found.lr_schedule, found.steps) == (3e-4, "constant", 25_000)
    assert (found.warm_up.steps, found.warm_up.weight_decay) == (200, 0)
    assert (found.target, found.sites) == (paper.target, paper.sites)


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_recipe_decomposes_the_same_network(name):
    found, paper = config(name), config(name.removesuffix("-robust"))
    assert (found.target, found.sites) == (paper.target, paper.sites)


@ALL
def test_every_loss_of_the_paper_has_coefficient_one(name):
    losses = config(name).losses
    assert losses.faithfulness == losses.stochastic_recon == losses.stochastic_recon_layerwise == 1


@pytest.mark.parametrize(
    ("name", "features", "hidden", "identities", "zero_bias", "batch"),
    [
        ("tms_5-2", 5, 2, 0, False, 1024),
        ("tms_5-2-id", 5, 2, 1, False, 1024),
        ("tms_40-10", 40, 10, 0, True, 8192),
        ("tms_40-10-id", 40, 10, 1, True, 8192),
    ],
)
def test_tms_targets_are_the_papers(name, features, hidden, identities, zero_bias, batch):
    target = config(name).target
    assert (target.features, target.hidden, target.identity_layers) == (
        features,
        hidden,
        identities,
    )
    assert (target.zero_bias, target.batch_size) == (zero_bias, batch)
    assert (target.lr, target.weight_decay, target.steps) == (5e-3, 0.01, 10_000)
    assert target.probability == 0.05


@pytest.mark.parametrize(
    ("name", "features", "d_mlp", "layers", "steps"),
    [("resid_mlp1", 100, 50, 1, 1000), ("resid_mlp2", 100, 25, 2, 1000),
     ("resid_mlp3", 102, 17, 3, 10_000)],
)  # fmt: skip
def test_residual_mlp_targets_are_the_papers(name, features, d_mlp, layers, steps):
    target = config(name).target
    assert (target.features, target.d_mlp, target.layers) == (features, d_mlp, layers)
    assert (target.d_embed, target.steps, target.lr) == (1000, steps, 3e-3)
    assert (target.batch_size, target.weight_decay, target.probability) == (2048, 0.01, 0.01)


@EVERY_RECIPE
def test_every_site_has_a_known_mechanism(name):
    from spd_fast.model.sites import resolve_sites

    found = config(name)
    sites = resolve_sites(make_target(found.target, 0), found.sites)
    assert list(sites) == [n for n in sites if n in expected_sites(found)]
    assert set(sites) == set(expected_sites(found))


def expected(name):
    return {n: (e.pattern, e.components) for n, e in expected_sites(config(name)).items()}


def test_tms_sites_are_identities_and_the_identity_layer_is_dense():
    assert expected("tms_40-10-id") == {
        "linear1": ("identity", 40), "linear2": ("identity", 40), "hidden_layers.0": ("dense", 10),
    }  # fmt: skip


def test_residual_mlp_sites_are_identities_in_and_dense_out():
    assert expected("resid_mlp2") == {
        "layers.0.mlp_in": ("identity", 100), "layers.0.mlp_out": ("dense", 25),
        "layers.1.mlp_in": ("identity", 100), "layers.1.mlp_out": ("dense", 25),
    }  # fmt: skip


@EVERY_RECIPE
def test_a_recipe_has_its_own_name_and_a_description(name):
    assert config(name).name == name
    assert len(recipes()[name]) > 20


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(UserError, match="unknown experiment 'tms_52'; nearest: 'tms_5-2'"):
        recipe("tms_52")


@pytest.mark.parametrize("name", ["../experiments/tms_5-2", "", ".", "/etc/passwd"])
def test_a_path_is_no_name(name):
    with pytest.raises(UserError, match="unknown experiment"):
        recipe(name)


@pytest.mark.parametrize("ending", [".yaml", ".yml"])
def test_a_file_is_read_by_its_ending(tmp_path, ending):
    path = tmp_path / f"mine{ending}"
    path.write_text("name: mine\n")
    assert recipe(str(path)) == {"name": "mine"}


def test_a_missing_file_is_an_error():
    with pytest.raises(UserError, match=r"no configuration file none.yaml"):
        recipe("none.yaml")
