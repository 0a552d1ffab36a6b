"""APD's A and B on disk: ``config.json`` and ``model.safetensors`` (never the target)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from spd_fast._files import write_bytes
from spd_fast.baselines.apd import APDModel
from spd_fast.errors import UserError
from spd_fast.model.pretrained import target_hash

__all__ = ["load_pretrained", "save_pretrained"]

FORMAT = 1


def save_pretrained(model: APDModel, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "method": "apd",
        "format": FORMAT,
        "sites": {name: site.components for name, site in model.sites.items()},
        **model.options,
        "target_sha256": target_hash(model.target),
    }
    # A does not lie in memory row by row, which the format does not know.
    tensors = {
        k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()
    }
    write_bytes(folder / "model.safetensors", save(tensors))
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_pretrained(
    folder: str | Path, target: nn.Module, *, backend: str | None = None
) -> APDModel:
    """The components in ``folder``, on ``target``.

    Raises:
        UserError: nothing readable there, another format, or a target with other weights.
    """
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
        if (config.pop("method"), config.pop("format")) != ("apd", FORMAT):
            raise UserError(f"the components in {folder} have another format; need APD's {FORMAT}")
        sites, expected = config.pop("sites"), config.pop("target_sha256")
        model = APDModel(target, sites, **config, backend=backend)
        if target_hash(target) == expected:
            model.load_state_dict(tensors)
            return model
    except UserError:
        raise
    except (
        OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UserError(f"no readable components of APD in {folder}: {reason}") from None
    raise UserError(
        f"the components in {folder} were made of a target with other weights than this one"
    )
