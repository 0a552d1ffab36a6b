"""Stochastic reconstruction, whole and layerwise, against METHOD's formulas in float64."""

from __future__ import annotations

import pytest
import torch

from spd_fast.losses import Step, stochastic_recon, stochastic_recon_layerwise
from spd_fast.ops import make_key
from tests import oracle, toys

SEED, STEP = 5, 8
X = toys.batch(1)
DIVERGENCES = {"mse": oracle.mse, "kl": oracle.kl}


def step(model, draws, kind="mse", seed=SEED, index=STEP):
    clean = model.clean_forward(X)
    ci = model.causal_importances(clean)
    return Step(model, X, clean, ci, make_key(seed, index), kind, draws)


def by_hand(model, draws, kind, subsets, seed=SEED, index=STEP):
    """Mean over draws and subsets of D with the subset's sites masked and W elsewhere."""
    lower = {n: g for n, (g, _) in toys.importances(model, X).items()}
    total, count = 0.0, 0
    for draw in draws:
        masks, deltas = toys.stochastic_masks(model, lower, seed, index, draw)
        for names in subsets:
            chosen = {n: masks[n] for n in names}
            linear = toys.masked(model, chosen, deltas if model.delta else None)
            total = total + DIVERGENCES[kind](toys.by_hand(X, linear), model.target(X))
            count += 1
    return total / count


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("delta", [False, True])
def test_stochastic_recon_masks_every_site_at_once(kind, delta):
    model = toys.decomposed(delta=delta)
    expected = by_hand(model, range(1), kind, [list(model.sites)])
    toys.assert_same_gradients(model, stochastic_recon(step(model, 1, kind)), expected)


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("delta", [False, True])
def test_layerwise_masks_one_site_and_keeps_the_others_weights(kind, delta):
    model = toys.decomposed(delta=delta)
    expected = by_hand(model, range(1, 2), kind, [[name] for name in model.sites])
    toys.assert_same_gradients(model, stochastic_recon_layerwise(step(model, 1, kind)), expected)


@pytest.mark.parametrize("sigmoid", ["2026", "hard", "normal"])
def test_other_sigmoids_send_their_own_gradients(sigmoid):
    model = toys.decomposed(sigmoid=sigmoid)
    expected = by_hand(model, range(1), "mse", [list(model.sites)])
    toys.assert_same_gradients(model, stochastic_recon(step(model, 1)), expected)


def test_several_draws_are_averaged():
    model = toys.decomposed()
    expected = by_hand(model, range(3), "mse", [list(model.sites)])
    toys.assert_same_gradients(model, stochastic_recon(step(model, 3)), expected)


def test_layerwise_is_averaged_over_draws_and_sites():
    model = toys.decomposed()
    expected = by_hand(model, range(2, 4), "mse", [[name] for name in model.sites])
    toys.assert_same_gradients(model, stochastic_recon_layerwise(step(model, 2)), expected)


@pytest.mark.parametrize("change", [{"seed": SEED + 1}, {"index": STEP + 1}])
def test_the_key_decides_the_masks(change):
    model = toys.decomposed()
    one, same = (stochastic_recon(step(model, 1)).item() for _ in range(2))
    assert one == same
    assert stochastic_recon(step(model, 1, **change)).item() != one


def test_a_perfect_decomposition_with_full_importance_reconstructs():
    model = toys.decomposed()
    with torch.no_grad():
        for name, site in model.sites.items():
            # One component a row of W, and gates that are always on.
            V, U = model.V(name), model.U(name)
            V.zero_()
            U.zero_()
            rank = min(site.components, site.d_out)
            V[:, :rank] = site.weight[:rank].T
            U[:rank, :rank] = torch.eye(rank)
            model.ci_fn(name).biases[-1].fill_(1e3)
    exact = [n for n, s in model.sites.items() if s.components >= s.d_out]
    assert exact == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    assert stochastic_recon(step(model, 1)).item() < 1e-25
    assert stochastic_recon_layerwise(step(model, 1)).item() < 1e-25
