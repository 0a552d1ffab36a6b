"""Each masking against explicit masks, explicit weight deltas and a forward by hand, in float64."""

from __future__ import annotations

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.model import Adversarial, CIMask, Given, Ones, Stochastic
from spd_fast.ops import make_key
from tests import toys

SEED, STEP, DRAW = 3, 11, 2
X = toys.batch(1)


def importances(model):
    return model.causal_importances(model.clean_forward(X))


def by_hand(model, masks, deltas=None, routing=None):
    return toys.by_hand(X, toys.masked(model, masks, deltas, routing))


def ones(model):
    return {n: torch.ones(9, s.components, dtype=X.dtype) for n, s in model.sites.items()}


def draws(model, seed):
    """Per site numbers in [0, 1): sources [N, C], deltas [N], routing [N]."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=X.dtype)

    sources = {n: rand(9, s.components) for n, s in model.sites.items()}
    deltas = {n: rand(9) for n in model.sites}
    routing = {n: rand(9) < 0.5 for n in model.sites}
    return sources, deltas, routing


def test_ones_are_the_components_alone():
    model = toys.decomposed()
    got = model.masked_forward(X, Ones())
    toys.assert_same_gradients(model, got, by_hand(model, ones(model)))


def test_ci_masks_are_the_lower_importances():
    model = toys.decomposed()
    got = model.masked_forward(X, CIMask(importances(model)))
    lower = {n: g for n, (g, _) in toys.importances(model, X).items()}
    toys.assert_same_gradients(model, got, by_hand(model, lower))


def test_rounded_ci_masks_are_one_above_the_threshold():
    model = toys.decomposed()
    got = model.masked_forward(X, CIMask(importances(model), threshold=0.3))
    rounded = {n: (g > 0.3).to(X.dtype) for n, (g, _) in toys.importances(model, X).items()}
    assert 0 < sum(m.sum() for m in rounded.values()) < sum(m.numel() for m in rounded.values())
    torch.testing.assert_close(got, by_hand(model, rounded), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("delta", [False, True])
def test_stochastic_masks_lie_between_importance_and_one(delta):
    model = toys.decomposed()
    masking = Stochastic(importances(model), make_key(SEED, STEP), DRAW, delta=delta)
    lower = {n: g for n, (g, _) in toys.importances(model, X).items()}
    masks, deltas = toys.stochastic_masks(model, lower, SEED, STEP, DRAW)
    got = model.masked_forward(X, masking)
    toys.assert_same_gradients(model, got, by_hand(model, masks, deltas if delta else None))


def test_binomial_sources_keep_the_delta_continuous():
    model = toys.decomposed()
    masking = Stochastic(
        importances(model), make_key(SEED, STEP), DRAW, delta=True, binomial=True
    )  # fmt: skip
    zero = {n: torch.zeros_like(g) for n, (g, _) in toys.importances(model, X).items()}
    sources, deltas = toys.stochastic_masks(model, zero, SEED, STEP, DRAW)
    masks = {
        n: g + (1 - g) * (sources[n] >= 0.5).to(g.dtype)
        for n, (g, _) in toys.importances(model, X).items()
    }
    toys.assert_same_gradients(
        model, model.masked_forward(X, masking), by_hand(model, masks, deltas)
    )


def test_routing_keeps_the_original_weight_where_it_is_false():
    model = toys.decomposed()
    _, _, routing = draws(model, 4)
    masking = Stochastic(
        importances(model), make_key(SEED, STEP), DRAW, delta=True, routing=routing
    )  # fmt: skip
    lower = {n: g for n, (g, _) in toys.importances(model, X).items()}
    masks, deltas = toys.stochastic_masks(model, lower, SEED, STEP, DRAW)
    got = model.masked_forward(X, masking)
    toys.assert_same_gradients(model, got, by_hand(model, masks, deltas, routing))


def test_a_row_offset_continues_another_batchs_random_numbers():
    model = toys.decomposed()
    key = make_key(SEED, STEP)
    whole = model.masked_forward(X, Stochastic(importances(model), key, delta=True))
    rest = X[4:]
    ci = model.causal_importances(model.clean_forward(rest))
    part = model.masked_forward(rest, Stochastic(ci, key, delta=True, row_offset=4))
    torch.testing.assert_close(part, whole[4:], rtol=1e-13, atol=1e-13)


def test_the_delta_component_makes_unit_masks_exact():
    model = toys.decomposed()
    deltas = {n: torch.ones(9, dtype=X.dtype) for n in model.sites}
    got = model.masked_forward(X, Given(ones(model), deltas))
    torch.testing.assert_close(got, model.target(X), rtol=1e-12, atol=1e-12)


def test_given_masks_deltas_and_routing_are_used_as_they_are():
    model = toys.decomposed()
    masks, deltas, routing = draws(model, 5)
    got = model.masked_forward(X, Given(masks, deltas, routing))
    toys.assert_same_gradients(model, got, by_hand(model, masks, deltas, routing))


def test_adversarial_sources_interpolate_from_the_importances():
    model = toys.decomposed()
    sources, deltas, routing = draws(model, 6)
    got = model.masked_forward(X, Adversarial(importances(model), sources, deltas, routing))
    masks = {
        n: g + (1 - g) * sources[n] for n, (g, _) in toys.importances(model, X).items()
    }  # fmt: skip
    toys.assert_same_gradients(model, got, by_hand(model, masks, deltas, routing))


def test_gradients_reach_adversarial_sources_and_deltas():
    model = toys.decomposed()
    lower = {n: g.detach() for n, (g, _) in toys.importances(model, X).items()}
    sources, deltas, _ = draws(model, 7)
    leaves = [t.requires_grad_() for t in (*sources.values(), *deltas.values())]
    got = model.masked_forward(X, Adversarial(importances(model), sources, deltas))
    masks = {n: lower[n] + (1 - lower[n]) * sources[n] for n in lower}
    expected = by_hand(model, masks, deltas)
    weights = toys.batch(8, 9, 3)
    grads = torch.autograd.grad((got * weights).sum(), leaves)
    for ours, truth in zip(grads, torch.autograd.grad((expected * weights).sum(), leaves)):  # noqa: B905
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_sites_that_are_not_named_keep_their_weight():
    model = toys.decomposed()
    got = model.masked_forward(X, Ones(), sites=["blocks.0.down", "head"])
    masks = {n: m for n, m in ones(model).items() if n in ("blocks.0.down", "head")}
    toys.assert_same_gradients(model, got, by_hand(model, masks))


def test_no_sites_give_the_targets_output():
    model = toys.decomposed()
    clean = model.clean_forward(X)
    assert torch.equal(model.masked_forward(X, Ones(), sites=[]), clean.output)
    assert torch.equal(model.masked_forward(X, Ones(), sites=[], clean=clean), clean.output)


def test_an_unknown_site_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown site 'haed'; nearest: 'head'"):
        toys.decomposed().masked_forward(X, Ones(), sites=["haed"])


SUBSETS = [
    None,
    ["blocks.0.up"],
    ["blocks.0.down"],
    ["blocks.1.up"],
    ["head"],
    ["blocks.1.down", "blocks.0.down"],
    ["head", "blocks.1.up"],
]


@pytest.mark.parametrize("sites", SUBSETS)
@pytest.mark.parametrize("shape", [(9, 4), (2, 3, 4)])
def test_reusing_the_clean_forward_changes_no_value_and_no_gradient(sites, shape):
    model, x = toys.decomposed(delta=True), toys.batch(1, *shape)
    clean = model.clean_forward(x)
    ci = model.causal_importances(clean)
    masking = Stochastic(ci, make_key(SEED, STEP), delta=True)
    plain = model.masked_forward(x, masking, sites=sites)
    reused = model.masked_forward(x, masking, sites=sites, clean=clean, importances=ci)
    toys.assert_same_gradients(model, reused, plain)


@pytest.mark.parametrize("sites", SUBSETS)
def test_reusing_the_clean_forward_changes_nothing_on_every_backend(sites, backend):
    target = toys.Net(dtype=torch.float32)
    model = toys.DecomposedModel(target, toys.SITES, delta=True, backend=backend)
    x = toys.batch(1, dtype=torch.float32)
    clean = model.clean_forward(x)
    ci = model.causal_importances(clean)
    masking = Stochastic(ci, make_key(SEED, STEP), delta=True)
    plain = model.masked_forward(x, masking, sites=sites)
    reused = model.masked_forward(x, masking, sites=sites, clean=clean, importances=ci)
    torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-5)
    truth = toys.gradients(model, plain)
    for name, gradient in toys.gradients(model, reused).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-4, msg=name)


def test_it_hands_out_the_inputs_of_the_masked_sites():
    model = toys.decomposed()
    linear, seen, expected = toys.masked(model, ones(model)), {}, {}
    model.masked_forward(X, Ones(), inputs=seen)

    def watched(name, x):
        expected[name] = x
        return linear(name, x)

    toys.by_hand(X, watched)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-13)


def test_ci_masks_leave_what_is_not_routed_alone():
    model = toys.decomposed()
    routing = {n: torch.arange(9) % 3 == i % 3 for i, n in enumerate(model.sites)}
    got = model.masked_forward(X, CIMask(importances(model), routing=routing))
    lower = {n: g for n, (g, _) in toys.importances(model, X).items()}
    toys.assert_same_gradients(model, got, by_hand(model, lower, routing=routing))


def test_a_site_without_a_mask_is_named():
    model = toys.decomposed()
    masks = ones(model)
    del masks["head"]
    with pytest.raises(UserError, match="no mask for site 'head'; given for: "):
        model.masked_forward(X, Given(masks))
    with pytest.raises(UserError, match=r"no source for site .blocks\.0\.up.; given for: —"):
        model.masked_forward(X, Adversarial(importances(model), {}))
