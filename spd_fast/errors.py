"""The one exception that stands for a mistake of the user, not of the program."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["Diverged", "UserError", "nearest"]


class UserError(ValueError):
    """Bad input. The message is one clear line; the command line prints it and exits with 2."""


class Diverged(UserError):
    """Training reached a value that is not finite: the settings' fault, found underway."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """The closest of ``choices`` to ``name``, as a phrase for an error message."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=n, cutoff=0.4) or choices[:8]
    return ", ".join(repr(c) for c in close)
