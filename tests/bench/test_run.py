"""The commands: they run, and write what a reader can use."""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path

import pytest
import torch

from bench import memory, plot, profile_step, run
from bench.machine import ROOT
from bench.problems import step_trainer

needs_proc = pytest.mark.skipif(not memory.supported(), reason="no /proc/self/clear_refs")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "quick.csv"
    arguments = ["tms_5-2", "layer", "--quick", "--providers", "reference", "--no-memory"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    return out


def test_quick_run_writes_a_tidy_csv(table: Path) -> None:
    rows = read(table)
    assert list(rows[0]) == run.FIELDS
    assert [(r["workload"], r["provider"]) for r in rows] == [
        ("tms_5-2", "reference"), ("tms_5-2", "products"),
        ("layer", "reference"), ("layer", "products"),
    ]  # fmt: skip
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert float(row["q1_ms"]) <= float(row["median_ms"]) <= float(row["q3_ms"])
        assert float(row["required_gflop"]) > 0
        assert row["torch"] == torch.__version__


def test_the_csv_names_no_host_and_no_path(table: Path) -> None:
    text = table.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    assert platform.node() not in text


def test_plots_are_drawn_from_the_csv(table: Path) -> None:
    absent = str(table.parent / "absent.csv")
    assert plot.main(["--run", str(table), "--memory", absent, "--out", str(table.parent)]) == 0
    assert (table.parent / "throughput.png").stat().st_size > 1000


def test_providers_take_turns_in_a_rotating_order() -> None:
    calls: list[str] = []

    def waits(name: str) -> None:
        calls.append(name)
        torch.randn(256, 256) @ torch.randn(256, 256)

    samples = run.interleave({n: lambda n=n: waits(n) for n in "ab"}, seconds=0, fewest=2)
    assert {name: len(s) for name, s in samples.items()} == {"a": 2, "b": 2}
    order = [n for i, n in enumerate(calls) if i == 0 or calls[i - 1] != n]
    assert order == ["a", "b", "a", "b", "a"]


def test_slope_of_a_line() -> None:
    assert memory.slope([(1, 5), (2, 7), (3, 9)]) == pytest.approx(2)


@needs_proc
def test_extra_memory_counts_what_a_call_creates() -> None:
    class Problem:
        held: object = None

        def call(self) -> None:
            self.held = torch.ones(4, 2**20)
            (self.held + 1).sum()

        def clear(self) -> None:
            self.held = None

        def results(self) -> dict[str, torch.Tensor]:
            return {}

    found = memory.extra_memory(Problem())
    assert 32 <= found["extra_mb"] <= 40
    assert found["peak_mb"] > found["extra_mb"]


@needs_proc
def test_memory_is_measured_in_a_fresh_process() -> None:
    found = memory.fresh_process("layer", "reference", quick=True)
    assert 0 <= found["extra_mb"] < found["peak_mb"]


def test_a_failing_measurement_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="exit status 1"):
        memory.fresh_process("layer", "reference", quick=True)


def test_profile_names_every_phase_and_writes_a_trace(
    tmp_path: Path, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["tms_5-2", "--backend", backend, "--batch", "32", "--steps", "1"]
    assert profile_step.main([*arguments, "--trace", str(trace)]) == 0
    said = capsys.readouterr().out
    phases = ["batch", "clean forward", "importances", "backward", "optimiser"]
    phases += [f"loss {name}" for name in step_trainer("tms_5-2", backend).coefficients]
    assert all(f"\n{phase} " in said for phase in phases)
    content = json.loads(trace.read_text(encoding="utf-8"))
    recorded = {event.get("name") for event in content["traceEvents"]}
    assert {f"phase: {phase}" for phase in phases} <= recorded
    assert "host_name" not in content
    expected = "aten::gelu" if backend == "reference" else "spd_fast::gate_forward"
    assert expected in recorded
