"""The report: figures, page, model card and results table of tiny runs."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from PIL import Image

from spd_fast.errors import UserError
from spd_fast.evaluate import Expected
from spd_fast.experiments import Run, configuration, load_run, recipe, run
from spd_fast.report import results_table, write_report
from spd_fast.report.facts import count, duration, number, recipe_changes, verdict
from spd_fast.report.importances import contradictions, shown_columns
from spd_fast.report.style import LIGHT_AND_DARK, power_of_ten, thousands
from spd_fast.report.table import PAPER, mean_and_spread
from spd_fast.train import parse_config, set_keys

COMMON = [
    "batch_size=64",
    "target.steps=8",
    "target.batch_size=32",
    "checkpoint_every=1000",
]
# tms_40-10-id logs a single line.
TINY = {
    "tms_5-2": [
        "steps=4",
        "log_every=1",
        "target.starts=1",
        "ci_hidden=[3]",
        "sites.linear1=7",
        "sites.linear2=7",
    ],
    "tms_40-10-id": [
        "steps=1",
        "ci_hidden=[3]",
        "target.starts=1",
        "sites.linear1=50",
        "sites.hidden_layers.0=12",
        "sites.linear2=50",
    ],
    "resid_mlp2": [
        "steps=2",
        "log_every=1",
        "ci_hidden=[3]",
        "target.d_embed=40",
        "sites.layers.*.mlp_in=110",
        "sites.layers.*.mlp_out=40",
    ],
    "apd/tms_5-2": ["steps=4", "log_every=1", "target.starts=1"],
    "apd/tms_40-10-id": ["steps=1", "target.starts=1", "rank=2"],
    "apd/resid_mlp2": ["steps=2", "log_every=1", "target.d_embed=40", "components=20", "rank=2"],
}
KINDS = list(TINY)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A finished run of every kind of target, with its report."""
    made = {}
    for name, changes in TINY.items():
        config = configuration(set_keys(recipe(name), COMMON + changes))
        made[name] = run(
            config, tmp_path_factory.mktemp("runs") / name, device="cpu", backend="reference",
            quiet=True, say=lambda _: None,
        )  # fmt: skip
        write_report(made[name])
    return made


@pytest.fixture(params=KINDS)
def finished(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


def page(finished: Run) -> str:
    return (finished.folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects every tag with its attributes, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained(finished: Run) -> None:
    text = page(finished)
    tags = Tags(text)
    assert not tags.open
    names = {tag for tag, _ in tags.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in tags.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "srcset", "href", "xlink:href", "data"):
                assert value is not None
                # The only thing that leaves the page is a link that a reader may follow.
                assert value.startswith(("#", "data:")) or tag == "a"
    assert not re.search(r"url\((?!#)|@import", text)


def test_identifiers_are_unique_and_references_resolve(finished: Run) -> None:
    text = page(finished)
    ids = [a["id"] for _, a in Tags(text).tags if "id" in a]
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in referred} <= set(ids)


def test_colours_follow_the_reader(finished: Run) -> None:
    text = page(finished)
    assert "prefers-color-scheme: dark" in text
    body = text[text.index("<body>") :]
    for key, (light, _) in LIGHT_AND_DARK.items():
        assert light not in body
        assert f"--{key}:" in text
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= {
        *LIGHT_AND_DARK, "page", "panel", "edge", "sans", "mono",
    }  # fmt: skip


def test_page_holds_the_evaluation(finished: Run) -> None:
    text = page(finished)
    evaluation = finished.evaluation()
    for site, result in evaluation["sites"].items():
        assert site in text
        assert f">{result['ci_error']:,}<" in text
        assert f">{number(result['faithfulness'])}<" in text
        assert f">{number(result['relative_error'])}<" in text
        assert f">{number(result['l0'])}<" in text
    for value in evaluation["reconstruction"].values():
        assert f">{number(value)}<" in text
    assert f"{evaluation['peak_memory_mb']:,.0f} MB" in text
    assert f"{number(evaluation['ms_per_step'])} ms" in text
    raw = re.search(r"\(eval\.json\)</summary><pre>(.*?)</pre>", text, re.S)
    assert raw is not None
    assert json.loads(raw[1].replace("&#34;", '"')) == evaluation


@pytest.mark.parametrize("name", ["tms_5-2", "tms_40-10-id", "apd/tms_5-2", "apd/tms_40-10-id"])
def test_page_shows_the_papers_table(runs: dict[str, Run], name: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page(runs[name])))
    for experiment, values in PAPER.items():
        assert experiment in text
        for value in values:
            assert value in text
    linear1 = runs[name].evaluation()["sites"]["linear1"]
    assert f"{linear1['mmcs']:.4f} ± {linear1['mmcs_std']:.4f}" in text
    assert f"{linear1['ml2r']:.3f} ± {linear1['ml2r_std']:.3f}" in text


