"""The command line, as a user meets it: what it prints, its exit status, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import spd_fast
from spd_fast import backends
from spd_fast.cli import main
from spd_fast.experiments import recipe, recipes

ROOT = Path(__file__).parents[1]
SMALL = [
    "steps=20", "batch_size=32", "log_every=8", "checkpoint_every=10", "ci_hidden=[3]",
    "target.steps=20", "target.batch_size=32", "target.starts=1",
    "sites.linear1=6", "sites.linear2=6",
]  # fmt: skip
RUBBISH = {
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[]",
    "a number": b"3",
    "an object": b"{}",
    "a half": None,
}


@dataclass
class Result:
    status: int
    out: str
    err: str


Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> Result:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return Result(left.value.code, *capsys.readouterr())


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder, folders too, with the time it was written."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in folder.rglob("*")
    }


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line with which a command refuses; nothing in the working folder changes."""
    before = state(Path.cwd())
    result = call(capsys, *arguments)
    assert state(Path.cwd()) == before
    assert (result.status, result.out) == (2, ""), result
    (line,) = result.err.splitlines()
    assert line.startswith("spd-fast: error: ")
    assert len(line) < 700
    return line.removeprefix("spd-fast: error: ")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, with one thread: two wait for each other longer than they work."""
    monkeypatch.chdir(tmp_path)
    threads, showwarning = torch.get_num_threads(), sys.modules["warnings"].showwarning
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.modules["warnings"].showwarning = showwarning


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by command. Not to be written to."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as left:
        main(["run", "tms_5-2", "--out", str(folder), "--quiet", *SMALL])
    assert left.value.code == 0
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without their report, which takes longer than they do."""
    monkeypatch.setattr("spd_fast.report.write_report", lambda run: run.folder / "report.html")


@pytest.fixture
def copied(finished: Path) -> Path:
    return Path(shutil.copytree(finished, "run", ignore=shutil.ignore_patterns("figures")))


# What works.


def test_run_prints_the_table_and_the_report(capsys):
    result = call(capsys, "run", "tms_5-2", "--seed", 3, "--steps", 2, *SMALL[1:])
    assert result.status == 0
    *_, row, last = result.out.splitlines()
    assert row.split()[:2] == ["tms_5-2", "3"]
    report = Path("runs") / "tms_5-2-seed3" / "report.html"
    assert last == f"report: {report}"
    assert report.is_file()
    assert "train target: 20/20" in result.err
    assert "decompose: 2/2" in result.err


@pytest.mark.usefixtures("undrawn")
def test_set_and_bare_assignments_mean_the_same(capsys):
    for assignments in (["lr=0.5"], ["--set", "lr=0.5"]):
        name = f"out{len(assignments)}"
        result = call(capsys, "run", "tms_5-2", "--out", name, "--quiet", *assignments,
                      *SMALL)  # fmt: skip
        assert result.status == 0, result.err
    held = [yaml.safe_load((Path(f"out{n}") / "config.yaml").read_text()) for n in (1, 2)]
    assert held[0] == held[1]
    assert held[0]["lr"] == 0.5


@pytest.mark.usefixtures("undrawn")
def test_a_configuration_file_is_run(capsys):
    Path("mine.yaml").write_text(yaml.safe_dump(recipe("tms_5-2") | {"name": "mine"}))
    assert call(capsys, "run", "mine.yaml", "--quiet", *SMALL).status == 0
    assert Path("runs/mine-seed0/eval.json").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_that_is_resumed_stays_the_same(capsys, copied):
    before = (copied / "model.safetensors").read_bytes()
    result = call(capsys, "run", "tms_5-2", "--out", copied, "--resume", *SMALL)
    assert result.status == 0
    assert result.out.startswith("resuming at step 20 of 20\n")
    assert (copied / "model.safetensors").read_bytes() == before


def test_eval_prints_what_it_writes(capsys, copied):
    before = json.loads((copied / "eval.json").read_text())
    result = call(capsys, "eval", copied)
    assert result.status == 0
    assert json.loads(result.out) == json.loads((copied / "eval.json").read_text()) == before


def test_report_draws_again(capsys, copied):
    (copied / "report.html").unlink()
    result = call(capsys, "report", copied)
    assert (result.status, result.out) == (0, f"{copied / 'report.html'}\n")
    assert (copied / "report.html").is_file()
    assert (copied / "figures" / "losses.png").is_file()


def test_table_has_a_row_a_run(capsys, finished):
    result = call(capsys, "table", finished, finished)
    assert result.status == 0
    assert len(result.out.splitlines()) == 4
    assert "0.993 ± .002" in result.out


