"""The Triton masked sum and its backward, every regime and kind of mask, against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import component_linear
from tests.checks import LAYOUTS, assert_matches_oracle, normal
from tests.kernels.bf16 import assert_right_in_bf16
from tests.ops import test_component_linear as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("kind", cases.KINDS)
def test_output_and_gradients_are_the_oracles(kind, regime):
    kind = cases.KINDS[kind]
    assert_matches_oracle(
        cases.runner(kind, "triton"),
        cases.truth(kind),
        cases.make_inputs(kind),
        cases.incoming(),
        torch.float32,
    )


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (37, 19, 70, 67), (3, 2, 131, 5), (35, 16, 48, 32)]
)
@pytest.mark.parametrize("kind", [cases.FULL, cases.GIVEN], ids=["full", "given"])
def test_tile_edges_and_chunks_are_the_oracles(kind, shape, regime):
    assert_matches_oracle(
        cases.runner(kind, "triton"),
        cases.truth(kind),
        cases.make_inputs(kind, *shape),
        cases.incoming(shape[0], shape[-1]),
        torch.float32,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, regime):
    def run(t):
        laid_out = {k: LAYOUTS[layout](v) if v.ndim == 2 else v for k, v in t.items()}
        return cases.runner(cases.GIVEN, "triton")(laid_out)

    assert_matches_oracle(
        run,
        cases.truth(cases.GIVEN),
        cases.make_inputs(cases.GIVEN),
        cases.incoming(),
        torch.float32,
    )


@pytest.mark.parametrize("kind", ["stochastic", "stochastic_delta", "adversarial_delta_routed"])
def test_given_inner_activations_change_nothing(kind, regime):
    kind = cases.KINDS[kind]

    def run(t):
        return {
            "y": component_linear(
                t["x"], t["V"], t["U"], cases.recipe_of(kind, t),
                weight=t["weight"], bias=t["bias"], inner=t["x"] @ t["V"], backend="triton",
            )
        }  # fmt: skip

    assert_matches_oracle(
        run, cases.truth(kind), cases.make_inputs(kind), cases.incoming(), torch.float32
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (5, 3, 0, 2), (5, 3, 4, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape):
    t = {k: v.float() for k, v in cases.make_inputs(cases.KINDS["stochastic"], *shape).items()}
    V, U = t["V"].requires_grad_(), t["U"].requires_grad_()
    y = component_linear(
        t["x"], V, U, cases.recipe_of(cases.KINDS["stochastic"], t), backend="triton"
    )
    assert y.shape == (shape[0], shape[3])
    grads = torch.autograd.grad(y.sum(), [V, U])
    assert [grad.shape for grad in grads] == [V.shape, U.shape]
    assert not any(grad.any() for grad in grads)


def test_incoming_gradients_and_inputs_are_not_written(regime):
    t = {
        k: v.float() if v.is_floating_point() else v
        for k, v in cases.make_inputs(cases.GIVEN).items()
    }
    before = {k: v.clone() for k, v in t.items()}
    leaves = [t[k].requires_grad_() for k in ("x", "V", "U", "lower", "source", "delta")]
    y = cases.runner(cases.GIVEN, "triton")(t)["y"]
    grad = normal(3, *y.shape).float()
    kept = grad.clone()
    torch.autograd.grad(y, leaves, grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(t[k].detach(), before[k]) for k in t)


@pytest.mark.parametrize("kind", [cases.FULL, cases.GIVEN], ids=["full", "given"])
@pytest.mark.parametrize("sizes", [(19, 70, 35), (32, 48, 16)], ids=["ragged", "even"])
def test_errors_in_bf16_are_at_most_twice_the_eager_ones(sizes, kind, regime):
    assert_right_in_bf16(
        cases.runner(kind, "triton"), cases.runner(kind, "reference"),
        cases.make_inputs(kind, 37, *sizes), cases.incoming(37, sizes[-1]),
    )  # fmt: skip


def test_the_gradient_of_an_fp32_bias_is_not_rounded_to_the_bf16_of_x():
    kind = cases.KINDS["stochastic"]
    t = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in cases.make_inputs(kind).items()
    }
    t["bias"] = t["bias"].float().requires_grad_()
    y = cases.runner(kind, "triton")(t)["y"]
    grad = normal(3, *y.shape).bfloat16()
    (got,) = torch.autograd.grad(y, t["bias"], grad)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, grad.double().sum(0).float())