def test_figures_are_there_small_and_not_blank(finished: Run) -> None:
    files = {p.name for p in (finished.folder / "figures").iterdir()}
    sites = finished.evaluation()["sites"]
    expected = {
        "losses", "schedules", "l0", "live", "importance-mean", "importance-mean-log",
        "reconstruction", "faithfulness", "speed",
        *(f"importances-{s}" for s in sites), *(f"importance-histogram-{s}" for s in sites),
    }  # fmt: skip
    if finished.config.target.kind == "tms":
        expected |= {"table1", "network-linear1"}
    else:
        expected |= {"neurons", "neurons-features"}
    assert {f"{name}.png" for name in expected} <= files
    for path in sorted((finished.folder / "figures").iterdir()):
        assert path.stat().st_size < 120_000
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 3, path.name
    assert len(page(finished)) < 2_000_000


def test_page_shows_neuron_contributions_of_residual_mlps_alone(runs: dict[str, Run]) -> None:
    found = runs["resid_mlp2"].evaluation()["neuron_contributions"]
    text = page(runs["resid_mlp2"])
    assert f"R² {found['r2']:.4f} about the dotted diagonal, slope {found['slope']:.3f}" in text
    assert f"Layer 2: R² {found['layers'][1]['r2']:.3f}" in text
    assert "neurons?" not in page(runs["tms_5-2"])


def test_report_is_deterministic_and_leaves_matplotlib_alone(runs: dict[str, Run]) -> None:
    folder = runs["tms_5-2"].folder
    kept = ["report.html", "README.md", "figures/losses.png", "figures/network-linear1.png"]
    before, settings = {name: (folder / name).read_bytes() for name in kept}, dict(rcParams)
    assert write_report(load_run(folder, device="cpu", backend="reference")) == (
        folder / "report.html"
    )
    assert before == {name: (folder / name).read_bytes() for name in kept}
    assert dict(rcParams) == settings


