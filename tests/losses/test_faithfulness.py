"""Faithfulness against its formula."""

from __future__ import annotations

import torch

from spd_fast.losses import faithfulness, relative_faithfulness
from spd_fast.model import DecomposedModel
from tests import oracle, toys


def by_hand(model):
    total, numel = 0.0, 0
    for name, site in model.sites.items():
        total = total + oracle.faithfulness(model.V(name), model.U(name), site.weight)
        numel += site.d_in * site.d_out
    return total / numel


def test_it_is_the_squared_error_over_all_decomposed_weights():
    model = toys.decomposed()
    toys.assert_same_gradients(model, faithfulness(model), by_hand(model))


def test_weights_that_are_not_decomposed_do_not_count():
    model = DecomposedModel(toys.Net(), {"head": 3}, backend="reference")
    toys.assert_same_gradients(model, faithfulness(model), by_hand(model))


def test_it_is_zero_for_a_perfect_factorisation():
    model = DecomposedModel(toys.Net(), {"head": 3}, backend="reference")
    with torch.no_grad():
        model.V("head").copy_(model.sites["head"].weight.T)
        model.U("head").copy_(torch.eye(3))
    assert faithfulness(model).item() == 0


def test_relative_faithfulness_averages_the_sites_relative_errors():
    model = toys.decomposed()
    terms = [
        oracle.faithfulness(model.V(n), model.U(n), s.weight) / (s.weight**2).sum()
        for n, s in model.sites.items()
    ]
    toys.assert_same_gradients(model, relative_faithfulness(model), sum(terms) / len(terms))
