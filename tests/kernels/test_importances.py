"""Logits → importances and penalty sums, and the embedding gather's gradient."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import Penalty, lower_importance, upper_importance
from spd_fast.ops.penalty import penalty_sums
from tests.checks import normal

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
@pytest.mark.parametrize(
    "penalty", [Penalty(), Penalty("lp", 1.0), Penalty("lp", 0.7, 0.01), Penalty("smooth_l0", 0.3)]
)
def test_importances_and_gradients_are_the_references(sigmoid, penalty):
    from spd_fast.kernels import importances

    s = (normal(1, 70, 67) + 0.4).requires_grad_()
    lower = lower_importance(s, sigmoid)
    sums = penalty_sums(upper_importance(s, sigmoid), penalty) + 0 * s.sum(0)
    grads = normal(2, 70, 67), normal(3, 67)
    (truth,) = torch.autograd.grad((lower, sums), s, grads)
    options = (sigmoid, penalty.kind, penalty.power, penalty.eps)
    logits = s.detach().float()
    got_lower, got_sums = importances.importances_forward(logits, *options)
    got = importances.importances_backward(*(g.float() for g in grads), logits, *options)
    torch.testing.assert_close(got_lower.double(), lower.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got_sums.double(), sums.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.double(), truth, atol=1e-5, rtol=1e-4)


def test_each_gradient_may_be_missing():
    from spd_fast.kernels import importances

    logits = normal(1, 5, 6).float()
    options = ("2026", "lp", 1.0, 1e-12)
    both = importances.importances_backward(
        normal(2, 5, 6).float(), normal(3, 6).float(), logits, *options
    )
    parts = importances.importances_backward(
        normal(2, 5, 6).float(), None, logits, *options
    ) + importances.importances_backward(None, normal(3, 6).float(), logits, *options)
    torch.testing.assert_close(both, parts)


@pytest.mark.parametrize(("rows", "vocabulary", "C"), [(1, 1, 1), (40, 7, 5), (9, 50, 300)])
def test_the_gathers_gradient_adds_the_rows_of_each_token(rows, vocabulary, C):
    from spd_fast.kernels import embedding

    tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    V, grad = normal(1, vocabulary, C).float(), normal(2, rows, C).float()
    assert torch.equal(embedding.embedding_forward(tokens, V), V[tokens])
    truth = torch.zeros(vocabulary, C, dtype=torch.float64).index_add(0, tokens, grad.double())
    got = embedding.embedding_backward(grad, tokens, vocabulary)
    torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=1e-6)
