"""Stochastic reconstruction, whole and layerwise, against the paper's formulas in float64."""

from __future__ import annotations

import pytest
import torch

from spd_fast.losses import (
    Part,
    Routing,
    Step,
    stochastic_hidden_acts_recon,
    stochastic_recon,
    stochastic_recon_layerwise,
    stochastic_recon_subset,
)
from spd_fast.ops import make_key
from tests import oracle, toys
from tests.losses import steps

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


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_subset_masks_the_routed_sites_of_each_position(kind, delta):
    model, name = toys.decomposed(delta=delta), "stochastic_recon_subset"
    lower, values = steps.lower(model), []
    for index in range(2):
        number = steps.draw(name, index, 2)
        masks, deltas = toys.stochastic_masks(model, lower, SEED, STEP, number)
        routing = steps.uniform_k(model, number)
        values.append(steps.value(model, masks, deltas, routing, kind))
    got = stochastic_recon_subset(steps.step(model, kind, 2, options={name: Routing()}))
    toys.assert_same_gradients(model, got, sum(values) / 2)


@pytest.mark.parametrize("delta", [False, True])
def test_hidden_activations_compare_the_inputs_of_all_sites(delta):
    model, name = toys.decomposed(delta=delta), "stochastic_hidden_acts_recon"
    number = steps.draw(name)
    masks, deltas = toys.stochastic_masks(model, steps.lower(model), SEED, STEP, number)
    linear, seen = toys.masked(model, masks, deltas if delta else None), {}

    def watched(name, x):
        seen[name] = x
        return linear(name, x)

    toys.by_hand(X, watched)
    total, numel = 0.0, 0
    for site, x in toys.site_inputs(model, X).items():
        total = total + ((seen[site] - x) ** 2).sum()
        numel += x.numel()
    toys.assert_same_gradients(
        model, stochastic_hidden_acts_recon(steps.step(model)), total / numel
    )


LOSSES = {
    "stochastic_recon": stochastic_recon,
    "stochastic_recon_layerwise": stochastic_recon_layerwise,
    "stochastic_recon_subset": stochastic_recon_subset,
    "stochastic_hidden_acts_recon": stochastic_hidden_acts_recon,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("binomial", [False, True])
def test_parts_of_a_batch_see_the_masks_of_the_whole(name, binomial):
    model, loss = toys.decomposed(delta=True), LOSSES[name]
    more = {"options": {name: Routing()}, "binomial": binomial}
    whole = loss(steps.step(model, **more))
    got = sum(p.part.share * loss(p) for p in steps.parts(model, 4, **more))
    toys.assert_same_gradients(model, got, whole)


@pytest.mark.parametrize("name", LOSSES)
def test_recomputed_activations_give_the_same_gradients(name):
    model, loss = toys.decomposed(delta=True), LOSSES[name]
    more = {"options": {name: Routing()}, "part": Part()}
    kept = loss(steps.step(model, **more))
    recomputed = loss(steps.step(model, recompute=True, **more))
    toys.assert_same_gradients(model, recomputed, kept)
