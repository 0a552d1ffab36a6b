"""The workloads that are measured, and the flops that they are credited with."""

from __future__ import annotations

import pytest
import torch

from bench.problems import prepare, site_tensors
from bench.products import bare_products, flops, record, required, site_flops
from bench.registry import (
    CPU,
    GPU,
    OPERATIONS,
    Bar,
    OperationWorkload,
    Shape,
    StepWorkload,
    select,
)
from bench.run import _step_products
from spd_fast.experiments.recipes import recipes

SHAPE = Shape(N=7, d_in=3, d_out=5, C=11, hidden=2)


def test_names_are_keys_and_point_at_what_exists() -> None:
    for name, workload in (CPU | GPU).items():
        assert workload.name == name
        if isinstance(workload, StepWorkload):
            assert workload.experiment in recipes()
        else:
            assert isinstance(workload, OperationWorkload)
            assert workload.operation in OPERATIONS
    assert not set(CPU) & set(GPU)


def test_every_operation_is_measured() -> None:
    measured = {w.operation for w in CPU.values() if isinstance(w, OperationWorkload)}
    assert measured == set(OPERATIONS)


def test_steps_have_the_batch_size_of_the_recipe() -> None:
    rows = {n: w.rows for n, w in CPU.items() if isinstance(w, StepWorkload)}
    assert rows == {
        "tms_5-2": 4096, "tms_40-10": 4096, "resid_mlp1": 2048, "resid_mlp2": 2048,
        "resid_mlp3": 2048,
    }  # fmt: skip


def test_bars_know_their_direction() -> None:
    assert Bar("speedup", 8).met(9)
    assert not Bar("speedup", 8).met(7)
    assert Bar("times_products", 1.6).met(1.5)
    assert not Bar("times_products", 1.6).met(1.7)


def test_small_workloads_carry_no_bars_of_the_true_size() -> None:
    assert not any(w.small().bars or w.small().authors_ms for w in CPU.values())


def test_an_unknown_workload_is_named_in_the_error() -> None:
    with pytest.raises(SystemExit, match="tms_9"):
        select(["tms_9"], CPU)


def test_required_flops_against_a_count_by_hand() -> None:
    # x V, h̄ Vᵀ, xᵀ h̄: 7 · 3 · 11 multiplications each; a U, ȳ Uᵀ, aᵀ ȳ: 7 · 11 · 5.
    layer = OperationWorkload("layer", operation="layer", shape=SHAPE)
    by_hand = 2 * 3 * (7 * 3 * 11) + 2 * 3 * (7 * 11 * 5)
    assert flops(required(layer)) == site_flops(SHAPE) == by_hand == 3696


def test_flops_with_the_original_weight_against_a_count_by_hand() -> None:
    # x Wᵀ and ȳ W: 7 · 3 · 5 multiplications each.
    assert site_flops(SHAPE, weight=True) == 3696 + 2 * 2 * (7 * 3 * 5)
    assert site_flops(SHAPE, weight=True, backward=False) == 1232 + 2 * (7 * 3 * 5)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_reference_executes_the_required_products_and_no_others(
    operation: str, backward: bool
) -> None:
    workload = OperationWorkload("w", operation=operation, shape=SHAPE, backward=backward)
    executed = record(prepare(workload, "reference").call)
    assert flops(executed) == flops(required(workload))
    assert len(executed) == len(required(workload))


def test_a_step_requires_no_product_of_the_streams_width_and_all_rows() -> None:
    rows, width = 16, 1000
    products = _step_products(StepWorkload("resid_mlp1", experiment="resid_mlp1", batch=rows))
    assert any(width in (p.m, p.k, p.n) for p in products)
    assert not any(rows in (p.m, p.k, p.n) and width in (p.m, p.k, p.n) for p in products)


def test_bare_products_run() -> None:
    products = required(OperationWorkload("layer", operation="layer", shape=SHAPE))
    bare_products(products, torch.float32)()


def test_tensors_are_the_same_every_time_and_far_from_kinks() -> None:
    first = site_tensors(SHAPE, torch.float32, avoid_kinks=True)
    second = site_tensors(SHAPE, torch.float32, avoid_kinks=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
