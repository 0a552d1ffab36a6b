"""The recipes that ship with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from spd_fast.errors import UserError, nearest
from spd_fast.evaluate.ground_truth import Expected
from spd_fast.train.config import Config, ResidMLPTarget, TMSTarget, load_config

__all__ = ["expected_sites", "recipe", "recipes"]


def _folder() -> Path:
    return Path(str(resources.files("spd_fast.experiments")))


def recipes() -> dict[str, str]:
    """Name → one-line description (the recipe's first comment), in name order."""
    found = {}
    for path in sorted(_folder().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found[path.stem] = first.lstrip("# ").strip()
    return found


def recipe(name: str) -> dict[str, Any]:
    """The settings of a shipped experiment, or of a YAML file.

    Raises:
        UserError: unknown name (lists the nearest), or an unreadable file.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no configuration file {name}")
        return load_config(path)
    if name not in recipes():
        raise UserError(
            f"unknown experiment {name!r}; nearest: {nearest(name, recipes())} "
            "(`spd-fast list` shows all; a path must end in .yaml)"
        )
    return load_config(_folder() / f"{name}.yaml")


def expected_sites(config: Config) -> dict[str, Expected]:
    """Site → the mechanisms a toy target is known to have (the paper, §3)."""
    target = config.target
    if isinstance(target, TMSTarget):
        sites = {
            "linear1": Expected("identity", target.features),
            "linear2": Expected("identity", target.features),
        }
        for i in range(target.identity_layers):
            sites[f"hidden_layers.{i}"] = Expected("dense", target.hidden)
        return sites
    assert isinstance(target, ResidMLPTarget)
    sites = {}
    for i in range(target.layers):
        sites[f"layers.{i}.mlp_in"] = Expected("identity", target.features)
        sites[f"layers.{i}.mlp_out"] = Expected("dense", target.d_mlp)
    return sites
