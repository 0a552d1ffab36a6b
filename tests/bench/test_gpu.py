"""The GPU benchmark as far as no GPU is needed: predictions, memory, the page, bars, plots."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu, gpu_plot, gpu_trace
from bench.registry import Shape
from spd_fast.kernels import regimes

WORK = {work.name: work for work in gpu.WORKLOADS}
WHERE = {
    "gpu": "Some GPU", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3",
    "commit": "0123456789ab", "started": "2026-11-25T12:00:00Z", "peak_tflops": "790",
    "copy_tb_s": "4.30",
}  # fmt: skip


@pytest.fixture(scope="module")
def predicted():
    return {name: gpu.predicted(work) for name, work in WORK.items()}


def test_a_layer_makes_the_required_products_and_what_streaming_makes_again(predicted):
    for name, work in WORK.items():
        gflop = sum(row.gflop for row in predicted[name][0])
        s = work.shape
        again = 0
        if work.elements > gpu.STREAMED:
            # h once more in the sum's forward and in both backwards, V̄ and x̄ in both.
            again = 2 * s.N * s.C * s.d_in * 5
        assert gflop == pytest.approx((work.product_flops(True) + again) / 1e9), name


@pytest.mark.parametrize("name", WORK)
def test_no_layer_holds_more_than_the_formula(name, predicted):
    assert predicted[name][1] <= gpu.ceiling(WORK[name])


def test_the_formula_is_within_the_memory_bars():
    work = WORK["mlp_in"]
    assert gpu.ceiling(work) <= gpu.eager_memory(work) / 8
    assert gpu.ceiling(WORK["wide_dictionary"]) <= 4096


def test_memory_of_a_wide_dictionary_grows_by_two_tensors(predicted):
    # g and its gradient, and V̄ three times, Ū once: nothing else grows with C.
    narrow = WORK["wide_dictionary"]
    wide = replace(narrow, shape=replace(narrow.shape, C=2 * narrow.shape.C))
    grown = gpu.predicted(wide)[1] - predicted["wide_dictionary"][1]
    s = narrow.shape
    parameters = s.C * (3 * s.d_in + s.d_out + 4 * (3 * s.hidden + 1))
    assert grown <= (2 * (2 * narrow.elements + parameters)) / 1e6 * 1.02


def test_linear_kl_holds_two_chunks_of_logits_in_the_compute_dtype(monkeypatch):
    from spd_fast.kernels import divergence, linear_kl
    from spd_fast.ops import linear_kl as operation

    monkeypatch.setattr(divergence, "launch", lambda *_, **__: None)
    N, d, vocabulary = 8192, 512, 50257
    x, t, head = (
        torch.empty(rows, d, dtype=torch.bfloat16, device="meta") for rows in (N, N, vocabulary)
    )
    monkeypatch.setattr("spd_fast.ops._fused.GPU_DEVICES", ("meta",))
    with gpu_trace.simulated(), gpu_trace.Memory() as memory:
        loss = operation(x.requires_grad_(), t, head, backend="triton")
        torch.autograd.grad(loss, x)
    whole_in_fp32 = 4 * N * vocabulary
    assert memory.peak < 2 * 2 * linear_kl.LOGITS + 64e6 < whole_in_fp32 / 4


def test_live_memory_is_what_tensors_hold():
    with gpu_trace.Memory() as memory:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100)
        c = a + 1
        assert memory.live == 8000
        del a, b
        assert memory.live == 4000
        del c
        assert memory.live == 0
    assert memory.peak == 8000


def test_a_small_layer_is_two_launches_forward():
    work = gpu.Work("toy", Shape(64, 5, 2, 20))
    with gpu_trace.simulated(), gpu_trace.recorded(work.product_of, run=False) as calls:
        gpu.step_of(work, "triton", "meta")(False)
    assert [call.name for call in calls] == ["gate forward with x V", "whole layer forward"]


def test_a_large_layer_reads_and_writes_chunks(monkeypatch):
    monkeypatch.setattr(regimes, "CHUNK_ELEMENTS", 64 * 128)
    monkeypatch.setattr(regimes, "SMALL_PRODUCTS", 0)
    work = gpu.Work("chunked", Shape(64, 32, 48, 300))
    with gpu_trace.simulated(), gpu_trace.recorded(work.product_of, run=False) as calls:
        gpu.step_of(work, "triton", "meta")(False)
    names = [call.name for call in calls]
    assert names == ["x V", "gate forward", *["mask forward", "a U"] * 3]
    masked = [call for call in calls if call.name == "mask forward"]
    # h and g read, a written: three bf16 tensors of 64 · 300.
    assert sum(call.bytes for call in masked) == 3 * 2 * 64 * 300


PAGE = f"""# Page

