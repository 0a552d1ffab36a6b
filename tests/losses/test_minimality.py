"""Importance minimality against its formula."""

from __future__ import annotations

import pytest
import torch

from spd_fast.losses import Step, importance_minimality
from spd_fast.ops import Penalty, make_key
from tests import toys

X = toys.batch(1)


def step(model, penalty, x=X):
    clean = model.clean_forward(x)
    return Step(model, x, clean, model.causal_importances(clean, penalty), make_key(0, 0))


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 2.0])
def test_it_sums_over_components_and_averages_over_positions(power):
    model = toys.decomposed()
    expected = sum(s.sum() for _, s in toys.importances(model, X, power).values()) / len(X)
    got = importance_minimality(step(model, Penalty("lp", power)))
    toys.assert_same_gradients(model, got, expected)


def test_leading_dimensions_are_all_positions():
    model = toys.decomposed()
    x = toys.batch(1, 2, 3, 4)
    flat = importance_minimality(step(model, Penalty("lp", 1.0), x.reshape(6, 4)))
    got = importance_minimality(step(model, Penalty("lp", 1.0), x))
    torch.testing.assert_close(got, flat, rtol=1e-13, atol=0)


def test_it_uses_upper_importances():
    model = toys.decomposed()
    with torch.no_grad():
        for name in model.sites:
            for W in model.ci_fn(name).weights:
                W.zero_()
            model.ci_fn(name).biases[-1].fill_(3.0)
    # s = 3 everywhere: g⁺ = 1 + 0.01 · 2 for each of the 2·7 + 2·5 + 6 components.
    got = importance_minimality(step(model, Penalty("lp", 1.0)))
    torch.testing.assert_close(got.item(), 1.02 * 30, rtol=1e-10, atol=0)
