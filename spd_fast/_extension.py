"""The compiled module `spd_fast._C`, if this installation has one."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # The extension links against torch's libraries, which importing torch makes findable.
    import torch  # noqa: F401

    from spd_fast.ops._fused import DIFFERENTIABLE, PRIMITIVES

    advice = "see Install in the README"
    try:
        extension = importlib.import_module("spd_fast._C")
    except ModuleNotFoundError:
        return None, f"the C++ extension spd_fast._C is not installed; {advice}"
    except ImportError as error:
        return None, f"the C++ extension spd_fast._C cannot be imported: {error}"
    wanted = (*PRIMITIVES, *DIFFERENTIABLE, "sparse_features")
    if missing := [name for name in wanted if not hasattr(extension, name)]:
        reason = f"is older than this spd_fast: it lacks {missing[0]}; build it again"
        return None, f"the C++ extension spd_fast._C {reason}, {advice}"
    return extension, None


def module() -> ModuleType | None:
    """The extension, or None; imported at the first call, not with spd_fast."""
    return _load()[0]


def keep_freed_memory() -> None:
    """Let this process keep what it frees instead of faulting it in again every step.

    Process-wide (mallopt), hence for programs to call, not for a library; nothing without the
    extension.
    """
    if (extension := module()) is not None:
        extension.keep_freed_memory()


def unavailable_reason() -> str | None:
    """Why `module()` is None; None where the extension works."""
    return _load()[1]