def test_table_as_markdown(capsys, finished):
    lines = call(capsys, "table", "--markdown", finished).out.splitlines()
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)


def test_list_shows_every_recipe(capsys):
    lines = call(capsys, "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())


def test_version(capsys):
    assert call(capsys, "--version").out == f"{spd_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(capsys, arguments):
    result = call(capsys, *arguments)
    assert result.status == 0
    for command in ("run", "list", "eval", "report", "table", "doctor"):
        assert f"  {command} " in result.out


# doctor


def test_doctor_tries_each_usable_backend(capsys):
    result = call(capsys, "doctor")
    assert result.status == 0
    assert torch.__version__ in result.out
    for name in backends.BACKENDS[1:]:
        (line,) = [x for x in result.out.splitlines() if x.startswith(f"backend {name} ")]
        reason = backends.unavailable_reason(name)
        assert (f"not usable: {reason}" if reason else "ok (relative error") in line


def test_doctor_fails_where_a_backend_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("spd_fast.doctor._try", lambda name: 0.1)
    result = call(capsys, "doctor")
    assert result.status == 1
    assert "backend reference  WRONG (relative error 1.0e-01)" in result.out


# Bad input.


def test_an_unknown_experiment_lists_the_nearest(capsys):
    message = refused(capsys, "run", "tms_5_2")
    assert "unknown experiment 'tms_5_2'; nearest: 'tms_5-2'" in message


@pytest.mark.parametrize("name", ["", "ténia ∞", "../tms_5-2", "\udcff", "x" * 300, "."])
def test_any_other_experiment_is_refused(capsys, name):
    refused(capsys, "run", name)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepz=3", "unknown key 'stepz'; nearest valid key: 'steps'"),
        ("target.featurs=3", "unknown key 'target.featurs'; nearest valid key: 'features'"),
        ("steps", "--set needs key=value, got 'steps'"),
        ("=3", "--set needs key=value"),
        ("steps=many", "steps: input should be a valid integer"),
        ("steps=0", "steps: input should be greater than or equal to 1, got 0"),
        ("steps=-3", "steps: input should be greater than or equal to 1, got -3"),
        ("steps=99999999999999999999", "steps: input should be less than 2147483648"),
        ("steps=1.5", "steps: input should be a valid integer"),
        ("lr=true", "lr: input should be a number"),
        ("lr=.nan", "lr: input should be"),
        ("lr=.inf", "lr: input should be"),
        ("lr=-1", "lr: input should be greater than 0"),
        ("lr={}", "lr: input should be a valid number"),
        ("lr=[", "the value '[' is not plain YAML"),
        ("lr=!!python/name:os.system", "is not plain YAML"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("seed=4294967296", "seed: input should be less than 4294967296"),
        ("sites.linear1=0", "sites.linear1: input should be greater than or equal to 1, got 0"),
        ("sites.linaer*=3", "site pattern 'linaer*' matches no module; closest: 'linear"),
        ("sites=3", "sites: input should be a mapping, got 3"),
        ("target=3", "target: input should be a mapping with keys 'kind', 'features', "),
        ("starts=2", "starts: input should be a mapping with keys 'count', 'fraction', got 2"),
        ("sites={linear1: 4, linear1: 5}", "--set sites: key 'linear1' stands twice, in line 1"),
        ("target.kind=gpt", "target: input tag 'gpt'"),
        ("ci_hidden=[]", "ci_fn 'mlp' needs hidden widths of at least 1"),
        ("preset=2027", "preset: input should be 'paper' or '2026'"),
        ("name=../elsewhere", "name: input should be one word"),
        ("name=", "name: input should be a valid string"),
        ("target.path=nowhere", "no readable target in nowhere"),
        ("target.probability=2", "target.probability: input should be less than or equal to 1"),
    ],
)
def test_a_bad_setting_is_named(capsys, assignment, message):
    assert message in refused(capsys, "run", "tms_5-2", "--set", assignment)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "x"], "Invalid value for '--steps'"),
        (["--steps", "-1"], "steps: input should be greater than or equal to 1, got -1"),
        (["--seed", "9" * 30], "seed: input should be less than 4294967296"),
        (["--stepz", "1"], "--stepz"),
        (["--seeds", "0-1", "--seed", "3"], "--seed and --seeds: give one of them"),
        (["--seeds", "0-1", "--set", "seed=3"], "--set seed and --seeds: give one of them"),
        (["--device", "gpu"], "unknown device 'gpu'; use cpu, cuda or cuda:N"),
        (["--device", "meta"], "device 'meta' is not supported"),
        (["--backend", "tritn"], "unknown backend 'tritn'; nearest: 'triton'"),
        (["--out"], "--out"),
    ],
)
def test_a_bad_option_is_named(capsys, options, message):
    assert message in refused(capsys, "run", "tms_5-2", *options)


