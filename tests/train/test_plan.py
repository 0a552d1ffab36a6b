"""Plans: what a run will need, before it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spd_fast import cli
from spd_fast.train.plan import make_plan
from tests.conftest import needs_extension
from tests.train.test_trainer import trainer


def planned(**changes):
    made = trainer(**changes)
    return make_plan(made.model, made.config, 9, measure=lambda _: 1e9)


def test_sites_and_parameters_are_listed():
    plan = planned()
    assert plan.sites["blocks.0.up"] == ("linear", 4, 6, 7, 7 * (4 + 6))
    assert "blocks.0.up" in plan.table()


def test_trained_numbers_gradients_and_moments_are_counted():
    made = trainer()
    numbers = 4 * sum(p.numel() for p in made.model.parameters())
    memory = planned().memory
    assert memory["components, importance fns"] == numbers
    assert memory["gradients"] == numbers
    assert memory["Adam's moments"] == 2 * numbers


def test_every_draw_keeps_activations_of_its_own():
    one, two = planned(draws=1).memory, planned(draws=2).memory
    assert one["importances"] == two["importances"]
    assert one["activations"] < two["activations"]


def test_an_adversary_keeps_sources():
    attack = {"pgd_recon": {"coeff": 1.0, "pgd_steps": 2, "step_size": 0.1}}
    assert planned().memory["adversarial sources"] == 0
    assert planned(losses=attack).memory["adversarial sources"] > 0


@needs_extension
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system keeps no peak to begin again"
)
def test_the_predicted_peak_is_within_15_per_cent_of_the_measured_one():
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.measure_peak"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Measured four times: 1.03 to 1.04.
    assert 0.85 < found["predicted"] / found["measured"] < 1.15


def test_the_command_line_plans_an_experiment(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "tms_5-2", "batch_size=64"])
    assert stopped.value.code in (0, None)
    out = capsys.readouterr().out
    assert "linear1" in out
    assert "64 positions a step" in out


def test_an_unknown_experiment_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "tms_5"])
    assert stopped.value.code == 2
    assert "unknown experiment 'tms_5'" in capsys.readouterr().err
