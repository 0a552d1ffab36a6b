"""The ground-truth check on matrices whose errors are planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_fast.evaluate import (
    WIDER,
    Contradiction,
    Expected,
    dense_error,
    identity_error,
    live_components,
    probe_importances,
)
from spd_fast.evaluate.ground_truth import permute_dense, permute_identity
from spd_fast.model import DecomposedModel
from spd_fast.targets import TMS
from tests import oracle

SIZES = st.tuples(st.integers(1, 7), st.integers(0, 5), st.integers(0, 10_000))


def noise(rng, rows, columns):
    """Values that are off, down to the slightly negative ones of the paper's sigmoid."""
    return rng.uniform(-0.01, 0.1, (rows, columns))


def identity(rng, n, extra):
    """An identity of n features and n + extra components, all values within their bounds."""
    matrix = noise(rng, n, n + extra)
    matrix[np.arange(n), np.arange(n)] = rng.uniform(0.9, 1.0, n)
    return matrix


def shuffle(rng, matrix):
    return matrix[:, rng.permutation(matrix.shape[1])]


@given(SIZES)
def test_any_permuted_identity_has_no_error(sizes):
    n, extra, seed = sizes
    rng = np.random.default_rng(seed)
    assert identity_error(shuffle(rng, identity(rng, n, extra)), n) == 0


@given(SIZES, st.data())
def test_every_planted_error_of_an_identity_counts_once(sizes, data):
    n, extra, seed = sizes
    rng = np.random.default_rng(seed)
    matrix = identity(rng, n, extra)
    cells = [(i, j) for i in range(n) for j in range(n + extra)]
    planted = data.draw(st.sets(st.sampled_from(cells)))
    for i, j in planted:
        # Too weak for an assignment to change: any other has a smaller sum.
        matrix[i, j] = rng.uniform(0.6, 0.89) if i == j else rng.uniform(0.11, 0.29)
    assert identity_error(shuffle(rng, matrix), n) == len(planted)


@given(SIZES)
def test_the_diagonal_of_the_permuted_identity_is_the_features_own(sizes):
    n, extra, seed = sizes
    rng = np.random.default_rng(seed)
    matrix = shuffle(rng, identity(rng, n, extra))
    order = permute_identity(matrix)
    assert sorted(order) == list(range(n + extra))
    assert (np.diag(matrix[:, order]) >= 0.9).all()


def test_columns_that_belong_to_no_feature_follow_by_their_mass():
    matrix = np.array([[0.0, 0.05, 1.0, 0.09], [0.01, 0.0, 0.0, 0.99]])
    assert permute_identity(matrix).tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize(("value", "errors"), [(0.9, 0), (0.89, 1), (1.0, 0)])
def test_on_is_at_least_nine_tenths(value, errors):
    assert identity_error(np.array([[value]]), 1) == errors


@pytest.mark.parametrize(("value", "errors"), [(0.1, 0), (0.11, 1), (-0.5, 0)])
def test_off_is_at_most_a_tenth(value, errors):
    assert identity_error(np.array([[1.0, value]]), 1) == errors


def test_components_that_serve_two_features_are_errors():
    # One component for both features: one is off where it should be on, one on where off.
    assert identity_error(np.array([[1.0, 0.0], [1.0, 0.0]]), 2) == 2


def test_missing_components_are_errors():
    assert identity_error(np.array([[1.0], [0.0]]), 2) == 1


def test_nothing_alive_makes_every_feature_an_error():
    assert identity_error(np.zeros((5, 20)), 5) == 5


def dense(rng, n, k, extra):
    """k components, each on for at least one of n features; the rest off."""
    matrix = noise(rng, n, k + extra)
    matrix[:, :k] = rng.uniform(0.2, 1.0, (n, k))
    matrix[rng.integers(0, n, k), np.arange(k)] = rng.uniform(0.9, 1.0, k)
    return matrix


@given(SIZES, st.integers(1, 5))
def test_any_dense_block_has_no_error(sizes, k):
    n, extra, seed = sizes
    rng = np.random.default_rng(seed)
    assert dense_error(shuffle(rng, dense(rng, n, k, extra)), k) == 0


@given(SIZES, st.integers(1, 5), st.data())
def test_every_planted_error_of_a_dense_block_counts_once(sizes, k, data):
    n, extra, seed = sizes
    rng = np.random.default_rng(seed)
    matrix = dense(rng, n, k, extra)
    weak = data.draw(st.sets(st.integers(0, k - 1)))
    for c in weak:  # lighter than a full column, heavier than an idle one
        matrix[:, c] = 0.5
    idle = [(i, j) for i in range(n) for j in range(k, k + extra)]
    alive = data.draw(st.sets(st.sampled_from(idle), max_size=1)) if idle else set()
    for i, j in alive:
        matrix[i, j] = 0.15
    assert dense_error(shuffle(rng, matrix), k) == len(weak) + len(alive)


