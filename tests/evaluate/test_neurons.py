"""Neuron contributions against their formula written out neuron by neuron."""

from __future__ import annotations

import pytest
import torch

from spd_fast.evaluate.neurons import NeuronContributions, best_components, neuron_contributions
from spd_fast.model import DecomposedModel
from spd_fast.targets import TMS, ResidMLP

FEATURES, EMBED, MLP, LAYERS, C = 6, 11, 4, 2, 7


def decomposed(seed=0):
    target = ResidMLP(FEATURES, EMBED, MLP, LAYERS, seed)
    return DecomposedModel(target, {"layers.*": C}, ci_fn="linear", seed=seed)


def solved():
    """Components that are the target's own: one a feature in, one a neuron out. As in a trained
    network, neurons write where they read, so that contributions are positive."""
    target = ResidMLP(3, 3, 4, 2, 0)
    model = DecomposedModel(target, {"layers.*.mlp_in": 5, "layers.*.mlp_out": 4}, ci_fn="linear")
    with torch.no_grad():
        target.W_E.copy_(torch.eye(3))
        for i, layer in enumerate(target.layers):
            layer.mlp_out.weight.copy_(layer.mlp_in.weight.T)
            model.V(f"layers.{i}.mlp_in").copy_(torch.eye(3, 5))
            model.U(f"layers.{i}.mlp_in").copy_(
                torch.cat([layer.mlp_in.weight.T, torch.zeros(2, 4)])
            )
            model.V(f"layers.{i}.mlp_out").copy_(torch.eye(4))
            model.U(f"layers.{i}.mlp_out").copy_(layer.mlp_out.weight.T)
    return model


def test_the_targets_contributions_are_the_formula():
    model = decomposed()
    W_E = model.target.W_E.double()
    found = neuron_contributions(model).target
    assert found.shape == (LAYERS, FEATURES, MLP)
    for layer in range(LAYERS):
        W_in = model.target.layers[layer].mlp_in.weight.double()
        W_out = model.target.layers[layer].mlp_out.weight.double()
        for i in range(FEATURES):
            for m in range(MLP):
                naive = (W_E[i] @ W_out[:, m]) * (W_in[m] @ W_E[i])
                assert found[layer, i, m].item() == pytest.approx(naive.item(), rel=1e-12)


def test_the_components_contributions_are_the_formula():
    model = decomposed(seed=3)
    W_E = model.target.W_E.double()
    found = neuron_contributions(model)
    for layer in range(LAYERS):
        V, U = (p(f"layers.{layer}.mlp_in").double() for p in (model.V, model.U))
        V_out, U_out = (p(f"layers.{layer}.mlp_out").double() for p in (model.V, model.U))
        for i in range(FEATURES):
            naive = [
                [
                    (W_E[i] @ sum(U_out[k] * V_out[m, k] for k in range(C))).item()
                    * (U[c, m] * (V[:, c] @ W_E[i])).item()
                    for m in range(MLP)
                ]
                for c in range(C)
            ]
            best = max(range(C), key=lambda c: max(naive[c]))
            assert found.component[layer, i] == best
            assert found.found[layer, i].tolist() == pytest.approx(naive[best], rel=1e-9)


def test_a_component_is_chosen_by_its_largest_contribution_not_its_size():
    candidates = torch.tensor([[[0.0, 0.5], [-9.0, 0.4], [0.3, 0.3]]])
    assert best_components(candidates).tolist() == [0]


def test_the_targets_own_columns_reproduce_it():
    found = neuron_contributions(solved())
    torch.testing.assert_close(found.found, found.target)
    assert found.component.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (found.r2, found.slope) == (pytest.approx(1), pytest.approx(1))


def test_shrunken_components_show_in_slope_and_r2():
    model = solved()
    with torch.no_grad():
        for i in range(2):
            model.U(f"layers.{i}.mlp_in").mul_(0.5)
    found = neuron_contributions(model)
    assert found.slope == pytest.approx(0.5)
    assert found.r2 < 0.9


def test_the_statistics_are_their_formulas():
    target = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]).double()
    found = torch.tensor([[[1.0, 1.0], [4.0, 6.0]]]).double()
    c = NeuronContributions(target, found, torch.zeros(1, 2))
    # mean 3; Σ (t − 3)² = 4 + 1 + 0 + 9; Σ (f − t)² = 0 + 1 + 1 + 0; Σ t f = 51; Σ t² = 50
    assert c.r2 == pytest.approx(1 - 2 / 14)
    assert c.slope == pytest.approx(51 / 50)
    assert c.by_layer() == [{"r2": c.r2, "slope": c.slope}]


def test_a_damaged_layer_shows_in_its_own_numbers():
    model = solved()
    with torch.no_grad():
        model.U("layers.1.mlp_in").zero_()
    first, second = neuron_contributions(model).by_layer()
    assert first["r2"] == pytest.approx(1)
    assert second["slope"] == 0


def test_other_networks_have_no_neurons_to_compare():
    model = DecomposedModel(TMS(5, 2), {"linear1": 4})
    with pytest.raises(ValueError, match="need a ResidMLP, got TMS"):
        neuron_contributions(model)


def test_every_matrix_must_be_decomposed():
    model = DecomposedModel(ResidMLP(4, 5, 3, 1, 0), {"layers.*.mlp_in": 4})
    with pytest.raises(ValueError, match=r"site 'layers.0.mlp_out'"):
        neuron_contributions(model)
