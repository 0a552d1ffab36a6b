"""The residual MLP toy."""

from __future__ import annotations

import math

import pytest
import torch

from spd_fast._adamw import AdamW
from spd_fast.targets import ResidMLP, SparseFeatures
from spd_fast.targets.resid_mlp import train_resid_mlp

DATA = SparseFeatures(4, 0.5, -1.0, 1.0, 64, 0, "target")


def model(layers=2, seed=0):
    return ResidMLP(features=4, d_embed=50, d_mlp=6, layers=layers, seed=seed)


def test_the_forward_is_a_residual_stream_between_embedding_and_its_transpose():
    net, x = model(), DATA(0)
    W_E = net.W_E
    stream = x @ W_E
    for layer in net.layers:
        hidden = torch.relu(stream @ layer.mlp_in.weight.T)
        stream = stream + hidden @ layer.mlp_out.weight.T
    torch.testing.assert_close(net(x), stream @ W_E.T)


def test_embedding_rows_have_length_one():
    norms = model().W_E.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_there_are_no_biases():
    assert [name for name, _ in model().named_parameters() if "bias" in name] == []


def test_the_seed_decides_every_weight():
    one, same, other = (model(seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


def train(steps=200, **options):
    net = model()
    settings = {"lr": 1e-2, "weight_decay": 0.0} | options
    return net, train_resid_mlp(net, DATA, steps=steps, **settings)


def test_training_lowers_the_loss():
    _, losses = train()
    assert losses[-1] < 0.3 * losses[0]


def test_the_first_loss_is_the_error_against_x_plus_relu_x():
    net, x = model(), DATA(0)
    _, losses = train(steps=1)
    expected = (net(x) - (x + x.clamp(min=0))).square().mean().item()
    assert losses == pytest.approx([expected])


def test_the_embedding_stays_fixed():
    net, _ = train(steps=5)
    assert torch.equal(net.W_E, model().W_E)


def test_a_trained_target_is_frozen():
    net, _ = train(steps=2)
    assert not any(p.requires_grad for p in net.parameters())


def test_the_learning_rate_is_a_half_wave(monkeypatch):
    rates = []
    step = AdamW.step

    def recorded(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdamW, "step", recorded)
    train(steps=5)
    assert rates == pytest.approx([1e-2 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)])


def test_progress_is_told_of_every_step():
    done = []
    train(steps=3, progress=done.append)
    assert done == [1, 2, 3]


def test_losses_are_those_of_every_hundredth_of_the_way():
    assert len(train(steps=250)[1]) == 126
