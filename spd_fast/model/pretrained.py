"""A decomposition on disk: ``config.json`` and ``model.safetensors`` (V, U, ci_fn; never the
target)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.model.decomposed import DecomposedModel
from spd_fast.model.sites import Site

__all__ = ["load_pretrained", "save_pretrained", "weights_hash"]

FORMAT = 1


def weights_hash(sites: dict[str, Site]) -> str:
    """Identifies the decomposed weights of a target: sha256 of their float bytes, site by site."""
    digest = hashlib.sha256()
    for name, site in sites.items():
        digest.update(name.encode())
        digest.update(site.weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_pretrained(model: DecomposedModel, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "sites": {name: site.components for name, site in model.sites.items()},
        **model.options,
        "target_weights_sha256": weights_hash(model.sites),
    }
    # Copies, for tied components share a storage, which the format does not know.
    tensors = {
        k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()
    }
    write_bytes(folder / "model.safetensors", save(tensors))
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_pretrained(
    folder: str | Path, target: nn.Module, *, backend: str | None = None
) -> DecomposedModel:
    """The decomposition in ``folder``, on ``target``.

    Raises:
        UserError: nothing readable there, another format, or a target with other weights.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
        if config.pop("format") != FORMAT:
            raise UserError(f"the decomposition in {folder} has another format; need {FORMAT}")
        sites, expected = config.pop("sites"), config.pop("target_weights_sha256")
        model = DecomposedModel(target, sites, **config, backend=backend)
        model.load_state_dict(tensors)
    except UserError:
        raise
    except (
        OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UserError(f"no readable decomposition in {folder}: {reason}") from None
    if weights_hash(model.sites) != expected:
        raise UserError(
            f"the decomposition in {folder} was made of a target with other weights than this one"
        )
    return model
