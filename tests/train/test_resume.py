"""A run that is killed twice and resumed ends bit for bit as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 200, 20
# What `spd-fast run` does, without the report that follows.
PROGRAM = f"""
import sys
from pathlib import Path
from spd_fast import experiments
from spd_fast.train import set_keys

config = experiments.configuration(set_keys(experiments.recipe(sys.argv[2]), [
    "seed=3", "steps={STEPS}", "checkpoint_every={EVERY}", "log_every=10", "batch_size=64",
    "target.steps=100", "target.batch_size=64",
    *(["target.starts=2"] if "tms" in sys.argv[2] else []),
]))
experiments.run(config, Path(sys.argv[1]), quiet=True, resume=True)
"""


def start(out: Path, experiment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out), experiment],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def kill_after(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    """SIGKILL as soon as that checkpoint is there, while the run goes on past it."""
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / f"step_{step}").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "ms_per_step"} for line in lines]


TIMING = ("seconds", "ms_per_step", "peak_memory_mb")


def evaluation(out: Path) -> dict:
    found = json.loads((out / "eval.json").read_text())
    return {k: v for k, v in found.items() if k not in TIMING}


@pytest.fixture(scope="module", params=["tms_5-2", "resid_mlp1", "apd/tms_5-2"])
def runs(request, tmp_path_factory) -> tuple[Path, Path]:
    """One run left alone, one killed twice."""
    experiment = request.param
    folder = tmp_path_factory.mktemp("runs")
    alone, resumed = folder / "alone", folder / "resumed"
    whole = start(alone, experiment)
    kill_after(start(resumed, experiment), resumed, 3 * EVERY)
    kill_after(start(resumed, experiment), resumed, 7 * EVERY)
    finish(start(resumed, experiment))
    finish(whole)
    return alone, resumed


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "config.yaml",
        "target/model.safetensors",
        f"checkpoints/step_{STEPS}/model.safetensors",
        f"checkpoints/step_{STEPS}/optimizer.safetensors",
        f"checkpoints/step_{STEPS}/state.json",
    ],
)
def test_files_are_the_same_to_the_last_bit(runs, name):
    alone, resumed = runs
    assert (alone / name).read_bytes() == (resumed / name).read_bytes()


def test_metrics_are_the_same_but_for_timing(runs):
    alone, resumed = runs
    assert [line["step"] for line in metrics(alone)] == list(range(10, STEPS + 1, 10))
    assert metrics(alone) == metrics(resumed)


def test_evaluations_are_the_same_but_for_timing(runs):
    alone, resumed = runs
    assert evaluation(alone) == evaluation(resumed)


def test_nothing_half_written_is_left(runs):
    _, resumed = runs
    assert list(resumed.rglob(".*")) == []
