"""Studies: many runs that answer one question each, as a table and a figure."""

from __future__ import annotations

from pathlib import Path

from spd_fast.errors import UserError, nearest
from spd_fast.studies.paper import STUDIES
from spd_fast.studies.scaling import scaling
from spd_fast.studies.study import Options, Study, run_study

NAMES = (*STUDIES, "scaling")

__all__ = ["NAMES", "STUDIES", "Options", "Study", "carry_out", "check_name", "scaling"]


def check_name(name: str) -> None:
    """Raise UserError unless there is a study of this name."""
    if name not in NAMES:
        raise UserError(
            f"unknown study {name!r}; nearest: {nearest(name, NAMES)} (all: {', '.join(NAMES)})"
        )


def carry_out(name: str, options: Options, *, memory_mb: float | None = None) -> list[Path]:
    """Run what a study misses, then write its table and figure; their paths.

    Raises:
        UserError: bad input, before the first run.
    """
    check_name(name)
    if name == "scaling":
        if options.seeds is not None or options.jobs != 1:
            raise UserError("study scaling measures one cell at a time: no --seeds, no --jobs")
        return scaling(options, memory_mb=memory_mb)
    if memory_mb is not None:
        raise UserError(f"--memory-mb goes with study scaling, not with {name}")
    return run_study(STUDIES[name], options)
