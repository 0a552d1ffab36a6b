"""What is measured: operations, workloads, and the bars that they are held to.

A new operation is one line in ``OPERATIONS``; the single operations, ``bench.verify`` and the
micro-benchmarks take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from spd_fast import ops

__all__ = [
    "CPU",
    "GPU",
    "OPERATIONS",
    "Bar",
    "Operation",
    "OperationWorkload",
    "Shape",
    "StepWorkload",
    "Workload",
    "select",
]

Tensors = Mapping[str, Tensor]
SIGMOID: ops.sigmoids.SigmoidKind = "paper"
PENALTY = ops.Penalty("lp", 2.0)


@dataclass(frozen=True)
class Shape:
    """N rows, W [d_out, d_in], C components, gates of one hidden layer."""

    N: int
    d_in: int
    d_out: int
    C: int
    hidden: int = 16

    def small(self) -> Shape:
        """Odd sizes that take milliseconds: what ``--quick`` and the tests compute."""
        return Shape(77, min(self.d_in, 24), min(self.d_out, 18), min(self.C, 33), 5)


@dataclass(frozen=True)
class Operation:
    """One operation on the tensors of a site (``bench.problems.site_tensors`` names them).

    Attributes:
        run: (tensors, backend) → named outputs.
        inputs: what is differentiated, separated by spaces.
        forward, backward: the required matrix products, separated by commas, in the letters of
            ``bench.products.DIMENSIONS``.
    """

    run: Callable[[Tensors, str], dict[str, Tensor]]
    inputs: str
    forward: str
    backward: str


def _gate(t: Tensors, backend: str, gate_eval: ops.GateEval = "exact") -> dict[str, Tensor]:
    weights = [t["w_in"].unsqueeze(1), t["w_out"].unsqueeze(2)]
    biases = [t["b_in"], t["b_out"].unsqueeze(1)]
    out = ops.gate(
        t["x"], t["V"], weights, biases, sigmoid=SIGMOID, penalty=PENALTY, gate_eval=gate_eval,
        backend=backend,
    )  # fmt: skip
    return out._asdict()


def _gate_interpolated(t: Tensors, backend: str) -> dict[str, Tensor]:
    return _gate(t, backend, "interpolated")


def _masked(t: Tensors, inner: Tensor, lower: Tensor, delta: bool, backend: str) -> Tensor:
    recipe = ops.MaskRecipe(lower, ops.RandomSource(t["key"]), delta or None)
    return ops.component_linear(
        t["x"], t["V"], t["U"], recipe, weight=t["weight"], bias=t["bias"], inner=inner,
        backend=backend,
    )  # fmt: skip


def _component_linear(t: Tensors, backend: str) -> dict[str, Tensor]:
    return {"y": _masked(t, t["inner"], t["lower"], False, backend)}


def _component_linear_delta(t: Tensors, backend: str) -> dict[str, Tensor]:
    return {"y": _masked(t, t["inner"], t["lower"], True, backend)}


def _faithfulness(t: Tensors, backend: str) -> dict[str, Tensor]:
    return {"error": ops.faithfulness(t["V"], t["U"], t["weight"], backend=backend)}


def _layer(t: Tensors, backend: str) -> dict[str, Tensor]:
    gate = _gate(t, backend)
    y = _masked(t, gate["inner"], gate["lower"], False, backend)
    return {"y": y, "penalty_sum": gate["penalty_sum"]}


def _layer_streamed(t: Tensors, backend: str) -> dict[str, Tensor]:
    weights = [t["w_in"].unsqueeze(1), t["w_out"].unsqueeze(2)]
    biases = [t["b_in"], t["b_out"].unsqueeze(1)]
    out = ops.layer(
        t["x"], t["V"], t["U"], weights, biases, ops.MaskRecipe(source=ops.RandomSource(t["key"])),
        sigmoid=SIGMOID, penalty=PENALTY, bias=t["bias"], backend=backend,
    )  # fmt: skip
    return out._asdict()


GATE = "x V w_in b_in w_out b_out"
OPERATIONS: dict[str, Operation] = {
    "gate": Operation(_gate, GATE, "x V", "xᵀ h̄, h̄ Vᵀ"),
    "gate_interpolated": Operation(_gate_interpolated, GATE, "x V", "xᵀ h̄, h̄ Vᵀ"),
    "component_linear": Operation(_component_linear, "inner U lower bias", "a U", "ȳ Uᵀ, aᵀ ȳ"),
    "component_linear_delta": Operation(
        _component_linear_delta, "x inner U lower bias", "a U, x Wᵀ", "ȳ Uᵀ, aᵀ ȳ, ȳ W"
    ),
    "faithfulness": Operation(_faithfulness, "V U", "V U", "Δᵀ Uᵀ, Vᵀ Δᵀ"),
    "layer": Operation(_layer, f"{GATE} U bias", "x V, a U", "ȳ Uᵀ, aᵀ ȳ, xᵀ h̄, h̄ Vᵀ"),
    "layer_streamed": Operation(
        _layer_streamed, f"{GATE} U bias", "x V, a U", "ȳ Uᵀ, aᵀ ȳ, xᵀ h̄, h̄ Vᵀ"
    ),
}

Quantity = Literal[
    "speedup",  # reference's median / this one's
    "speedup_over_compile",  # torch.compile(reference)'s median / this one's
    "speedup_over_authors",  # lower end of the authors' figure / this one's median
    "times_products",  # median / that of the bare matrix products
    "share_of_peak",  # required flops per second / the machine's matrix-product peak
    "extra_ratio",  # extra memory / the reference's
    "extra_mb",  # extra memory over resident inputs
    "peak_mb",  # highest resident memory of the whole process
]
AT_LEAST = ("speedup", "speedup_over_compile", "speedup_over_authors", "share_of_peak")


@dataclass(frozen=True)
class Bar:
    """A bound on one quantity of a fused backend."""

    quantity: Quantity
    bound: float

    def met(self, value: float) -> bool:
        if self.quantity in AT_LEAST:
            return value >= self.bound
        return value <= self.bound

    def __str__(self) -> str:
        return f"{self.quantity} {'≥' if self.quantity in AT_LEAST else '≤'} {self.bound:g}"


@dataclass(frozen=True)
class Workload:
    """Something to time and to weigh.

    Attributes:
        bars: of the fused backends.
        authors_ms, authors_mb: the authors' code on such a machine: constants to set a
            measurement against, not measured here.
        compiled: whether torch.compile takes part unless asked for: its compilation of a whole
            step takes minutes.
        interpolated: whether steps with interpolated gates are measured besides.
    """

    name: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    bars: tuple[Bar, ...] = ()
    authors_ms: tuple[float, float] | None = None
    authors_mb: float | None = None
    compiled: bool = False
    interpolated: bool = False

    def small(self) -> Workload:
        raise NotImplementedError


@dataclass(frozen=True)
class StepWorkload(Workload):
    """A whole training step of a shipped experiment (or a .yaml), at its own batch size."""

    experiment: str = ""
    batch: int | None = None

    @property
    def rows(self) -> int:
        """N: the batch size that is run."""
        # A GPU machine that measures operations alone need not hold what reads configurations.
        from spd_fast.experiments.recipes import recipe
        from spd_fast.train import parse_config

        return self.batch or parse_config(recipe(self.experiment)).batch_size

    def small(self) -> StepWorkload:
        """With a batch of 64, and without bars and figures: they are for the true size."""
        return replace(self, batch=64, bars=(), authors_ms=None, authors_mb=None)


@dataclass(frozen=True)
class OperationWorkload(Workload):
    """One of ``OPERATIONS``, forward alone or with its backward."""

    operation: str = ""
    shape: Shape = Shape(1, 1, 1, 1)
    backward: bool = True

    def small(self) -> OperationWorkload:
        """Of a small shape, and without bars: they are for the true size."""
        return replace(self, shape=self.shape.small(), bars=())


def _step(
    experiment: str,
    speedup: float,
    over_authors: float,
    authors_ms: tuple[float, float],
    peak_mb: float | None = None,
    authors_mb: float | None = None,
    compiled: bool = False,
    interpolated: bool = False,
) -> StepWorkload:
    bars = [Bar("speedup", speedup), Bar("speedup_over_authors", over_authors)]
    if peak_mb is not None:
        bars.append(Bar("peak_mb", peak_mb))
    return StepWorkload(
        experiment, bars=tuple(bars), authors_ms=authors_ms, authors_mb=authors_mb,
        compiled=compiled, interpolated=interpolated, experiment=experiment,
    )  # fmt: skip


CPU_SHAPE = Shape(4096, 512, 512, 1024)
CPU: dict[str, Workload] = {
    w.name: w
    for w in (
        _step("tms_5-2", 8, 10, (45, 60), compiled=True, interpolated=True),
        _step("tms_40-10", 12, 15, (590, 660), interpolated=True),
        _step("resid_mlp1", 2.5, 3.5, (220, 220)),
        _step("resid_mlp2", 4, 5, (1700, 1700)),
        _step("resid_mlp3", 12, 15, (21600, 21600), peak_mb=1024, authors_mb=8.8 * 1024),
        OperationWorkload(
            "layer-forward", operation="layer", shape=CPU_SHAPE, backward=False
        ),
        OperationWorkload(
            "layer", operation="layer", shape=CPU_SHAPE, compiled=True,
            bars=(Bar("times_products", 1.6), Bar("speedup", 5), Bar("extra_ratio", 1 / 8)),
        ),
        *(
            OperationWorkload(name, operation=name, shape=CPU_SHAPE)
            for name in OPERATIONS
            if name != "layer"
        ),
        # Exact beside interpolated gates where the gates are most of a site's work.
        *(
            OperationWorkload(
                f"{name}-tms_40-10", operation=name, shape=Shape(4096, 40, 10, 200)
            )
            for name in ("gate", "gate_interpolated")
        ),
    )
}  # fmt: skip

GPU: dict[str, Workload] = {
    w.name: w
    for w in (
        OperationWorkload(
            "gpu-layer", "cuda", torch.bfloat16, operation="layer", compiled=True,
            shape=Shape(8192, 768, 3072, 4096),
            bars=(Bar("speedup", 2.5), Bar("speedup_over_compile", 1.5), Bar("extra_ratio", 1 / 8)),
        ),
        OperationWorkload(
            "gpu-layer-large", "cuda", torch.bfloat16, operation="layer",
            shape=Shape(4096, 4096, 14336, 24576), bars=(Bar("share_of_peak", 0.6),),
        ),
        OperationWorkload(
            "gpu-layer-many", "cuda", torch.bfloat16, operation="layer",
            shape=Shape(4096, 1024, 1024, 131072), bars=(Bar("extra_mb", 4096),),
        ),
        StepWorkload(
            "gpu-tms_5-2", "cuda", bars=(Bar("speedup", 10),), experiment="tms_5-2", compiled=True
        ),
    )
}  # fmt: skip


def select(names: list[str], among: Mapping[str, Workload]) -> list[Workload]:
    """The named workloads, or all of them.

    Raises:
        SystemExit: an unknown name; lists the known ones.
    """
    if unknown := [n for n in names if n not in among]:
        raise SystemExit(f"unknown workload {unknown[0]!r}; known: {', '.join(among)}")
    return [w for n, w in among.items() if not names or n in names]
