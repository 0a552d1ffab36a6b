"""Studies: what they plan to run, what their tables say, what they skip and refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.image
import pytest

from spd_fast.cli import main
from spd_fast.errors import UserError
from spd_fast.experiments import Outcome, expected_sites, recipe
from spd_fast.report.style import drawing
from spd_fast.studies import (
    NAMES,
    STUDIES,
    Options,
    carry_out,
    check_name,
    convergence,
    importance,
    robustness,
    splitting,
    tables,
    variants,
)
from spd_fast.studies.study import write_results
from spd_fast.train import Config, set_keys

TINY = [
    "steps=2", "batch_size=16", "target.steps=2", "target.batch_size=16", "log_every=1",
]  # fmt: skip


def evaluated(config, live=None, found=None):
    """An evaluation as a run of ``config`` would write it."""
    known = expected_sites(config)
    return Outcome(
        {
            "name": config.name, "seed": config.seed, "recovered": True, "steps": config.steps,
            "seconds": 1.5, "target_represents_all_features": True,
            "neuron_contributions": {"r2": 0.99, "slope": 1.0},
            "reconstruction": {"stochastic": 1e-6, "zero": 1e-3},
            "sites": {
                site: {
                    "components": 4 * e.components, "live_components": live or e.components,
                    "ci_error": 0, "ci_margins": [0.95, 0.02], "l0": 1.0, "mmcs": 1.0, "ml2r": 0.9,
                    "mechanisms_found": found,
                }
                for site, e in known.items()
            },
        }
    )  # fmt: skip


def read(path):
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


# What is planned.


def test_splitting_goes_from_the_needed_number_to_sixteen_times():
    plan = splitting.plan(False, (0, 1))
    assert len(plan) == 2 * 5 * 2
    config = plan["tms_40-10-id-x16-seed1"].config
    assert config.sites == {"linear1": 640, "hidden_layers.0": 160, "linear2": 640}
    assert plan["tms_5-2-id-x1-seed0"].config.sites == {
        "linear1": 5, "hidden_layers.0": 2, "linear2": 5,
    }  # fmt: skip
    assert config.seed == 1
    assert config.steps == 40_000


def test_the_importance_sweep_is_the_papers():
    plan = importance.plan(False, (0,))
    found = [c.config.losses.importance_minimality.coeff for c in plan.values()]
    assert found == [1e-6, 3e-6, 1e-5, 1e-4, 1e-3]
    assert {c.config.steps for c in plan.values()} == {30_000}


def test_robustness_sweeps_two_decades_around_the_published_values():
    plan = robustness.plan(False, (0,))
    for network in robustness.NETWORKS:
        points = [p for c in plan.values() for p in c.points if p["network"] == network]
        assert len(points) == 7 * 4
        for method, hyperparameter in robustness.KNOBS:
            mine = [p for p in points if p["hyperparameter"] == hyperparameter]
            assert {p["method"] for p in mine} == {method}
            assert sorted(p["multiplier"] for p in mine) == [0.1, 0.2, 0.5, 1, 2, 5, 10]
            (published,) = [p["value"] for p in mine if p["multiplier"] == 1]
            for p in mine:
                assert p["value"] == pytest.approx(p["multiplier"] * published)


def test_robustness_gives_both_methods_the_same_number_of_samples():
    for cell in robustness.plan(False, (0,)).values():
        assert not isinstance(cell.config, Config) or cell.config.starts.count == 1
        assert cell.config.steps * cell.config.batch_size == robustness.SAMPLES


def test_robustness_changes_one_hyperparameter_at_a_time():
    plan = robustness.plan(False, (0,))
    for key, cell in plan.items():
        published = plan[f"{key.split('-tms')[0]}-{cell.points[0]['network']}-published-seed0"]
        ours, theirs = (c.config.model_dump() for c in (cell, published))
        assert sum(ours[k] != theirs[k] for k in ours) == ("published" not in key)


def test_the_published_run_stands_for_both_hyperparameters():
    cell = robustness.plan(False, (3,))["SPD-tms_5-2-published-seed3"]
    assert [p["hyperparameter"] for p in cell.points] == [
        "importance coefficient", "learning rate",
    ]  # fmt: skip
    assert cell.config.losses.importance_minimality.coeff == 3e-3


@pytest.mark.parametrize("name", STUDIES)
def test_quick_is_the_same_study_in_small(name):
    study = STUDIES[name]
    whole, quick = study.plan(False, (0,)), study.plan(True, (0,))
    assert len(quick) < len(whole) or len(whole) == 1
    assert sum(c.config.steps for c in quick.values()) < sum(c.config.steps for c in whole.values())
    assert max(c.config.steps for c in quick.values()) <= 1000


# What the tables say.


def test_splitting_counts_live_components_of_every_site():
    plan = splitting.plan(True, (0,))
    found = {k: evaluated(c.config, live=7) for k, c in plan.items()}
    rows = splitting.rows(plan, found)
    assert len(rows) == 3 * len(plan)
    row = next(r for r in rows if r["site"] == "hidden_layers.0" and r["multiple"] == 4)
    assert (row["needed"], row["live_components"], row["network"]) == (2, 7, "tms_5-2-id")


def test_robustness_is_the_fraction_of_mechanisms_and_zero_where_training_diverged():
    plan = robustness.plan(True, (0,))
    found = {k: evaluated(c.config, found=4) for k, c in plan.items()}
    bad = next(k for k in plan if "lr-x10" in k)
    found[bad] = Outcome(None, "loss is nan")
    rows = robustness.rows(plan, found)
    assert len(rows) == 3 * 4
    for row in rows:
        diverged = row["hyperparameter"] == "learning rate" and row["multiplier"] == 10
        assert row["fraction"] == (0 if diverged else 4 / 5)
        assert row["diverged"] == diverged


def test_runs_that_are_missing_have_no_row():
    for module in (splitting, robustness, importance, variants, convergence):
        assert module.rows(module.plan(True, (0,)), {}) == []


@pytest.mark.parametrize("module", [splitting, robustness])
def test_figures_show_every_network(module, tmp_path):
    plan = module.plan(False, (0,))
    found = {k: evaluated(c.config, found=3) for k, c in plan.items()}
    rows = module.rows(plan, found)
    write_results("x", rows, lambda: module.draw(rows, tmp_path), tmp_path)
    assert len(read(tmp_path / "x.csv")) == len(rows)
    picture = matplotlib.image.imread(tmp_path / "x.png")
    assert picture[..., :3].std() > 0.02
    assert picture.shape[1] > 1.8 * picture.shape[0]


def test_robustness_shows_curves_that_lie_on_each_other():
    """All four at 1: each keeps pixels of its own colour, not in the legend alone."""
    plan = robustness.plan(True, (0,))
    rows = robustness.rows(plan, {k: evaluated(c.config, found=5) for k, c in plan.items()})
    assert {row["fraction"] for row in rows} == {1}
    with drawing():
        (ax,) = robustness.draw(rows, Path()).axes
    sizes = [line.get_markersize() for line in ax.lines]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(robustness.KNOBS)
    assert all(line.get_markerfacecolor() == "none" for line in ax.lines)


# Carrying them out.


def shrink(monkeypatch, module, name, *more):
    """A study's network ``name``, tiny, as its quick version."""
    small = set_keys(recipe(name), [
        *TINY, "target.features=4", "target.d_embed=8", "target.d_mlp=3", "ci_fn=linear",
        "sites.layers.*.mlp_in=4", "sites.layers.*.mlp_out=4", *more,
    ])  # fmt: skip
    monkeypatch.setattr(module, "recipe", lambda _: small)
    monkeypatch.setattr(module, "QUICK_MLP", [])


