"""Reconstruction under each masking, and the number of active components."""

from __future__ import annotations

import pytest
import torch

from spd_fast.evaluate import importance_l0, reconstruction
from spd_fast.ops.divergence import divergence
from tests import oracle, toys

X = toys.batch(1)


def perfect(always_on: bool = True):
    """Every row of W a component of its own, its gate always on (or always off)."""
    model = toys.decomposed()
    with torch.no_grad():
        for name, site in model.sites.items():
            V, U = model.V(name).zero_(), model.U(name).zero_()
            V[:, : site.d_out] = site.weight.T[:, : site.components]
            U[: site.d_out] = torch.eye(site.d_out)[: site.components]
            for W in model.ci_fn(name).weights:
                W.zero_()
            model.ci_fn(name).biases[-1].fill_(1e3 if always_on else 0)
    return model


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_a_perfect_decomposition_reconstructs_exactly(kind):
    found = reconstruction(perfect(), X, kind, seed=0)
    assert list(found) == ["stochastic", "ci", "rounded", "unmasked", "zero"]
    for name in ("stochastic", "ci", "rounded", "unmasked"):
        # Seen: 1e-31 (MSE) and 3e-17 (KL, a sum of terms that cancel).
        assert found[name] == pytest.approx(0, abs=1e-24 if kind == "mse" else 1e-15)
    assert found["zero"] > 0.1


def test_without_importance_ci_masks_are_all_zero():
    found = reconstruction(perfect(always_on=False), X, "mse", seed=0)
    assert found["ci"] == found["rounded"] == found["zero"]
    assert found["unmasked"] == pytest.approx(0, abs=1e-24)
    assert 0 < found["stochastic"] < found["zero"]


def test_every_value_is_the_divergence_of_its_masks():
    model = toys.decomposed(delta=True)
    found = reconstruction(model, X, "mse", seed=7)
    lower = {n: g for n, (g, _) in toys.importances(model, X).items()}
    masks, deltas = toys.stochastic_masks(model, lower, 7, 2**32 - 1, 0)

    def expected(masks, deltas=None):
        output = toys.by_hand(X, toys.masked(model, masks, deltas))
        return oracle.mse(output, model.target(X)).item()

    assert found == pytest.approx(
        {
            "stochastic": expected(masks, deltas),
            "ci": expected(lower),
            "rounded": expected({n: (g > 0.5).to(g.dtype) for n, g in lower.items()}),
            "unmasked": expected({n: torch.ones_like(g) for n, g in lower.items()}),
            "zero": expected({n: torch.zeros_like(g) for n, g in lower.items()}),
        },
        rel=1e-10,
    )


def test_the_zero_mask_leaves_the_biases():
    model = toys.decomposed()
    net = model.target
    # The last site, masked, gives its bias whatever it sees.
    expected = divergence(net.head.bias.expand(9, 3), net(X), "mse").item()
    assert reconstruction(model, X, "mse", seed=0)["zero"] == pytest.approx(expected)


def test_the_seed_decides_the_stochastic_masks():
    model = toys.decomposed()
    one, same, other = (reconstruction(model, X, "mse", seed=s) for s in (1, 1, 2))
    assert one == same
    assert one["stochastic"] != other["stochastic"]


def test_evaluation_leaves_no_gradient():
    model = toys.decomposed()
    reconstruction(model, X, "mse", seed=0)
    importance_l0(model, X, 0.0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_l0_is_the_mean_number_of_components_above_the_threshold(threshold):
    model = toys.decomposed()
    found = importance_l0(model, X, threshold)
    for name, (lower, _) in toys.importances(model, X).items():
        assert found[name] == pytest.approx((lower > threshold).sum(dim=1).double().mean().item())


def test_l0_counts_every_leading_dimension():
    model = toys.decomposed()
    flat = importance_l0(model, toys.batch(1, 6, 4), 0.01)
    assert importance_l0(model, toys.batch(1, 2, 3, 4), 0.01) == pytest.approx(flat)


def test_l0_of_an_empty_batch_is_zero():
    assert set(importance_l0(toys.decomposed(), toys.batch(1, 0, 4), 0.01).values()) == {0}
