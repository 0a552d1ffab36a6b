"""Gate and masked sum as one call on a GPU: two Triton operations, sharing h or making it again."""

from __future__ import annotations

import pytest
import torch

from tests.checks import assert_matches_oracle
from tests.ops import test_layer as cases

pytestmark = pytest.mark.usefixtures("triton_ops")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("delta", [None, True])
def test_results_and_gradients_are_the_oracles(delta, streamed, monkeypatch):
    from spd_fast.ops import component_linear

    inner = []

    def spy(*args, **options):
        inner.append(options["inner"])
        return component_linear(*args, **options)

    monkeypatch.setitem(cases.layer.__globals__, "STREAMED", 0 if streamed else 2**28)
    monkeypatch.setitem(cases.layer.__globals__, "component_linear", spy)
    mask = cases.recipe(delta, False, True, 23)
    assert_matches_oracle(
        cases.runner(mask, "triton"), cases.truth(mask), cases.make(23, 5, 7, 3, (4,)),
        cases.incoming(23, 7, 3), torch.float32,
    )  # fmt: skip
    assert (inner[0] is None) == streamed
