"""Importing spd_fast is cheap and needs none of the optional parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

BLOCKED = (
    "triton",
    "spd_fast._C",
    "transformers",
    "datasets",
    "huggingface_hub",
    "wandb",
    "tensorboard",
)

# Stands in front of every other finder, so that a blocked module is as good as not installed.
BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        for blocked in {BLOCKED!r}:
            if name == blocked or name.startswith(blocked + "."):
                raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Block())
"""


def python(code: str) -> str:
    """What ``code`` prints in a fresh interpreter in which the optional parts are missing."""
    environment = {k: v for k, v in os.environ.items() if k != "SPD_FAST_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_works_without_the_optional_parts():
    assert python("import spd_fast; print(spd_fast.__version__)")


def test_import_loads_no_library():
    loaded = python("""
before = {name.partition(".")[0] for name in sys.modules}
import spd_fast
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
""")
    assert loaded == "spd_fast"


def test_import_loads_no_part_of_the_package():
    loaded = python("""
import spd_fast
print(*sorted(name for name in sys.modules if name.startswith("spd_fast")))
""")
    assert loaded == "spd_fast"


def test_an_unknown_name_is_an_attribute_error():
    assert python("import spd_fast; print(hasattr(spd_fast, 'Decomposed'))") == "False"


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What one process without the optional parts sees; one, because it has to import torch."""
    return json.loads(
        python("""
import json
import warnings
import spd_fast
from spd_fast import backends, ops
modules = list(sys.modules)
import torch
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    value = ops.faithfulness(torch.zeros(3, 2), torch.ones(2, 4), torch.ones(4, 3)).item()
print(json.dumps({
    "modules after operations": modules,
    "value": value,
    "warning": str(said[0].message),
    "reason": backends.unavailable_reason("cpu"),
    "unresolved": [name for name in spd_fast.__all__ if not hasattr(spd_fast, name)],
    "unlisted": sorted(set(spd_fast.__all__) - set(dir(spd_fast))),
}))
""")
    )


def test_an_operation_runs_without_the_optional_parts(seen):
    assert seen["value"] == 12


def test_auto_says_that_it_falls_back_without_the_extension(seen):
    assert seen["warning"].startswith("faithfulness runs on the reference backend (cpu: the C++")


def test_the_cpu_backend_says_what_it_misses(seen):
    assert "spd_fast._C" in seen["reason"]


def test_operations_import_no_plotting_and_no_command_line(seen):
    assert not {"matplotlib", "jinja2", "typer"} & set(seen["modules after operations"])


def test_every_public_name_resolves_without_the_optional_parts(seen):
    assert seen["unresolved"] == []


def test_every_public_name_is_listed(seen):
    assert seen["unlisted"] == []
