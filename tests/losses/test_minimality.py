"""Importance minimality against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from spd_fast.losses import Frequency, Part, importance_minimality
from spd_fast.ops import Penalty
from tests import oracle, toys
from tests.losses import steps
from tests.losses.steps import X


def step(model, penalty, x=X, frequency=None, part=None):
    options = {} if frequency is None else {"importance_minimality": frequency}
    return steps.step(model, x=x, penalty=penalty, options=options, part=part or Part())


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


PENALTIES = [("lp", 0.9, 1e-12), ("smooth_l0", 0.3, 1e-12)]


def frequencies(model, penalty):
    """Site → f_c = mean over positions of ψ(g⁺), [C]."""
    found = {}
    for name, x in toys.site_inputs(model, X).items():
        gate = model.ci_fn(name)
        arguments = (x, model.V(name), gate.weights, gate.biases, model.sigmoid, penalty)
        found[name] = oracle.gate(*arguments)[2] / len(X)
    return found


def by_hand(model, penalty, beta, a):
    total = 0.0
    for f in frequencies(model, penalty).values():
        for c in range(len(f)):
            total = total + f[c] * (1 + beta * torch.log(1 + a * f[c]) / math.log(2))
    return total


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("scale", [None, 20.0])
def test_the_frequency_term_is_the_formula(penalty, beta, scale):
    model = toys.decomposed()
    expected = by_hand(model, penalty, beta, len(X) if scale is None else scale)
    got = importance_minimality(step(model, Penalty(*penalty), frequency=Frequency(beta, scale)))
    toys.assert_same_gradients(model, got, expected)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_in_parts_it_is_that_of_the_whole_batch(penalty, beta):
    model, frequency = toys.decomposed(), Frequency(beta)
    whole = step(model, Penalty(*penalty), frequency=frequency)
    totals = {n: s.penalty_sum.detach() for n, s in whole.importances.items()}
    got, row = 0.0, 0
    for piece in X.tensor_split(4):
        part = Part(len(piece) / len(X), row, row, totals)
        row += len(piece)
        one = step(model, Penalty(*penalty), piece, frequency, part)
        got = got + part.share * importance_minimality(one)
    toys.assert_same_gradients(model, got, importance_minimality(whole))
