"""Whether the compiled module can be used, and what is said where it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spd_fast import _extension


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    _extension._load.cache_clear()
    yield
    _extension._load.cache_clear()


def importing(monkeypatch: pytest.MonkeyPatch, found: Callable[[], Any]) -> None:
    real = importlib.import_module

    def import_module(name: str, *rest: Any) -> ModuleType:
        return found() if name == "spd_fast._C" else real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)


def fails(error: Exception) -> Callable[[], Any]:
    def found() -> Any:
        raise error

    return found


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (fails(ModuleNotFoundError("no")), "_C is not installed; see Install in the README"),
        (fails(ImportError("undefined symbol: x")), "cannot be imported: undefined symbol: x"),
        (SimpleNamespace, "is older than this spd_fast: it lacks gate_forward; build it again"),
    ],
)
def test_an_unusable_extension_is_none_with_a_reason(monkeypatch, found, reason):
    importing(monkeypatch, found)
    assert _extension.module() is None
    assert reason in _extension.unavailable_reason()


def test_memory_is_kept_by_the_extension_alone(monkeypatch):
    importing(monkeypatch, fails(ModuleNotFoundError("no")))
    _extension.keep_freed_memory()