{gpu.MEASURED} nothing yet.

{gpu.HEADER}
|---|---|---|---|---|---|---|
| mlp_in | x V | 1 | 86 | 51 | 0.065 | |
| mlp_in | a U | 1 | 143 | 206 | 0.26 | |
| mlp_in | **sum** | | | | **2.3** | |

Between | x V | and the next.

{gpu.MEMORY_HEADER}
|---|---|---|---|---|
| mlp_in | 3498 | 390 | 1/8.97 | |
| tms_5-2 | 8.4 | 1.2 | 1/6.9 | 7 |
"""


def test_filling_the_page_writes_only_what_was_measured():
    times = {("mlp_in", "a U"): 0.30149, ("mlp_in", "**sum**"): 2.5, ("other", "x V"): 1.0}
    filled = gpu.fill(PAGE, times, {"mlp_in": 401.234})
    expected = (
        PAGE.replace("| 0.26 | |", "| 0.26 | 0.301 |")
        .replace("| **2.3** | |", "| **2.3** | 2.5 |")
        .replace("| 1/8.97 | |", "| 1/8.97 | 401.2 |")
    )
    assert filled == expected
    assert gpu.fill(filled, times, {"mlp_in": 401.234}) == filled
    assert gpu.fill(PAGE, {}, {}) == PAGE


def test_filling_the_page_says_where_it_was_measured():
    filled = gpu.fill(PAGE, {}, {}, WHERE)
    assert "nothing yet" not in filled
    assert (
        "**Measured:** on Some GPU with torch 2.11.0, triton 3.6.0, python 3.12.3, at 0123456789ab,"
        " 2026-11-25, by `python -m bench.gpu`" in filled
    )
    assert gpu.MEASURED in (gpu.ROOT / "docs/kernels.md").read_text(encoding="utf-8")


def test_every_operation_and_the_toy_step_have_a_row_for_each_kernel(predictions):
    rows: dict[str, list[str]] = {}
    for line in predictions:
        if line.startswith("| "):
            workload, kernel, *_ = line.strip("| ").split(" | ")
            rows.setdefault(workload, []).append(kernel)
    assert rows["importances"] == ["importances forward", "importances backward", "**sum**"]
    assert rows["embedding"] == [
        "embedding gather", "zero fill", "sort by token", "embedding gradient", "rounding",
        "**sum**",
    ]  # fmt: skip
    assert rows["squared_error"] == [
        "squared error forward", "squared error backward", "**sum**",
    ]  # fmt: skip
    assert rows["kl"] == ["KL forward", "KL backward", "**sum**"]
    assert rows["linear_kl"] == [
        "x Wᵀ, t Wᵀ", "KL forward", "KL backward", "(Q − P) W", "**sum**",
    ]  # fmt: skip
    assert {"gate forward with x V", "squared error forward", "AdamW", "torch's own passes"} < set(
        rows[gpu.STEP]
    )


def test_an_operation_moves_what_its_formula_says():
    from bench import gpu_operations as sizes

    found = {
        row.kernel: row for work in gpu.OPERATIONS for row in gpu.predicted(work)[0]
    }  # fmt: skip
    logits = sizes.N * sizes.VOCABULARY
    assert found["KL forward"].mb == pytest.approx(4 * logits / 1e6, rel=1e-3)
    assert found["KL backward"].mb == pytest.approx(6 * logits / 1e6, rel=1e-3)
    assert found["(Q − P) W"].gflop == pytest.approx(2 * logits * sizes.D_MODEL / 1e9)
    of_importances = sizes.N * sizes.C
    assert found["importances backward"].mb == pytest.approx(6 * of_importances / 1e6, rel=1e-3)
    # A row of the table for each position at most, on zeros; its tokens, their order and ends.
    assert found["zero fill"].mb == pytest.approx(4 * sizes.VOCABULARY * 1024 / 1e6, rel=1e-3)
    moved = (4 + 2) * sizes.N * 1024 + 3 * 8 * sizes.N
    assert found["embedding gradient"].mb == pytest.approx(moved / 1e6)


@pytest.fixture(scope="module")
def predictions():
    return gpu.predict().splitlines()


def test_the_documented_predictions_are_those_of_the_code(predictions):
    page = (gpu.ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    # Without what a GPU has filled in.
    blank = gpu.fill(page, {}, {})
    for line in predictions:
        kept = line.rpartition("|")[0].rpartition("|")[0]
        assert kept in blank, line


@pytest.mark.parametrize("work", ["mlp_in", "large_mlp", "wide_dictionary"])
def test_every_product_of_a_layer_is_told_from_the_others(work, predictions):
    names = {line.split(" | ")[1] for line in predictions if f"| {work} |" in line}
    assert {"a U", "ȳ Uᵀ", "aᵀ ȳ", "xᵀ h̄", "h̄ Vᵀ"} <= names


def results() -> list[gpu.Measurement]:
    def of(workload: str, *variants: tuple[str, float, float, float]) -> list[gpu.Measurement]:
        return [
            gpu.Measurement(workload, name, "fwd+bwd", ms, mb, 100.0, share)
            for name, ms, mb, share in variants
        ]

    return [
        *of("mlp_in", ("eager", 10, 3500, 0.1), ("torch.compile", 5, 900, 0.2),
            ("spd_fast", 2.5, 500, 0.4)),
        *of("large_mlp", ("spd_fast", 20, 2000, 0.7)),
        gpu.Measurement("wide_dictionary", "eager", "fwd+bwd", None, failure="out of memory"),
        gpu.Measurement("kl", "torch.compile", "fwd+bwd", None, failure="InductorError: no"),
        gpu.Measurement("step tms_5-2", "eager", "step", 8.0),
        gpu.Measurement("step tms_5-2", "spd_fast, captured", "step", 0.4),
    ]  # fmt: skip


def test_every_bar_has_a_verdict():
    assert gpu.verdicts(results()) == [
        "mlp_in: speedup ≥ 2.5: 4, met",
        "mlp_in: speedup_over_compile ≥ 1.5: 2, met",
        "mlp_in: extra_ratio ≤ 0.125: 0.143, MISSED",
        "large_mlp: share_of_peak ≥ 0.6: 0.7, met",
        "wide_dictionary: extra_mb ≤ 4096: not measured",
        "step tms_5-2: speedup ≥ 10: 20, met",
    ]


def test_the_table_names_the_machine_on_every_line_and_the_plots_are_drawn(tmp_path):
    table = tmp_path / "gpu.csv"
    gpu.write(results(), WHERE, table)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results())
    assert all(row[key] == value for row in rows for key, value in WHERE.items())
    assert next(r for r in rows if r["workload"] == "wide_dictionary")["ms"] == "out of memory"
    assert set(rows[0]) == set(gpu.COLUMNS)
    assert rows[2]["ms"] == "2.5"
    for path in gpu_plot.draw(table, tmp_path):
        assert path.stat().st_size > 5000


def test_some_workloads_are_measured_anew_and_the_others_lines_stay(tmp_path):
    table = tmp_path / "gpu.csv"
    gpu.write(results(), {**WHERE, "commit": "old"}, table)
    again = [gpu.Measurement("mlp_in", "spd_fast", "fwd+bwd", 2.0)]
    gpu.write(again, {**WHERE, "commit": "new"}, table, gpu.kept(table, {"mlp_in"}))
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {r["commit"] for r in rows if r["workload"] == "mlp_in"} == {"new"}
    others = [r for r in rows if r["workload"] != "mlp_in"]
    assert [r["workload"] for r in others] == [
        r.workload for r in results() if r.workload != "mlp_in"
    ]
    assert {r["commit"] for r in others} == {"old"}
    assert gpu.kept(tmp_path / "none.csv", set()) == []


def test_what_the_page_says_of_the_others_stays_where_some_are_measured_anew():
    page = f"{gpu.MEASURED} on a GPU, at old.\n"
    filled = gpu.fill(page, {}, {}, {**WHERE, "commit": "new"}, ["kl", "embedding"])
    assert filled.startswith(page.strip())
    assert f"kl, embedding: new, {WHERE['started'][:10]}." in filled
    assert "old" not in gpu.fill(page, {}, {}, WHERE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures there")
def test_without_a_gpu_measuring_is_one_clear_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    assert "torch sees no CUDA device to measure on; --predict" in capsys.readouterr().err


@pytest.fixture
def device(monkeypatch):
    """A GPU of meta tensors: launchers run and kernels do not; every call takes 2 ms and 3 MB."""

    def timed(step, backward):
        step(backward)
        return 2.0, 3.0

    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 0.5)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "DEVICE", "meta")
    monkeypatch.setattr(gpu, "_timed", timed)
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "_ceilings", lambda: (790e12, 4.3e12))
    monkeypatch.setattr(gpu, "_where", lambda *_: WHERE)
    for module in ("gate", "component_linear", "random", "importances", "embedding_inner",
                   "divergence"):  # fmt: skip
        monkeypatch.setattr(f"spd_fast.kernels.{module}.launch", lambda *_, **__: None)
    with gpu_trace.simulated():
        yield


def test_a_variant_that_fails_loses_its_own_row_with_the_reason(device, monkeypatch, capsys):
    def compile(function):
        def run():
            raise ValueError("no such graph\nmore")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    work = replace(gpu.Work("toy", Shape(64, 5, 2, 20)), compiled=True)
    rows = {m.variant: m for m in gpu._variants(work, True, 790e12)}
    assert {name: m.ms for name, m in rows.items()} == {
        "eager": 2.0, "torch.compile": None, "spd_fast": 2.0,
    }  # fmt: skip
    assert rows["torch.compile"].failure == "ValueError: no such graph"
    assert "toy, torch.compile, fwd+bwd: not measured, ValueError: no" in capsys.readouterr().out


def test_a_variant_that_fails_between_others_leaves_them_their_times(device, monkeypatch):
    calls = []

    def timed(step, backward):
        calls.append(step)
        if len(calls) == 4:  # the second round's
            raise torch.OutOfMemoryError
        return 2.0, 3.0

    monkeypatch.setattr(gpu, "_timed", timed)
    rows = {m.variant: m for m in gpu._variants(gpu.Work("toy", Shape(64, 5, 2, 20)), False, 1e12)}
    assert (rows["eager"].ms, rows["spd_fast"].failure) == (2.0, "out of memory")


def test_ceilings_that_cannot_be_measured_cost_the_shares_of_them_alone(
    device, monkeypatch, tmp_path, capsys
):
    def no_room():
        raise torch.OutOfMemoryError

    def where(ceilings):
        return WHERE if ceilings else {**WHERE, "peak_tflops": "", "copy_tb_s": ""}

    monkeypatch.setattr(gpu, "_ceilings", no_room)
    monkeypatch.setattr(gpu, "_where", where)
    monkeypatch.setattr(gpu, "WORKLOADS", (gpu.Work("toy", Shape(64, 5, 2, 20)),))
    monkeypatch.setattr(gpu, "OPERATIONS", ())
    page = tmp_path / "kernels.md"
    page.write_text(PAGE, encoding="utf-8")
    gpu.measure(tmp_path / "gpu.csv", page, minutes=4)
    with (tmp_path / "gpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(r["ms"], r["share_of_peak"], r["peak_tflops"]) for r in rows} == {("2", "", "")}
    assert "the device's ceilings: not measured, out of memory" in capsys.readouterr().out
    assert "its ceilings were not measured" in page.read_text(encoding="utf-8")


def test_a_whole_run_fills_table_page_and_bars(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    page = tmp_path / "kernels.md"
    told = (gpu.ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    measured = r"(?m)^(\|(?:[^|\n]*\|){6}|\|(?:[^|\n]*\|){4}) [\d.e+-]+ \|$"
    page.write_text(re.sub(measured, r"\1 |", told), "utf-8")
    gpu.measure(tmp_path / "gpu.csv", page, minutes=4)
    with (tmp_path / "gpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {work.name for work in (*gpu.WORKLOADS, *gpu.OPERATIONS)}
    assert {r["workload"] for r in rows} == names
    assert all(r["ms"] == "2" for r in rows)
    empty = [
        line for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and line.endswith("| |")
    ]  # fmt: skip
    # A training step needs a device that computes.
    assert empty
    assert all(line.startswith(f"| {gpu.STEP} |") for line in empty), empty
    out = capsys.readouterr().out
    assert f"{gpu.STEP}: not measured" in out
    assert "large_mlp: share_of_peak ≥ 0.6:" in out
    assert (tmp_path / "gpu_speed.png").exists()