def test_a_study_is_carried_out_once_and_drawn_again(tmp_path, monkeypatch):
    shrink(monkeypatch, importance, "resid_mlp1")
    paths = carry_out("importance", Options(tmp_path / "out", quick=True, quiet=True))
    assert [p.name for p in paths] == ["importance.csv", "importance.png"]
    rows = read(paths[0])
    assert [(r["coefficient"], r["site"]) for r in rows] == [
        ("1e-06", "layers.0.mlp_in"), ("1e-06", "layers.0.mlp_out"),
        ("0.001", "layers.0.mlp_in"), ("0.001", "layers.0.mlp_out"),
    ]  # fmt: skip
    runs = tmp_path / "out" / "runs"
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("eval.json")}
    assert len(before) == 2
    table = paths[0].read_bytes()
    carry_out("importance", Options(tmp_path / "out", quick=True, quiet=True))
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("eval.json")} == before
    assert paths[0].read_bytes() == table


def test_variants_change_one_thing_each_in_the_published_recipe():
    plan = variants.plan(False, (0, 1))
    assert len(plan) == 2 * len(variants.VARIANTS_OF)
    published = plan["published-seed0"].config.model_dump()
    assert published == Config(**(recipe("resid_mlp2") | {"steps": 5000, "seed": 0})).model_dump()
    for key, cell in plan.items():
        label = cell.points[0]["variant"]
        ours = cell.config.model_dump() | {"seed": 0}
        changed = {k for k in published if ours[k] != published[k]}
        if label == variants.ROBUST:
            assert {"name", "losses"} <= changed
        else:
            assert len(changed) == int(label != "published"), (key, changed)
    assert {c.config.name for c in plan.values()} == {"resid_mlp2", "resid_mlp2-robust"}


