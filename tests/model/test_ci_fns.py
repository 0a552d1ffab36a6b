"""Gates: architecture, names, initialisation."""

from __future__ import annotations

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.model.ci_fns import hidden_widths, make_ci_fn


def gate(kind="mlp", hidden=(16,), C=5, seed=0):
    return make_ci_fn(kind, C, hidden, torch.Generator().manual_seed(seed))


def test_layers_are_numbered_as_in_the_authors_code():
    names = dict(gate(hidden=(16, 8)).named_parameters())
    assert {n: tuple(p.shape) for n, p in names.items()} == {
        "layers.0.W": (5, 1, 16), "layers.0.b": (5, 16),
        "layers.2.W": (5, 16, 8), "layers.2.b": (5, 8),
        "layers.4.W": (5, 8, 1), "layers.4.b": (5, 1),
    }  # fmt: skip


def test_the_linear_gate_is_one_scale_and_one_shift_a_component():
    assert [tuple(p.shape) for p in gate("linear").parameters()] == [(5, 1, 1), (5, 1)]


def test_weights_and_biases_come_in_layer_order():
    made = gate(hidden=tuple(range(2, 14)))
    assert [tuple(w.shape[1:]) for w in made.weights] == [
        (1, 2), *((n, n + 1) for n in range(2, 13)), (13, 1),
    ]  # fmt: skip
    assert [b.shape[1] for b in made.biases] == [*range(2, 14), 1]


def test_first_hidden_weights_have_standard_deviation_root_two():
    first = gate(C=4000).weights[0]
    torch.testing.assert_close(first.std().item(), 2**0.5, rtol=0.02, atol=0)


def test_further_hidden_weights_are_scaled_by_root_two_over_root_fan_in():
    second = gate(hidden=(32, 8), C=500).weights[1]
    torch.testing.assert_close(second.std().item(), (2 / 32) ** 0.5, rtol=0.02, atol=0)


def test_head_weights_are_scaled_by_one_over_root_hidden():
    head = gate(hidden=(64,), C=2000).weights[-1]
    torch.testing.assert_close(head.std().item(), 1 / 8, rtol=0.02, atol=0)


def test_linear_weights_are_standard_normal():
    w = gate("linear", C=50_000).weights[0]
    torch.testing.assert_close(w.std().item(), 1.0, rtol=0.02, atol=0)
    assert abs(w.mean().item()) < 0.02


def test_biases_start_at_zero():
    assert all(not b.any() for b in gate(hidden=(3, 4)).biases)


def test_the_seed_decides_the_weights():
    same, again, other = (gate(seed=s).weights[0] for s in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="unknown ci_fn 'mpl'; nearest: 'mlp'"):
        gate("mpl")


@pytest.mark.parametrize("hidden", [(), (0,), (16, -1)])
def test_hidden_widths_below_one_are_an_error(hidden):
    with pytest.raises(UserError, match="'mlp' needs hidden widths of at least 1"):
        gate(hidden=hidden)


@pytest.mark.parametrize("given", [16, None, "16", [16, "8"], (16.0,)])
def test_hidden_widths_that_are_no_list_of_whole_numbers_are_an_error(given):
    with pytest.raises(UserError, match=r"ci_hidden lists hidden widths, such as \(16,\); got "):
        hidden_widths(given)


def test_hidden_widths_may_be_whole_numbers_of_any_library():
    widths = hidden_widths(torch.tensor([16, 8]))
    assert widths == [16, 8]
    assert {type(w) for w in widths} == {int}
