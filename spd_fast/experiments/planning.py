"""The plan of an experiment: what it will need, before anything of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spd_fast import targets
from spd_fast.errors import UserError
from spd_fast.experiments.language import language_trainer
from spd_fast.experiments.recipes import configuration, language_configuration
from spd_fast.experiments.runs import check_device, make_trainer
from spd_fast.train import Trainer
from spd_fast.train.plan import Plan, make_plan

__all__ = ["plan_experiment"]


def plan_experiment(
    data: dict[str, Any], *, device: str | None = None, backend: str | None = None
) -> Plan:
    """The plan of the experiment with these settings (those of ``spd-fast run``). Of a language
    model, target and tokens are read; of a toy, an untrained network stands for the target.

    Raises:
        UserError: bad settings; a baseline, which is not planned.
    """
    chosen = check_device(device, backend)
    nowhere = Path()  # nothing is written
    language = language_configuration(data)
    if language is not None:
        target = targets.load_hf(language.target.path, revision=language.target.revision)
        trainer = language_trainer(language, target.to(chosen), nowhere, backend, True)
        return make_plan(trainer.model, language, trainer.batches(0).numel())
    config = configuration(data)
    network = targets.make_target(config.target, config.seed).to(chosen)
    toy = make_trainer(config, network, nowhere, backend, True)
    if not isinstance(toy, Trainer):
        raise UserError(f"{config.name!r} is a baseline; only SPD's runs are planned")
    return make_plan(toy.model, toy.config, toy.config.batch_size)
