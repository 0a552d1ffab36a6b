"""The masked embedding in Triton, every regime, against one-hot rows."""

from __future__ import annotations

import pytest
import torch

from tests.checks import assert_matches_oracle
from tests.ops import test_component_embedding as cases
from tests.ops.test_component_linear import FULL, GIVEN, incoming

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("given_inner", [False, True])
@pytest.mark.parametrize("kind", [FULL, GIVEN], ids=["full", "given"])
def test_output_and_gradients_are_the_oracles(kind, given_inner, regime):
    assert_matches_oracle(
        cases.runner(kind, "triton", given_inner), cases.truth(kind), cases.make_inputs(kind),
        incoming(), torch.float32,
    )  # fmt: skip
