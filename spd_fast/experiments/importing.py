"""A run of the authors' code as a run of ours: to evaluate, to report and to continue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.experiments.language import language_trainer
from spd_fast.experiments.recipes import language_configuration
from spd_fast.experiments.runs import make_trainer
from spd_fast.model import DecomposedModel
from spd_fast.targets.authors import read_import, write_import
from spd_fast.train import Trainer
from spd_fast.train.config import Config, LanguageConfig, parse_config

__all__ = ["import_as_run"]

# What the imported run decides about its model, whatever the settings say.
OF_MODEL = ("ci_fn", "ci_hidden", "sigmoid", "init", "delta")


def _trainer(config: Config | LanguageConfig, network: nn.Module, out: Path) -> Trainer:
    if isinstance(config, LanguageConfig):
        return language_trainer(config, network, out, None, True)
    return make_trainer(config, network, out, None, True)


def import_as_run(
    folder: Path, out: Path, settings: Mapping[str, Any], target: str | None = None
) -> DecomposedModel:
    """Write a run of the authors' code into ``out`` as a run of ours: what
    :func:`~spd_fast.targets.import_run` writes, a ``config.yaml`` and a checkpoint at the run's
    step, from which ``spd-fast run OUT/config.yaml --out OUT --resume`` goes on. Moments of the
    optimiser are not in the authors' checkpoints: they begin at zero.

    Args:
        settings: of the training that is to follow, those of a recipe; target, sites and
            importance functions are the imported run's.

    Raises:
        UserError: a run or settings that cannot be read or do not go together, no step left to
            train; nothing is written then.
    """
    found = read_import(folder, out, target)
    model = found.model
    data = dict(settings)
    given = dict(data.get("target") or {})
    if found.toy is not None:
        kept = given if given.get("kind") == found.toy.kind else {}
        data["target"] = {k: v for k, v in kept.items() if k != "path"} | found.architecture()
    elif given.get("kind") == "hf" and target is not None:
        data["target"] = given | {"path": target}
    else:
        raise UserError(
            "settings for a run on a named target are those of a language model (target.kind hf)"
        )
    data["sites"] = {name: site.components for name, site in model.sites.items()}
    data |= {key: model.options[key] for key in OF_MODEL}
    config = language_configuration(data) or parse_config(data)
    if config.steps <= found.step:
        raise UserError(
            f"the run has {found.step} steps behind it and the settings end at {config.steps}: "
            f"add --set steps=N with N above {found.step}"
        )
    trainer = _trainer(config, model.target, out)
    trainer.model.load_state_dict(model.state_dict())
    trainer.step = found.step
    write_import(found, out)
    write_bytes(out / "config.yaml", config.to_yaml().encode())
    trainer.save()
    return model
