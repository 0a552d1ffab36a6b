"""The toy targets inside checkpoints of the authors' code, and the import of a whole run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel
from spd_fast.model.authors import decomposition_of, read_run
from spd_fast.targets.build import load_target, save_target
from spd_fast.targets.hf import load_hf
from spd_fast.targets.resid_mlp import ResidMLP
from spd_fast.targets.tms import TMS
from spd_fast.train.config import ResidMLPTarget, TMSTarget

__all__ = ["Imported", "import_run", "read_import", "toy_target", "write_import"]

ToyConfig = TMSTarget | ResidMLPTarget


def _tms(state: Mapping[str, Tensor]) -> tuple[nn.Module, ToyConfig]:
    hidden, features = state["linear1.weight"].shape
    layers = sum(n.startswith("hidden_layers.") and n.endswith(".weight") for n in state)
    target = TMS(features, hidden, layers)
    if not torch.equal(state["linear2.weight"], state["linear1.weight"].T):
        raise UserError("the run's toy model of superposition is not tied: name its target")
    target.load_state_dict(state)
    target.tie()
    return target, TMSTarget(features=features, hidden=hidden, identity_layers=layers)


def _resid_mlp(state: Mapping[str, Tensor]) -> tuple[nn.Module, ToyConfig]:
    features, d_embed = state["W_E"].shape
    layers = sum(n.endswith(".mlp_in.weight") for n in state)
    d_mlp = state["layers.0.mlp_in.weight"].shape[0]
    if not torch.equal(state["W_U"], state["W_E"].T):
        raise UserError("the run's residual MLP does not unembed with W_Eᵀ: name its target")
    target = ResidMLP(features, d_embed, d_mlp, layers, seed=0)
    own = {n: t for n, t in state.items() if n not in ("W_E", "W_U")}
    target.load_state_dict({"embedding.weight": state["W_E"].T, **own})
    config = ResidMLPTarget(features=features, d_embed=d_embed, d_mlp=d_mlp, layers=layers)
    return target, config


def toy_target(state: Mapping[str, Tensor]) -> tuple[nn.Module, ToyConfig]:
    """The toy network that a state dict of the authors' code stands for, and its configuration.

    Raises:
        UserError: it stands for none of theirs.
    """
    make = _tms if "linear1.weight" in state else _resid_mlp if "W_E" in state else None
    if make is None:
        raise UserError(
            "the checkpoint does not say what network it was made of: name it with --target "
            "(a folder or hub id)"
        )
    try:
        target, config = make(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the checkpoint's target is no toy that this program knows ({reason}): name it with "
            "--target (a folder or hub id)"
        ) from None
    return target.requires_grad_(False), config


def _named_target(name: str) -> nn.Module:
    """A folder of ours (``target/`` of a run), or a Hugging Face folder or hub id."""
    try:
        given = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        given = {}
    kinds: dict[str, type[ToyConfig]] = {"tms": TMSTarget, "resid_mlp": ResidMLPTarget}
    if isinstance(given, dict) and given.get("kind") in kinds:
        try:
            return load_target(kinds[given["kind"]](**given), Path(name))
        except ValidationError as error:
            raise UserError(f"no readable target in {name}: {error.errors()[0]['msg']}") from None
    return load_hf(name)


@dataclass(frozen=True)
class Imported:
    """A run of the authors' code, read: its decomposition, the step of its checkpoint, its settings
    and, where its target is the toy inside the checkpoint, that toy's configuration."""

    model: DecomposedModel
    step: int
    settings: dict[str, Any]
    toy: ToyConfig | None

    def architecture(self) -> dict[str, Any]:
        """What the toy was built from."""
        return (
            {}
            if self.toy is None
            else self.toy.model_dump(exclude_unset=True) | {"kind": self.toy.kind}
        )


def read_import(folder: Path, out: Path, target: str | None = None) -> Imported:
    """What :func:`write_import` is to write into ``out``; nothing is written yet. Arguments and
    errors of :func:`import_run`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not an empty folder; choose another")
    run = read_run(folder)
    if target is None:
        network, config = toy_target(run.target)
    else:
        network, config = _named_target(target), None
    return Imported(decomposition_of(run, network), run.step, run.config, config)


def write_import(found: Imported, out: Path) -> None:
    """Write the decomposition, ``source_config.yaml`` and, of a toy, ``target/``."""
    found.model.save_pretrained(out)
    text = yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True)
    write_bytes(out / "source_config.yaml", text.encode())
    if found.toy is not None:
        save_target(found.model.target, found.toy, out / "target")


def import_run(folder: Path, out: Path, target: str | None = None) -> DecomposedModel:
    """Write a run of the authors' code as a decomposition of ours: ``out`` gets what
    :meth:`DecomposedModel.save_pretrained` writes, the run's settings as ``source_config.yaml``
    and, of a toy, ``target/``.

    Args:
        folder: the run's, with ``final_config.yaml`` and ``model_<step>.pth``, or the latter.
        target: folder or hub id of its target; None takes the toy inside the checkpoint.

    Raises:
        UserError: a run that cannot be read, or ``out`` is not empty; nothing is written then.
    """
    found = read_import(folder, out, target)
    write_import(found, out)
    return found.model
