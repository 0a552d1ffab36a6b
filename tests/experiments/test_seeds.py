"""Several seeds of one experiment: which they are, and what they come to."""

from __future__ import annotations

import json
import statistics

import pytest

from spd_fast.errors import UserError
from spd_fast.experiments import Outcome, aggregate, parse_seeds, run_seeds
from spd_fast.experiments.seeds import spread
from spd_fast.report import seeds_summary
from tests.experiments.conftest import small, tree

FEW = ["steps=2", "target.steps=2", "log_every=1"]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-4", [0, 1, 2, 3, 4]),
        ("0,2,5", [0, 2, 5]),
        ("3", [3]),
        ("7, 0-2 ,1", [7, 0, 1, 2]),
        ("4294967295", [2**32 - 1]),
    ],
)
def test_seeds_are_ranges_and_lists(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "needs numbers such as 0-4 or 0,2,5, got ''"),
        ("a", "got 'a'"),
        ("1,,2", "got '1,,2'"),
        ("-1", "got '-1'"),
        ("1.5", "got '1.5'"),
        ("٣", "got '٣'"),
        ("4-0", "the range 4-0 ends before it begins"),
        ("4294967296", r"below 2\^32"),
        ("0-99999", "at most 1000 seeds, got 0-99999"),
        ("0-999,1000", "at most 1000 seeds, got 1001"),
    ],
)
def test_other_texts_are_errors_of_one_line(text, match):
    with pytest.raises(UserError, match=match) as caught:
        parse_seeds(text)
    assert "\n" not in str(caught.value)


def test_the_spread_is_the_sample_standard_deviation():
    values = [1.0, 2.5, -3.0, 0.25]
    assert spread(values) == {
        "mean": pytest.approx(statistics.mean(values)),
        "std": pytest.approx(statistics.stdev(values)),
        "min": -3.0,
        "max": 2.5,
    }


def test_a_single_value_has_no_spread():
    assert spread([2.0]) == {"mean": 2.0, "std": None, "min": 2.0, "max": 2.0}


def evaluated(recovered, ml2r, complete=True, **more):
    site = {
        "mmcs": 1.0,
        "ml2r": ml2r,
        "ci_error": 0,
        "live_components": 5,
        "mechanisms_found": None,
    }
    return Outcome(
        {"recovered": recovered, "target_represents_all_features": complete, "seconds": 1.0,
         "sites": {"linear1": site}} | more
    )  # fmt: skip


FOUND = {
    0: evaluated(True, 0.9),
    1: evaluated(False, 1.1),
    2: evaluated(True, 50.0, complete=False),
    3: Outcome(None, "loss is nan"),
}


def test_recovered_is_a_fraction_of_the_seeds_that_count():
    found = aggregate("x", FOUND)
    assert found["recovered"] == {"seeds": [0], "of": 3, "fraction": pytest.approx(1 / 3)}
    assert (found["seeds"], found["target_incomplete"]) == ([0, 1, 2, 3], [2])
    assert found["diverged"] == {3: "loss is nan"}


def test_incomplete_targets_stay_out_of_the_means():
    site = aggregate("x", FOUND)["sites"]["linear1"]
    assert site["ml2r"]["mean"] == pytest.approx(1.0)
    assert site["ml2r"]["std"] == pytest.approx(statistics.stdev([0.9, 1.1]))


def test_numbers_that_no_seed_has_are_left_out():
    found = aggregate("x", FOUND)
    assert "mechanisms_found" not in found["sites"]["linear1"]
    assert found["neuron_contributions"] is None


def test_neuron_contributions_are_aggregated():
    neurons = [{"r2": r2, "slope": 1.0, "layers": []} for r2 in (0.5, 0.7)]
    found = aggregate(
        "x", {s: evaluated(True, 1.0, neuron_contributions=n) for s, n in enumerate(neurons)}
    )
    assert found["neuron_contributions"]["r2"]["mean"] == pytest.approx(0.6)


def test_nothing_that_counts_has_no_fraction():
    found = aggregate("x", {2: FOUND[2]})
    assert found["recovered"] == {"seeds": [], "of": 0, "fraction": None}
    assert found["sites"] == {}


def test_the_summary_is_a_line():
    assert seeds_summary(aggregate("x", FOUND)) == (
        "x: recovered on 1 of 3 seeds; MMCS 1.0000 ± 0.0000; ML2R 1.000 ± 0.141; 1 diverged; "
        "1 left out: target incomplete"
    )


def configs(*seeds):
    return {s: small(*FEW, f"seed={s}") for s in seeds}


def test_seeds_are_run_into_their_folders_and_continued(tmp_path):
    out = tmp_path / "out"
    by_seed, together = run_seeds(configs(0, 3), out, quiet=True)
    assert list(by_seed) == [0, 3]
    assert sorted(p.name for p in out.iterdir()) == ["aggregate.json", "seed0", "seed3"]
    assert json.loads((out / "aggregate.json").read_text()) == json.loads(json.dumps(together))
    before = tree(out / "seed0")
    _, more = run_seeds(configs(0, 1, 3), out, quiet=True)
    assert more["seeds"] == [0, 1, 3]
    assert tree(out / "seed0") == before


def test_a_folder_of_a_single_run_is_refused(tmp_path, finished):
    with pytest.raises(UserError, match="holds a single run"):
        run_seeds(configs(0), finished, quiet=True)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds other things"):
        run_seeds(configs(0), tmp_path, quiet=True)
    with pytest.raises(UserError, match="is a file"):
        run_seeds(configs(0), tmp_path / "thesis.tex", quiet=True)
