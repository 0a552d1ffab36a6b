"""Batches of sparse features: their distribution, and that they are a function of the step."""

from __future__ import annotations

import pytest
import torch

from spd_fast import _extension
from spd_fast.targets import SparseFeatures
from tests.conftest import needs_extension


def data(**changes):
    options = {
        "features": 6, "probability": 0.05, "low": -1.0, "high": 1.0, "batch_size": 20_000,
        "seed": 0, "stream": "target",
    }  # fmt: skip
    return SparseFeatures(**(options | changes))


def test_shape_and_dtype():
    x = data(batch_size=7)(0)
    assert x.shape == (7, 6)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 1.0])
def test_each_feature_is_present_with_its_probability(probability):
    present = (data(probability=probability)(0) != 0).double().mean(dim=0)
    spread = (probability * (1 - probability) / 20_000) ** 0.5
    assert ((present - probability).abs() <= 5 * spread).all()


def test_features_are_present_independently():
    present = (data(probability=0.5)(0) != 0).double()
    both = (present.T @ present) / 20_000
    off = both[~torch.eye(6, dtype=torch.bool)]
    assert (off - 0.25).abs().max() < 5 * (0.25 * 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_values_are_uniform_between_low_and_high(low, high):
    x = data(probability=1.0, low=low, high=high)(0)
    assert low <= x.min() < low + 0.01
    assert high - 0.01 < x.max() < high
    assert x.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    assert x.var().item() == pytest.approx((high - low) ** 2 / 12, rel=0.02)


def test_a_batch_is_a_function_of_its_step():
    one, other = data(batch_size=9), data(batch_size=9)
    other(5)
    assert torch.equal(one(3), other(3))


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"stream": "decompose"}, {"stream": "evaluate"}, {"step": 1}]
)
def test_another_seed_stream_or_step_is_another_batch(changes):
    step = changes.pop("step", 0)
    assert not torch.equal(data(probability=1.0)(0), data(probability=1.0, **changes)(step))


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data()(0)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("module", [_extension.module, lambda: None])
def test_it_is_float32_whatever_the_default(module, monkeypatch):
    monkeypatch.setattr(_extension, "module", module)
    expected, before = data()(0), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = data()(0)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("features", "batch_size", "probability", "low", "high"),
    [(5, 1024, 0.05, 0.0, 1.0), (7, 89, 0.3, -1.0, 1.0), (1, 1, 1.0, -2.5, 0.3)],
)
def test_the_extension_draws_the_bits_of_torch(
    isa, features, batch_size, probability, low, high, monkeypatch
):
    monkeypatch.setenv("SPD_FAST_CPU_ISA", isa)
    made = data(
        features=features, batch_size=batch_size, probability=probability, low=low, high=high
    )
    for step in range(3):
        try:
            ours = made(step)
        except RuntimeError:
            pytest.skip(f"this machine has no {isa}")
        with monkeypatch.context() as without:
            without.setattr(_extension, "module", lambda: None)
            theirs = made(step)
        # As integers: a zero's sign counts.
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
