"""Every kernel with its signatures and shipped configurations: what the compile gate compiles.

Scalars are typed as the launchers' calls come out on contiguous inputs whose sizes are multiples of
16: unit strides and constants are compiled in, sizes are known to divide by 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spd_fast.kernels import (
    component_linear,
    divergence,
    embedding_inner,
    gate,
    importances,
    random,
)
from spd_fast.kernels.configs import CONFIGS, Config

# Operand class of a configuration set → (element type, precision of its products).
_OPERANDS = {
    "mma": (("bf16", "ieee"), ("fp32", "tf32")),
    "ieee": (("fp32", "ieee"),),
    **dict.fromkeys(("any", "wide", "wider", "widest"), (("bf16", "ieee"), ("fp32", "ieee"))),
}
_GATE_POINTERS = {"w_in", "b_in", "w_out", "b_out"}
_FP32_POINTERS = {
    "partial", "grad_sum", "delta", "d_bar", "norm_p", "norm_q", "scale", "loss", "table_bar",
}  # fmt: skip
_INT32_POINTERS = {"counts"}
_INT64_POINTERS = {"key", "order", "starts"}
_BYTE_POINTERS = {"routing"}
_PLAIN_INTS = {"draw", "site", "row_offset", "column", "tiles"}
_FLOATS = {"power", "eps", "threshold", "factor"}
_SCALARS = {"N", "C", "first", "count", "d_in", "d_out", "size", "width"}


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel, its constants, its element type and its configuration."""

    name: str
    kernel: Any
    element: str
    constants: dict[str, Any]
    config: Config
    default: bool = True  # whether the configuration is what ships
    gate: str = "fp32"  # element type of the gate's parameters

    def signature(self) -> tuple[dict[str, str], dict, dict]:
        """(types by name, constants by position, attributes by position) for ASTSource."""
        constants = {**self.constants, **self.config.blocks}
        types: dict[str, str] = {}
        values, attributes = {}, {}
        for position, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if parameter.is_constexpr or name.endswith("_col"):
                types[name] = "constexpr"
                values[(position,)] = constants[name] if parameter.is_constexpr else 1
                continue
            types[name] = self._type(name)
            if name in _SCALARS or types[name].startswith("*") or name.endswith("_row"):
                attributes[(position,)] = [["tt.divisibility", 16]]
        return types, values, attributes

    def _type(self, name: str) -> str:
        for names, kind in ((_FP32_POINTERS, "*fp32"), (_INT32_POINTERS, "*i32"),
                            (_INT64_POINTERS, "*i64"), (_BYTE_POINTERS, "*u8"),
                            (_GATE_POINTERS, f"*{self.gate}"),
                            (_FLOATS, "fp32"), (_PLAIN_INTS | _SCALARS, "i32")):  # fmt: skip
            if name in names:
                return kind
        return "i32" if name.endswith("_row") else f"*{self.element}"

    def __str__(self) -> str:
        flags = ",".join(f"{k.lower()}={int(v) if not isinstance(v, str) else v}"
                         for k, v in self.constants.items())  # fmt: skip
        return f"{self.element} {flags}" + (f",gate={self.gate}" if self.gate != "fp32" else "")


def _each(name: str, kernel: Any, operands: str, *constant_sets: dict[str, Any]) -> Iterator[Case]:
    """The default configuration in its main element type with every set of constants; each other
    combination with the last set, which is the heaviest."""
    main = _OPERANDS[operands][0], CONFIGS[name][operands][0]
    for (element, precision), config in itertools.product(
        _OPERANDS[operands], CONFIGS[name][operands]
    ):
        default = ((element, precision), config) == main
        for constants in constant_sets if default else constant_sets[-1:]:
            constants = dict(constants)
            if "PRECISION" in kernel.arg_names:
                constants["PRECISION"] = precision
            blocks = dict(config.blocks)
            if "BLOCK_K" in kernel.arg_names:
                blocks.setdefault("BLOCK_K", 16)
            yield Case(name, kernel, element, constants,
                       Config(blocks, config.num_warps, config.num_stages),
                       config is CONFIGS[name][operands][0])  # fmt: skip