@pytest.mark.parametrize("arguments", [["run"], ["table"], ["eval"], ["flatten"], ["list", "all"]])
def test_a_command_that_is_none_is_refused(capsys, arguments):
    assert "(see `spd-fast --help`)" in refused(capsys, *arguments)


def test_cuda_without_one_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no CUDA device" in refused(capsys, "run", "tms_5-2", "--device", "cuda")


def test_triton_where_it_cannot_run_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("spd_fast.backends.unavailable_reason", lambda _: "no such device")
    message = refused(capsys, "run", "tms_5-2", "--backend", "triton")
    assert message.startswith("backend 'triton' cannot run here: ")
    assert message.endswith("use backend 'auto'")


BILLION = "".join(
    f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "an empty file": b"",
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "a word": b"tms_5-2",
    "a python tag": b"name: !!python/object/apply:os.system ['touch was-run']\n",
    "a tab": b"name:\n\t- x",
    "a null byte": b"name: \x00",
    "two documents": b"name: a\n---\nname: b\n",
    "no key": b"name: mine\n",
    "foreign keys": b"services: {web: {image: x}}\n",
    "a deep nest": b"[" * 10_000,
    "a billion lists": f"a: &a [1]\n{BILLION}name: *i\npreset: paper\nlr: *i\n".encode(),
    "a date": b"2026-13-45: 2026-99-99\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_configuration_file_is_refused(capsys, kind):
    Path("mine.yaml").write_bytes(FILES[kind])
    refused(capsys, "run", "mine.yaml")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_configuration_that_is_no_file_is_refused(capsys, kind):
    if kind == "folder":
        Path("mine.yaml").mkdir()
    assert refused(capsys, "run", "mine.yaml") == "no configuration file mine.yaml"


def test_more_than_fits_into_memory_is_refused(capsys):
    huge = ["target.features=2000000", "target.hidden=2000000"]
    assert refused(capsys, "run", "tms_5-2", *huge).startswith("not enough memory: ")


# --out


def test_out_that_is_a_file_is_refused(capsys):
    Path("taken").write_text("mine")
    message = refused(capsys, "run", "tms_5-2", "--out", "taken")
    assert message == "--out taken is a file; name a folder"


@pytest.mark.parametrize("out", ["taken/below", "a" * 300, "/proc/here"])
def test_out_that_cannot_be_made_is_refused(capsys, out):
    Path("taken").write_text("mine")
    refused(capsys, "run", "tms_5-2", "--out", out, *SMALL)


def test_out_that_holds_something_else_is_refused(capsys):
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("mine")
    message = refused(capsys, "run", "tms_5-2", "--out", "full")
    assert message == "full is not empty and holds no run; choose another --out"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_out_that_cannot_be_written_to_is_refused(capsys):
    Path("locked").mkdir(mode=0o500)
    refused(capsys, "run", "tms_5-2", "--out", "locked/run")


def test_out_that_holds_a_different_run_is_refused(capsys, copied):
    for options in ([], ["--resume"]):
        message = refused(capsys, "run", "tms_5-2", "--out", copied, *SMALL, "seed=1", *options)
        how = "seed: 0 there, 1 here"
        assert message == f"{copied} already holds a different run ({how}); choose another --out"


def test_out_that_holds_this_run_is_refused_without_resume(capsys, copied):
    message = refused(capsys, "run", "tms_5-2", "--out", copied, *SMALL)
    assert message == f"{copied} already holds this run; pass --resume to continue it"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.skipif(sys.platform == "win32", reason="no such lock")
def test_out_in_which_another_process_works_is_refused(capsys, copied):
    import fcntl

    descriptor = os.open(copied, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    message = refused(capsys, "run", "tms_5-2", "--out", copied, *SMALL, "--resume")
    assert message == f"another process is working in {copied}"
    os.close(descriptor)
    assert call(capsys, "run", "tms_5-2", "--out", copied, *SMALL, "--resume").status == 0


# Files that are damaged.


def damage(path: Path, kind: str) -> None:
    data = RUBBISH[kind]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if data is None else data)


@pytest.mark.parametrize("kind", RUBBISH)
@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_refused(capsys, copied, name, kind):
    damage(copied / "checkpoints" / "step_20" / name, kind)
    message = refused(capsys, "run", "tms_5-2", "--out", copied, *SMALL, "--resume")
    assert "checkpoints/step_20" in message
    assert "remove that folder to resume from the one before it" in message


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_of_another_run_is_refused(capsys, copied):
    assert call(
        capsys, "run", "tms_5-2", "--out", "other", *SMALL, "--quiet", "seed=1"
    ).status == 0  # fmt: skip
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree("other/checkpoints", copied / "checkpoints")
    message = refused(capsys, "run", "tms_5-2", "--out", copied, *SMALL, "--resume")
    assert "belongs to another configuration or target" in message


@pytest.mark.parametrize("kind", RUBBISH)
@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "target/config.json",
                                  "target/model.safetensors", "config.json"])  # fmt: skip
