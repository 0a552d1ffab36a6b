"""The 2× rule in bf16, by norms: near a sigmoid's kink a rounded logit falls on either side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.checks import Run, evaluate

__all__ = ["assert_right_in_bf16"]

# Half a step of bf16: what rounding alone does to a result.
FLOOR = 2**-9


def assert_right_in_bf16(
    run: Run, reference: Run, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> None:
    """Every output and gradient of ``run`` in bf16 is at most twice as far from the float64
    reference as the reference in bf16 is."""

    def to(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}

    inputs, grads = to(inputs, torch.bfloat16), to(grads, torch.bfloat16)
    got, eager = evaluate(run, inputs, grads), evaluate(reference, inputs, grads)
    truth = evaluate(reference, to(inputs, torch.float64), to(grads, torch.float64))
    for name, true in truth.items():
        errors = [((t.double() - true).norm() / true.norm()).item()
                  for t in (got[name], eager[name])]  # fmt: skip
        allowed = 2 * errors[1] + FLOOR
        assert errors[0] <= allowed, f"{name}: {errors[0]:.2e} > {allowed:.2e}"
