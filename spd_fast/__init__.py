"""spd_fast: fast Stochastic Parameter Decomposition of PyTorch networks.

Names load on first use, so that ``import spd_fast`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "train.config",
    "DecomposedModel": "model",
    "Stochastic": "model",
    "CIMask": "model",
    "Ones": "model",
    "Given": "model",
    "Adversarial": "model",
    "Trainer": "train",
    "UserError": "errors",
    "make_key": "ops",
}
_SUBMODULES = (
    "backends", "data", "evaluate", "losses", "model", "nn", "ops", "report", "targets", "train",
)  # fmt: skip

__all__ = ["__version__", *_HOME, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"spd_fast.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"spd_fast.{name}")
    raise AttributeError(f"module 'spd_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
