"""Everything of the paper: the list of runs, what is run of it, and the page made from it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from spd_fast.cli import main
from spd_fast.errors import UserError
from spd_fast.experiments import configuration, recipe, recipes
from spd_fast.studies import Options, document, sources
from spd_fast.studies.paper import SEEDS, STUDIES, claims, folder_of, paper, planned
from spd_fast.studies.scaling import METHODS, SIZES
from spd_fast.studies.study import write_csv
from spd_fast.train import set_keys

ROOT = Path(__file__).parents[2]
TINY = [
    "steps=2", "batch_size=16", "target.steps=2", "target.batch_size=16", "target.starts=1",
    "log_every=1",
]  # fmt: skip


def test_every_recipe_is_in_the_paper():
    toys = ("tms", "resid_mlp")
    assert set(SEEDS) == {n for n in recipes() if recipe(n)["target"].get("kind") in toys}


def test_claims_are_the_recipes_as_they_ship():
    runs = claims(False)
    assert len(runs) == sum(map(len, SEEDS.values()))
    for name, of in SEEDS.items():
        for seed in of:
            shipped = configuration(recipe(name) | {"seed": seed})
            assert runs[f"{folder_of(name)}/seed{seed}"] == shipped


def test_table_1_has_five_seeds_of_spd_and_two_of_apd():
    for network in ("tms_5-2", "tms_40-10", "tms_5-2-id", "tms_40-10-id"):
        assert SEEDS[network] == (0, 1, 2, 3, 4)
    for network in ("tms_5-2", "tms_40-10"):
        assert len(SEEDS[f"apd/{network}"]) >= 2
    assert SEEDS["resid_mlp1"] == (0, 1, 2)


@pytest.mark.parametrize("quick", [False, True])
def test_no_two_runs_share_a_folder(quick):
    runs, plans = planned(quick)
    assert len(runs) == len(claims(quick)) + sum(map(len, plans.values()))
    for one in runs:
        assert not any(other.startswith(f"{one}/") for other in runs)


@pytest.fixture
def little(monkeypatch):
    """The paper with two seeds of one tiny recipe and no studies."""
    small = set_keys(recipe("tms_5-2"), TINY)
    monkeypatch.setattr("spd_fast.studies.paper.SEEDS", {"tms_5-2": (0, 1)})
    monkeypatch.setattr("spd_fast.studies.paper.STUDIES", {})
    monkeypatch.setattr("spd_fast.studies.paper.recipe", lambda _: small)
    monkeypatch.setattr("spd_fast.studies.paper.scaling", lambda *_, **__: [])
    monkeypatch.setattr(
        "spd_fast.studies.paper.write_report", lambda run: (run.folder / "report.html").touch()
    )


def test_the_paper_is_run_once_and_continued(tmp_path, little):
    out = tmp_path / "paper"
    (aggregate,) = paper(Options(out, quiet=True), only="tms_5-2/seed1")
    assert json.loads(aggregate.read_text())["seeds"] == [1]
    before = (out / "tms_5-2" / "seed1" / "eval.json").stat().st_mtime_ns
    (out / "tms_5-2" / "seed1" / "report.html").unlink()  # as a kill before it leaves the run
    (aggregate,) = paper(Options(out, quiet=True))
    assert json.loads(aggregate.read_text())["seeds"] == [0, 1]
    (aggregate,) = paper(Options(out, quiet=True), only="tms_5-2/seed0")
    assert json.loads(aggregate.read_text())["seeds"] == [0, 1]
    assert (out / "tms_5-2" / "seed1" / "eval.json").stat().st_mtime_ns == before
    for seed in (0, 1):
        assert (out / "tms_5-2" / f"seed{seed}" / "report.html").exists()


def test_a_pattern_without_a_run_is_an_error(tmp_path):
    match = (
        r"--only 'tms_6\*' matches no run; runs are called as .*'studies/splitting/\*'.*'scaling'"
    )
    with pytest.raises(UserError, match=match):
        paper(Options(tmp_path / "out", quiet=True), only="tms_6*")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.yaml", "aggregate.json"])
def test_the_folder_of_a_run_is_no_place_for_the_paper(tmp_path, little, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=rf"holds a run \({name}\); choose another"):
        paper(Options(tmp_path, quiet=True))
    assert [p.name for p in tmp_path.iterdir()] == [name]


# The page.


@pytest.fixture
def page(tmp_path):
    """The page that ships, without its sources."""
    return Path(shutil.copy(ROOT / "docs" / "paper.md", tmp_path / "paper.md"))


def test_the_page_that_ships_is_up_to_date(tmp_path):
    copied = Path(shutil.copy(ROOT / "docs" / "paper.md", tmp_path / "paper.md"))
    shutil.copytree(ROOT / "docs" / "paper", tmp_path / "paper")
    document.write_page(copied)
    fresh = copied.read_text() == (ROOT / "docs" / "paper.md").read_text()
    assert fresh, "run: spd-fast paper --page docs/paper.md"


def test_without_sources_everything_is_not_measured(page):
    document.write_page(page)
    text = page.read_text()
    for name, of in SEEDS.items():
        listed = ",".join(map(str, of))
        assert f"`spd-fast run {name} --seeds {listed} --out runs/paper/{folder_of(name)}`" in text
    for name in ("splitting", "robustness", "importance", "variants", "convergence", "scaling"):
        assert f"not measured: `spd-fast study {name} " in text
    assert "| yes |" not in text


def test_tables_are_well_formed(page):
    document.write_page(page)
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def record(name, seed, **changes):
    """The record of a recovered run."""
    from spd_fast.experiments import expected_sites

    config = configuration(recipe(name) | {"seed": seed})
    sites = {
        site: {
            "mmcs": 1.0, "mmcs_std": 0.0, "ml2r": 0.99 + 0.01 * seed, "ml2r_std": 0.001,
            "live_components": e.components, "components": 200, "ci_error": 0,
        }
        for site, e in expected_sites(config).items()
    }  # fmt: skip
    evaluation = {
        "name": name, "seed": seed, "recovered": True, "target_represents_all_features": True,
        "sites": sites, "steps": config.steps, "seconds": 5.0,
        "neuron_contributions": {"r2": 0.9975, "slope": 1.02, "layers": []}
        if "resid" in name else None,
    }  # fmt: skip
    return {
        "date": "2026-01-02 03:04 UTC", "processor": "Abacus", "threads": 1, "cuda": None,
        "torch": "2.0", "spd_fast": "0.1", "evaluation": evaluation | changes,
    }  # fmt: skip


def put(page, *records):
    folder = page.with_suffix("") / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(records):
        (folder / f"{i}.json").write_text(json.dumps(one))


def lines(page, *words):
    document.write_page(page)
    return [line for line in page.read_text().splitlines() if all(w in line for w in words)]


def test_a_run_is_a_row_with_its_machine_and_the_rest_stays_unmeasured(page):
    put(page, record("tms_5-2", 0), record("tms_5-2", 2))
    (row,) = lines(page, "| tms_5-2 | 2 | yes")
    assert "| yes | 1.000 ± .000 | 1.0000 ± 0.0000 | 0.993 ± .002 | 1.010 ± 0.001 |" in row
    assert "Abacus, 1 thread(s); torch 2.0; 2026-01-02" in row
    (mean,) = lines(page, "| tms_5-2 | all 2 |")
    assert "2 of 2" in mean
    assert "1.000 ± 0.014" in mean
    (rest,) = lines(page, "| tms_5-2 | 1, 3, 4 | not measured")
    assert "--seeds 1,3,4 --out runs/paper/tms_5-2`" in rest


def test_residual_mlps_have_their_own_columns(page):
    put(page, record("resid_mlp2", 0))
    (row,) = lines(page, "| resid_mlp2 | 0 |")
    assert "| yes | 100+100 (errors 0+0) | 25+25 (errors 0+0) | 0.9975 | 1.020 |" in row


def test_apd_on_residual_mlps_has_no_neuron_contributions_to_show(page):
    put(page, record("apd/resid_mlp1", 0, neuron_contributions=None, recovered=False))
    (row,) = lines(page, "| apd/resid_mlp1 | 0 | no |")
    assert "| 100 (errors 0) | 50 (errors 0) | — | — |" in row


def test_incomplete_targets_count_for_neither_side(page):
    put(page, record("tms_5-2", 0), record("tms_5-2", 1, target_represents_all_features=False))
    assert lines(page, "| tms_5-2 | 2 | 1 of 1 | 1 |")
    assert lines(page, "| tms_5-2 | 1 | target incomplete |")


def test_estimates_are_steps_times_cpu_time(page):
    page.with_suffix("").mkdir()
    costs = {"tms_5-2": {"status": "ok", "cpu_ms": 10.0}, "resid_mlp3": {"cpu_ms": 3000.0}}
    (page.with_suffix("") / "estimates.json").write_text(json.dumps(costs))
    (row,) = lines(page, "| tms_5-2 | 0, 1, 2, 3, 4 |")
    # 5 seeds of 40,000 steps, and of 10,000 from the second start
    assert row.endswith("about 42 min |")
    (row,) = lines(page, "| resid_mlp3 | 0, 1, 2 |")
    assert row.endswith("about 10.4 days |")
    (row,) = lines(page, "| tms_40-10 | 0, 1, 2, 3, 4 |")
    assert row.endswith("no estimate |")


def place(folder, name, table, **where):
    """A study among the sources of a page."""
    (folder / f"{name}.csv").write_text(table)
    (folder / f"{name}.png").write_text("x")
    rows = len(table.splitlines()) - 1
    empty = {"machines": [], "versions": [], "days": [], "memory_mb": []}
    where = empty | {"rows": rows} | where
    (folder / f"{name}.json").write_text(json.dumps(where))


def test_a_study_shows_its_figure_and_its_table(page):
    folder = page.with_suffix("")
    folder.mkdir()
    header = "network,seed,multiple,site,needed,components,live_components,ci_error,recovered"
    lines_ = ["tms_5-2-id,0,4,linear1,5,20,5,0,True", "tms_5-2-id,0,4,linear2,5,20,6,0,True"]
    place(folder, "splitting", "\n".join([header, *lines_, ""]))
    assert lines(page, "![splitting](paper/splitting.png)")
    assert lines(page, "| tms_5-2-id | 0 | 4× | 5 of 20 | 6 of 20 | True |")


def test_a_mark_without_a_table_is_an_error():
    with pytest.raises(UserError, match="no table 'nope'; known: a"):
        document.fill("<!-- table: nope -->\n<!-- end -->", {"a": ""})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("A\n[a]\nold\nprose\n[b]\nold\n[end]\n", "'a' has no <!-- end --> before table 'b'"),
        ("[a]\n[a]\nold\n[end]\n", "'a' has no <!-- end --> before table 'a'"),
        ("[a]\nold\n[end]\nprose\n[b]\nold\n", "'b' has no <!-- end --> after it"),
        ("prose\n[end]\n[a]\n[end]\n", "line 2: <!-- end --> without a table's mark"),
        ("[a]\n[end]\n[end]\n", "line 3: <!-- end --> without a table's mark"),
        ("prose", "no <!-- table: NAME -->"),
        ("", "no <!-- table: NAME -->"),
        ("in prose [a] and [end]", "no <!-- table: NAME -->"),
    ],
)
def test_marks_that_are_not_in_pairs_leave_the_page_as_it_is(page, text, match):
    marked = re.sub(r"\[(a|b)\]", r"<!-- table: \1 -->", text).replace("[end]", "<!-- end -->")
    with pytest.raises(UserError, match=re.escape(match)):
        document.fill(marked, {"a": "A\n", "b": "B\n"})
    page.write_text(marked)
    with pytest.raises(UserError, match="cannot fill"):
        document.write_page(page)
    assert page.read_text() == marked


def test_what_stands_between_the_tables_stays():
    text = "one\n<!-- table: a -->\nold\n<!-- end -->\ntwo\n<!-- table: b -->\n<!-- end -->\nthree"
    filled = document.fill(text, {"a": "A\n", "b": "B\n"})
    assert filled == text.replace("old\n", "A\n").replace("b -->\n", "b -->\nB\n")


def test_filling_twice_changes_nothing(page):
    put(page, record("tms_5-2", 0))
    document.write_page(page)
    once = page.read_bytes()
    document.write_page(page)
    assert page.read_bytes() == once


# Collecting.


@pytest.fixture
def shipped(monkeypatch):
    """As if tiny runs of tms_5-2 were the recipe."""
    monkeypatch.setattr(sources, "recipe_changes", lambda _: [])


def test_finished_runs_are_collected_with_date_and_machine(tmp_path, finished, shipped):
    (path,) = sources.collect([finished], tmp_path / "paper")
    assert path == tmp_path / "paper" / "evaluations" / "tms_5-2-seed2.json"
    found = json.loads(path.read_text())
    assert found["evaluation"] == json.loads((finished / "eval.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    assert found["processor"]


@pytest.mark.parametrize(
    ("resumed", "told"),
    [(None, "1"), ([{"threads": 1}], "1"), ([{"threads": 4}, {"threads": 2}], "1 to 4"), (3, "1")],
)
def test_a_run_says_how_many_threads_all_its_processes_had(
    tmp_path, finished, shipped, resumed, told
):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    env = {"processor": "M", "threads": 1, "torch": "3", "date": "2026-11-26 00:00 UTC"}
    (folder / "env.json").write_text(json.dumps(env | {"resumed": resumed}))
    (path,) = sources.collect([folder], tmp_path / "paper")
    assert sources.machine(json.loads(path.read_text())) == f"M, {told} thread(s)"


def test_one_bad_run_leaves_the_sources_as_they_were(tmp_path, finished, monkeypatch):
    everything = tmp_path / "runs"
    for name in ("a", "b"):
        shutil.copytree(finished, everything / name)
    answers = iter([[], [("steps", 40_000, 20)]])
    monkeypatch.setattr(sources, "recipe_changes", lambda _: next(answers))
    with pytest.raises(UserError, match="is not tms_5-2 as it ships"):
        sources.collect([everything], tmp_path / "paper")
    assert not (tmp_path / "paper").exists()


@pytest.mark.parametrize("name", ["estimates.json", "evaluations/x.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"evaluation": 3}'])
def test_sources_that_cannot_be_read_are_named(page, name, text):
    broken = page.with_suffix("") / name
    broken.parent.mkdir(parents=True)
    broken.write_text(text)
    with pytest.raises(UserError, match=rf"cannot read .*{Path(name).name}"):
        document.write_page(page)


WHOLE = "\n".join(
    [
        "coefficient,seed,site,needed,live_components,ci_error,neuron_r2,stochastic_recon",
        *(f"1e-0{i},0,s,100,100,0,0.99,1e-05" for i in (5, 6)),
        "",
    ]
)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda p: p.write_bytes(b"\x80\xff" * 9), "cannot read .*importance.csv"),
        (lambda p: p.write_text(""), "importance.csv: cut short"),
        (lambda p: p.write_text(WHOLE[:-9]), "importance.csv: cut short"),
        (lambda p: p.write_text(WHOLE[: WHOLE.index("1e-06")]), "has 1 rows, but .* counted 2"),
        (lambda p: p.write_text("a,b\n1,2\n1,2\n"), "importance.csv is no table of the study"),
        (lambda p: p.write_text(WHOLE.replace("0.99", "x")), "is no table of the study"),
        (lambda p: p.with_suffix(".png").unlink(), "no figure .*importance.png"),
        (lambda p: p.with_suffix(".json").unlink(), "cannot read .*importance.json"),
        (lambda p: p.with_suffix(".json").write_text('{"days": 3}'), "it holds something else"),
    ],
)
def test_a_damaged_study_is_named_and_the_page_left_as_it_is(page, damage, match):
    folder = page.with_suffix("")
    folder.mkdir()
    place(folder, "importance", WHOLE)
    page.write_text("<!-- table: importance -->\n<!-- end -->\n")
    document.write_page(page)
    before = page.read_text()
    assert "| 1e-06 | 0 | s | 100 |" in before
    damage(folder / "importance.csv")
    with pytest.raises(UserError, match=match):
        document.write_page(page)
    assert page.read_text() == before


def test_runs_of_other_settings_are_refused(tmp_path, finished):
    with pytest.raises(UserError, match=r"is not tms_5-2 as it ships: .*steps 20"):
        sources.collect([finished], tmp_path / "paper")
    assert not (tmp_path / "paper").exists()


def studied(name, quick, everything):
    """The table of a study that went as planned, and a picture beside it."""
    study = STUDIES[name]
    plan = study.plan(quick, (0, 3))
    rows = [p | {"steps": c.config.steps, "x": 1} for c in plan.values() for p in c.points]
    folder = everything / "studies" / name
    folder.mkdir(parents=True)
    write_csv(folder / f"{name}.csv", rows)
    (folder / f"{name}.png").write_text("x")


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_collected_and_their_runs_left_alone(tmp_path, finished, shipped, name):
    everything = tmp_path / "runs"
    studied(name, False, everything)
    shutil.copytree(finished, everything / "studies" / name / "runs" / "a")
    written = sources.collect([everything], tmp_path / "paper")
    assert [p.name for p in written] == [f"{name}.csv", f"{name}.png", f"{name}.json"]
    environment = json.loads((finished / "env.json").read_text())
    days = [environment["date"][:10]]
    assert json.loads(written[2].read_text())["days"] == days
    assert sources.read_sources(tmp_path / "paper").measured[name]["days"] == days


@pytest.mark.parametrize(("seeds", "named"), [((0,), ""), ((0, 10, 2), " --seeds 0,2,10")])
def test_a_study_says_by_what_command_where_and_when(page, seeds, named):
    folder = page.with_suffix("")
    folder.mkdir()
    rows = [
        p | {"steps": c.config.steps}
        for c in STUDIES["importance"].plan(False, seeds).values()
        for p in c.points
    ]
    measured = {"needed": 1, "live_components": 1, "ci_error": 0, "neuron_r2": 1, "site": "s"}
    table = folder / "importance.csv"
    write_csv(table, [r | measured | {"stochastic_recon": 0} for r in rows])
    where = {"machines": ["M, 1 thread(s)"], "versions": ["torch 3"], "days": ["a", "b", "c"]}
    place(folder, "importance", table.read_text(), **where)
    page.write_text("<!-- table: importance -->\n<!-- end -->\n")
    document.write_page(page)
    command = f"`spd-fast study importance{named} --out runs/paper/studies/importance`"
    assert f"{command}; M, 1 thread(s); torch 3; a to c.\n" in page.read_text()


@pytest.mark.parametrize(
    ("limits", "named"), [([], ""), ([8192], " --memory-mb 8192"), ([10, 20], "")]
)
def test_scaling_says_by_which_limit_its_series_ended(page, limits, named):
    folder = page.with_suffix("")
    folder.mkdir()
    table = "series,method,components,features,status,ms,peak_mb\ncomponents,APD,40,40,ok,1,2\n"
    place(folder, "scaling", table, memory_mb=limits)
    page.write_text("<!-- table: scaling -->\n<!-- end -->\n")
    document.write_page(page)
    command = f"`spd-fast study scaling{named} --out runs/paper/studies/scaling`"
    assert page.read_text().splitlines()[1] == f"{command}."


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_in_small_is_no_source(tmp_path, name):
    studied(name, True, tmp_path / "runs")
    with pytest.raises(UserError, match=rf"{name}.csv is not the study {name} as it ships"):
        sources.collect([tmp_path / "runs"], tmp_path / "paper")
    assert not (tmp_path / "paper").exists()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\ufffe\x00"])
@pytest.mark.parametrize("name", [*STUDIES, "scaling"])
def test_a_table_of_something_else_is_no_source(tmp_path, name, text):
    path = tmp_path / "runs" / "studies" / name / f"{name}.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-16")
    match = rf"cannot read .*{name}.csv|{name}.csv is not the study {name} as it ships"
    with pytest.raises(UserError, match=match):
        sources.collect([tmp_path / "runs"], tmp_path / "paper")


@pytest.mark.parametrize(
    ("sizes", "last", "whole"),
    [
        (SIZES, "ok", True),
        (SIZES[:5], "memory", True),
        (SIZES[:5], "ok", False),
        ((1, 4), "ok", False),
        ((1, 4), "memory", False),
    ],
)
def test_scaling_is_collected_where_every_series_went_to_its_end(tmp_path, sizes, last, whole):
    rows = [
        {"series": series, "method": method, "size": size, "status": "ok"}
        for series in ("components", "width")
        for method in METHODS
        for size in sizes
    ]
    rows[-1]["status"] = last
    for row in rows[:-1]:
        if row["size"] == sizes[-1]:
            row["status"] = "memory"
    folder = tmp_path / "runs" / "studies" / "scaling"
    folder.mkdir(parents=True)
    write_csv(folder / "scaling.csv", rows)
    (folder / "scaling.png").write_text("x")
    (folder / "cells").mkdir()
    for name, cell in (("a", ("ok", 100)), ("b", ("memory", 8192.25)), ("c", ("memory", 8192.25))):
        held = dict(zip(("status", "memory_limit_mb"), cell, strict=True))
        (folder / "cells" / f"{name}.json").write_text(json.dumps(held))
    if whole:
        written = sources.collect([tmp_path / "runs"], tmp_path / "paper")
        assert [p.name for p in written] == ["scaling.csv", "scaling.png", "scaling.json"]
        told = json.loads(written[2].read_text())
        assert (told["rows"], told["memory_mb"]) == (len(rows), [8192])
    else:
        with pytest.raises(UserError, match=r"scaling.csv is not the study scaling as it ships"):
            sources.collect([tmp_path / "runs"], tmp_path / "paper")


def test_a_study_without_its_figure_is_no_source(tmp_path):
    studied("splitting", False, tmp_path / "runs")
    (tmp_path / "runs" / "studies" / "splitting" / "splitting.png").unlink()
    with pytest.raises(UserError, match=r"cannot read .*splitting.png.*run the study again"):
        sources.collect([tmp_path / "runs"], tmp_path / "paper")
    assert not (tmp_path / "paper").exists()


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        sources.collect([tmp_path], tmp_path / "paper")
    with pytest.raises(UserError, match="no folder"):
        sources.collect([tmp_path / "none"], tmp_path / "paper")


def test_estimates_are_measured_once(tmp_path, monkeypatch):
    asked = []

    def take(settings, **_):
        asked.append(settings["name"])
        return {"status": "ok", "cpu_ms": 2.0}

    monkeypatch.setattr(sources, "measure", take)
    sources.estimate(tmp_path / "paper", say=lambda _: None)
    path = sources.estimate(tmp_path / "paper", say=lambda _: None)
    assert asked == list(SEEDS)
    assert json.loads(path.read_text())["tms_5-2"] == {"status": "ok", "cpu_ms": 2.0}


# The command.


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["somewhere"], "go with --page"),
        (["--estimate"], "go with --page"),
        (["--page", "none.md"], "no page none.md"),
        (["--only", "abacus/*"], "matches no run"),
        (["--jobs", "0"], "--jobs needs at least 1"),
        (["--memory-mb", "0"], "--memory-mb needs to be positive"),
        (["--device", "abacus"], "unknown device"),
    ],
)
def test_bad_input_is_one_line_status_two_and_nothing_written(
    tmp_path, monkeypatch, capsys, arguments, match
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["paper", *arguments])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--only", "scaling"], "leave --only out"),
        (["--quick"], "leave --quick out"),
        (["--out", "x"], "leave --out out"),
        (["--jobs", "3"], "leave --jobs out"),
        (["--memory-mb", "5"], "leave --memory-mb out"),
        ([], "paper, which is missing; name folders of runs"),
    ],
)
def test_a_page_is_filled_from_what_there_is_and_by_nothing_else(page, capsys, arguments, match):
    before = page.read_text()
    with pytest.raises(SystemExit) as left:
        main(["paper", "--page", str(page), *arguments])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line
    assert page.read_text() == before


def test_the_page_is_filled_by_the_command(page, capsys):
    page.with_suffix("").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["paper", "--page", str(page)])
    assert left.value.code == 0
    assert capsys.readouterr().out.splitlines() == [str(page)]
