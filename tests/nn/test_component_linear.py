"""The drop-in layer against the authors' formula, and in place of theirs."""

from __future__ import annotations

import pytest
import torch

from spd_fast.nn import ComponentLinear
from spd_fast.ops import MaskRecipe, RandomSource, make_key
from tests import oracle
from tests.checks import assert_matches_oracle, normal, unit

C, D_IN, D_OUT = 6, 5, 4


def layer(bias=True, **options):
    return ComponentLinear(C, D_IN, D_OUT, normal(9, D_OUT) if bias else None, **options)


def test_parameters_have_the_authors_names_and_shapes():
    made = layer()
    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == {
        "V": (D_IN, C), "U": (C, D_OUT),
    }  # fmt: skip
    assert set(made.state_dict()) == {"V", "U", "bias"}
    assert set(layer(bias=False).state_dict()) == {"V", "U"}


def test_parameters_start_with_the_authors_variances():
    torch.manual_seed(0)
    made = ComponentLinear(300, 200, 100)
    torch.testing.assert_close(made.V.var().item() * 200, 1.0, rtol=0.03, atol=0)
    torch.testing.assert_close(made.U.var().item() * 300, 1.0, rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_authors_formula(backend, dtype, delta, bias):
    inputs = {
        "x": normal(1, 7, D_IN), "V": normal(2, D_IN, C), "U": normal(3, C, D_OUT),
        "mask": unit(4, 7, C), "delta": normal(5, D_OUT, D_IN), "delta_mask": unit(6, 7),
    }  # fmt: skip

    def run(given):
        made = layer(bias, backend=backend).to(given["x"].dtype)
        pair = (given["delta"], given["delta_mask"]) if delta else None
        with torch.nn.utils.stateless._reparametrize_module(
            made, {"V": given["V"], "U": given["U"]}
        ):
            return {"y": made(given["x"], given["mask"], pair)}

    def truth(given):
        rows = []
        for n in range(7):
            y = ((given["x"][n] @ given["V"]) * given["mask"][n]) @ given["U"]
            if delta:
                y = y + given["delta_mask"][n] * (given["delta"] @ given["x"][n])
            rows.append(y + normal(9, D_OUT).to(y) if bias else y)
        return {"y": torch.stack(rows)}

    assert_matches_oracle(run, truth, inputs, {"y": normal(7, 7, D_OUT)}, dtype)


def test_without_a_mask_it_is_the_sum_of_the_components():
    made = layer().double()
    x = normal(1, 2, 3, D_IN)
    torch.testing.assert_close(made(x), x @ made.weight.T + made.bias)
    torch.testing.assert_close(made.get_component_acts(x), x @ made.V)


def test_a_mask_may_be_boolean_and_broadcast():
    made, x = layer(False).double(), normal(1, 2, 3, D_IN)
    mask = unit(2, C) > 0.5
    expected = ((x @ made.V) * mask) @ made.U
    torch.testing.assert_close(made(x, mask), expected)


def test_a_mask_may_be_a_recipe():
    made, x, g = layer(False).double(), normal(1, 3, D_IN), unit(2, 3, C)
    recipe = MaskRecipe(g, RandomSource(make_key(1, 2), 3, 4))
    u = oracle.uniforms(1, 2, 3, 4, range(3), range(C))
    torch.testing.assert_close(made(x, recipe), ((x @ made.V) * (g + (1 - g) * u)) @ made.U)


def test_neither_input_is_written_to():
    made, x, mask = layer().double(), normal(1, 3, D_IN), unit(2, 3, C)
    before = x.clone(), mask.clone()
    made(x, mask).sum().backward()
    assert torch.equal(x, before[0])
    assert torch.equal(mask, before[1])


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"mask is \(3, 6\), need \(3, 5\)"):
        ComponentLinear(5, 8, 4)(torch.ones(3, 8), torch.ones(3, 6))


def test_a_delta_of_another_shape_is_an_error():
    made, x = layer().double(), normal(1, 3, D_IN)
    with pytest.raises(ValueError, match=r"is \(5, 4\) and \(3,\), need \(4, 5\) and \(3,\)"):
        made(x, None, (normal(2, D_IN, D_OUT), unit(3, 3)))


def test_a_layer_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="must be at least 1, got 0, 5 and 4"):
        ComponentLinear(0, 5, 4)
