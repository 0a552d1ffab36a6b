"""Experiments: recipes, and the run that carries one out."""

from spd_fast.experiments.grid import Outcome, run_grid
from spd_fast.experiments.recipes import (
    configuration,
    expected_sites,
    language_configuration,
    recipe,
    recipes,
)
from spd_fast.experiments.runs import Run, evaluate_run, load_run, run
from spd_fast.experiments.seeds import aggregate, parse_seeds, run_seeds

__all__ = [
    "Outcome",
    "Run",
    "aggregate",
    "configuration",
    "evaluate_run",
    "expected_sites",
    "language_configuration",
    "load_run",
    "parse_seeds",
    "recipe",
    "recipes",
    "run",
    "run_grid",
    "run_seeds",
]
