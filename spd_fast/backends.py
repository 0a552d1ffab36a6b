"""Who computes an operation: names, availability and the choice for one call.

The name of an operation fixes the mathematics; the backend only decides who computes it.
``auto`` takes the fastest backend that supports the case and says so once where it has to
fall back; an explicit choice never falls back, it raises.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from spd_fast.errors import UserError, nearest

__all__ = ["BACKENDS", "check_backend", "name_for", "resolve", "unavailable_reason"]

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SPD_FAST_BACKEND"

# Fastest first: what ``auto`` tries on each kind of device.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# The device whose tensors each backend computes on.
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


_F = TypeVar("_F", bound=Callable)


def constant_when_compiled(function: _F) -> _F:
    """Let torch.compile call ``function`` while tracing and take its answer as a constant.

    The mark that torch.compiler.assume_constant_result sets, without importing the compiler:
    that would double the time of importing the operations.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot run in this process, or None if it can."""
    # torch.compile takes the answer as a constant: it cannot trace the imports behind it.
    return _find_reason(backend)


@functools.cache
def _find_reason(backend: str) -> str | None:
    if backend in ("auto", "reference"):
        return None
    if backend == "cpu":
        from spd_fast import _extension

        return _extension.unavailable_reason()
    if backend == "triton":
        if not sys.platform.startswith("linux"):
            return "Triton runs on Linux only"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return None
    if backend == "cuda":
        return "this version has no CUDA kernels yet"
    raise UserError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def check_backend(backend: str | None, device: torch.device) -> str:
    """Normalise a requested backend for ``device``; None means the environment, then ``auto``.

    Raises:
        UserError: unknown name, unavailable here, or made for another device.
    """
    backend = backend or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; nearest: {nearest(backend, BACKENDS)}")
    if backend in ("auto", "reference"):
        return backend
    if reason := unavailable_reason(backend):
        raise UserError(f"backend {backend!r} cannot run here: {reason}; use backend 'auto'")
    if _DEVICE_OF[backend] != device.type:
        raise UserError(
            f"backend {backend!r} computes on {_DEVICE_OF[backend]} tensors, got {device.type}"
        )
    return backend


def resolve(
    backend: str | None,
    device: torch.device,
    operation: str,
    unsupported: Callable[[str], str | None],
) -> str:
    """The backend that computes one call of ``operation`` on ``device``.

    ``unsupported(backend)`` names the reason why that backend does not cover this case, or None.
    """
    backend = check_backend(backend, device)
    if backend != "auto":
        if backend != "reference" and (reason := unsupported(backend)):
            raise UserError(f"backend {backend!r} does not support this {operation}: {reason}")
        return backend
    skipped: list[str] = []
    for candidate in _ORDER.get(device.type, ("reference",)):
        if candidate == "reference":
            break
        if reason := unavailable_reason(candidate) or unsupported(candidate):
            skipped.append(f"{candidate}: {reason}")
            continue
        return candidate
    if skipped:
        _say_once(operation, "; ".join(skipped))
    return "reference"


@functools.cache
def _say_once(operation: str, reason: str) -> None:
    # Under torch.compile the reference is what the user wants to trace: nothing to say there.
    if not torch.compiler.is_compiling():
        warnings.warn(f"{operation} runs on the reference backend ({reason})", stacklevel=4)


def name_for(backend: str | None, device: torch.device) -> str:
    """What ``backend`` comes to on ``device`` for cases that every backend supports."""
    return resolve(backend, device, "run", lambda _: None)
