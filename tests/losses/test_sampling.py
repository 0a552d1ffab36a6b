"""Binomial sampling against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from spd_fast.losses import jittered, stochastic_recon
from spd_fast.losses.step import DRAWN
from tests import oracle, toys
from tests.losses.steps import SEED, STEP, X, draw, step, value


def by_hand(model, draws=1):
    """Site → lower(1.05 s − 0.05 u)."""
    found = {}
    for name, x in toys.site_inputs(model, X).items():
        gate, site = model.ci_fn(name), model.sites[name]
        s = oracle.gate_logits(x @ model.V(name), gate.weights, gate.biases)
        columns = range(site.components)
        u = oracle.uniforms(SEED, STEP, len(DRAWN) * draws, site.index, range(9), columns)
        found[name] = oracle.lower_importance(1.05 * s - 0.05 * u, model.sigmoid)
    return found


@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
def test_lower_importances_are_those_of_the_jittered_logit(sigmoid):
    model = toys.decomposed(sigmoid=sigmoid)
    current = step(model)
    got = jittered(current.importances, model.sites, current.key, 1)
    for name, expected in by_hand(model).items():
        toys.assert_same_gradients(model, got[name].lower, expected)


def test_the_loss_has_binary_sources_and_a_continuous_delta():
    model = toys.decomposed(delta=True, sigmoid="2026")
    lower, number = by_hand(model), draw("stochastic_recon")
    masks, deltas = {}, {}
    for name, g in lower.items():
        site = model.sites[name]
        columns = range(site.components + 1)
        u = oracle.uniforms(SEED, STEP, number, site.index, range(9), columns)
        r = (u[:, :-1] >= 0.5).to(g.dtype)
        masks[name], deltas[name] = g + (1 - g) * r, u[:, -1]
    current = step(model, binomial=True)
    current.importances = jittered(current.importances, model.sites, current.key, 1)
    toys.assert_same_gradients(model, stochastic_recon(current), value(model, masks, deltas))


def test_a_part_of_the_batch_sees_the_jitter_of_the_whole():
    model = toys.decomposed()
    whole, part = step(model), step(model, x=X[4:])
    one = jittered(whole.importances, model.sites, whole.key, 1)
    other = jittered(part.importances, model.sites, part.key, 1, row_offset=4)
    for name in model.sites:
        torch.testing.assert_close(other[name].lower, one[name].lower[4:], rtol=1e-13, atol=0)


def test_no_hidden_layer_of_a_gate_is_kept_for_the_jitter():
    hidden = 64
    model = toys.decomposed(ci_hidden=(hidden,))
    current = step(model)
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        jittered(current.importances, model.sites, current.key, 1)
    components = sum(site.components for site in model.sites.values())
    # One hidden layer alone would be as much; measured: 3 numbers a component and position.
    assert kept < hidden * components * 9
