"""Evaluation of APD: shares, errors, reconstruction, on models whose components are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spd_fast.baselines import APDModel
from spd_fast.baselines.evaluate import FULL, on_data, probe_shares, site_error
from spd_fast.evaluate import Expected
from spd_fast.experiments.measures import match, measure
from spd_fast.targets import TMS

FEATURES, HIDDEN = 5, 2


def target(identities: int = 0) -> TMS:
    """Columns of a pentagon; a bias that hides the interference."""
    made = TMS(FEATURES, HIDDEN, identities)
    angles = torch.arange(FEATURES) * 2 * torch.pi / FEATURES
    with torch.no_grad():
        made.linear1.weight.copy_(torch.stack([angles.cos(), angles.sin()]))
        made.linear2.bias.fill_(-0.31)
    made.tie()
    return made.requires_grad_(False)


def perfect(length: float = 1.0, identities: int = 0, spare: int = 1) -> APDModel:
    """Component j is column j of W, ``length`` times as long; then one that holds the identity,
    if there is one; the last ``spare`` ones are zero."""
    sites = ["linear1", "linear2", *(f"hidden_layers.{i}" for i in range(identities))]
    count = FEATURES + bool(identities) + spare
    model = APDModel(target(identities), dict.fromkeys(sites, count))
    W = model.sites["linear1"].weight
    with torch.no_grad():
        for name in model.free_sites():
            model.A(name).zero_()
            model.B(name).zero_()
        for j in range(FEATURES):
            model.A("linear1")[j, j, 0] = length
            model.B("linear1")[j, 0] = W[:, j]
        if identities:
            model.A("hidden_layers.0")[FEATURES] = torch.eye(HIDDEN)
            model.B("hidden_layers.0")[FEATURES] = torch.eye(HIDDEN)
    return model


def data(rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(rows, FEATURES, generator=generator) < 0.05
    return torch.rand(rows, FEATURES, generator=generator) * present


@pytest.mark.parametrize("length", [1.0, 0.89])
def test_a_component_a_feature_is_a_diagonal_of_ones_even_when_too_short(length):
    model = perfect(length)
    shares = probe_shares(model, FEATURES, on_data(model, data(), 0.2).threshold)
    for name in ("linear1", "linear2"):
        expected = np.eye(FEATURES, FEATURES + 1)
        np.testing.assert_allclose(shares[name], expected, atol=1e-6)
        assert site_error(Expected("identity", FEATURES), shares[name]) == 0


def test_a_share_is_the_part_of_the_sites_effect_up_to_eighty_percent():
    model = perfect(0.5)
    shares = probe_shares(model, FEATURES, 0.0)
    assert shares["linear1"][2, 2] == pytest.approx(0.5 / FULL)
    assert site_error(Expected("identity", FEATURES), shares["linear1"]) == FEATURES


def test_what_is_not_kept_has_no_share():
    shares = probe_shares(perfect(), FEATURES, float("inf"))
    assert all((s == 0).all() for s in shares.values())


def test_two_features_in_one_component_contradict():
    model = perfect()
    with torch.no_grad():  # component 0 takes feature 1's mechanism too
        model.A("linear1")[0, 1, 1] = 1
        model.B("linear1")[0, 1] = model.sites["linear1"].weight[:, 1]
        model.A("linear1")[1].zero_()
    shares = probe_shares(model, FEATURES, 1e-3)
    assert site_error(Expected("identity", FEATURES), shares["linear1"]) == 2


def test_the_identity_may_be_one_component_of_rank_two():
    shares = probe_shares(perfect(identities=1), FEATURES, 1e-3)["hidden_layers.0"]
    assert site_error(Expected("dense", HIDDEN), shares) == 0


def test_a_dense_site_split_over_the_features_contradicts():
    shares = np.eye(FEATURES)
    assert site_error(Expected("dense", HIDDEN), shares) == FEATURES - HIDDEN


def test_a_dense_site_without_its_component_contradicts_on_every_probe():
    assert site_error(Expected("dense", HIDDEN), np.zeros((FEATURES, 3))) == FEATURES


def test_reconstruction_is_exact_with_perfect_components():
    model = perfect()
    found = on_data(model, data(), 0.2)
    assert found.kept.sum() == 80
    assert found.l0 == pytest.approx(0.2)
    assert found.reconstruction["unmasked"] < 1e-12
    assert found.reconstruction["topk"] < found.reconstruction["zero"]
    assert list(found.reconstruction) == ["topk", "unmasked", "zero"]


@pytest.mark.parametrize("length", [1.0, 0.89])
def test_shrinkage_is_what_ml2r_reports(length):
    found = match(perfect(length), "linear1")
    assert found.mmcs == pytest.approx(1)
    assert found.ml2r == pytest.approx(length)
    assert found.component.tolist() == list(range(FEATURES))


def test_measures_are_those_of_every_site():
    from spd_fast.experiments import configuration, recipe

    config, model = configuration(recipe("apd/tms_5-2-id")), perfect(identities=1)
    found = measure(config, model, data())
    assert found.errors == {"linear1": 0, "linear2": 0, "hidden_layers.0": 0}
    assert found.l0 == dict.fromkeys(model.sites, pytest.approx(0.4350))
