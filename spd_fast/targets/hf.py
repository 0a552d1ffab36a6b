"""Hugging Face models as targets: a local folder or a hub id, weights from safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from spd_fast.errors import UserError

__all__ = ["load_hf"]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "Hugging Face models need transformers: pip install 'spd_fast[hf]'"
        ) from None
    return transformers


def load_hf(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> nn.Module:
    """A Hugging Face model, frozen and in evaluation mode, on the CPU.

    The class is the one its ``config.json`` names (``LlamaForCausalLM``, ``BertModel``, …), from
    transformers itself: a repository's own code is never run, and only ``.safetensors`` weights are
    read. ``HF_HUB_OFFLINE=1`` keeps everything off the network.

    Args:
        path_or_id: a local folder, or an id on the hub (``"openai-community/gpt2"``).
        dtype: of its weights.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: transformers is not installed; nothing there, nothing that can be read, or some
            weights missing.
    """
    transformers = _transformers()
    name = str(path_or_id)
    folder = Path(name)
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise UserError(f"{name} holds no Hugging Face model (no config.json)")
    if local and not any(folder.glob("*.safetensors")):
        raise UserError(f"{name} holds no .safetensors weights; other formats can run code")
    if not local and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise UserError(f"no folder {name}")
    source = {"revision": revision, "trust_remote_code": False}
    logging = transformers.utils.logging
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name, **source)
        architecture = (getattr(config, "architectures", None) or [None])[0]
        found = getattr(transformers, architecture or "", None) or transformers.AutoModel
        model, found_keys = found.from_pretrained(
            name, **source, config=config, dtype=dtype, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (
        OSError, SafetensorError, ValueError, KeyError, ImportError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        where = "folder" if local else "folder or hub id"
        raise UserError(f"no readable model at the {where} {name}: {reason}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
    if missing := sorted(found_keys["missing_keys"]):
        raise UserError(
            f"the weights of {name} lack {missing[0]!r} of {type(model).__name__}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return model.eval().requires_grad_(False)
