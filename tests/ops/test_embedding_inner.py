"""h = V[token] and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from spd_fast.ops import embedding_inner
from tests import oracle
from tests.checks import assert_matches_oracle, normal, transposed


def make_inputs(shape: tuple[int, ...], vocabulary: int, components: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(vocabulary, shape, generator=generator),
        "V": normal(1, vocabulary, components),
    }


def runner(backend: str | None) -> Callable[[dict], dict]:
    return lambda t: {"h": embedding_inner(t["tokens"], t["V"], backend=backend)}


def truth(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"h": oracle.embedding_inner(t["tokens"], t["V"])}


SIZES = [((1,), 1, 1), ((40,), 7, 5), ((3, 4), 50, 6), ((), 5, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "vocabulary", "components"), SIZES)
def test_result_and_gradient_are_the_oracles(shape, vocabulary, components, dtype):
    assert_matches_oracle(
        runner(None), truth, make_inputs(shape, vocabulary, components),
        {"h": normal(2, *shape, components)}, dtype,
    )  # fmt: skip


def test_gradcheck():
    t = make_inputs((6,), 4, 3)
    assert torch.autograd.gradcheck(
        lambda V: embedding_inner(t["tokens"], V), t["V"].requires_grad_()
    )


def test_opcheck():
    t = make_inputs((6,), 4, 3)
    op = torch.ops.spd_fast.embedding_inner.default
    library.opcheck(op, (t["tokens"], t["V"].requires_grad_()))


def test_int32_tokens_and_any_layout_of_V():
    t = make_inputs((6,), 4, 3)
    got = embedding_inner(t["tokens"].int(), transposed(t["V"]))
    assert torch.equal(got, t["V"][t["tokens"]])


def test_no_tokens_give_no_rows():
    V = normal(1, 4, 3).requires_grad_()
    h = embedding_inner(torch.zeros(0, dtype=torch.int64), V)
    assert h.shape == (0, 3)
    (grad,) = torch.autograd.grad(h.sum(), V)
    assert not grad.any()


def test_every_backend_of_a_cpu_is_torchs_own(backend):
    t = make_inputs((6,), 4, 3)
    assert torch.equal(embedding_inner(t["tokens"], t["V"], backend=backend), t["V"][t["tokens"]])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"tokens are torch.float32, need int64 or int32"):
        embedding_inner(torch.zeros(3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"V is \(4,\), need \[vocabulary, C\]"):
        embedding_inner(torch.zeros(3, dtype=torch.int64), torch.zeros(4))
    with pytest.raises(IndexError):
        embedding_inner(torch.tensor([4]), torch.zeros(4, 2))
