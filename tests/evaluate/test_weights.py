"""MMCS and ML2R on cases done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spd_fast.evaluate import match_matrices, match_weights, mechanism_cosines
from tests.checks import normal


def test_a_perfect_decomposition_has_one_and_one():
    W = normal(1, 3, 5)
    match = match_weights(torch.eye(5), W.T, W)
    assert match.mmcs == pytest.approx(1)
    assert match.ml2r == pytest.approx(1)
    assert match.component.tolist() == [0, 1, 2, 3, 4]


def test_angles_and_lengths_are_those_drawn_by_hand():
    # Two inputs, two outputs; columns of W: (1, 0) and (0, 2).
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # Component 0 is (1, 1), half of it at input 0; component 1 is (0, 3) at input 1.
    V = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    U = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    match = match_weights(V, U, W)
    assert match.cosine.tolist() == pytest.approx([math.sqrt(0.5), 1])
    assert match.ratio.tolist() == pytest.approx([0.5 * math.sqrt(2), 1.5])
    assert match.mmcs == pytest.approx((math.sqrt(0.5) + 1) / 2)
    assert match.ml2r == pytest.approx((0.5 * math.sqrt(2) + 1.5) / 2)


def test_a_negative_entry_of_V_turns_its_component_round():
    W = torch.tensor([[1.0], [0.0]])
    match = match_weights(torch.tensor([[-2.0]]), torch.tensor([[-1.0, 0.0]]), W)
    assert (match.mmcs, match.ml2r) == pytest.approx((1, 2))


def test_a_component_that_points_the_other_way_counts_as_such():
    W = torch.tensor([[1.0], [0.0]])
    match = match_weights(torch.tensor([[-2.0]]), torch.tensor([[1.0, 0.0]]), W)
    assert match.mmcs == pytest.approx(-1)


def test_dead_components_have_cosine_and_length_zero():
    W = normal(1, 3, 2)
    match = match_weights(torch.ones(2, 4), torch.zeros(4, 3), W)
    assert (match.mmcs, match.ml2r) == (0, 0)


def test_a_component_without_the_input_has_cosine_zero():
    W = torch.tensor([[1.0], [1.0]])
    match = match_weights(torch.zeros(1, 1), torch.ones(1, 2), W)
    assert (match.mmcs, match.ml2r) == (0, 0)


def test_dead_components_do_not_hide_live_ones():
    W = normal(1, 3, 4)
    V = torch.cat([torch.zeros(4, 2), torch.eye(4)], dim=1)
    U = torch.cat([torch.zeros(2, 3), W.T])
    match = match_weights(V, U, W)
    assert match.mmcs == pytest.approx(1)
    assert match.component.tolist() == [2, 3, 4, 5]


def test_an_input_whose_weights_are_zero_has_no_match():
    W = torch.zeros(3, 1)
    match = match_weights(torch.ones(1, 1), torch.ones(1, 3), W)
    assert match.mmcs == 0
    assert math.isfinite(match.cosine.item())


def test_the_ratio_is_that_of_the_best_cosine_not_of_the_longest():
    W = torch.tensor([[1.0], [0.0]])
    V, U = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.3, 0.0], [9.0, 9.0]])
    assert match_weights(V, U, W).ml2r == pytest.approx(0.3)


def test_an_emptied_component_that_points_the_right_way_is_no_match():
    W = torch.tensor([[1.0], [0.0]])
    V, U = torch.ones(1, 2), torch.tensor([[0.99, 0.01], [1e-5, 0.0]])
    among = torch.tensor([True, False])
    assert match_weights(V, U, W).ml2r == pytest.approx(1e-5)
    assert match_weights(V, U, W, among).ml2r == pytest.approx(0.99, abs=1e-3)
    assert match_weights(V, U, W, among).component.tolist() == [0]


def test_where_no_component_is_live_all_may_match():
    W = normal(3, 2, 3)
    V, U = torch.eye(3), W.T
    nobody = torch.zeros(3, dtype=torch.bool)
    assert match_weights(V, U, W, nobody).component.tolist() == [0, 1, 2]


def by_hand(V: Tensor, U: Tensor, W: Tensor) -> tuple[float, float]:
    cosines, ratios = [], []
    for j in range(V.shape[0]):
        column = W[:, j]
        pieces = [U[c] * V[j, c] for c in range(V.shape[1])]
        each = [(p @ column / (p.norm() * column.norm())).item() for p in pieces]
        best = max(range(len(each)), key=each.__getitem__)
        cosines.append(each[best])
        ratios.append((pieces[best].norm() / column.norm()).item())
    return sum(cosines) / len(cosines), sum(ratios) / len(ratios)


@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
)
def test_any_matrices_agree_with_the_definition(seed, sizes):
    d_in, C, d_out = sizes
    V, U, W = normal(seed, d_in, C), normal(seed + 1, C, d_out), normal(seed + 2, d_out, d_in)
    match = match_weights(V, U, W)
    assert (match.mmcs, match.ml2r) == pytest.approx(by_hand(V, U, W), rel=1e-9)


def test_float32_matrices_are_compared_in_float64():
    W = normal(1, 3, 5).float()
    match = match_weights(torch.eye(5), W.T, W)
    assert match.cosine.dtype == torch.float64
    assert abs(match.mmcs - 1) < 1e-12


def alone(W, j):
    """W with every column but one zero."""
    mechanism = torch.zeros_like(W)
    mechanism[:, j] = W[:, j]
    return mechanism


def test_a_component_for_each_feature_has_cosine_one_whatever_its_length():
    W = normal(1, 3, 5)
    P = torch.stack([0.7 * alone(W, j) for j in (4, 2, 0, 1, 3)])
    assert mechanism_cosines(P, W).tolist() == pytest.approx([1] * 5)


def test_mechanisms_are_flattened_cosines_written_out():
    W, P = normal(1, 3, 5), normal(2, 4, 3, 5)
    naive = [
        max(
            torch.nn.functional.cosine_similarity(p.flatten(), alone(W, j).flatten(), dim=0).item()
            for p in P
        )
        for j in range(5)
    ]
    assert mechanism_cosines(P, W).tolist() == pytest.approx(naive)


def test_a_component_that_serves_two_features_is_the_mechanism_of_neither():
    W = torch.tensor([[1.0, -1.0]])  # two opposite features in one dimension
    assert mechanism_cosines(W[None], W).tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_components_of_nothing_are_no_mechanisms():
    assert mechanism_cosines(torch.zeros(2, 3, 4), normal(1, 3, 4)).tolist() == [0] * 4
    assert mechanism_cosines(torch.ones(1, 2, 2), torch.zeros(2, 2)).tolist() == [0, 0]


def test_matrices_of_rank_one_match_as_their_factors_do():
    V, U, weight = normal(0, 6, 4), normal(1, 4, 3), normal(2, 3, 6)
    by_factors = match_weights(V, U, weight)
    by_matrices = match_matrices(torch.einsum("ic,co->coi", V, U), weight)
    assert torch.equal(by_matrices.component, by_factors.component)
    torch.testing.assert_close(by_matrices.cosine, by_factors.cosine)
    torch.testing.assert_close(by_matrices.ratio, by_factors.ratio)


def test_a_matrix_matches_column_by_column():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    whole = torch.tensor([[[0.5, 9.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]])
    found = match_matrices(whole, weight)
    assert found.component.tolist() == [0, 1]
    assert found.cosine.tolist() == [1, 1]
    assert found.ratio.tolist() == [0.5, 0.5]


def test_only_the_matrices_asked_for_match():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    whole = torch.stack([1e-5 * weight, 0.5 * weight, normal(0, 2, 2).float()])
    found = match_matrices(whole, weight, torch.tensor([False, True, True]))
    assert found.component.tolist() == [1, 1]
    assert found.ratio.tolist() == [0.5, 0.5]
