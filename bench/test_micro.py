"""Micro-benchmarks of single operations: `make bench-micro`.

Outside tests/, so that plain `pytest` does not collect them: no timing in tests.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.problems import prepare, unavailable_reason
from bench.registry import OPERATIONS, OperationWorkload, Shape

# Cache-sized, tall and wide sites, as in the toy targets and their larger kin.
SHAPES = {
    "small": Shape(4096, 5, 2, 20),
    "medium": Shape(4096, 40, 10, 200),
    "large": Shape(1024, 512, 512, 1024),
}


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(
    benchmark: Any, operation: str, shape: str, backward: bool, provider: str
) -> None:
    if reason := unavailable_reason(provider):
        pytest.skip(reason)
    workload = OperationWorkload(
        operation, operation=operation, shape=SHAPES[shape], backward=backward
    )
    benchmark.group = f"{operation} {shape} {'forward+backward' if backward else 'forward'}"
    benchmark(prepare(workload, provider).call)
