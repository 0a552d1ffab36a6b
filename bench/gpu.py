"""GPU benchmark of one layer (gate and masked sum): eager, torch.compile and the Triton kernels.

    python -m bench.gpu --predict            the floors and predictions; needs no GPU
    python -m bench.gpu --out bench/results/gpu.csv

Variants are interleaved: round by round, one timing of each, median over the rounds. Time is read
from device events after a warm-up; extra memory is the allocator's peak above the inputs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Measured on an H200: copy bandwidth (bytes read plus written) and bf16 product rate.
BANDWIDTH, MATRIX_RATE = 4.3e12, 790e12
# From the datasheet: 132 multiprocessors · 128 fp32 lanes · 1.755 GHz.
LANE_RATE = 132 * 128 * 1.755e9
# Instructions a neuron of the gate, forward; and backward, which evaluates the tail twice.
GATE_FORWARD, GATE_BACKWARD = 19, 45
ROUNDS = 15
COLUMNS = ("workload", "variant", "pass", "ms", "extra_mb", "tflops", "share_of_peak")


@dataclass(frozen=True)
class Workload:
    name: str
    N: int
    d_in: int
    d_out: int
    C: int
    hidden: int

    def product_flops(self, backward: bool) -> float:
        """The required ones: 2 N C (d_in + d_out) forward, three times that with the backward."""
        return 2 * self.N * self.C * (self.d_in + self.d_out) * (3 if backward else 1)

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(kernel, bytes, product flops, lane instructions) of one forward and backward, bf16."""
        n, small_in, small_out = self.N * self.C, self.N * self.d_in, self.N * self.d_out
        into, out = self.C * self.d_in, self.C * self.d_out
        neurons = n * self.hidden
        return [
            ("x V", 2 * (small_in + into + n), 2 * n * self.d_in, 0),
            ("gate_forward", 4 * n, 0, GATE_FORWARD * neurons),
            ("mask_forward", 6 * n, 0, 25 * n),
            ("a U", 2 * (n + out + small_out), 2 * n * self.d_out, 0),
            ("ȳ Uᵀ", 2 * (small_out + out + n), 2 * n * self.d_out, 0),
            ("mask_backward", 12 * n, 0, 30 * n),
            ("aᵀ ȳ", 2 * (n + small_out) + 4 * out, 2 * n * self.d_out, 0),
            ("gate_backward", 8 * n, 0, GATE_BACKWARD * neurons),
            ("xᵀ h̄", 2 * (n + small_in) + 4 * into, 2 * n * self.d_in, 0),
            ("h̄ Vᵀ", 2 * (n + into + small_in), 2 * n * self.d_in, 0),
        ]


def seconds(moved: float, flops: float, instructions: float) -> float:
    return max(moved / BANDWIDTH, flops / MATRIX_RATE, instructions / LANE_RATE)


WORKLOADS = (
    Workload("mlp_in", 8192, 768, 3072, 4096, 16),
    Workload("large_mlp", 4096, 4096, 14336, 24576, 16),
    Workload("wide_dictionary", 4096, 1024, 1024, 131072, 16),
    Workload("resid_mlp1", 2048, 1000, 50, 100, 16),
    Workload("tms_5-2", 4096, 5, 2, 20, 16),
)


def predict() -> None:
    """A table of every kernel's predicted time at every workload, in Markdown."""
    print("| workload | kernel | MB | GFLOP | predicted ms | measured ms |")
    print("|---|---|---|---|---|---|")
    for work in WORKLOADS:
        total = 0.0
        for name, *costs in work.rows():
            time = seconds(*costs)
            total += time
            mb, gflop = costs[0] / 1e6, costs[1] / 1e9
            print(f"| {work.name} | {name} | {mb:.4g} | {gflop:.4g} | {1e3 * time:.3g} | |")
        print(f"| {work.name} | **sum** | | | **{1e3 * total:.3g}** | |")


def _step(work: Workload, backend: str, compiled: bool) -> Callable[[bool], None]:
    import torch

    from spd_fast.ops import MaskRecipe, Penalty, RandomSource, component_linear, gate, make_key

    def parameter(*shape: int, scale: float) -> Any:
        return (torch.randn(*shape, device="cuda") * scale).bfloat16().requires_grad_()

    torch.manual_seed(0)
    x = torch.randn(work.N, work.d_in, device="cuda").bfloat16().requires_grad_()
    V = parameter(work.d_in, work.C, scale=work.d_in**-0.5)
    U = parameter(work.C, work.d_out, scale=work.C**-0.5)
    weights = [parameter(work.C, 1, work.hidden, scale=1.4),
               parameter(work.C, work.hidden, 1, scale=work.hidden**-0.5)]  # fmt: skip
    biases = [parameter(work.C, work.hidden, scale=0.5), parameter(work.C, 1, scale=0.5)]
    grad = torch.randn(work.N, work.d_out, device="cuda").bfloat16()
    key = make_key(0, 0, "cuda")

    def forward() -> tuple[Any, Any]:
        out = gate(x, V, weights, biases, sigmoid="2026", penalty=Penalty("lp", 2.0),
                   backend=backend)  # fmt: skip
        recipe = MaskRecipe(out.lower, RandomSource(key))
        # A wide dictionary streams: both backwards make h again, nobody keeps it.
        inner = out.inner if work.N * work.C <= 2**28 else None
        y = component_linear(x, V, U, recipe, inner=inner, backend=backend)
        return y, out.penalty_sum

    run = torch.compile(forward) if compiled else forward

    def step(backward: bool) -> None:
        if not backward:
            with torch.no_grad():
                run()
            return
        y, sums = run()
        torch.autograd.grad((y, sums), [x, V, U, *weights, *biases], (grad, torch.ones_like(sums)))

    return step


def _timed(step: Callable[[bool], None], backward: bool) -> tuple[float, float]:
    """(milliseconds, MB above the inputs) of one call."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(backward)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(out: Path) -> None:
    """Time and extra memory of every variant at every workload, into a CSV."""
    import torch

    rows: list[tuple[Any, ...]] = []
    for work in WORKLOADS:
        for backward in (False, True):
            samples: dict[str, list[tuple[float, float]]] = {}
            steps: dict[str, Callable[[bool], None]] = {}
            for name, backend, compiled in (
                ("eager", "reference", False), ("torch.compile", "reference", True),
                ("spd_fast", "triton", False),
            ):  # fmt: skip
                try:
                    steps[name] = _step(work, backend, compiled)
                    for _ in range(3):
                        steps[name](backward)
                except torch.OutOfMemoryError:
                    steps.pop(name, None)
                    rows.append((work.name, name, "fwd+bwd" if backward else "fwd", "out of memory",
                                 "", "", ""))  # fmt: skip
                    torch.cuda.empty_cache()
            for _ in range(ROUNDS):
                for name, step in steps.items():
                    samples.setdefault(name, []).append(_timed(step, backward))
            for name, pairs in samples.items():
                ms = statistics.median(p[0] for p in pairs)
                rate = work.product_flops(backward) / (1e-3 * ms)
                rows.append((work.name, name, "fwd+bwd" if backward else "fwd", f"{ms:.4f}",
                             f"{max(p[1] for p in pairs):.1f}", f"{rate / 1e12:.1f}",
                             f"{rate / MATRIX_RATE:.3f}"))  # fmt: skip
            steps.clear()
            torch.cuda.empty_cache()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    for row in rows:
        print(*row, sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--predict", action="store_true", help="predictions only; needs no GPU")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.csv"))
    options = parser.parse_args()
    predict() if options.predict else measure(options.out)


if __name__ == "__main__":
    main()
