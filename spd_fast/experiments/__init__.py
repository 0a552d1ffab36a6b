"""Experiments: recipes, and the run that carries one out."""

from spd_fast.experiments.recipes import expected_sites, recipe, recipes
from spd_fast.experiments.runs import Run, evaluate_run, load_run, run

__all__ = ["Run", "evaluate_run", "expected_sites", "load_run", "recipe", "recipes", "run"]
