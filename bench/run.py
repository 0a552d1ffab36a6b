"""The CPU table: speed and memory of every provider, measured side by side.

    python -m bench.run [NAME …] [--quick] [--providers P …] [--compile none|some|all]
                        [--no-memory] [--keep-freed-memory] [--seconds S] [--out FILE.csv]

For every workload, in this order: the results of every provider are checked against float64
(bench.verify); those that are right are timed in this one process, in turns, in an order that
rotates from one round to the next, beside the bare matrix products of the workload; then each one's
memory is measured in a process of its own (bench.memory). A provider whose results are wrong gets
no number, but the name of the tensor that is wrong.

malloc is what a program that imports the library finds, for every provider; with
--keep-freed-memory it is what `spd-fast run` sets (again for all, since it belongs to the process),
and the column `malloc` says so.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import memory
from bench.machine import ROOT, machine
from bench.problems import (
    INTERPOLATED,
    PROVIDERS,
    Problem,
    prepare,
    step_trainer,
    unavailable_reason,
)
from bench.products import Product, bare_products, flops, matmul_peak, record, required
from bench.registry import CPU, OperationWorkload, StepWorkload, Workload, select
from bench.verify import compare, first_results, shared_tensors, truth, yardstick
from spd_fast import _extension
from spd_fast.train.progress import Progress

__all__ = ["FIELDS", "Result", "interleave", "main", "measure_workload"]

PRODUCTS = "products"  # the bare matrix products, timed beside the providers
BASELINES = ("reference", "compile", PRODUCTS)

FIELDS = [
    "workload", "direction", "provider", "status", "N", "d_in", "d_out", "C", "hidden", "dtype",
    "median_ms", "q1_ms", "q3_ms", "min_ms", "rounds", "first_call_s", "required_gflop", "gflops",
    "share_of_peak", "peak_gflops", "times_products", "speedup", "speedup_over_compile",
    "speedup_over_authors", "authors_ms_low", "authors_ms_high", "authors_mb", "extra_mb",
    "extra_ratio", "peak_mb", "error_ratio", "bars", "processor", "cores", "threads",
    "instruction_set", "torch", "python", "spd_fast", "commit", "malloc", "load_average", "started",
]  # fmt: skip
AUTHORS = "authors (known figures, not measured here)"


@dataclass
class Result:
    """One provider on one workload; None: not measured. Milliseconds, MB, GFLOP/s."""

    workload: Workload
    provider: str
    status: str = "right"
    milliseconds: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    error_ratio: float | None = None
    quantities: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        return statistics.median(self.milliseconds) if self.milliseconds else None

    def quartiles(self) -> tuple[float, float]:
        if len(self.milliseconds) < 2:
            return self.milliseconds[0], self.milliseconds[0]
        q1, _, q3 = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return q1, q3

    def bars(self) -> list[str]:
        """Each bar with its outcome; none for baselines."""
        if self.provider in BASELINES or self.status != "right":
            return []
        lines = []
        for bar in self.workload.bars:
            value = self.quantities.get(bar.quantity)
            if value is None:
                lines.append(f"{bar}: not measured")
            else:
                lines.append(f"{bar}: {'met' if bar.met(value) else 'MISSED'} ({value:.3g})")
        return lines


def interleave(
    calls: dict[str, Callable[[], None]],
    seconds: float,
    fewest: int = 5,
    most: int = 100,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Milliseconds per call of each, measured in turns, for about ``seconds`` altogether.

    One call of each comes first, to warm up and to choose the number of rounds; calls shorter than
    2 ms are timed several at a time.
    """

    def timed(call: Callable[[], None], count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - begin) / count

    estimates = {name: timed(call, 1) for name, call in calls.items()}
    counts = {name: max(1, int(2 / max(ms, 1e-3))) for name, ms in estimates.items()}
    per_round = sum(estimates[name] * counts[name] for name in calls) / 1e3
    # Where one round takes longer than all of them should, three must do.
    fewest = min(fewest, 3) if per_round > seconds else fewest
    rounds = max(fewest, min(most, int(seconds / max(per_round, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in order[i % len(order) :] + order[: i % len(order)]:
                samples[name].append(timed(calls[name], counts[name]))
            say(f"round {i + 1} of {rounds}")
    finally:
        gc.enable()
    return samples


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"failed: {type(error).__name__}: {text[:160]}"


def measure_workload(
    workload: Workload,
    providers: list[str],
    *,
    seconds: float,
    fewest: int = 5,
    weigh: Callable[[str], memory.Memory] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Check, time and (where ``weigh`` is given) weigh every provider on one workload.

    The reference is always checked, for its error is the yardstick; it is timed like the others.
    """
    say("float64 reference")
    tensors = shared_tensors(workload)
    exact = truth(workload, tensors)
    problems: dict[str, Problem] = {}
    results: dict[str, Result] = {}
    eager = None
    if isinstance(workload, OperationWorkload):
        products = required(workload)
    else:
        products = _step_products(workload)
    for provider in ["reference", *(p for p in providers if p != "reference")]:
        result = results[provider] = Result(workload, provider)
        say(f"checking {provider}")
        try:
            begin = time.perf_counter()
            problem = prepare(workload, provider, tensors=tensors)
            got = first_results(problem)
            problem.clear()
            result.first_call_s = time.perf_counter() - begin
        except Exception as error:  # one provider must not take the others' numbers with it
            if provider == "reference":
                raise
            result.status = _one_line(error)
            continue
        if provider == "reference":
            eager = got
        assert eager is not None
        held = exact, eager
        if (reference := yardstick(provider)) != "reference":
            rival = prepare(workload, reference, tensors=tensors)
            held = truth(workload, tensors, reference), first_results(rival)
            del rival
        verdict = compare(got, held[1], held[0])
        del held
        result.error_ratio = verdict.ratio
        if not verdict.right:
            result.status = f"WRONG {verdict.failures[0]}"
            continue
        problems[provider] = problem
    del exact, eager, got
    calls = {name: problem.call for name, problem in problems.items()}
    calls[PRODUCTS] = bare_products(products, workload.dtype, workload.device)
    results[PRODUCTS] = Result(workload, PRODUCTS)
    samples = interleave(calls, seconds, fewest, say=lambda text: say(f"timing, {text}"))
    for name, milliseconds in samples.items():
        results[name].milliseconds = milliseconds
    del calls, problems
    gc.collect()
    for provider in samples:
        if weigh is not None and provider != PRODUCTS:
            say(f"memory of {provider}")
            try:
                results[provider].quantities.update(weigh(provider))
            except RuntimeError as error:
                print(f"memory of {provider} on {workload.name}: {error}", file=sys.stderr)
    _derive(results, flops(products))
    return list(results.values())


def _step_products(workload: StepWorkload) -> list[Product]:
    trainer = step_trainer(workload.experiment, "reference", batch=workload.batch, factored=True)
    trainer.model.clean_forward(trainer.batches(0))  # the first also looks at the target's modules
    return record(lambda: trainer.train_step(0))


def _derive(results: dict[str, Result], required_flops: int) -> None:
    """Everything that follows from medians and memory."""
    for result in results.values():
        q, ms = result.quantities, result.median
        if ms is None:
            continue
        q["required_gflop"] = required_flops / 1e9
        q["gflops"] = required_flops / (1e6 * ms)
        authors = result.workload.authors_ms
        if authors is not None and result.provider != PRODUCTS:
            q["speedup_over_authors"] = authors[0] / ms
        others = {
            "speedup": "reference", "speedup_over_compile": "compile", "times_products": PRODUCTS
        }  # fmt: skip
        for quantity, name in others.items():
            other = results[name].median if name in results else None
            if other is not None:
                q[quantity] = ms / other if quantity == "times_products" else other / ms
        weighed = results["reference"].quantities
        if "extra_mb" in q and "extra_mb" in weighed:
            q["extra_ratio"] = q["extra_mb"] / max(weighed["extra_mb"], 1e-9)


def rows(results: list[Result], peaks: dict[torch.dtype, float]) -> list[dict[str, object]]:
    """One CSV row per result; a number that was not measured is empty."""
    table = []
    for r in results:
        w = r.workload
        row: dict[str, object] = dict.fromkeys(FIELDS, "")
        row |= {"workload": w.name, "provider": r.provider, "status": r.status}
        row |= {"dtype": str(w.dtype).removeprefix("torch."), "rounds": len(r.milliseconds)}
        row["direction"] = "step"
        if isinstance(w, OperationWorkload):
            row["direction"] = "forward+backward" if w.backward else "forward"
            row |= {k: getattr(w.shape, k) for k in ("N", "d_in", "d_out", "C", "hidden")}
        elif isinstance(w, StepWorkload):
            row["N"] = w.rows
        numbers: dict[str, float | None] = {**r.quantities}
        if r.milliseconds:
            q1, q3 = r.quartiles()
            numbers |= {"median_ms": r.median, "q1_ms": q1, "q3_ms": q3}
            numbers["min_ms"] = min(r.milliseconds)
        numbers |= {"first_call_s": r.first_call_s, "error_ratio": r.error_ratio}
        if w.authors_ms is not None:
            numbers |= {"authors_ms_low": w.authors_ms[0], "authors_ms_high": w.authors_ms[1]}
        numbers |= {"authors_mb": w.authors_mb, "peak_gflops": peaks[w.dtype]}
        row |= {k: f"{v:.6g}" for k, v in numbers.items() if v is not None}
        row["bars"] = "; ".join(r.bars())
        table.append(row)
    return table


def _number(value: float | None, style: str = ".2f", unit: str = "") -> str:
    return "–" if value is None else f"{value:{style}}{unit}"


def _authors(workload: Workload) -> str:
    if workload.authors_ms is None:
        return "–"
    low, high = workload.authors_ms
    figure = f"{low:g} ms" if low == high else f"{low:g}–{high:g} ms"
    return figure if workload.authors_mb is None else f"{figure}, {workload.authors_mb / 1024:g} GB"


def print_table(results: list[Result], peaks: dict[torch.dtype, float]) -> None:
    """The table a person reads; times as median [first – third quartile]."""
    headings = [
        ("workload", 29), ("provider", 18), ("ms, median [quartiles]", 29), ("× reference", 12),
        ("× products", 11), ("GFLOP/s", 9), ("of peak", 8), ("extra MB", 10), ("peak MB", 9),
        (AUTHORS, 0),
    ]  # fmt: skip
    print("".join(f"{text:<{width}}" for text, width in headings))
    for r in results:
        q = r.quantities
        if r.median is None:
            print(f"{r.workload.name:<29}{r.provider:<18}{r.status}")
            continue
        q1, q3 = r.quartiles()
        share = q.get("share_of_peak")
        cells = [
            r.workload.name,
            r.provider,
            f"{r.median:.2f} [{q1:.2f} – {q3:.2f}]",
            _number(q.get("speedup"), unit="×"),
            _number(q.get("times_products"), unit="×"),
            _number(q.get("gflops"), ".1f"),
            _number(None if share is None else 100 * share, ".0f", "%"),
            _number(q.get("extra_mb"), ".1f"),
            _number(q.get("peak_mb"), ".0f"),
            _authors(r.workload) if r.provider == "reference" else "",
        ]
        line = "".join(f"{c:<{width}}" for c, (_, width) in zip(cells, headings, strict=True))
        print(line.rstrip())
    dtypes = ", ".join(f"{str(k).removeprefix('torch.')} {v:.0f}" for k, v in peaks.items())
    print(f"\nmatrix-product peak of this machine in this run, GFLOP/s: {dtypes}")
    lines = [(r, line) for r in results for line in r.bars()]
    if not lines:
        print("\nno bars: none of these workloads has one at this size")
    else:
        print("\nbars (speedup_over_authors: against the lower end of their figure)")
        for r, line in lines:
            print(f"  {r.workload.name:<29}{r.provider:<18}{line}")


def _chosen_providers(
    workload: Workload, asked: list[str], compiled: str
) -> tuple[list[str], dict[str, str]]:
    """Those that run, and why the others do not."""
    chosen, left_out = [], {}
    for provider in asked:
        if reason := unavailable_reason(provider):
            left_out[provider] = f"not available: {reason}"
        elif provider == INTERPOLATED and not workload.interpolated:
            continue
        elif provider == "compile" and compiled != "all" and not workload.compiled:
            left_out[provider] = "not run (takes minutes to compile): pass --compile all"
        else:
            chosen.append(provider)
    return chosen, left_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"workloads (default: all): {', '.join(CPU)}")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        default=["reference", "compile", "cpu", INTERPOLATED],
    )
    parser.add_argument(
        "--compile", choices=("none", "some", "all"), default="some",
        help="torch.compile(reference): nowhere, where it compiles soon, everywhere",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=5.0, help="timing, per workload")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="malloc as in spd-fast run"
    )
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args(arguments)
    workloads = select(options.names, CPU)
    asked = [p for p in options.providers if p != "compile" or options.compile != "none"]
    where = machine() | {"malloc": "default"}
    if options.keep_freed_memory:
        _extension.keep_freed_memory()
        where["malloc"] = "keeps freed memory"
    if float(where["load_average"]) > 0.5 * int(where["cores"]):
        print(
            f"the machine is busy (load average {where['load_average']} on {where['cores']} cores):"
            " these times are not fit to publish",
            file=sys.stderr,
        )
    weighing = not options.no_memory and memory.supported()
    if not weighing and not options.no_memory:
        print("memory is not measured: this system has no /proc/self/clear_refs", file=sys.stderr)
    peaks: dict[torch.dtype, float] = {}
    results: list[Result] = []
    with Progress("bench", len(workloads)) as progress:
        for i, full in enumerate(workloads):
            workload = full.small() if options.quick else full
            # The best of the whole run: the clock may change meanwhile.
            now = matmul_peak(workload.dtype, 256 if options.quick else 2048)
            peaks[workload.dtype] = max(now, peaks.get(workload.dtype, 0.0))
            chosen, left_out = _chosen_providers(workload, asked, options.compile)

            def weigh(provider: str, name: str = workload.name) -> memory.Memory:
                return memory.fresh_process(
                    name, provider, quick=options.quick, keep_freed=options.keep_freed_memory
                )

            def say(text: str, i: int = i, name: str = workload.name) -> None:
                progress.update(i, f"{name}: {text}")

            # Single operations are parts of a layer: their memory says little, and takes minutes.
            whole = isinstance(workload, StepWorkload) or workload.name.startswith("layer")
            results += measure_workload(
                workload, chosen, seconds=0.2 if options.quick else options.seconds,
                fewest=2 if options.quick else 5, weigh=weigh if weighing and whole else None,
                say=say,
            )  # fmt: skip
            results += [Result(workload, p, status=reason) for p, reason in left_out.items()]
            progress.update(i + 1, workload.name)
    for result in results:
        if "gflops" in result.quantities:
            peak = peaks[result.workload.dtype]
            result.quantities["share_of_peak"] = result.quantities["gflops"] / peak
    kind = "quick" if options.quick else "partial" if options.names else "cpu"
    out = options.out or ROOT / "bench/results" / f"{kind}.csv"
    with out.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(row | where for row in rows(results, peaks))
    print(", ".join(f"{key} {value}" for key, value in where.items()) + "\n")
    print_table(results, peaks)
    return int(any(r.status.startswith("WRONG") for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
