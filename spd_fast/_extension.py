"""The compiled extension, if it is there."""

from __future__ import annotations

from types import ModuleType


def unavailable_reason() -> str | None:
    return "not built"


def module() -> ModuleType:
    raise RuntimeError("not built")
