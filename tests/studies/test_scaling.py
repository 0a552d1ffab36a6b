"""The scaling study: its cells, when a series ends, fitted slopes, and one real measurement."""

from __future__ import annotations

import csv
import json
import subprocess

import pytest

from spd_fast.errors import UserError
from spd_fast.experiments import configuration
from spd_fast.studies import measure as measuring
from spd_fast.studies.scaling import METHODS, QUICK_SIZES, SIZES, scaling, settings, slope
from spd_fast.studies.study import Options


def components(data):
    return data["components"] if "components" in data else data["sites"]["linear1"]


@pytest.mark.parametrize("method", METHODS)
def test_the_components_series_grows_nothing_else(method):
    for size in (1, 8):
        data = settings(method, "components", size)
        assert components(data) == 40 * size
        assert (data["target"]["features"], data["target"]["hidden"]) == (40, 10)
        assert data["batch_size"] == 2048
        configuration(data)


@pytest.mark.parametrize(
    ("method", "published"),
    [("APD", 50), ("eager SPD", 200), ("spd_fast", 200)],
)
def test_the_width_series_begins_at_the_published_network(method, published):
    assert components(settings(method, "width", 1)) == published
    data = settings(method, "width", 4)
    assert (data["target"]["features"], data["target"]["hidden"]) == (160, 40)
    assert components(data) == 4 * published


def test_eager_and_fused_measure_the_same_run():
    assert settings("eager SPD", "width", 2) == settings("spd_fast", "width", 2)
    assert METHODS["eager SPD"][1] == "reference"


def answers(limit):
    """A measurement that runs out of memory past ``limit`` components, and what it was asked."""
    asked = []

    def take(data, **options):
        asked.append((components(data), options))
        if components(data) > limit:
            return {"status": "memory"}
        return {
            "status": "ok", "ms": 2.0 * components(data), "cpu_ms": 1.0, "steps": 3,
            "peak_mb": 0.5 * components(data) ** 2, "bare_mb": 200.0, "threads": 1,
        }  # fmt: skip

    return take, asked


def rows_of(folder):
    with (folder / "scaling.csv").open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_series_ends_where_memory_does(tmp_path):
    take, asked = answers(300)
    scaling(Options(tmp_path / "s", quiet=True), memory_mb=100, take=take)
    rows = [r for r in rows_of(tmp_path / "s") if r["series"] == "components"]
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method]
        assert [(int(r["components"]), r["status"]) for r in mine] == [
            (40, "ok"), (80, "ok"), (160, "ok"), (320, "memory"),
        ]  # fmt: skip
        assert mine[-1]["ms"] == ""
    assert all(options["memory_mb"] == 100 for _, options in asked)
    assert (tmp_path / "s" / "scaling.png").stat().st_size > 5000


def test_cells_that_are_measured_are_not_measured_again(tmp_path):
    take, asked = answers(300)
    options = Options(tmp_path / "s", quick=True, quiet=True)
    scaling(options, memory_mb=100, take=take)
    once, table = len(asked), rows_of(tmp_path / "s")
    (tmp_path / "s" / "cells" / "width-spd_fast-1.json").unlink()
    scaling(options, memory_mb=100, take=take)
    assert len(asked) == once + 1
    assert rows_of(tmp_path / "s") == table


def test_a_cell_keeps_its_machine_and_limit(tmp_path):
    take, _ = answers(300)
    scaling(Options(tmp_path / "s", quick=True, quiet=True), memory_mb=100, take=take)
    cell = json.loads((tmp_path / "s" / "cells" / "width-spd_fast-1.json").read_text())
    assert cell["memory_limit_mb"] == 100
    assert "processor" in cell["environment"]


def test_quick_measures_the_first_sizes(tmp_path):
    take, asked = answers(10**9)
    scaling(Options(tmp_path / "s", quick=True, quiet=True), memory_mb=100, take=take)
    assert len(asked) == 2 * len(METHODS) * len(QUICK_SIZES)
    assert set(QUICK_SIZES) < set(SIZES)


def test_another_failure_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"components-.*-1: failed \(1\): oops"):
        scaling(
            Options(tmp_path / "s", quick=True, quiet=True), memory_mb=100,
            take=lambda *_, **__: {"status": "failed (1): oops"},
        )  # fmt: skip


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_slope_is_the_exponent_of_the_larger_sizes(exponent):
    sizes = [1, 2, 4, 8, 16, 32]
    assert slope(sizes, [3 * s**exponent for s in sizes]) == pytest.approx(exponent)
    flat_below = [3 * max(s, 8) ** exponent for s in sizes]
    assert slope(sizes, flat_below) == pytest.approx(exponent)


def test_two_sizes_have_no_slope():
    assert slope([1, 2], [1, 2]) is None


TINY = settings("spd_fast", "components", 1) | {"batch_size": 64}


def test_a_step_is_measured_in_a_process_of_its_own():
    found = measuring.measure(
        TINY, backend="auto", device="cpu", memory_mb=2000, seconds=900, before=TINY
    )
    assert found["status"] == "ok"
    assert found["ms"] > 0
    assert 0 <= found["peak_mb"] < 100
    assert found["bare_mb"] > 50
    assert 1 <= found["steps"] <= measuring.MOST_STEPS


@pytest.mark.skipif(
    measuring.available_memory_mb() == float("inf"), reason="only Linux counts private memory"
)
def test_a_step_that_does_not_fit_runs_out_of_memory():
    large = settings("spd_fast", "components", 512) | {"batch_size": 4096}
    found = measuring.measure(large, backend="reference", device="cpu", memory_mb=100, seconds=900)
    assert found == {"status": "memory"}


def test_a_step_that_takes_too_long_is_ended():
    found = measuring.measure(TINY, backend=None, device="cpu", memory_mb=2000, seconds=0.01)
    assert found == {"status": "time"}


@pytest.mark.parametrize(
    ("code", "stderr", "status"),
    [
        (1, "Traceback\nUserError: missing key 'preset'\n", "failed (1): UserError: missing key"),
        (-9, "", "memory"),
        (1, "RuntimeError: [enforce fail] can't allocate memory: you tried", "memory"),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'", "memory"),
        (-11, "", "failed (-11): "),
    ],
)
def test_the_end_of_a_process_says_why(monkeypatch, code, stderr, status):
    ended = subprocess.CompletedProcess([], code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    found = measuring.measure({}, backend=None, device=None, memory_mb=1, seconds=1)
    assert found["status"].startswith(status)
