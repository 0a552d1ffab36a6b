"""Drop-in layers on the fused operations."""

from spd_fast.nn.component_linear import ComponentLinear

__all__ = ["ComponentLinear"]
