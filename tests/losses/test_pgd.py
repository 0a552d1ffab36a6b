"""PGD reconstruction: the ascent by hand, and its final forward, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from spd_fast.losses import (
    PGD,
    Routing,
    find_sources,
    pgd_recon,
    pgd_recon_layerwise,
    pgd_recon_subset,
)
from spd_fast.losses.adversary import gradients
from spd_fast.model import DecomposedModel
from tests import oracle, toys
from tests.losses.steps import SEED, STEP, X, draw, lower, parts, step, uniform_k, value

SHARED = "shared_across_batch"


def initial(model, sites, loss, options):
    """Site → raw r [N or 1, C + 1], the delta's channel last."""
    found = {}
    for name in sites:
        site = model.sites[name]
        rows = range(1) if options.scope == SHARED else range(9)
        columns = range(site.components + 1)
        shape = (len(rows), len(columns))
        if options.init == "random":
            found[name] = oracle.uniforms(SEED, STEP, draw(loss), site.index, rows, columns)
        else:
            found[name] = torch.full(shape, float(options.init == "ones"), dtype=torch.float64)
    return found


def attacked(model, raw, masks, routing, kind):
    r = {n: t[:, :-1].expand(9, -1) for n, t in raw.items()}
    delta = {n: t[:, -1].expand(9) for n, t in raw.items()}
    mixed = {n: masks[n] + (1 - masks[n]) * r[n] for n in raw}
    return value(model, mixed, delta, routing, kind)


def by_hand(model, loss, options, sites, routing=None, kind="mse"):
    """k times r ← clamp(r + η sign ∂D/∂r, 0, 1); then D at that r, with the model's gradients."""
    masks = lower(model)
    raw = initial(model, sites, loss, options)
    fixed = {n: g.detach() for n, g in masks.items()}
    for _ in range(options.steps):
        raw = {n: t.detach().requires_grad_() for n, t in raw.items()}
        grads = torch.autograd.grad(attacked(model, raw, fixed, routing, kind), list(raw.values()))
        raw = {
            n: (t.detach() + options.step_size * g.sign()).clamp(0, 1)
            for (n, t), g in zip(raw.items(), grads, strict=True)
        }
    return attacked(model, raw, masks, routing, kind)


# Not all ones with a delta: that is the target itself, where the gradient is only rounding.
@pytest.mark.parametrize(
    ("init", "delta"),
    [("random", False), ("ones", False), ("zeros", False), ("random", True), ("zeros", True)],
)
@pytest.mark.parametrize("scope", ["unique_per_datapoint", SHARED])
def test_pgd_recon_is_the_formula(scope, init, delta):
    model = toys.decomposed(delta=delta)
    options = PGD(steps=4, step_size=0.15, scope=scope, init=init)
    expected = by_hand(model, "pgd_recon", options, list(model.sites))
    got = pgd_recon(step(model, options={"pgd_recon": options}))
    toys.assert_same_gradients(model, got, expected)


def test_pgd_recon_by_kl():
    model = toys.decomposed(delta=True)
    options = PGD(steps=3, step_size=0.2)
    expected = by_hand(model, "pgd_recon", options, list(model.sites), kind="kl")
    got = pgd_recon(step(model, "kl", options={"pgd_recon": options}))
    toys.assert_same_gradients(model, got, expected)


def test_layerwise_attacks_each_site_by_itself():
    model, name = toys.decomposed(delta=True), "pgd_recon_layerwise"
    options = PGD(steps=3, step_size=0.2)
    values = [by_hand(model, name, options, [site]) for site in model.sites]
    got = pgd_recon_layerwise(step(model, options={name: options}))
    toys.assert_same_gradients(model, got, sum(values) / len(values))


@pytest.mark.parametrize("scope", ["unique_per_datapoint", SHARED])
def test_subset_draws_its_routing_once(scope):
    model, name = toys.decomposed(delta=True), "pgd_recon_subset"
    options = PGD(steps=3, step_size=0.2, scope=scope, routing=Routing("uniform_k"))
    routing = uniform_k(model, draw(name))
    expected = by_hand(model, name, options, list(model.sites), routing)
    got = pgd_recon_subset(step(model, options={name: options}))
    toys.assert_same_gradients(model, got, expected)


@pytest.mark.parametrize("scope", ["unique_per_datapoint", SHARED])
def test_the_ascent_never_lowers_a_convex_loss(scope):
    # One linear site under MSE: D is a convex quadratic of r. Moving coordinates in the direction
    # of their gradient's sign cannot lower a convex function, whatever the step.
    target = nn.Linear(4, 3, dtype=torch.float64)
    toys.fill(target, 3)
    model = DecomposedModel(nn.Sequential(target), {"0": 6}, delta=True, backend="reference")
    values = []
    for steps in range(12):
        options = PGD(steps, 0.03, scope=scope)
        values.append(pgd_recon(step(model, options={"pgd_recon": options})).item())
    assert all(later >= earlier for earlier, later in pairwise(values))
    assert values[-1] > 1.05 * values[0]


def test_the_gradient_of_the_sources_leaves_no_other():
    model = toys.decomposed(delta=True)
    options = PGD(2, 0.1)
    find_sources("pgd_recon", lambda: [step(model, options={"pgd_recon": options})])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_sources_stay_in_the_unit_interval():
    model = toys.decomposed(delta=True)
    options = PGD(5, 0.4)
    (found,) = find_sources("pgd_recon", lambda: [step(model, options={"pgd_recon": options})])
    for tensor in found.tensors():
        assert tensor.min() >= 0
        assert tensor.max() <= 1


@pytest.mark.parametrize("name", ["pgd_recon", "pgd_recon_layerwise", "pgd_recon_subset"])
def test_sources_of_the_whole_batch_are_found_from_its_parts(name):
    model = toys.decomposed(delta=True)
    options = {name: PGD(4, 0.15, scope=SHARED, routing=Routing("uniform_k"))}
    whole = find_sources(name, lambda: [step(model, options=options)])
    pieces = find_sources(name, lambda: parts(model, 3, options=options))
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.tensors(), other.tensors(), rtol=0, atol=1e-12)


def test_detached_gradients_are_those_of_the_attacked_loss():
    model = toys.decomposed(delta=True)
    current = step(model, options={"pgd_recon": PGD(0, 0.1)})
    (sources,) = find_sources("pgd_recon", lambda: [current])
    got = gradients(current, sources, list(model.sites), {})
    raw = initial(model, list(model.sites), "pgd_recon", PGD(0, 0.1))
    raw = {n: t.requires_grad_() for n, t in raw.items()}
    truth = torch.autograd.grad(
        attacked(model, raw, lower(model, X), None, "mse"), list(raw.values())
    )
    r, delta = got[: len(raw)], got[len(raw) :]
    for i, grad in enumerate(truth):
        torch.testing.assert_close(r[i], grad[:, :-1], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(delta[i], grad[:, -1], rtol=1e-10, atol=1e-13)
