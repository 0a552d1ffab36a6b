"""A decomposition on disk or on the Hugging Face hub: ``config.json``, ``model.safetensors`` (V, U,
importance functions; never the target) and a model card."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import spd_fast
from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.model.decomposed import DecomposedModel
from spd_fast.model.sites import Site, submodules

__all__ = ["load_pretrained", "model_card", "push_to_hub", "save_pretrained", "target_hash"]

FORMAT = 2
# Format 1 knew nn.Linear only and hashed the decomposed weights alone.
READABLE = (1, FORMAT)


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def target_hash(target: nn.Module) -> str:
    """Identifies a target: sha256 over the names and bytes of all its weights and buffers."""
    digest = hashlib.sha256()
    state = submodules(target)[""].state_dict()
    for name in sorted(state):
        if isinstance(tensor := state[name], Tensor):
            _update(digest, name.replace("_orig_mod.", ""), tensor)
    return digest.hexdigest()


def _sites_hash(sites: dict[str, Site]) -> str:
    """The identification of format 1."""
    digest = hashlib.sha256()
    for name, site in sites.items():
        _update(digest, name, site.weight)
    return digest.hexdigest()


def _target_id(target: nn.Module) -> str:
    """Folder or hub id of a Hugging Face model, else the name of its class."""
    name = getattr(target, "name_or_path", None)
    return name if isinstance(name, str) and name else type(submodules(target)[""]).__name__


def _config(model: DecomposedModel) -> dict[str, Any]:
    output = model.caller.output
    return {
        "format": FORMAT,
        "spd_fast": spd_fast.__version__,
        "sites": {name: site.components for name, site in model.sites.items()},
        **model.options,
        "output": None if callable(output) else output,
        "target": {
            "id": _target_id(model.target),
            "class": type(submodules(model.target)[""]).__name__,
            "sha256": target_hash(model.target),
        },
    }


def model_card(config: dict[str, Any], sites: dict[str, Site]) -> str:
    """README.md of a decomposition: what it is of, its sites, and how to load it."""
    target = config["target"]
    known = "" if target["id"] == target["class"] else f"{target['id']}, "
    rows = [
        f"| `{name}` | {site.kind} | {site.d_in} → {site.d_out} | {site.components} |"
        for name, site in sites.items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: spd_fast",
            "tags: [interpretability, stochastic-parameter-decomposition]",
            "---",
            f"# Decomposition of {target['id']}",
            "",
            "Rank-one components and causal-importance functions of a frozen network, by",
            "Stochastic Parameter Decomposition (arXiv 2506.20790). The network is not in here:",
            f"{known}{target['class']}, sha256 of its weights `{target['sha256']}`.",
            "",
            "| site | kind | width | components |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Importance function `{config['ci_fn']}`, sigmoids `{config['sigmoid']}`, "
            f"weight delta {'on' if config['delta'] else 'off'}. "
            f"Made with spd_fast {config['spd_fast']}.",
            "",
            "```python",
            "import spd_fast",
            "model = spd_fast.DecomposedModel.from_pretrained(FOLDER_OR_HUB_ID, target)",
            "```",
            "",
        ]
    )


def save_pretrained(model: DecomposedModel, folder: str | Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and, unless there is one, ``README.md`` into
    ``folder``, made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(model)
    # Copies, for tied components share a storage, which the format does not know.
    tensors = {
        k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()
    }
    write_bytes(folder / "model.safetensors", save(tensors))
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    if not (folder / "README.md").exists():
        write_bytes(folder / "README.md", model_card(config, model.sites).encode())


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'spd_fast[hf]'") from None
    return huggingface_hub


def push_to_hub(
    model: DecomposedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload decomposition",
) -> str:
    """Upload what :func:`save_pretrained` writes into a repository, made if needed; its address.

    Raises:
        UserError: huggingface_hub is not installed, or the hub refuses.
    """
    hub = _hub()
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
            reason = " ".join(str(error).split())
            raise UserError(f"cannot push to {repo_id}: {reason}") from None
    return str(url)


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        found = _hub().snapshot_download(
            repo_id, revision=revision, allow_patterns=["config.json", "model.safetensors"]
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"no decomposition at the folder or hub id {repo_id}: {reason}") from None
    return Path(found)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["format"] not in READABLE:
        raise UserError(f"the decomposition in {folder} has another format; need {FORMAT}")
    return config, load_file(folder / "model.safetensors")


def load_pretrained(
    source: str | Path,
    target: nn.Module | str | Path | None = None,
    *,
    revision: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> DecomposedModel:
    """The decomposition in a folder or a repository of the hub, on ``target``.

    Args:
        target: the network it was made of; None loads the Hugging Face model that it names.
        revision: branch, tag or commit on the hub.
        options: ``output`` and ``adapter`` of :class:`DecomposedModel`; a callable ``output`` is
            not stored and has to be given again.

    Raises:
        UserError: nothing readable there, another format, or a target with other weights.
    """
    folder = Path(source)
    if not folder.is_dir() and isinstance(source, str) and source.count("/") == 1:
        folder = _download(source, revision)
    try:
        config, tensors = _read(folder)
        version = config.pop("format")
        config.pop("spd_fast", None)
        sites = config.pop("sites")
        known = config.pop("target", {"id": None, "class": None})
        expected = config.pop("target_weights_sha256") if version == 1 else known["sha256"]
        if target is None:
            if known["id"] in (None, known["class"]):
                raise UserError(f"the decomposition in {folder} needs its target: pass it")
            target = known["id"]
        model = DecomposedModel(target, sites, **config | options, backend=backend)
        found = _sites_hash(model.sites) if version == 1 else target_hash(model.target)
        if found == expected:
            model.load_state_dict(tensors)
    except UserError:
        raise
    except (
        OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UserError(f"no readable decomposition in {folder}: {reason}") from None
    if found != expected:
        of = f"{known['id']}, " if known["id"] else ""
        raise UserError(
            f"the decomposition in {folder} was made of a target with other weights than this one"
            f" ({of}sha256 {expected[:12]}…; this one {found[:12]}…)"
        )
    model.awaits_inputs = False
    return model
