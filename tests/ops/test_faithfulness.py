"""‖W − (V U)ᵀ‖² of one site."""

from __future__ import annotations

import pytest
import torch
from torch import library

from spd_fast import UserError
from spd_fast.ops import _fused, faithfulness, weight_delta
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal
from tests.conftest import needs_extension


def make_inputs(d_in: int, components: int, d_out: int) -> dict[str, torch.Tensor]:
    return {
        "V": normal(1, d_in, components),
        "U": normal(2, components, d_out),
        "weight": normal(3, d_out, d_in),
    }


def runner(backend: str):
    return lambda t: {"loss": faithfulness(t["V"], t["U"], t["weight"], backend=backend)}


def truth(t):
    return {"loss": oracle.faithfulness(t["V"], t["U"], t["weight"])}


GRAD = {"loss": torch.tensor(1.7, dtype=torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 3), (5, 20, 2), (13, 7, 11)])
def test_value_and_gradients_are_the_oracles(shape, dtype, backend):
    assert_matches_oracle(runner(backend), truth, make_inputs(*shape), GRAD, dtype)


def test_gradcheck(backend):
    t = make_inputs(4, 3, 2)
    inputs = (t["V"].requires_grad_(), t["U"].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda V, U: faithfulness(V, U, t["weight"], backend=backend), inputs
    )


def test_exact_factors_lose_nothing(backend):
    V, U = torch.eye(4), normal(1, 4, 3).float()
    assert faithfulness(V, U, U.T, backend=backend).item() == 0


def test_weight_delta_is_what_the_factors_leave_over():
    t = make_inputs(5, 2, 3)
    delta = weight_delta(t["V"], t["U"], t["weight"])
    expected = [[t["weight"][o, i] - t["V"][i] @ t["U"][:, o] for i in range(5)] for o in range(3)]
    torch.testing.assert_close(delta, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    assert delta.shape == (3, 5)


@needs_extension
def test_second_derivatives_are_refused_by_the_kernels():
    t = make_inputs(5, 4, 3)
    V = t["V"].requires_grad_()
    loss = faithfulness(V, t["U"], t["weight"], backend="cpu").square()
    (grad,) = torch.autograd.grad(loss, V, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout, backend):
    inputs = make_inputs(13, 7, 11)
    expected = evaluate(runner(backend), inputs, GRAD)
    got = evaluate(
        lambda t: runner(backend)({name: LAYOUTS[layout](v) for name, v in t.items()}), inputs, GRAD
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_expanded_weight_is_its_copy(backend):
    t = make_inputs(5, 4, 3)
    row = t["weight"][:1].expand(3, 5)
    torch.testing.assert_close(
        faithfulness(t["V"], t["U"], row, backend=backend),
        faithfulness(t["V"], t["U"], row.contiguous(), backend=backend),
    )


def test_inputs_are_not_written_to(backend):
    t = make_inputs(13, 7, 11)
    V, U = t["V"].requires_grad_(), t["U"].requires_grad_()
    faithfulness(V, U, t["weight"], backend=backend).backward()
    for name, value in make_inputs(13, 7, 11).items():
        assert torch.equal(t[name], value), name


def test_two_runs_are_bit_identical(backend):
    inputs = make_inputs(70, 90, 50)
    first, second = (evaluate(runner(backend), inputs, GRAD) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_meta_tensors_give_a_meta_scalar():
    t = {name: v.to("meta") for name, v in make_inputs(5, 4, 3).items()}
    loss = faithfulness(t["V"], t["U"], t["weight"])
    assert (loss.device.type, loss.shape) == ("meta", ())


def test_compiled_is_eager(backend):
    inputs = make_inputs(13, 7, 11)
    compiled = torch.compile(runner(backend), fullgraph=True, backend="aot_eager")
    got, expected = evaluate(compiled, inputs, GRAD), evaluate(runner(backend), inputs, GRAD)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_opcheck_of_the_operation():
    t = make_inputs(5, 4, 3)
    arguments = (t["V"].requires_grad_(), t["U"].requires_grad_(), t["weight"])
    library.opcheck(torch.ops.spd_fast.faithfulness.default, arguments)


@needs_extension
@pytest.mark.parametrize("layout", [torch.clone, *LAYOUTS.values()])
def test_opcheck_of_the_primitives(layout):
    _fused.load("cpu")
    arguments = tuple(layout(v) for v in make_inputs(5, 4, 3).values())
    library.opcheck(torch.ops.spd_fast.faithfulness_forward.default, arguments)
    backward = torch.ops.spd_fast.faithfulness_backward.default
    library.opcheck(backward, (GRAD["loss"], *arguments))


@needs_extension
def test_a_gradient_to_the_weight_is_refused_by_the_kernels():
    t = make_inputs(5, 4, 3)
    weight = t["weight"].requires_grad_()
    with pytest.raises(
        UserError, match="does not support this faithfulness: it computes no gradient of the weight"
    ):
        faithfulness(t["V"], t["U"], weight, backend="cpu")


def test_the_reference_gives_the_weight_its_gradient():
    t = make_inputs(5, 4, 3)
    weight = t["weight"].requires_grad_()
    faithfulness(t["V"], t["U"], weight, backend="reference").backward()
    torch.testing.assert_close(weight.grad, 2 * weight_delta(t["V"], t["U"], t["weight"]).detach())


@pytest.mark.parametrize(
    "shapes",
    [((5, 4), (3, 2), (2, 5)), ((5, 4), (4, 2), (5, 2)), ((5,), (4, 2), (2, 5))],
)
def test_shapes_that_do_not_fit_are_named(shapes, backend):
    V, U, weight = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError) as raised:
        faithfulness(V, U, weight, backend=backend)
    assert f"V {shapes[0]}, U {shapes[1]} and weight {shapes[2]} do not fit" in str(raised.value)
