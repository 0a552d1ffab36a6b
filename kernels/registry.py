"""Every kernel with its signatures and shipped configurations: what the compile gate compiles.

Scalars are typed as the launchers' calls come out. On contiguous inputs unit strides and constants
are compiled in; that 16 divides a size or an address is known except where a case says otherwise,
and such a case has the configuration that the launchers take there (configs.by_divisibility).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from spd_fast.kernels import (
    component_linear,
    divergence,
    embedding_inner,
    gate,
    importances,
    random,
)
from spd_fast.kernels.configs import CONFIGS, Config, by_divisibility

# Operand class of a configuration set → (element type, precision of its products).
_OPERANDS = {
    "mma": (("bf16", "ieee"), ("fp32", "tf32")),
    "ieee": (("fp32", "ieee"),),
    "any": (("bf16", "ieee"), ("fp32", "ieee")),
}
_GATE_POINTERS = {"w_in", "b_in", "w_out", "b_out"}
_FP32_POINTERS = {
    "partial", "grad_sum", "delta", "d_bar", "norm_p", "norm_q", "scale", "loss", "table_bar",
}  # fmt: skip
_INT32_POINTERS = {"counts"}
_INT64_POINTERS = {"key", "ordered", "order", "ends"}
_BYTE_POINTERS = {"routing"}
# Kernels whose launchers hand over matrices with columns side by side only.
_UNIT_COLUMNS = {"gate_backward"}
_PLAIN_INTS = {"draw", "site", "row_offset", "column", "tiles"}
_FLOATS = {"power", "eps", "threshold", "factor"}
_SCALARS = {"N", "C", "first", "count", "d_in", "d_out", "size", "width"}
# Rows of a matrix are as long as a size: its stride is a multiple of 16 where the size is.
_COMPONENTS = {"C", "count", "size", "width", "v_row", "l_row", "s_row", "i_row", "in_row",
               "gi_row", "gl_row", "ab_row", "hb_row", "g_row", "q_row", "p_row"}  # fmt: skip
_FEATURES = {"d_in", "d_out", "x_row", "w_row", "y_row", "u_row"}
# What a case does not know to be a multiple of 16. "views": nothing, also not that addresses are,
# nor how far apart columns are. (first is a multiple of 128 wherever a launch begins.)
_ODD: dict[str, set[str]] = {
    "even": set(),
    "odd rows": {"N"},
    "odd components": _COMPONENTS,
    "odd features": _FEATURES,
    "odd": {"N"} | _COMPONENTS | _FEATURES,
    "views": {"N"} | _COMPONENTS | _FEATURES,
}


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
    sizes: str = "even"  # what is not known to be a multiple of 16
    full: bool = False  # left to the gate in full

    def assumption(self, name: str) -> int:
        """What parameter ``name`` is a multiple of by assumption, 1 if nothing is assumed; 0 for
        a constant one."""
        views = self.sizes == "views"
        if name.endswith("_col"):
            return 1 if views and self.name not in _UNIT_COLUMNS else 0
        if name.endswith("_row") or name in _SCALARS:
            return 1 if name in _ODD[self.sizes] else 16
        return 1 if views or name in _PLAIN_INTS | _FLOATS else 16

    def signature(self) -> tuple[dict[str, str], dict, dict]:
        """(types by name, constants by position, attributes by position) for ASTSource."""
        constants = {**self.constants, **self.config.blocks}
        types: dict[str, str] = {}
        values, attributes = {}, {}
        for position, parameter in enumerate(self.kernel.params):
            name = parameter.name
            assumed = 0 if parameter.is_constexpr else self.assumption(name)
            if assumed == 0:
                types[name] = "constexpr"
                values[(position,)] = constants[name] if parameter.is_constexpr else 1
                continue
            types[name] = self._type(name)
            if assumed == 16:
                attributes[(position,)] = [["tt.divisibility", 16]]
        return types, values, attributes

    def _type(self, name: str) -> str:
        for names, kind in ((_FP32_POINTERS, "*fp32"), (_INT32_POINTERS, "*i32"),
                            (_INT64_POINTERS, "*i64"), (_BYTE_POINTERS, "*u8"),
                            (_GATE_POINTERS, f"*{self.gate}"),
                            (_FLOATS, "fp32"), (_PLAIN_INTS | _SCALARS, "i32")):  # fmt: skip
            if name in names:
                return kind
        return "i32" if name.endswith(("_row", "_col")) else f"*{self.element}"

    def __str__(self) -> str:
        flags = ",".join(f"{k.lower()}={int(v) if not isinstance(v, str) else v}"
                         for k, v in self.constants.items())  # fmt: skip
        flags += f",gate={self.gate}" if self.gate != "fp32" else ""
        return f"{self.element} {flags}" + (f",sizes={self.sizes}" if self.sizes != "even" else "")


def _each(name: str, kernel: Any, operands: str, *constant_sets: dict[str, Any]) -> Iterator[Case]:
    """The default configuration in its main element type with every set of constants; each other
    combination with the last set, which is the heaviest. All of that again where sizes are odd, and
    the default where only some are, or nothing is known: of these the heaviest of the default with
    odd sizes, and with an odd number of rows, is not left to the full gate."""
    ragged = by_divisibility(name, operands, 1)
    for sizes, of_class in (("even", operands), ("odd", ragged)):
        main = _OPERANDS[operands][0], CONFIGS[name][of_class][0]
        for kind, config in itertools.product(_OPERANDS[operands], CONFIGS[name][of_class]):
            default = (kind, config) == main
            for constants in constant_sets if default else constant_sets[-1:]:
                heaviest = default and constants is constant_sets[-1]
                yield _case(name, kernel, kind, constants, config, config is main[1], sizes,
                            full=sizes == "odd" and not heaviest)  # fmt: skip
    for kind in _OPERANDS[operands]:
        usual = kind == _OPERANDS[operands][0]
        others = ["views"]
        if usual and "PRECISION" in kernel.arg_names:
            others += ["odd components", "odd features"]
        for sizes in others:
            config = CONFIGS[name][ragged][0]
            yield _case(name, kernel, kind, constant_sets[-1], config, True, sizes, full=True)
        for config in CONFIGS[name][operands] if ragged != operands else ():
            shipped = config is CONFIGS[name][operands][0]
            yield _case(name, kernel, kind, constant_sets[-1], config, shipped, "odd rows",
                        full=not (usual and shipped))  # fmt: skip


def _case(
    name: str, kernel: Any, kind: tuple[str, str], constants: dict[str, Any], config: Config,
    default: bool, sizes: str, *, full: bool,
) -> Case:  # fmt: skip
    element, precision = kind
    if "PRECISION" in kernel.arg_names:
        constants = {**constants, "PRECISION": precision}
    if "BLOCK_K" in kernel.arg_names and "BLOCK_K" not in config.blocks:
        config = config.without_product()
    return Case(name, kernel, element, constants, config, default, sizes=sizes, full=full)


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
    forward = {**_GENERAL, "COUNT": True}
    backward = {**_GENERAL, "GRAD_INNER": True, "GRAD_LOWER": True}
    for name, kernel, operands, constants in (
        ("gate_forward", gate.gate_forward_kernel, "mma", {**forward, "PRODUCT": True}),
        ("gate_forward", gate.gate_forward_kernel, "any", {**forward, "PRODUCT": False}),
        ("gate_backward", gate.gate_backward_kernel, "any", backward),
    ):
        ragged = by_divisibility(name, operands, 1)
        for sizes, of_class in (("even", operands), ("odd", ragged)):
            case = _case(name, kernel, ("bf16", "ieee"), constants, CONFIGS[name][of_class][0],
                         True, sizes, full=sizes == "odd")  # fmt: skip
            yield replace(case, gate="bf16")


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
    yield from _each(
        "gate_backward", gate.gate_backward_kernel, "any",
        {**_LINEAR, **both}, {**_GATE, **both}, {**_GENERAL, **both},
    )  # fmt: skip
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
    for sizes in ("even", "odd", "views"):
        full = sizes != "even"
        yield Case("uniform", random.uniform_kernel, "fp32", {}, tile, sizes=sizes, full=full)
        yield Case("uniform_column", random.uniform_column_kernel, "fp32", {}, column, sizes=sizes,
                   full=full)  # fmt: skip
