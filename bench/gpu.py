"""GPU benchmark: layers (gate and masked sum), the operations beside them and a toy training step,
against eager and torch.compile of the reference.

    python -m bench.gpu --predict     the predictions of docs/kernels.md; needs no GPU
    python -m bench.gpu               measures, writes bench/results/gpu.csv and plots, and fills
                                      the measured columns of docs/kernels.md

Variants are interleaved: round by round, one timing of each, median over the rounds. Time is read
from device events after a warm-up; extra memory is the allocator's peak above the inputs. All of
it stops within --minutes, the last workloads first.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_operations import OPERATIONS, OperationWork, timed_steps
from bench.registry import GPU, Bar, OperationWorkload, Shape

ROOT = Path(__file__).resolve().parent.parent
# Measured on an H200: copy bandwidth (bytes read plus written) and bf16 product rate.
BANDWIDTH, MATRIX_RATE = 4.3e12, 790e12
# Of the H200 SXM by its datasheet (66.9 fp32 TFLOP/s): 132 multiprocessors · 128 lanes · 1.98 GHz.
LANE_RATE = 132 * 128 * 1.98e9
ROUNDS = 15
# Above this many elements the gate keeps no inner activations, and the layer asks for none.
STREAMED = 2**28
# Partial sums of the gate's backward: columns of [groups, fields, chunk] over all groups.
PARTIAL_COLUMNS = 4096 * 16


@dataclass(frozen=True)
class Work:
    """One layer, in bf16, by the name that docs/kernels.md gives it."""

    name: str
    shape: Shape
    bars: tuple[Bar, ...] = ()
    compiled: bool = False  # torch.compile takes part: half a minute for each pass

    @property
    def elements(self) -> int:
        return self.shape.N * self.shape.C

    def product_flops(self, backward: bool) -> float:
        """The required ones: 2 N C (d_in + d_out) forward, three times that with the backward."""
        s = self.shape
        return 2.0 * s.N * s.C * (s.d_in + s.d_out) * (3 if backward else 1)

    def step(self, backend: str, device: str, compiled: bool = False) -> Callable[[bool], None]:
        return step_of(self, backend, device, compiled)

    def product_of(self, a: Any, b: Any) -> str:
        from bench import gpu_trace

        return gpu_trace.site_products(self.shape.d_in, self.shape.d_out)(a, b)


def _registered(name: str, registered: str) -> Work:
    workload = GPU[registered]
    assert isinstance(workload, OperationWorkload)
    return Work(name, workload.shape, workload.bars, workload.compiled)


WORKLOADS = (
    _registered("mlp_in", "gpu-layer"),
    _registered("large_mlp", "gpu-layer-large"),
    _registered("wide_dictionary", "gpu-layer-many"),
    Work("resid_mlp1", Shape(2048, 1000, 50, 100)),
    Work("tms_5-2", Shape(4096, 5, 2, 20)),
)


def seconds(moved: float, flops: float, instructions: float) -> float:
    return max(moved / BANDWIDTH, flops / MATRIX_RATE, instructions / LANE_RATE)


def step_of(
    work: Work, backend: str, device: str, compiled: bool = False
) -> Callable[[bool], None]:
    """The layer's forward, or forward and backward, on inputs made here."""
    import torch

    from spd_fast.ops import MaskRecipe, Penalty, RandomSource, component_linear, gate

    s = work.shape
    torch.manual_seed(0)

    def tensor(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(*shape, device=device).mul_(scale).bfloat16()

    def parameter(*shape: int, scale: float = 1.0) -> Any:
        return tensor(*shape, scale=scale).requires_grad_()

    x, grad = parameter(s.N, s.d_in), tensor(s.N, s.d_out)
    V, U = parameter(s.d_in, s.C, scale=s.d_in**-0.5), parameter(s.C, s.d_out, scale=s.C**-0.5)
    weights = [parameter(s.C, 1, s.hidden, scale=1.4),
               parameter(s.C, s.hidden, 1, scale=s.hidden**-0.5)]  # fmt: skip
    biases = [parameter(s.C, s.hidden, scale=0.5), parameter(s.C, 1, scale=0.5)]
    key = torch.zeros(2, dtype=torch.int64, device=device)
    sums = torch.ones(s.C, device=device)

    def forward() -> tuple[list[Any], list[Any]]:
        out = gate(x, V, weights, biases, sigmoid="2026", penalty=Penalty("lp", 2.0),
                   backend=backend)  # fmt: skip
        recipe = MaskRecipe(out.lower, RandomSource(key))
        # A wide dictionary streams: both backwards make h again, nobody keeps it.
        inner = out.inner if work.elements <= STREAMED else None
        y = component_linear(x, V, U, recipe, inner=inner, backend=backend)
        return [y, out.penalty_sum], [grad, sums]

    return timed_steps(forward, [x, V, U, *weights, *biases], compiled)


@dataclass(frozen=True)
class Prediction:
    """A kernel of one workload: all its launches in a forward and backward together."""

    workload: str
    kernel: str
    launches: int
    mb: float
    gflop: float
    ms: float

    def cells(self) -> tuple[str, ...]:
        return (self.workload, self.kernel, str(self.launches), f"{self.mb:.4g}",
                f"{self.gflop:.4g}", f"{self.ms:.3g}")  # fmt: skip


def _summed(workload: str, calls: list[Any]) -> list[Prediction]:
    rows = []
    for name in dict.fromkeys(call.name for call in calls):
        same = [call for call in calls if call.name == name]
        ms = 1e3 * sum(seconds(c.bytes, c.flops, c.instructions) for c in same)
        mb, gflop = sum(c.bytes for c in same) / 1e6, sum(c.flops for c in same) / 1e9
        rows.append(Prediction(workload, name, len(same), mb, gflop, ms))
    return rows


def _recorded(work: Work | OperationWork, run: bool) -> Any:
    """Records the launches of ``work``; of an embedding those of torch's own too."""
    from bench import gpu_trace

    library = None
    if isinstance(work, OperationWork) and work.name == "embedding":
        library = gpu_trace.Library([], work.launch_of, run)
    return gpu_trace.recorded(work.product_of, run, library)


def predicted(work: Work | OperationWork) -> tuple[list[Prediction], float]:
    """The kernels of a forward and backward, and the MB that it adds to its inputs."""
    from bench import gpu_trace

    with gpu_trace.simulated():
        step = work.step("triton", "meta")
        with _recorded(work, run=False) as calls, gpu_trace.Memory() as memory:
            step(True)
    return _summed(work.name, calls), memory.peak / 1e6


def _torchs(operation: str) -> str:
    """The row of a launch of torch's own in a training step."""
    return "AdamW" if "adamw" in operation else "torch's own passes"


def _recorded_step(run: bool) -> Any:
    from bench import gpu_trace

    library = gpu_trace.Library([], _torchs, run)
    return gpu_trace.recorded(lambda *_: "products", run, library)


def predicted_step() -> list[Prediction]:
    """Every launch of a toy's training step, in fp32, from the batch to the new parameters."""
    from bench import gpu_trace
    from bench.problems import step_trainer

    with gpu_trace.simulated():
        # Its tensors are small: on a CPU, with the kernels left out, they cost nothing either.
        trainer = step_trainer(TOY, "triton")
        batch = trainer.batches(0)
        trainer.model.clean_forward(batch)  # the first one also looks at the target's modules
        with _recorded_step(run=False) as calls:
            trainer.update(batch)
    return _summed(STEP, calls)


def eager_memory(work: Work) -> float:
    """MB that the eager layer adds to its inputs."""
    from bench import gpu_trace

    step = step_of(work, "reference", "meta")
    with gpu_trace.Memory() as memory:
        step(True)
    return memory.peak / 1e6


def ceiling(work: Work) -> float:
    """MB that a forward and backward adds at most: docs/kernels.md, "Memory"."""
    from spd_fast.kernels import regimes

    s, n = work.shape, work.elements
    kept = n <= STREAMED
    chunk, narrow = min(regimes.CHUNK_ELEMENTS, n), min(regimes.NARROW_ELEMENTS, n)
    sums = 4 * PARTIAL_COLUMNS * (3 * s.hidden + 1)
    if kept:
        of_sum, of_gate = 4 * n + narrow, 3 * n + chunk  # h, g, h̄, ḡ; a. h, h̄, ḡ; the gate's h̄
    else:
        of_sum, of_gate = 2 * n + 3 * chunk, n + 2 * chunk  # g, ḡ; h, a, ā. ḡ; h and the gate's h̄
    # y; x̄, which a sum over several chunks holds in fp32 and rounds at the end.
    activations = s.N * (s.d_out + s.d_in * (1 if n <= chunk else 3))
    # Ū, the gate's parameters; V̄, when streaming from the gate, from the masked sum and their sum.
    parameters = s.C * (s.d_out + s.d_in * (1 if kept else 3) + 3 * s.hidden + 1)
    elements = max(of_sum, of_gate) + activations + parameters
    return (2 * elements + sums + 4 * (3 * s.hidden + 1) * (s.C + chunk // s.N)) / 1e6


HEADER = "| workload | kernel | launches | MB | GFLOP | predicted ms | measured ms |"
MEMORY_HEADER = "| workload | eager MB | spd_fast MB | ratio | measured MB |"


def predict() -> str:
    """Two tables in Markdown: every kernel's time at every workload; memory."""
    lines = [HEADER, "|---" * 7 + "|"]
    memory = [MEMORY_HEADER, "|---" * 5 + "|"]

    def add(workload: str, rows: list[Prediction]) -> None:
        lines.extend(f"| {' | '.join(row.cells())} | |" for row in rows)
        total = sum(row.ms for row in rows)
        lines.append(f"| {workload} | **sum** | | | | **{total:.3g}** | |")

    for operation in OPERATIONS:
        add(operation.name, predicted(operation)[0])
    add(STEP, predicted_step())
    for work in WORKLOADS:
        rows, extra = predicted(work)
        add(work.name, rows)
        eager = eager_memory(work)
        memory.append(f"| {work.name} | {eager:.4g} | {extra:.4g} | 1/{eager / extra:.3g} | |")
    return "\n".join([*lines, "", *memory])


MEASURED = "**Measured:**"


def fill(
    page: str,
    times: dict[tuple[str, str], float],
    memory: dict[str, float],
    where: dict[str, str] | None = None,
    only: Sequence[str] = (),
) -> str:
    """``page`` with the measured columns of its two tables filled, by workload and kernel, and with
    where that was; rows that were not measured stay as they are. ``only``: the workloads, where
    these are not all: what the page says of the others stays."""
    lines, table = [], ""
    for line in page.splitlines():
        if line.startswith(MEASURED) and where is not None and only:
            line += f" {', '.join(only)}: {where['commit']}, {where['started'][:10]}."
        elif line.startswith(MEASURED) and where is not None:
            ceilings = "its ceilings were not measured."
            if where["peak_tflops"]:
                ceilings = (
                    f"its bf16 products reach {where['peak_tflops']} TFLOP/s, its copies "
                    f"{where['copy_tb_s']} TB/s."
                )
            line = (
                f"{MEASURED} on {where['gpu']} with torch {where['torch']}, triton "
                f"{where['triton']}, python {where['python']}, at {where['commit']}, "
                f"{where['started'][:10]}, by `python -m bench.gpu`; {ceilings}"
            )
        if line in (HEADER, MEMORY_HEADER):
            table = line
        elif not line.startswith("|"):
            table = ""
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if table == HEADER and len(cells) == 7 and (cells[0], cells[1]) in times:
            cells[-1] = f"{times[cells[0], cells[1]]:.3g}"
            line = f"| {' | '.join(cells)} |".replace("  ", " ")
        elif table == MEMORY_HEADER and len(cells) == 5 and cells[0] in memory:
            cells[-1] = f"{memory[cells[0]]:.4g}"
            line = f"| {' | '.join(cells)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Measurement:
    """One variant of one workload; milliseconds None where it failed, ``failure`` says how."""

    workload: str
    variant: str
    passes: str
    ms: float | None
    extra_mb: float | None = None
    tflops: float | None = None
    share_of_peak: float | None = None
    failure: str = ""


VARIANTS = (("eager", "reference", False), ("torch.compile", "reference", True),
            ("spd_fast", "triton", False))  # fmt: skip
COLUMNS = (
    "workload", "variant", "passes", "ms", "extra_mb", "tflops", "share_of_peak", "gpu", "torch",
    "triton", "python", "commit", "started", "peak_tflops", "copy_tb_s",
)  # fmt: skip


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


def _ceilings() -> tuple[float, float]:
    """Measured here: bf16 products in flop/s and copies in byte/s, read plus written."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)

    def best(function: Callable[[], Any]) -> float:
        times = [_timed(lambda _: function(), False)[0] for _ in range(12)]
        return 1e-3 * statistics.median(times[2:])

    products = best(lambda: torch.mm(a, b))
    copies = best(lambda: target.copy_(source))
    return 2 * 8192**3 / products, 2 * source.numel() / copies


def _attempt(function: Callable[[], None]) -> str:
    """How ``function`` failed, in a few words; "" where it did not."""
    import torch

    try:
        function()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # a compiler may raise anything, and that is its row's result
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")
    return ""


def _variants(work: Work | OperationWork, backward: bool, peak: float | None) -> list[Measurement]:
    """Every variant of ``work``; one that fails has a row that says so, and a line. ``peak``: of
    the device, in flop/s, where it is known."""
    import torch

    passes = "fwd+bwd" if backward else "fwd"
    failures: dict[str, str] = {}
    steps: dict[str, Callable[[bool], None]] = {}
    samples: dict[str, list[tuple[float, float]]] = {}

    def start(name: str, backend: str, compiled: bool) -> None:
        steps[name] = work.step(backend, DEVICE, compiled)
        for _ in range(3):
            steps[name](backward)

    def attempt(name: str, function: Callable[[], None]) -> None:
        if failure := _attempt(function):
            steps.pop(name, None)
            samples.pop(name, None)
            failures[name] = failure
            print(f"{work.name}, {name}, {passes}: not measured, {failure}", flush=True)

    for name, backend, compiled in VARIANTS:
        if compiled and not work.compiled:
            continue
        samples[name] = []
        attempt(name, lambda n=name, b=backend, c=compiled: start(n, b, c))  # type: ignore[misc]
        torch.cuda.empty_cache()
    for _ in range(ROUNDS):
        for name, step in list(steps.items()):
            attempt(name, lambda n=name, s=step: samples[n].append(_timed(s, backward)))  # type: ignore[misc]
    results = [Measurement(work.name, n, passes, None, failure=f) for n, f in failures.items()]
    for name, pairs in samples.items():
        ms = statistics.median(p[0] for p in pairs)
        rate = work.product_flops(backward) / (1e-3 * ms)
        extra = max(p[1] for p in pairs)
        share = None if peak is None else rate / peak
        results.append(Measurement(work.name, name, passes, ms, extra, rate / 1e12, share))
    return results


def _medians(
    workload: str, record: Callable[[], Any], step: Callable[[], object]
) -> dict[tuple[str, str], float]:
    """Milliseconds of every row of ``workload``: the median of some runs of ``step``."""
    import torch

    from bench import gpu_trace

    runs: dict[str, list[float]] = {}
    # Called directly: behind the dispatcher what torch launches inside an operation is not seen.
    with gpu_trace.simulated():
        step()
        for _ in range(7):
            with record() as calls:
                step()
            torch.cuda.synchronize()
            for name in dict.fromkeys(c.name for c in calls):
                total = sum(c.milliseconds for c in calls if c.name == name)
                runs.setdefault(name, []).append(total)
    times = {(workload, name): statistics.median(values) for name, values in runs.items()}
    times[workload, "**sum**"] = sum(times.values())
    return times


def _kernels(work: Work | OperationWork) -> dict[tuple[str, str], float]:
    """Milliseconds of every kernel in a forward and backward."""
    step = work.step("triton", DEVICE)
    return _medians(work.name, lambda: _recorded(work, run=True), lambda: step(True))


DEVICE = "cuda"
TOY = "tms_5-2"
STEP = f"step {TOY}"


def _step_kernels() -> dict[tuple[str, str], float]:
    """Milliseconds of every launch of a toy's step that is not recorded as a graph."""
    from bench.problems import step_trainer

    trainer = step_trainer(TOY, "triton", device=DEVICE)
    batch = trainer.batches(0)
    return _medians(STEP, lambda: _recorded_step(run=True), lambda: trainer.update(batch))


def _toy_steps() -> list[Measurement]:
    """A whole training step: eager; fused; fused and captured in a graph."""
    import torch

    from bench.problems import step_trainer

    def steps(trainer: Any) -> None:
        for _ in range(20):
            trainer.train_step(trainer.step)
            trainer.step += 1

    trainers = {
        "eager": step_trainer(TOY, "reference", device=DEVICE),
        "spd_fast": step_trainer(TOY, "triton", device=DEVICE),
        "spd_fast, captured": step_trainer(TOY, "triton", device=DEVICE),
    }
    for name, trainer in trainers.items():
        if name != "spd_fast, captured":
            trainer.graph = None
        steps(trainer)
    samples: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS):
        for name, trainer in trainers.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            steps(trainer)
            torch.cuda.synchronize()
            samples[name].append(1e3 * (time.perf_counter() - started) / 20)
    return [Measurement(STEP, n, "step", statistics.median(v)) for n, v in samples.items()]


def verdicts(results: list[Measurement]) -> list[str]:
    """Every bar with what was measured, or that nothing was."""
    by = {(r.workload, r.variant, r.passes): r for r in results}
    lines = []

    def ratio(over: Measurement | None, own: Measurement | None) -> float | None:
        if over is None or own is None or over.ms is None or own.ms is None:
            return None
        return over.ms / own.ms

    for work in WORKLOADS:
        own = by.get((work.name, "spd_fast", "fwd+bwd"))
        eager = by.get((work.name, "eager", "fwd+bwd"))
        compiled = by.get((work.name, "torch.compile", "fwd+bwd"))
        for bar in work.bars:
            value = None
            if bar.quantity == "speedup":
                value = ratio(eager, own)
            elif bar.quantity == "speedup_over_compile":
                value = ratio(compiled, own)
            elif bar.quantity == "extra_ratio" and own and eager and eager.extra_mb:
                value = own.extra_mb / eager.extra_mb if own.extra_mb else None
            elif bar.quantity == "extra_mb" and own:
                value = own.extra_mb
            elif bar.quantity == "share_of_peak" and own:
                value = own.share_of_peak
            lines.append(_verdict(work.name, bar, value))
    toy = by.get((STEP, "spd_fast, captured", "step"))
    for bar in GPU[f"gpu-{TOY}"].bars:
        lines.append(_verdict(STEP, bar, ratio(by.get((STEP, "eager", "step")), toy)))
    return lines


def _verdict(name: str, bar: Bar, value: float | None) -> str:
    if value is None:
        return f"{name}: {bar}: not measured"
    return f"{name}: {bar}: {value:.3g}, {'met' if bar.met(value) else 'MISSED'}"


def kept(path: Path, but: set[str]) -> list[dict[str, str]]:
    """The lines that ``path`` has of workloads other than ``but``."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [line for line in csv.DictReader(file) if line["workload"] not in but]


def write(
    results: list[Measurement], where: dict[str, str], path: Path,
    before: Sequence[dict[str, str]] = (),
) -> None:  # fmt: skip
    """The CSV: one line a measurement, with machine and versions on each; first those of
    ``before``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(before)
        for result in results:
            cells = {k: _cell(v) for k, v in vars(result).items()}
            failure = cells.pop("failure")
            writer.writerow({**cells, "ms": failure or cells["ms"], **where})


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _where(ceilings: tuple[float, float] | None) -> dict[str, str]:
    """Machine and versions; ``ceilings`` in flop/s and byte/s."""
    import torch
    import triton

    from bench.machine import machine

    here = machine()
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "python": here["python"], "commit": here["commit"],
        "started": here["started"],
        "peak_tflops": "" if ceilings is None else f"{ceilings[0] / 1e12:.0f}",
        "copy_tb_s": "" if ceilings is None else f"{ceilings[1] / 1e12:.2f}",
    }  # fmt: skip


def measure(out: Path, page: Path, minutes: float, only: Sequence[str] = ()) -> None:
    """Time and memory of every variant at every workload, or at ``only`` these, the others' lines
    kept: CSV, plots, measured column, bars."""
    before = kept(out, set(only)) if only else []
    deadline = time.monotonic() + 60 * minutes
    results: list[Measurement] = []
    times: dict[tuple[str, str], float] = {}
    ceilings: tuple[float, float] | None = None

    def measure_ceilings() -> None:
        nonlocal ceilings
        ceilings = _ceilings()

    if failure := _attempt(measure_ceilings):
        print(f"the device's ceilings: not measured, {failure}", flush=True)
    where = _where(ceilings)
    peak = None if ceilings is None else ceilings[0]

    def toy() -> None:
        results.extend(_toy_steps())
        times.update(_step_kernels())

    if (not only or STEP in only) and (failure := _attempt(toy)):
        print(f"{STEP}: not measured, {failure}", flush=True)
    write(results, where, out, before)
    for work in (*WORKLOADS, *OPERATIONS):
        if only and work.name not in only:
            continue
        for backward in (True, False):
            if time.monotonic() > deadline:
                print(
                    f"{work.name}, {'fwd+bwd' if backward else 'fwd'}: no time left, not measured"
                )
                continue
            results += _variants(work, backward, peak)
            write(results, where, out, before)
        if time.monotonic() < deadline:
            failure = _attempt(lambda w=work: times.update(_kernels(w)))  # type: ignore[misc]
            if failure:
                print(f"{work.name}, its kernels: not measured, {failure}", flush=True)
    memory = {r.workload: r.extra_mb for r in results
              if r.variant == "spd_fast" and r.passes == "fwd+bwd" and r.extra_mb}  # fmt: skip
    filled = fill(page.read_text(encoding="utf-8"), times, memory, where, only)
    page.write_text(filled, encoding="utf-8")
    print(*verdicts(results), sep="\n")
    try:
        from bench import gpu_plot
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed")
    else:
        gpu_plot.draw(out, out.parent)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--predict", action="store_true", help="predictions only; needs no GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/gpu.csv")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/kernels.md")
    names = [STEP, *(work.name for work in (*WORKLOADS, *OPERATIONS))]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=(), metavar="WORKLOAD",
        help=f"measure these anew, keep the lines of others; known: {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=4, help="start nothing after that")
    options = parser.parse_args(arguments)
    if options.predict:
        print(predict())
        return 0
    import torch

    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device to measure on; --predict needs none")
    measure(options.out, options.page, options.minutes, options.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