def test_variants_say_what_each_site_gets_and_which_diverged(tmp_path):
    plan = variants.plan(False, (0, 1))
    found = {k: evaluated(c.config, live=7) for k, c in plan.items()}
    found["rate_times_3-seed1"] = Outcome(None, "loss is nan")
    table = variants.rows(plan, found)
    assert len(table) == len(plan)
    (bad,) = (row for row in table if row["diverged"])
    assert (bad["variant"], bad["seed"], bad["errors"]) == ("rate × 3", 1, None)
    good = table[0]
    assert (good["live_components"], good["ci_error"], good["errors"]) == ("7 7 7 7", "0 0 0 0", 0)
    assert (good["lowest_on"], good["highest_off"]) == (0.95, 0.02)
    paths = write_results("x", table, lambda: variants.draw(table, tmp_path), tmp_path)
    lines = tables.variants_table(read(paths[0])).splitlines()
    assert len(lines) == 2 + len(plan)
    assert sum("| diverged |" in line for line in lines) == 1
    assert "| 7+7+7+7 | 0+0+0+0 | 0.950 | 0.020 | 0.9900 | 1.000 |" in lines[2]
    with drawing():
        left, right = variants.draw(table, tmp_path).axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == list(variants.VARIANTS_OF)
    assert [len(line.get_xdata()) for line in right.lines] == [len(plan) / 2, len(plan) / 2 - 1]


def test_convergence_shows_what_was_logged_on_the_way(tmp_path, monkeypatch):
    shrink(monkeypatch, convergence, "resid_mlp3", "steps=12", "target.probability=0.5")
    paths = carry_out("convergence", Options(tmp_path / "out", quick=True, quiet=True))
    assert [p.name for p in paths] == ["convergence.csv", "convergence.png"]
    rows = read(paths[0])
    assert [r["site"] for r in rows] == [
        f"layers.{i}.{end}" for i in range(3) for end in ("mlp_in", "mlp_out")
    ]
    assert {r["steps"] for r in rows} == {"12"}
    with drawing():
        left, right = convergence.draw(
            [{"run": "resid_mlp3-seed0", "steps": 12}], tmp_path / "out" / "runs"
        ).axes
    metrics = tmp_path / "out" / "runs" / "resid_mlp3-seed0" / "metrics.jsonl"
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line.get_label() for line in right.lines] == [r["site"] for r in rows]
    assert "stochastic recon" in {line.get_label() for line in left.lines}
    assert [step["step"] for step in logged] == [5, 10, 12]
    for line in right.lines:
        assert list(line.get_ydata()) == [step["l0"][line.get_label()] for step in logged]


def test_convergence_is_the_beginning_of_the_whole_run():
    (cell,) = convergence.plan(False, (0,)).values()
    whole = recipe("resid_mlp3")
    assert whole["lr_schedule"] == "constant"
    assert cell.config.model_dump() == Config(**(whole | {"steps": 5000, "seed": 0})).model_dump()


def test_an_unknown_study_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown study 'splitings'; nearest: 'splitting'"):
        check_name("splitings")
    for name in NAMES:
        check_name(name)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for name in NAMES:
        with pytest.raises(UserError, match=r"holds other things \(thesis.tex\)"):
            carry_out(name, Options(tmp_path, quick=True, quiet=True))
    with pytest.raises(UserError, match="is a file"):
        carry_out("splitting", Options(tmp_path / "thesis.tex", quick=True, quiet=True))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["robust"], "unknown study 'robust'; nearest: 'robustness'"),
        (["splitting", "--seeds", "b"], "needs numbers such as 0-4"),
        (["splitting", "--jobs", "0"], "--jobs needs at least 1"),
        (["splitting", "--memory-mb", "5"], "--memory-mb goes with study scaling"),
        (["scaling", "--seeds", "0"], "no --seeds"),
        (["scaling", "--backend", "cpu"], "leave --backend out"),
        (["scaling", "--memory-mb", "0"], "--memory-mb needs to be positive"),
        (["scaling", "--memory-mb", "nan"], "--memory-mb needs to be positive"),
        (["splitting", "--device", "abacus"], "unknown device 'abacus'"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_status_two_and_nothing_written(
    tmp_path, monkeypatch, capsys, arguments, match
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["study", *arguments])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert match in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_its_files(tmp_path, monkeypatch, capsys):
    made = [tmp_path / "splitting.csv", tmp_path / "splitting.png"]
    seen = []
    monkeypatch.setattr(
        "spd_fast.studies.carry_out", lambda name, options, **more: seen.append(options) or made
    )
    with pytest.raises(SystemExit) as left:
        main(["study", "splitting", "--quick", "--seeds", "0-2", "--jobs", "2"])
    assert left.value.code == 0
    assert capsys.readouterr().out.splitlines() == [str(p) for p in made]
    assert seen[0].seeds == [0, 1, 2]
    assert str(seen[0].out) == "runs/studies-quick/splitting"
    assert json.dumps(seen[0].jobs) == "2"