def test_a_damaged_run_is_refused(capsys, copied, name, kind):
    damage(copied / name, kind)
    for command in ("eval", "report"):
        refused(capsys, command, copied)


@pytest.mark.parametrize("kind", RUBBISH)
def test_a_damaged_evaluation_is_refused_and_made_again(capsys, copied, kind):
    damage(copied / "eval.json", kind)
    assert "eval.json" in refused(capsys, "table", copied)
    assert "eval.json" in refused(capsys, "report", copied)
    assert call(capsys, "eval", copied).status == 0
    assert call(capsys, "table", copied).status == 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"step": 1', '{"step": "x"}', "\udcff", '{"step": null, "p": null}']
)
def test_damaged_metrics_are_refused_and_mended_by_resume(capsys, copied, line):
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    assert "metrics.jsonl is damaged" in refused(capsys, "eval", copied)
    arguments = ("run", "tms_5-2", "--out", copied, *SMALL, "--resume")
    assert call(capsys, *arguments).status == 0
    assert call(capsys, "eval", copied).status == 0


@pytest.mark.parametrize("command", ["eval", "report", "table"])
@pytest.mark.parametrize("kind", ["missing", "a file", "an empty folder", "a foreign folder"])
def test_what_is_no_run_is_refused(capsys, command, kind):
    if kind == "a file":
        Path("it").write_bytes(bytes(range(256)))
    elif kind != "missing":
        Path("it").mkdir()
    if kind == "a foreign folder":
        Path("it/config.yaml").write_text("services: {}")
        Path("it/eval.json").write_text('{"accuracy": 1}')
        Path("it/model.safetensors").write_text("")
    assert "it" in refused(capsys, command, "it")


def test_a_run_that_is_not_finished_is_refused(capsys, copied):
    (copied / "model.safetensors").unlink()
    for command in ("eval", "report"):
        assert "is not finished: continue it with" in refused(capsys, command, copied)


# Trouble on the way.


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(capsys, monkeypatch, finished):
    from spd_fast.train import loop

    kept = loop.save_checkpoint

    def full(folder, checkpoint, keep):
        if checkpoint.step == 20:
            raise OSError(28, "No space left on device", str(folder))
        return kept(folder, checkpoint, keep)

    arguments = ("run", "tms_5-2", "--out", "run", "--quiet", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", full)
        result = call(capsys, *arguments)
    assert result.status == 1
    (line,) = result.err.splitlines()
    assert "No space left on device" in line
    assert line.endswith("checkpoints written before are kept, `--resume` continues")
    assert call(capsys, *arguments, "--resume").status == 0
    name = "model.safetensors"
    assert Path("run", name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_a_loss_that_explodes_is_one_line(capsys):
    result = call(capsys, "run", "tms_5-2", "--out", "run", "--quiet", *SMALL, "lr=1e30")
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert "try a lower lr" in line


def test_an_interruption_tells_how_to_continue(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spd_fast.experiments.run", interrupted)
    result = call(capsys, "run", "tms_5-2")
    assert result.status == 130
    assert result.err == (
        "spd-fast: error: interrupted; `--resume` continues from the last checkpoint\n"
    )


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("spd_fast.experiments.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", "tms_5-2"])


def test_warnings_are_notes_of_one_line(capsys, monkeypatch):
    def warns(*_, **__):
        sys.modules["warnings"].warn("the fan is loud", stacklevel=1)
        return {}

    monkeypatch.setattr("spd_fast.experiments.recipe", warns)
    result = call(capsys, "run", "tms_5-2")
    assert result.err.splitlines()[0] == "spd-fast: note: the fan is loud"


# In a process of its own.


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spd_fast", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_module_is_the_command():
    done = process("run", "tms_5_2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("spd-fast: error: unknown experiment 'tms_5_2'")
    assert len(done.stderr.splitlines()) == 1
    assert list(Path.cwd().iterdir()) == []


def test_a_terminal_without_unicode_does_not_end_a_command(finished):
    done = process("table", str(finished), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "0.993 ? .002" in done.stdout


def test_a_reader_that_goes_away_is_no_error(finished):
    command = f"{sys.executable} -m spd_fast table {' '.join(3 * [str(finished)])} | true"
    done = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
