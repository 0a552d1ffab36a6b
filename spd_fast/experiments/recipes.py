"""The recipes that ship with the package."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from spd_fast.baselines import APDConfig, parse_apd_config
from spd_fast.errors import UserError, nearest
from spd_fast.evaluate.ground_truth import Expected
from spd_fast.train.config import (
    Config,
    LanguageConfig,
    ResidMLPTarget,
    TMSTarget,
    load_config,
    parse_config,
    validate,
)

__all__ = [
    "AnyConfig",
    "configuration",
    "expected_sites",
    "language_configuration",
    "recipe",
    "recipes",
]


AnyConfig = Config | APDConfig


def _folder() -> Path:
    return Path(str(resources.files("spd_fast.experiments")))


def recipes() -> dict[str, str]:
    """Name → one-line description (the recipe's first comment), in name order."""
    found = {}
    for path in sorted(_folder().rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        name = path.relative_to(_folder()).with_suffix("").as_posix()
        found[name] = first.lstrip("# ").strip()
    return dict(sorted(found.items()))


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


def configuration(data: Mapping[str, Any]) -> AnyConfig:
    """The configuration in a mapping: SPD's, or that of the ``method`` it names.

    Raises:
        UserError: one line naming the key, what was given, and what is needed.
    """
    if "method" not in data:
        return parse_config(data)
    if data["method"] != "apd":
        raise UserError(f"unknown method {data['method']!r}; known: 'apd'; leave it out for SPD")
    return parse_apd_config(data)


def language_configuration(data: Mapping[str, Any]) -> LanguageConfig | None:
    """The configuration in a mapping whose target is a Hugging Face model; None for others.

    Raises:
        UserError: one line naming the key, what was given, and what is needed.
    """
    target = data.get("target")
    if not isinstance(target, Mapping) or target.get("kind") != "hf":
        return None
    return validate(data, LanguageConfig)


def expected_sites(config: AnyConfig) -> dict[str, Expected]:
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