_GATE = {"HIDDEN": 16, "SIGMOID": 1, "PENALTY": 1, "POWER": 2}
_GENERAL = {"HIDDEN": 16, "SIGMOID": 0, "PENALTY": 1, "POWER": 0}
_LINEAR = {"HIDDEN": 0, "SIGMOID": 0, "PENALTY": 2, "POWER": 0}
_DRAWN = {"LOWER": True, "SOURCE": 2, "DELTA": True, "ROUTING": True}
_PLAIN = {"LOWER": True, "SOURCE": 2, "DELTA": False, "ROUTING": False}
_GIVEN = {"LOWER": True, "SOURCE": 1, "DELTA": True, "ROUTING": True}
_MODEL = {"WRITE_A": True, "WRITE_H": True, "WRITE_G": True, "WRITE_R": False, "WRITE_D": False}
_ADVERSARY = {**_MODEL, "WRITE_R": True, "WRITE_D": True}


def _of_bf16_gates() -> Iterator[Case]:
    """The shipped defaults for a whole model in bf16, its gates' parameters too."""
    for operands, product in (("mma", True), ("any", False)):
        config = CONFIGS["gate_forward"][operands][0]
        yield Case("gate_forward", gate.gate_forward_kernel, "bf16",
                   {**_GENERAL, "COUNT": True, "PRODUCT": product, "PRECISION": "ieee"},
                   config if product else config.without_product(), gate="bf16")  # fmt: skip
    config = CONFIGS["gate_backward"]["any"][0]
    constants = {**_GENERAL, "GRAD_INNER": True, "GRAD_LOWER": True, "PADDED": _GENERAL["HIDDEN"]}
    yield Case("gate_backward", gate.gate_backward_kernel, "bf16", constants, config, gate="bf16")


def cases() -> Iterator[Case]:
    """Every shipped configuration with the specialisations that weigh most."""
    linear = component_linear
    for operands, product in (("mma", True), ("ieee", True), ("any", False)):
        yield from _each(
            "gate_forward", gate.gate_forward_kernel, operands,
            {**_LINEAR, "COUNT": False, "PRODUCT": product},
            {**_GATE, "COUNT": False, "PRODUCT": product},
            {**_GENERAL, "COUNT": True, "PRODUCT": product},
        )  # fmt: skip
        yield from _each(
            "mask_forward", linear.mask_forward_kernel, operands,
            {**_PLAIN, "PRODUCT": product}, {**_DRAWN, "PRODUCT": product},
            {**_GIVEN, "PRODUCT": product},
        )  # fmt: skip
        products = {"PRODUCT_H": product, "PRODUCT_A": product}
        yield from _each(
            "mask_backward", linear.mask_backward_kernel, operands,
            {**_PLAIN, **products, **_MODEL}, {**_DRAWN, **products, **_MODEL},
            {**_GIVEN, **products, **_ADVERSARY},
        )  # fmt: skip
    both = {"GRAD_INNER": True, "GRAD_LOWER": True}
    for operands, hidden in (("any", 16), ("wide", 128), ("wider", 512), ("widest", 1024)):
        wide = {**both, "HIDDEN": hidden, "PADDED": hidden}
        narrow = ({**_LINEAR, **both, "PADDED": 1}, {**_GATE, **wide}) if hidden == 16 else ()
        yield from _each("gate_backward", gate.gate_backward_kernel, operands, *narrow,
                         {**_GENERAL, **wide})  # fmt: skip
    yield from _of_bf16_gates()
    for operands in ("mma", "ieee"):
        yield from _each(
            "small_forward", linear.small_forward_kernel, operands,
            {**_PLAIN, "PRODUCT": True, "BIAS": True, "BLOCK_O": 16},
            {**_DRAWN, "DELTA": 2, "PRODUCT": True, "BIAS": True, "BLOCK_O": 64},
            {**_DRAWN, "DELTA": 2, "PRODUCT": False, "BIAS": True, "BLOCK_O": 64},
        )  # fmt: skip
    scalar_gate = [
        {k: v for k, v in g.items() if k != "HIDDEN"} for g in (_LINEAR, _GATE, _GENERAL)
    ]
    yield from _each("importances", importances.importances_forward_kernel, "any", *scalar_gate)
    yield from _each("importances", importances.importances_backward_kernel, "any", *scalar_gate)
    yield from _each("embedding_backward", embedding_inner.embedding_backward_kernel, "any", {})
    yield from _each("squared_error", divergence.squared_error_kernel, "any", {})
    yield from _each("squared_error", divergence.squared_error_backward_kernel, "any", {})
    yield from _each("kl", divergence.kl_kernel, "any", {})
    yield from _each("kl", divergence.kl_backward_kernel, "any", {})
    tile, column = Config({"BLOCK_N": 32, "BLOCK_C": 64}), Config({"BLOCK_N": 256})
    yield Case("uniform", random.uniform_kernel, "fp32", {}, tile)
    yield Case("uniform_column", random.uniform_column_kernel, "fp32", {}, column)
