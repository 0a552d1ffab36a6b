"""DecomposedModel: options that are refused when it is made."""

from __future__ import annotations

import pytest

from spd_fast import backends
from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel
from tests.toys import SITES, Net


def test_a_number_as_hidden_widths_is_an_error():
    with pytest.raises(UserError, match=r"ci_hidden lists hidden widths, .* got 16"):
        DecomposedModel(Net(), SITES, ci_hidden=16)


def test_hidden_widths_may_come_from_anything_that_lists_them():
    model = DecomposedModel(Net(), SITES, ci_hidden=range(2, 4))
    assert model.options["ci_hidden"] == [2, 3]


def test_an_unknown_backend_is_an_error():
    with pytest.raises(UserError, match="unknown backend 'tritn'; nearest: 'triton'"):
        DecomposedModel(Net(), SITES, backend="tritn")


def test_a_backend_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda _: "no such device")
    with pytest.raises(
        UserError, match=r"'triton' cannot run here: no such .*; use backend 'auto'"
    ):
        DecomposedModel(Net(), SITES, backend="triton")


def test_a_backend_of_another_device_than_the_targets_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda _: None)
    with pytest.raises(UserError, match="'triton' computes on cuda tensors, got cpu"):
        DecomposedModel(Net(), SITES, backend="triton")
