"""Causal importances of a clean forward against the gates written out by hand."""

from __future__ import annotations

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel
from spd_fast.ops import Penalty
from tests import oracle, toys
from tests.conftest import needs_extension


@pytest.mark.parametrize("sigmoid", ["paper", "2026", "hard", "normal"])
@pytest.mark.parametrize("ci", [("mlp", (3,)), ("mlp", (4, 3)), ("linear", ())])
def test_lower_importances_are_the_gates_of_the_site_inputs(sigmoid, ci):
    model = toys.decomposed(sigmoid=sigmoid, ci_fn=ci[0], ci_hidden=ci[1])
    x = toys.batch(1)
    got = model.causal_importances(model.clean_forward(x))
    expected = toys.importances(model, x)
    for name in model.sites:
        torch.testing.assert_close(got[name].lower, expected[name][0], rtol=1e-12, atol=1e-13)


def test_gates_can_be_interpolated():
    model, x = toys.decomposed(gate_eval="interpolated"), 0.2 * toys.batch(1, 300, 4)
    got = model.causal_importances(model.clean_forward(x))
    interpolated = 0
    for name, inputs in toys.site_inputs(model, x).items():
        gate = model.ci_fn(name)
        h = inputs @ model.V(name)
        s, which = oracle.interpolated_logits(h, gate.weights, gate.biases)
        interpolated += sum(which)
        for value, sigmoid in (
            (got[name].lower, oracle.lower_importance),
            (got[name].upper, oracle.upper_importance),
        ):
            torch.testing.assert_close(value, sigmoid(s, "paper"), rtol=1e-11, atol=1e-12)
    assert interpolated > 10


@needs_extension
def test_upper_importances_are_of_the_gates_that_the_lower_ones_are_of():
    x = 0.2 * toys.batch(1, 300, 4).float()
    kinds = {}
    for gate_eval in ("auto", "interpolated", "exact"):
        model = DecomposedModel(
            toys.Net(0).float(), toys.SITES, ci_hidden=(3,), gate_eval=gate_eval, backend="cpu"
        )
        got = model.causal_importances(model.clean_forward(x))
        kinds[gate_eval] = [site.upper for site in got.values()]
    for auto, interpolated, exact in zip(*kinds.values(), strict=True):
        assert torch.equal(auto, interpolated)
        assert not torch.equal(auto, exact)


def test_an_unknown_evaluation_of_gates_is_an_error():
    with pytest.raises(UserError, match="unknown gate_eval 'grid'"):
        toys.decomposed(gate_eval="grid")


def test_inner_activations_are_site_inputs_times_V():
    model, x = toys.decomposed(), toys.batch(1)
    got = model.causal_importances(model.clean_forward(x))
    for name, inputs in toys.site_inputs(model, x).items():
        torch.testing.assert_close(got[name].inner, inputs @ model.V(name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sigmoid", ["paper", "2026", "hard", "normal"])
def test_upper_importances_are_computed_when_asked_for(sigmoid):
    model, x = toys.decomposed(sigmoid=sigmoid), toys.batch(1)
    got = model.causal_importances(model.clean_forward(x))
    for name, inputs in toys.site_inputs(model, x).items():
        gate = model.ci_fn(name)
        s = oracle.gate_logits(inputs @ model.V(name), gate.weights, gate.biases)
        expected = oracle.upper_importance(s, sigmoid)
        torch.testing.assert_close(got[name].upper, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_penalty_sums_are_sums_of_powers_of_upper_importances(power):
    model, x = toys.decomposed(), toys.batch(1)
    got = model.causal_importances(model.clean_forward(x), Penalty("lp", power))
    expected = toys.importances(model, x, power)
    for name in model.sites:
        torch.testing.assert_close(got[name].penalty_sum, expected[name][1], rtol=1e-12, atol=1e-13)


def test_without_a_penalty_its_sums_are_zero():
    model = toys.decomposed()
    got = model.causal_importances(model.clean_forward(toys.batch(1)))
    assert not any(site.penalty_sum.any() for site in got.values())


def test_leading_dimensions_are_kept():
    model = toys.decomposed()
    got = model.causal_importances(model.clean_forward(toys.batch(1, 2, 3, 4)))
    assert got.positions == 6
    assert got["head"].lower.shape == got["head"].upper.shape == (2, 3, 6)
    assert got["head"].inner.shape == (2, 3, 6)


def test_importances_are_a_mapping_of_the_sites():
    model = toys.decomposed()
    got = model.causal_importances(model.clean_forward(toys.batch(1)))
    assert list(got) == list(model.sites)
    assert len(got) == 5


def test_importances_send_gradients_to_V_and_to_the_gate():
    model = toys.decomposed()
    got = model.causal_importances(model.clean_forward(toys.batch(1)))
    gradients = toys.gradients(model, got["head"].lower)
    assert gradients["components.head.V"].any()
    assert gradients["ci_fns.head.layers.0.W"].any()
    assert not gradients["components.head.U"].any()


def test_an_unknown_sigmoid_is_an_error():
    with pytest.raises(UserError, match="unknown sigmoid 'papr'; nearest: 'paper'"):
        toys.decomposed(sigmoid="papr")