def test_dense_columns_come_by_their_mass():
    assert permute_dense(np.array([[0.1, 1.0, 0.5], [0.1, 0.0, 0.9]])).tolist() == [2, 1, 0]


def test_missing_dense_components_are_errors():
    assert dense_error(np.ones((4, 1)), 3) == 2


def test_the_tolerance_moves_both_thresholds():
    matrix = np.array([[0.85, 0.15], [0.25, 0.75]])
    assert identity_error(matrix, 2) == 4
    assert identity_error(matrix, 2, WIDER) == 2
    assert dense_error(matrix, 1) == 3
    assert dense_error(matrix, 1, WIDER) == 1
    for pattern in (Expected("identity", 2), Expected("dense", 1)):
        assert pattern.error(matrix, WIDER) < pattern.error(matrix)


def test_contradictions_name_feature_and_component():
    identity = np.array([[0.02, 0.0, 1.0], [0.8, 0.3, 0.0]])
    assert Expected("identity", 2).contradictions(identity) == [
        Contradiction(1, 0, 0.8, 1),
        Contradiction(1, 1, 0.3, 0),
    ]
    assert Expected("identity", 2).contradictions(identity, 0.3) == []
    # Of a dense component that is never on, the largest; its others may be what they like.
    dense = np.array([[0.2, 0.8, 0.3], [0.04, 0.2, 0.95], [0.0, 0.5, 0.2]])
    assert Expected("dense", 2).contradictions(dense) == [
        Contradiction(0, 1, 0.8, 1),
        Contradiction(0, 0, 0.2, 0),
    ]


@pytest.mark.parametrize("pattern", ["identity", "dense"])
@pytest.mark.parametrize("seed", range(20))
def test_contradictions_are_the_errors(pattern, seed):
    """All of them but components that are missing, each with what its importance is."""
    importances = np.random.default_rng(seed).random((4, 6)).round(3)
    for components, missing in ((4, 0), (9, 5 if pattern == "identity" else 3)):
        known = Expected(pattern, components)
        for tolerance in (0.1, 0.5):
            found = known.contradictions(importances, tolerance)
            assert len(found) + missing == known.error(importances, tolerance)
            for entry in found:
                assert importances[entry.feature, entry.component] == entry.importance
                assert abs(entry.importance - entry.wanted) > tolerance


def test_margins_are_the_lowest_on_and_the_highest_off():
    identity = np.array([[0.0, 0.95, 0.02], [0.91, 0.05, 0.0]])
    assert Expected("identity", 2).margins(identity) == (0.91, 0.05)
    # A dense component counts by its largest value, whatever the others.
    dense = np.array([[0.1, 0.8, 0.3], [0.04, 0.2, 0.7], [0.0, 0.3, 0.2]])
    assert Expected("dense", 2).margins(dense) == (0.7, 0.1)
    assert Expected("dense", 3).margins(dense) == (0.1, 0.0)
    for pattern in ("identity", "dense"):
        assert Expected(pattern, 4).margins(dense)[0] == 0


@pytest.mark.parametrize("pattern", ["identity", "dense"])
@pytest.mark.parametrize("seed", range(20))
def test_margins_within_the_thresholds_are_no_error(pattern, seed):
    """And the other way round, at whatever tolerance."""
    importances = np.random.default_rng(seed).random((4, 6)).round(3)
    known = Expected(pattern, 4)
    lowest, highest = known.margins(importances)
    for tolerance in (0.05, 0.2, max(highest, 1 - lowest), max(highest, 1 - lowest) - 1e-6):
        clear = lowest >= 1 - tolerance and highest <= tolerance
        assert (known.error(importances, tolerance) == 0) == clear


def test_live_components_exceed_a_tenth_somewhere():
    matrix = np.array([[0.1, 0.11, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [-0.5, 0.0, 0.0, 0.0]])
    assert live_components(matrix) == 2


def test_expected_identities_and_dense_blocks_use_their_own_check():
    matrix = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert Expected("identity", 2).error(matrix) == 2
    assert Expected("dense", 1).error(matrix) == 0
    assert Expected("identity", 2).permute(matrix[:, ::-1]).tolist() in ([0, 1], [1, 0])
    assert Expected("dense", 1).permute(matrix[:, ::-1]).tolist() == [1, 0]


def test_probes_are_three_quarters_of_each_feature():
    model = DecomposedModel(TMS(5, 2), {"linear1": 4}, ci_hidden=(3,), backend="reference")
    gate = model.ci_fn("linear1")
    _, lower, _ = oracle.gate(
        0.75 * torch.eye(5), model.V("linear1"), gate.weights, gate.biases, "paper",
        ("none", 1.0, 0.0),
    )  # fmt: skip
    probes = probe_importances(model, 5)
    assert list(probes) == ["linear1"]
    np.testing.assert_allclose(probes["linear1"], lower.detach().numpy(), atol=1e-6)
