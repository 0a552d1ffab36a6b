"""A batch worked through whole or in pieces: the same losses, gradients and adversaries."""

from __future__ import annotations

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.train import Trainer, parse_config
from spd_fast.train.pieces import pieces
from tests import toys

MINIMALITY = {"coeff": 1e-2, "p": 0.9, "beta": 0.5}
PGD = {"coeff": 0.3, "pgd_steps": 2, "step_size": 0.1}
EVERY_LOSS = {
    "faithfulness": 0.7,
    "relative_faithfulness": 0.2,
    "stochastic_recon": 1.0,
    "stochastic_recon_layerwise": 0.5,
    "stochastic_recon_subset": {"coeff": 0.4, "routing": "static_probability", "probability": 0.6},
    "stochastic_hidden_acts_recon": 0.1,
    "ci_masked_recon": 0.3,
    "ci_masked_recon_layerwise": 0.2,
    "ci_masked_recon_subset": 0.6,
    "unmasked_recon": 0.2,
    "pgd_recon": PGD,
    "pgd_recon_layerwise": PGD | {"scope": "shared_across_batch"},
    "pgd_recon_subset": PGD | {"scope": "shared_across_batch", "init": "zeros"},
    "persistent_pgd_recon": {"coeff": 0.5, "lr": 0.05, "n_warmup": 1, "scope": "per_position"},
    "importance_minimality": MINIMALITY,
}


def trainer(**changes):
    data = {
        "name": "toy",
        "preset": "2026",
        "target": {"kind": "tms", "features": 5, "hidden": 2},
        "sites": toys.SITES,
        "losses": EVERY_LOSS,
        "lr": 1e-2,
        "steps": 6,
        "batch_size": 8,
        "warm_up": {"steps": 0},
        "sampling": "continuous",
    }
    model = toys.decomposed(delta=True, sigmoid="2026", ci_hidden=(3,))
    return Trainer(model, parse_config(data | changes), batches, quiet=True)


def batches(step):
    return toys.batch(50 + step, 8, 3, 4)


def gradients(run):
    # Hidden activations end before the head: its U has no part in them.
    named = run.model.named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("loss", [n for n in EVERY_LOSS if n != "importance_minimality"])
def test_in_four_pieces_a_loss_is_that_of_the_whole_batch(loss):
    off = dict.fromkeys(("faithfulness", "stochastic_recon", "stochastic_recon_layerwise"), 0.0)
    losses = off | {loss: EVERY_LOSS[loss], "importance_minimality": MINIMALITY}
    same(losses, 4)


def test_in_four_pieces_all_losses_together_are_those_of_the_whole_batch():
    same(EVERY_LOSS, 4)


def test_binomial_sampling_is_the_same_in_pieces():
    same(EVERY_LOSS, 4, sampling="binomial")


def test_pieces_need_not_be_equal():
    same(EVERY_LOSS, 3, batch_size=9)


def same(losses, count, **changes):
    whole = trainer(losses=losses, **changes)
    cut = trainer(losses=losses, accumulation=count, **changes)
    for index in range(2):
        ours, theirs = cut.train_step(index)[0], whole.train_step(index)[0]
        assert list(ours) == list(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients(cut), gradients(whole), rtol=1e-7, atol=1e-10)


def test_faithfulness_is_the_same_to_the_last_bit():
    whole, cut = trainer(), trainer(accumulation=4)
    one, other = whole.train_step(0)[0], cut.train_step(0)[0]
    assert torch.equal(one["faithfulness"], other["faithfulness"])


def test_recomputed_activations_change_nothing():
    kept, recomputed = trainer(), trainer(activation_checkpointing=True)
    for index in range(2):
        torch.testing.assert_close(recomputed.train_step(index)[0], kept.train_step(index)[0])
        torch.testing.assert_close(gradients(recomputed), gradients(kept), rtol=1e-9, atol=1e-12)


def test_pieces_cut_mappings_and_tuples():
    batch = {"ids": torch.arange(6), "pair": (torch.arange(12).reshape(6, 2), "kept")}
    found = pieces(batch, 4)
    assert [(p.start, p.samples, p.total) for p in found] == [
        (0, 2, 6), (2, 1, 6), (3, 1, 6), (4, 2, 6),
    ]  # fmt: skip
    assert found[3].batch["ids"].tolist() == [4, 5]
    assert found[3].batch["pair"][0].tolist() == [[8, 9], [10, 11]]
    assert found[3].batch["pair"][1] == "kept"


def test_one_piece_is_whatever_the_batch_is():
    marker = object()
    assert pieces(marker, 1)[0].batch is marker


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3, "no tensors"),
        ((torch.zeros(3), torch.zeros(4)), r"lengths \[3, 4\]"),
        (torch.zeros(3), "3 samples cannot be worked through in 4"),
    ],
)
def test_what_cannot_be_cut_is_an_error(batch, message):
    with pytest.raises(UserError, match=message):
        pieces(batch, 4)
