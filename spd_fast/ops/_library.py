"""The namespace ``spd_fast`` of torch's operators, in which every operation is registered.

Two kinds of entries:

- ``spd_fast::<op>``, *composite*: the reference mathematics, differentiated by torch's autograd.
- ``spd_fast::<op>_forward`` / ``_backward``: opaque primitives that a fused backend implements for
  its device; an ``autograd.Function`` in the operation's file joins the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import library

__all__ = ["LIBRARY", "composite", "primitive"]

LIBRARY = library.Library("spd_fast", "FRAGMENT")
F = TypeVar("F", bound=Callable)


def composite(schema: str) -> Callable[[F], F]:
    """Register the decorated function as the reference of the operation ``schema`` declares."""

    def register(function: F) -> F:
        LIBRARY.define(schema)
        LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")
        return function

    return register


def primitive(schema: str) -> Callable[[F], F]:
    """Declare an opaque primitive; the decorated function makes its fake (meta) outputs."""

    def register(fake: F) -> F:
        LIBRARY.define(schema)
        library.register_fake(
            f"spd_fast::{schema.partition('(')[0]}", fake, lib=LIBRARY, allow_override=False
        )
        return fake

    return register
