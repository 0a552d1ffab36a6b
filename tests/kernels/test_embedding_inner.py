"""The embedding gather and its sorted gradient in Triton, against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import embedding_inner
from tests.checks import assert_matches_oracle, normal, transposed
from tests.ops import test_embedding_inner as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize(
    ("shape", "vocabulary", "components"), [*cases.SIZES, ((9,), 50, 300), ((50,), 1, 3)]
)
def test_result_and_gradient_are_the_oracles(shape, vocabulary, components):
    assert_matches_oracle(
        cases.runner("triton"), cases.truth, cases.make_inputs(shape, vocabulary, components),
        {"h": normal(2, *shape, components)}, torch.float32,
    )  # fmt: skip


def test_transposed_and_expanded_gradients():
    t = cases.make_inputs((12,), 5, 6)
    V = t["V"].float().requires_grad_()
    h = embedding_inner(t["tokens"], V)
    for grad in (transposed(normal(2, 12, 6).float()), torch.ones(1, 1).expand(12, 6)):
        (got,) = torch.autograd.grad(h, V, grad, retain_graph=True)
        (expected,) = torch.autograd.grad(h, V, grad.contiguous(), retain_graph=True)
        assert torch.equal(got, expected)


def test_the_gradient_has_the_dtype_of_V():
    t = cases.make_inputs((12,), 5, 6)
    V = t["V"].bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(embedding_inner(t["tokens"], V).sum(), V)
    assert grad.dtype == torch.bfloat16
    counts = torch.bincount(t["tokens"], minlength=5).bfloat16()
    assert torch.equal(grad, counts[:, None].expand(5, 6))


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 4, 0)])
def test_empty_inputs_give_zero_gradients(shape):
    rows, vocabulary, components = shape
    V = torch.zeros(vocabulary, components, requires_grad=True)
    h = embedding_inner(torch.zeros(rows, dtype=torch.int64), V)
    assert h.shape == (rows, components)
    (grad,) = torch.autograd.grad(h.sum(), V)
    assert grad.shape == V.shape
    assert not grad.any()
