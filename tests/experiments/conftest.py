"""A small finished run, made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spd_fast.experiments import recipe, run
from spd_fast.train import Config, parse_config, set_keys

SMALL = [
    "steps=20", "batch_size=32", "log_every=8", "checkpoint_every=10",
    "target.steps=20", "target.batch_size=32", "target.starts=1", "seed=2",
]  # fmt: skip


def small(*assignments: str, name: str = "tms_5-2") -> Config:
    return parse_config(set_keys(recipe(name), [*SMALL, "starts.count=1", *assignments]))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other longer than they work on toys."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(small(), folder, quiet=True)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip
