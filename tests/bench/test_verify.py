"""A provider whose results are wrong is found, and gets no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import problems, registry
from bench.registry import CPU, OperationWorkload
from bench.run import measure_workload
from bench.verify import compare, first_results, shared_tensors, truth

LAYER = CPU["layer"].small()
EXACT = {"y": torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(8, 8)}
EAGER = {"y": EXACT["y"].float() * (1 + 1e-6)}


def test_the_error_of_eager_may_be_doubled_but_no_more() -> None:
    assert compare({"y": EXACT["y"].float() * (1 + 2e-6)}, EAGER, EXACT).right
    wrong = compare({"y": EXACT["y"].float() * (1 + 5e-6)}, EAGER, EXACT)
    assert not wrong.right
    assert wrong.failures[0].startswith("y: error")


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_one_wrong_number_is_enough(value: float) -> None:
    planted = EAGER["y"].clone()
    planted[3, 4] = value
    assert not compare({"y": planted}, EAGER, EXACT).right


def test_a_missing_tensor_is_wrong() -> None:
    assert "missing" in compare({}, EAGER, EXACT).failures[0]


@pytest.mark.parametrize("name", ["layer", "component_linear_delta", "faithfulness", "tms_5-2"])
def test_backends_are_right(name: str, backend: str) -> None:
    workload = CPU[name].small()
    tensors = shared_tensors(workload)
    eager = first_results(problems.prepare(workload, "reference", tensors=tensors))
    results = first_results(problems.prepare(workload, backend, tensors=tensors))
    verdict = compare(results, eager, truth(workload, tensors))
    assert verdict.right, verdict.failures


def test_a_step_is_checked_in_every_gradient() -> None:
    names = set(first_results(problems.prepare(CPU["tms_5-2"].small(), "reference")))
    assert {"loss_faithfulness", "grad_components.linear1.V"} <= names
    assert {"grad_ci_fns.linear2.layers.0.W", "grad_ci_fns.linear1.layers.2.b"} <= names


def test_no_time_for_a_provider_with_a_planted_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = registry.OPERATIONS["layer"].run

    def planted(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = run(tensors, "reference")
        return {**out, "y": out["y"] * 1.001} if backend == "broken" else out

    broken = replace(registry.OPERATIONS["layer"], run=planted)
    monkeypatch.setitem(registry.OPERATIONS, "layer", broken)
    assert isinstance(LAYER, OperationWorkload)
    results = measure_workload(LAYER, ["reference", "broken"], seconds=0.01, fewest=2)
    by_provider = {r.provider: r for r in results}
    assert by_provider["reference"].median is not None
    assert by_provider["broken"].median is None
    assert by_provider["broken"].status.startswith("WRONG grad_")


def test_a_provider_that_raises_leaves_the_others_their_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        if args[1] == "broken":
            raise RuntimeError("out of order")
        return prepare(*args, **kwargs)

    prepare = problems.prepare
    monkeypatch.setattr("bench.run.prepare", failing)
    results = measure_workload(LAYER, ["broken"], seconds=0.01, fewest=2)
    by_provider = {r.provider: r for r in results}
    assert "out of order" in by_provider["broken"].status
    assert by_provider["reference"].median is not None
