"""The package builds where a compiler, ninja or OpenMP is missing, and says what it did."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(folder, **environment):
    """Build the extension away from the tree; the messages and the compiled modules."""
    run = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr, list(folder.rglob("_C*.so"))


def compiler(folder, body):
    """A compiler made of a line of shell before the real one."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\n{body}\nexec {shutil.which("c++")} "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_what_is_installed_is_all_there_is(tmp_path):
    """A package left out is invisible where the repository itself is on the path."""
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"SPD_FAST_SKIP_EXTENSION": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr

    def kept(folder):
        wanted = (".py", ".yaml", ".j2", ".typed")
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in wanted}

    expected = kept(ROOT / "spd_fast") | {f"kernels/{n}" for n in kept(ROOT / "kernels")}
    assert len(expected) > 100
    assert kept(tmp_path / "spd_fast") == expected


def test_without_compiler(tmp_path):
    message, modules = build(tmp_path, CXX="no-such-compiler")
    assert "without the C++ extension (no C++ compiler: 'no-such-compiler'" in message
    assert not modules


def test_with_a_compiler_that_does_not_work(tmp_path):
    message, modules = build(tmp_path, CXX=compiler(tmp_path, "exit 1"))
    assert "cannot build a small program" in message
    assert not modules


def test_skipped_on_request(tmp_path):
    message, modules = build(tmp_path, SPD_FAST_SKIP_EXTENSION="1")
    assert "without the C++ extension (SPD_FAST_SKIP_EXTENSION=1)" in message
    assert not modules


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compile_error(tmp_path):
    fails = 'case "$*" in *csrc*) echo "error: broken" >&2; exit 1;; esac'
    message, modules = build(tmp_path, CXX=compiler(tmp_path, fails))
    assert "without the C++ extension (compilation failed:" in message
    assert not modules


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_without_openmp_and_ninja(tmp_path):
    refuses = 'case "$*" in *-fopenmp*) exit 1;; esac'
    # Only the system's folders: the environment's own ninja is out of sight.
    message, modules = build(tmp_path, CXX=compiler(tmp_path, refuses), PATH="/usr/bin:/bin")
    assert "the compiler has no OpenMP" in message
    assert len(modules) == 1
    load = (
        "import importlib.util as u, torch;"
        f"s = u.spec_from_file_location('_C', {str(modules[0])!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "print(m.uniform(torch.tensor([1, 2]), 3, 2, 0, 0, 0, torch.float32).shape)"
    )
    run = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert "torch.Size([3, 2])" in run.stdout, run.stderr
