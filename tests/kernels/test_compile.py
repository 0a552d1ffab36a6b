"""The compile gate: it can fail, and its committed tables are of the kernels that ship.

The interpreter replaces what a compiler needs, so it runs in a process without it.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench/results"
SCRIPT = """
import json
from dataclasses import replace
from spd_fast.kernels import compile as gate, gate as kernels, registry
from spd_fast.kernels.configs import Config

cases = list(registry.cases())
backward = next(c for c in cases if c.name == "gate_backward" and c.constants["HIDDEN"] == 16)
product = next(c for c in cases if c.name == "gate_forward" and c.constants["PRODUCT"])
# 128 elements a thread of each of a dozen tiles; seven stages of two 128 x 128 operands.
spilling = replace(backward, config=Config({"BLOCK_N": 64, "BLOCK_C": 64}, num_warps=1))
greedy = replace(product, config=Config({"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_K": 128}, 8, 7))
broken = replace(backward, constants={**backward.constants, "HIDDEN": "two"})
rows = [
    gate.examine(spilling, "sm_90"), gate.examine(spilling, "gfx942"),
    gate.examine(greedy, "sm_90"), gate.examine(broken, "sm_90"),
]
gate._registered = lambda: (spilling,)
failed = gate.main(["--targets", "sm_90", "--jobs", "1"])
fine = next(c for c in cases if c.name == "uniform_column")
gate._registered = lambda: (fine,)
passed = gate.main(["--targets", "sm_90", "--jobs", "1"])
every = [(c.kernel.__name__, t, str(c.config), str(c))
         for c in cases if not c.full for t in gate.TARGETS]
print(json.dumps({"rows": rows, "failed": failed, "passed": passed, "every": every}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict:
    done = run("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_spill_is_found_on_nvidia_and_on_amd(seen):
    for row in seen["rows"][:2]:
        *_, stack, _, verdict = row
        assert verdict == "spills", row
        assert stack > 0


def test_shared_memory_beyond_the_targets_is_found(seen):
    *_, shared, verdict = seen["rows"][2]
    assert verdict == "too much shared memory", seen["rows"][2]
    assert shared > 227 * 1024


def test_what_does_not_compile_is_a_failure_with_its_reason(seen):
    *_, registers, stack, shared, verdict = seen["rows"][3]
    assert (registers, stack, shared) == (-1, -1, -1)
    assert "Error" in verdict


def test_one_failure_fails_the_gate(seen):
    assert (seen["failed"], seen["passed"]) == (1, 0)


@pytest.mark.parametrize(
    "table", sorted(RESULTS.glob("kernels_triton-*.csv")), ids=lambda p: p.stem
)
def test_the_committed_table_is_of_the_registry_and_clean(table, seen):
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["verdict"] for row in rows} == {"ok"}
    listed = Counter((r["kernel"], r["target"], r["tile"], r["specialisation"]) for r in rows)
    assert listed == Counter(map(tuple, seen["every"]))


def test_there_are_tables_for_triton_3_6_and_a_newer_one():
    versions = [p.stem.partition("-")[2] for p in RESULTS.glob("kernels_triton-*.csv")]
    assert any(v.startswith("3.6.") for v in versions)
    assert any(int(v.split(".")[1]) > 6 for v in versions)


def test_an_unknown_kernel_is_an_error_that_names_the_nearest():
    done = run("-m", "spd_fast.kernels.compile", "--kernels", "gate_forwrd")
    assert done.returncode == 2
    assert "unknown kernel 'gate_forwrd'; nearest: 'gate_forward'" in done.stderr
