"""Reconstruction by importances and unmasked, against the paper's formulas in float64."""

from __future__ import annotations

import pytest
import torch

from spd_fast.losses import (
    Routing,
    ci_masked_recon,
    ci_masked_recon_layerwise,
    ci_masked_recon_subset,
    unmasked_recon,
)
from tests import toys
from tests.losses.steps import draw, lower, step, uniform_k, value

NAME = "ci_masked_recon_subset"


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_ci_masks_are_the_importances_without_delta(kind):
    model = toys.decomposed(delta=True)
    expected = value(model, lower(model), kind=kind)
    toys.assert_same_gradients(model, ci_masked_recon(step(model, kind)), expected)


def test_ci_masked_layerwise_averages_over_sites():
    model = toys.decomposed()
    masks = lower(model)
    expected = sum(value(model, {n: g}) for n, g in masks.items()) / len(masks)
    toys.assert_same_gradients(model, ci_masked_recon_layerwise(step(model)), expected)


def test_ci_masked_subset_averages_over_draws_of_the_routing():
    model = toys.decomposed()
    masks = lower(model)
    routings = [uniform_k(model, draw(NAME, i, 2)) for i in range(2)]
    expected = sum(value(model, masks, routing=r) for r in routings) / 2
    got = ci_masked_recon_subset(step(model, draws=2, options={NAME: Routing("uniform_k")}))
    toys.assert_same_gradients(model, got, expected)


def test_unmasked_is_the_components_alone():
    model = toys.decomposed(delta=True)
    ones = {n: torch.ones_like(g) for n, g in lower(model).items()}
    expected = value(model, ones)
    toys.assert_same_gradients(model, unmasked_recon(step(model)), expected)
