"""Faithfulness by the library's products, against the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.checks import LAYOUTS, assert_matches_oracle
from tests.ops import test_faithfulness as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 20, 2), (13, 7, 11)])
def test_value_and_gradients_are_the_oracles(shape):
    assert_matches_oracle(
        cases.runner("triton"), cases.truth, cases.make_inputs(*shape), cases.GRAD, torch.float32
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    assert_matches_oracle(
        lambda t: cases.runner("triton")({k: LAYOUTS[layout](v) for k, v in t.items()}),
        cases.truth, cases.make_inputs(6, 4, 5), cases.GRAD, torch.float32,
    )  # fmt: skip