def test_bare_folder_is_reported_and_foreign_text_escaped(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    source = runs["tms_5-2"]
    evaluation = source.evaluation() | {"backend": "<b>&reference"}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    text = write_report(Run(tmp_path, source.config, source.model)).read_text(encoding="utf-8")
    assert "nothing was logged" in text
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;reference" in text


def test_the_page_tells_of_the_starts(runs: dict[str, Run], tmp_path: Path) -> None:
    source = runs["resid_mlp2"]
    folder = Path(shutil.copytree(source.folder, tmp_path / "run"))
    held = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    held["starts"] = {
        "chosen": 2, "losses": [0.00205, None, 0.001494], "seeds": [3, 17, 99], "steps": 1200,
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(held), encoding="utf-8")
    write_report(Run(folder, source.config, source.model))
    told = "after 1,200 steps from the seeds 3, 17, 99: 0.00205, diverged, 0.00149 (continued)."
    for name in ("report.html", "README.md"):
        assert told in (folder / name).read_text(encoding="utf-8")
        assert "among" not in (source.folder / name).read_text(encoding="utf-8")


def test_report_needs_an_evaluation(runs: dict[str, Run], tmp_path: Path) -> None:
    source = runs["tms_5-2"]
    with pytest.raises(UserError, match="no finished run"):
        write_report(Run(tmp_path, source.config, source.model))


def test_model_card_snippet_runs(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (finished.folder / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.S)
    assert snippet is not None
    monkeypatch.chdir(finished.folder)
    exec(compile(snippet[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(site in printed for site in finished.evaluation()["sites"])


def test_model_card_says_what_it_is(finished: Run) -> None:
    card = (finished.folder / "README.md").read_text(encoding="utf-8")
    evaluation = finished.evaluation()
    assert card.startswith(f"# {evaluation['name']}, seed 0\n")
    assert verdict(evaluation).reason in card
    assert results_table([evaluation], markdown=True) in card
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card):
        assert (finished.folder / image).is_file()
    assert "| `steps` |" in card
    tables = re.findall(r"(?:^\|.*\n)+", card, re.M)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def site(error: int | None) -> dict[str, object]:
    return {"ci_error": error}


def evaluation(*errors: int | None, missing: tuple[int, ...] = ()) -> dict[str, object]:
    return {
        "sites": {f"s{i}": site(e) for i, e in enumerate(errors)},
        "recovered": all(e == 0 for e in errors),
        "target_represents_all_features": not missing,
        "features_not_represented": list(missing),
        "seed": 3,
    }


def test_verdict_recovered() -> None:
    said = verdict(evaluation(0, 0))
    assert (said.kind, said.headline) == ("recovered", "Recovered")
    assert "no contradicting entry at s0 and s1" in said.reason


def test_verdict_missed_names_sites_and_entries() -> None:
    said = verdict(evaluation(0, 1, 1200))
    assert said.kind == "missed"
    assert "1 entry at s1 and 1,200 entries at s2" in said.reason
    assert "Without contradiction: s0" in said.reason


def test_verdict_names_the_wrong_importances_where_they_are_few() -> None:
    found = evaluation(0, 1)
    entry = {"feature": 71, "component": 5, "importance": 0.8049, "wanted": 1}
    found["sites"]["s1"]["ci_contradictions"] = [entry]
    assert "s1, feature 71: component 5 is 0.80 (wanted: 1)." in verdict(found).reason
    entry["importance"] = -3e-10  # an off component's may be a little below zero
    assert "component 5 is 0.00 (wanted" in verdict(found).reason
    found["sites"]["s1"]["ci_error"] = 7
    assert "component 5" not in verdict(found).reason


def test_verdict_tells_of_the_wider_tolerance() -> None:
    wider = "At a tolerance of 0.2 instead of 0.1"
    assert wider not in verdict(evaluation(0, 2)).reason
    said = verdict(evaluation(0, 2) | {"recovered_0p2": True})
    assert (said.kind, wider in said.reason) == ("missed", True)


def test_verdict_over_many_sites_stays_short() -> None:
    reason = verdict(evaluation(0, 1, 5, 4, 3, 2, 6)).reason
    assert "21 entries over 6 of 7 sites, most of them at s6, s2, s3 and s4" in reason


@pytest.mark.parametrize("errors", [(0, 0), (0, 2)])
def test_verdict_of_an_incomplete_target_counts_for_neither_side(errors: tuple[int, ...]) -> None:
    said = verdict(evaluation(*errors, missing=(1, 4)))
    assert said.kind == "void"
    assert "does not represent features 1 and 4" in said.reason
    assert "counts for neither side" in said.reason


@pytest.mark.parametrize(("r2", "said"), [(0.9, True), (0.999, False)])
def test_verdict_names_neurons_that_disagree(r2: float, said: bool) -> None:
    found = evaluation(0) | {"recovered": not said, "neuron_contributions": {"r2": r2}}
    assert ("to R² 0.900 only, need 0.99" in verdict(found).reason) == said


def test_verdict_without_ground_truth() -> None:
    assert verdict(evaluation(None)).kind == "open"


@pytest.mark.parametrize("pattern", ["identity", "dense"])
def test_framed_entries_are_those_the_check_counts(pattern: str) -> None:
    generator = np.random.default_rng(0)
    expected = Expected(pattern, 4)  # type: ignore[arg-type]
    for _ in range(20):
        values = generator.random((4, 9)) ** 4
        ordered = values[:, expected.permute(values)]
        assert len(contradictions(ordered, expected)) == expected.error(values)


def test_every_live_column_is_drawn() -> None:
    values = np.zeros((5, 40))
    values[:, :5] = np.eye(5)
    assert shown_columns(values, Expected("identity", 5)) == 8
    values[2, 30] = 0.2
    assert shown_columns(values, Expected("identity", 5)) == 32
    assert shown_columns(values[:, :6], Expected("identity", 5)) == 6


def test_changes_from_the_recipe() -> None:
    whole = parse_config(recipe("tms_5-2"))
    assert recipe_changes(whole) == []
    short = parse_config(set_keys(recipe("tms_5-2"), ["steps=5", "seed=2", "log_every=7"]))
    assert recipe_changes(short) == [("steps", "40000", "5")]
    assert recipe_changes(short.model_copy(update={"name": "mine"})) is None


def test_results_table(runs: dict[str, Run]) -> None:
    evaluations = [r.evaluation() for r in runs.values()]
    lines = results_table(evaluations).splitlines()
    assert len(lines) == 2 + len(evaluations)
    assert all(v in lines[2] for v in PAPER["tms_5-2"])
    marked = results_table(evaluations, markdown=True).splitlines()
    assert {line.count("|") for line in marked} == {marked[0].count("|")}


def test_results_table_sets_an_incomplete_target_apart(runs: dict[str, Run]) -> None:
    one = runs["tms_5-2"].evaluation()
    void = one | {"recovered": True, "target_represents_all_features": False}
    assert "target incomplete" in results_table([void])
    whole = one | {"recovered": True, "target_represents_all_features": True}
    assert "yes" in results_table([whole])
    assert "at 0.2" in results_table([whole | {"recovered": False, "recovered_0p2": True}])
    starts = {"losses": [1.0, 2.0]}
    assert "best of" not in results_table([whole | {"starts": None}])
    assert f"{whole['steps']}, best of 2 starts" in results_table([whole | {"starts": starts}])
    assert "at 0.2" not in results_table([whole | {"recovered": False, "recovered_0p2": False}])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (None, "—"), (1.5822e-5, "1.58 × 10⁻⁵"), (0.00497, "0.00497"), (27.94, "27.9")],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_small_formats() -> None:
    assert [duration(s) for s in (40, 750, 3900)] == ["40 s", "12 min 30 s", "1 h 05 min"]
    assert [count(1, "entry"), count(2, "entry"), count(1500, "step")] == [
        "1 entry", "2 entries", "1,500 steps",
    ]  # fmt: skip
    assert [thousands(1500), thousands(40_000), thousands(0.5)] == ["1,500", "40k", "0.5"]
    assert [power_of_ten(x) for x in (1e-3, 1, 100, 1e4, 0.02, 0)] == [
        "10⁻³", "1", "100", "10⁴", "", "",
    ]  # fmt: skip
    assert mean_and_spread("0.993 ± .002") == (0.993, 0.002)
    assert mean_and_spread("0.998") == (0.998, 0.0)
