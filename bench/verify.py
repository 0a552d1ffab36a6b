"""Are the results that would be timed right?

    python -m bench.verify [NAME …] [--quick] [--providers P …]

The rule: against the reference in float64, from the same rounded inputs, the error of
every output and gradient is at most twice that of the eager reference in the same dtype. (That the
reference itself is right is what tests/oracle.py decides, independently.)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.problems import (
    INTERPOLATED,
    PROVIDERS,
    Problem,
    prepare,
    site_tensors,
    unavailable_reason,
)
from bench.registry import CPU, OPERATIONS, OperationWorkload, Workload, select
from spd_fast import ops

__all__ = ["Verdict", "compare", "error", "first_results", "shared_tensors", "truth", "yardstick"]

# Roundings of the largest entry that a result may be off whatever the eager error is.
ROUNDINGS = {torch.bfloat16: 0.5, torch.float16: 0.5}
ROUNDINGS_DEFAULT = 8.0


@dataclass(frozen=True)
class Verdict:
    """Outcome for one provider.

    Attributes:
        failures: one line per wrong tensor, worst first. worst: name of the tensor whose error is
            largest relative to what is allowed. ratio: that relation; above 1 is wrong.
    """

    failures: tuple[str, ...]
    worst: str
    ratio: float

    @property
    def right(self) -> bool:
        return not self.failures


def error(got: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of the truth; infinite where not finite."""
    if truth.numel() == 0:
        return 0.0
    difference = (got.double().to(truth.device) - truth).abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / max(truth.abs().max().item(), 1e-300)


def compare(
    results: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> Verdict:
    """Hold ``results`` to the 2× rule; every tensor of ``truth`` must be there."""
    wrong: list[tuple[float, str]] = []
    worst = (0.0, "")
    for name, exact in truth.items():
        got = results.get(name)
        if got is None or got.shape != exact.shape:
            shape = "missing" if got is None else f"{tuple(got.shape)}, need {tuple(exact.shape)}"
            wrong.append((math.inf, f"{name}: {shape}"))
            continue
        roundings = ROUNDINGS.get(got.dtype, ROUNDINGS_DEFAULT)
        eager_error = error(eager[name], exact)
        allowed = 2 * eager_error + roundings * torch.finfo(got.dtype).eps
        off = error(got, exact)
        worst = max(worst, (off / allowed, name))
        if not off <= allowed:
            line = f"{name}: error {off:.1e}, allowed {allowed:.1e} (eager {eager_error:.1e})"
            wrong.append((off / allowed, line))
    wrong.sort(reverse=True)
    return Verdict(tuple(line for _, line in wrong), worst[1], wrong[0][0] if wrong else worst[0])


@contextmanager
def _recomputed_gates() -> Iterator[None]:
    """Let backward recompute the gates instead of keeping their hidden layers, which in float64
    take more memory than a laptop has. The numbers are the same."""
    gate = ops.gate

    def recomputed(*args: Any, **kwargs: Any) -> ops.GateOutput:
        return checkpoint(gate, *args, use_reentrant=False, **kwargs)

    ops.gate = recomputed
    try:
        yield
    finally:
        ops.gate = gate


def shared_tensors(workload: Workload) -> dict[str, Tensor] | None:
    """Inputs that all providers of an operation share; None for a training step."""
    if not isinstance(workload, OperationWorkload):
        return None
    gated = "w_in" in OPERATIONS[workload.operation].inputs.split()
    return site_tensors(workload.shape, workload.dtype, workload.device, avoid_kinks=gated)


def first_results(problem: Problem) -> dict[str, Tensor]:
    """Call once; copies of the results."""
    problem.call()
    return {name: t.detach().clone() for name, t in problem.results().items()}


def yardstick(provider: str) -> str:
    """The reference that a provider is held to: with interpolated gates where its own are. (That
    those are within 1e-5 of exact ones is what tests/ops/test_interpolation.py decides.)"""
    return "reference-interpolated" if provider == INTERPOLATED else "reference"


def truth(
    workload: Workload, tensors: dict[str, Tensor] | None, reference: str = "reference"
) -> dict[str, Tensor]:
    """What a reference computes in float64."""
    with _recomputed_gates():
        return first_results(prepare(workload, reference, torch.float64, tensors))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verify", description=__doc__)
    parser.add_argument("names", nargs="*", help="workloads (default: all of the CPU)")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=["compile", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args(arguments)
    status = 0
    print(f"{'workload':<24}{'provider':<11}{'largest error / allowed':<26}tensor")
    for chosen in select(options.names, CPU):
        workload = chosen.small() if options.quick else chosen
        tensors = shared_tensors(workload)
        exact = truth(workload, tensors)
        eager = first_results(prepare(workload, "reference", tensors=tensors))
        for provider in options.providers:
            if reason := unavailable_reason(provider):
                print(f"{workload.name:<24}{provider:<11}not available: {reason}")
                continue
            if provider == INTERPOLATED and not workload.interpolated:
                continue
            held = exact, eager
            if (reference := yardstick(provider)) != "reference":
                rival = prepare(workload, reference, tensors=tensors)
                held = truth(workload, tensors, reference), first_results(rival)
            results = first_results(prepare(workload, provider, tensors=tensors))
            verdict = compare(results, held[1], held[0])
            print(f"{workload.name:<24}{provider:<11}{verdict.ratio:<26.2f}{verdict.worst}")
            for line in verdict.failures:
                print(f"    WRONG {line}")
            status |= not verdict.right
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
