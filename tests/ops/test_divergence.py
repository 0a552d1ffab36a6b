"""MSE and KL divergences."""

from __future__ import annotations

import pytest
import torch
from torch import library

from spd_fast import UserError
from spd_fast.ops import divergence, kl_divergence, mse_divergence
from tests import oracle
from tests.checks import assert_matches_oracle, normal, strided, transposed

OPERATIONS = {"mse": (mse_divergence, oracle.mse), "kl": (kl_divergence, oracle.kl)}
kinds = pytest.mark.parametrize("kind", OPERATIONS)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (13, 11), (2, 3, 5)])
def test_value_and_gradients_are_the_oracles(kind, dtype, shape):
    ours, truth = OPERATIONS[kind]
    if kind == "kl" and shape[-1] == 1:
        # One class: zero for every input, nothing to compare relatively.
        assert ours(normal(1, *shape), normal(2, *shape)) == 0
        return
    assert_matches_oracle(
        lambda t: {"D": ours(t["prediction"], t["target"])},
        lambda t: {"D": truth(t["prediction"], t["target"])},
        {"prediction": normal(1, *shape), "target": normal(2, *shape)},
        {"D": torch.tensor(1.7)},
        dtype,
    )


@kinds
def test_gradcheck(kind):
    inputs = (normal(1, 4, 3).requires_grad_(), normal(2, 4, 3).requires_grad_())
    assert torch.autograd.gradcheck(OPERATIONS[kind][0], inputs)


@kinds
def test_opcheck(kind):
    op = getattr(torch.ops.spd_fast, f"{kind}_divergence").default
    library.opcheck(op, (normal(1, 4, 3).requires_grad_(), normal(2, 4, 3)))


@kinds
def test_equal_inputs_diverge_by_zero(kind):
    logits = normal(1, 4, 3)
    assert divergence(logits, logits.clone(), kind).item() == 0


@kinds
def test_memory_layout_does_not_matter(kind):
    prediction, target = normal(1, 6, 5), normal(2, 6, 5)
    expected = divergence(prediction, target, kind)
    torch.testing.assert_close(divergence(transposed(prediction), strided(target), kind), expected)


@kinds
def test_expanded_target_is_its_copy(kind):
    prediction, target = normal(1, 6, 5), normal(2, 1, 5).expand(6, 5)
    expected = divergence(prediction, target.contiguous(), kind)
    torch.testing.assert_close(divergence(prediction, target, kind), expected)


@kinds
def test_inputs_are_not_written_to(kind):
    prediction, target = normal(1, 6, 5).requires_grad_(), normal(2, 6, 5)
    divergence(prediction, target, kind).backward()
    assert torch.equal(prediction, normal(1, 6, 5))
    assert torch.equal(target, normal(2, 6, 5))


@kinds
def test_meta_tensors_give_a_meta_scalar(kind):
    logits = torch.empty(4, 3, device="meta")
    D = divergence(logits, logits, kind)
    assert (D.device.type, D.shape) == ("meta", ())


@kinds
def test_compiled_is_eager(kind):
    compiled = torch.compile(
        lambda p, t: divergence(p, t, kind), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda p, t: divergence(p, t, kind)):
        prediction = normal(1, 6, 5).requires_grad_()
        D = function(prediction, normal(2, 6, 5))
        results.append((D.detach(), *torch.autograd.grad(D, prediction)))
    torch.testing.assert_close(results[0], results[1])


def test_kl_over_no_positions_is_zero():
    prediction = torch.empty(0, 5, requires_grad=True)
    D = kl_divergence(prediction, torch.empty(0, 5))
    D.backward()
    assert D.item() == 0
    assert prediction.grad.shape == (0, 5)


def test_mse_over_nothing_is_not_a_number():
    assert mse_divergence(torch.empty(0, 5), torch.empty(0, 5)).isnan()


def test_kl_does_not_change_when_logits_shift():
    prediction, target = normal(1, 6, 5), normal(2, 6, 5)
    expected = kl_divergence(prediction, target)
    torch.testing.assert_close(kl_divergence(prediction + 1e3, target - 1e3), expected)


def test_kl_of_far_apart_logits_is_finite():
    prediction = torch.tensor([[1e4, -1e4]], requires_grad=True)
    D = kl_divergence(prediction, torch.tensor([[-1e4, 1e4]]))
    D.backward()
    assert D.item() == pytest.approx(2e4)
    assert prediction.grad.isfinite().all()


def test_kl_of_bfloat16_is_computed_in_float32():
    prediction, target = normal(1, 6, 50).bfloat16(), normal(2, 6, 50).bfloat16()
    D = kl_divergence(prediction, target)
    assert D.dtype == torch.float32
    torch.testing.assert_close(D, kl_divergence(prediction.float(), target.float()))


@kinds
def test_different_shapes_are_an_error_that_names_both(kind):
    with pytest.raises(ValueError, match=r"prediction \(4, 3\) and target \(4, 1\) differ"):
        divergence(torch.zeros(4, 3), torch.zeros(4, 1), kind)


def test_unknown_kind_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match="unknown divergence 'l2'; known: 'mse', 'kl'"):
        divergence(torch.zeros(1), torch.zeros(1), "l2")


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_a_backend_that_cannot_run_here_is_an_error(kind):
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    with pytest.raises(UserError, match="triton"):
        divergence(normal(0, 3, 4), normal(1, 3, 4), kind, backend="triton")
