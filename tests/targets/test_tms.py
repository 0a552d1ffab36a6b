"""The toy model of superposition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spd_fast.targets import TMS, SparseFeatures
from spd_fast.targets.tms import represented_features, train_tms


def assert_tied(model):
    assert model.linear2.weight.data_ptr() == model.linear1.weight.data_ptr()
    assert torch.equal(model.linear2.weight, model.linear1.weight.T)


@pytest.mark.parametrize("identity_layers", [0, 1, 2])
def test_the_forward_is_relu_of_the_tied_maps(identity_layers):
    model, x = TMS(5, 2, identity_layers), torch.rand(7, 5)
    W, b = model.linear1.weight, model.linear2.bias
    torch.testing.assert_close(model(x), torch.relu(x @ W.T @ W + b))


def test_identity_layers_are_exactly_the_identity():
    model = TMS(5, 2, identity_layers=2)
    assert [torch.equal(m.weight, torch.eye(2)) for m in model.hidden_layers] == [True, True]


def test_the_second_weight_is_the_first_transposed_in_one_storage():
    assert_tied(TMS(5, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_keeps_the_weights_tied(dtype):
    model = TMS(5, 2).to(dtype)
    assert model.linear2.weight.dtype == dtype
    assert_tied(model)


def test_a_feature_that_moves_its_own_output_is_represented():
    model = TMS(3, 3)
    with torch.no_grad():
        model.linear1.weight.copy_(torch.diag(torch.tensor([1.0, 0.6, 0.5])))
        model.linear2.bias.zero_()
    # Responses to 0.75: 0.75, 0.27 and 0.19, of which a third of 0.75 is asked.
    assert represented_features(model, 3, torch.device("cpu")) == [True, True, False]


def test_an_output_that_is_always_on_is_not_a_represented_feature():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1.0)
    assert represented_features(model, 2, torch.device("cpu")) == [False, False]


def train(seed=0, steps=300, starts=8, model=None, **options):
    model = model or TMS(3, 3)
    data = SparseFeatures(3, 0.3, 0.0, 1.0, 128, seed, "target")
    settings = {"lr": 2e-2, "weight_decay": 0.01, "zero_bias": True} | options
    losses = train_tms(model, data, steps=steps, starts=starts, seed=seed, **settings)
    return model, losses


def test_training_lowers_the_loss_and_represents_every_feature():
    model, losses = train()
    assert losses[-1] < 0.1 * losses[0]
    assert all(represented_features(model, 3, torch.device("cpu")))


def test_a_trained_target_is_frozen_and_tied():
    model, _ = train(steps=3)
    assert not any(p.requires_grad for p in model.parameters())
    assert_tied(model)


def test_training_leaves_the_identity_layers_alone():
    model, _ = train(steps=20, model=TMS(3, 3, identity_layers=1))
    assert torch.equal(model.hidden_layers[0].weight, torch.eye(3))


def test_the_seed_decides_the_trained_target():
    one, same, other = (train(seed=s, steps=20)[0].state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["linear1.weight"], other["linear1.weight"])


def test_training_does_not_depend_on_what_the_model_was():
    one, _ = train(steps=20)
    other = TMS(3, 3)
    with torch.no_grad():
        other.linear1.weight.fill_(9)
    train(steps=20, model=other)
    assert torch.equal(one.linear1.weight, other.linear1.weight)


@pytest.mark.parametrize("zero_bias", [True, False])
def test_the_bias_starts_at_zero_where_asked(zero_bias):
    model, _ = train(steps=1, lr=1e-12, starts=1, zero_bias=zero_bias)
    assert (model.linear2.bias.abs() < 1e-9).all() == zero_bias


def test_losses_are_those_of_every_hundredth_of_the_way():
    _, losses = train(steps=300, starts=1)
    assert len(losses) == 101


def test_the_loss_is_the_mean_squared_error_of_the_features():
    model = TMS(3, 3)
    _, losses = train(steps=1, lr=1e-12, starts=1, model=model)
    x = SparseFeatures(3, 0.3, 0.0, 1.0, 128, 0, "target")(0)
    assert losses[0] == pytest.approx((model(x) - x.abs()).square().mean().item(), rel=1e-4)


def test_weight_decay_is_adamws():
    model, data = TMS(3, 3), SparseFeatures(3, 0.0, 0.0, 1.0, 8, 0, "target")
    kept, decayed = copy.deepcopy(model), model
    for each, decay in ((kept, 0.0), (decayed, 0.5)):
        train_tms(
            each, data, steps=1, lr=0.1, weight_decay=decay, zero_bias=True, starts=1, seed=0
        )  # fmt: skip
    # Without any feature present the first weight has no gradient: it only decays.
    torch.testing.assert_close(decayed.linear1.weight, kept.linear1.weight * (1 - 0.1 * 0.5))


def test_a_start_that_loses_a_feature_is_given_up_early(monkeypatch):
    answers = [[True, False, True], [False, True, True], [True, True, True]]
    monkeypatch.setattr(
        "spd_fast.targets.tms.represented_features", lambda *_: answers.pop(0)
    )  # fmt: skip
    done = []
    train(steps=10, starts=8, progress=done.append)
    assert done == [1, 2, 1, 2, *range(1, 11)]


def test_the_last_start_is_trained_to_the_end_whatever_it_loses(monkeypatch):
    monkeypatch.setattr("spd_fast.targets.tms.represented_features", lambda *_: [False])
    done = []
    train(steps=10, starts=2, progress=done.append)
    assert done == [1, 2, *range(1, 11)]
