"""What every test starts from: a known environment, and each backend that this machine has."""

from __future__ import annotations

from contextlib import suppress

import pytest

from spd_fast import _extension

# A GPU machine runs the tests of its kernels, none of which needs hypothesis.
with suppress(ModuleNotFoundError):
    from hypothesis import settings

    # The same examples every time: a failure found here is found everywhere.
    settings.register_profile(
        "fixed", deadline=None, max_examples=40, derandomize=True, database=None
    )
    settings.load_profile("fixed")

needs_extension = pytest.mark.skipif(
    _extension.module() is None, reason=str(_extension.unavailable_reason())
)


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPD_FAST_BACKEND", raising=False)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_extension)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend whose results the CPU can show."""
    return request.param
