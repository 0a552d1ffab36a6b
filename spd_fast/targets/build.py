"""Making, saving and loading the targets that experiments name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from spd_fast._files import write_bytes
from spd_fast.errors import UserError
from spd_fast.targets.data import SparseFeatures
from spd_fast.targets.resid_mlp import ResidMLP, train_resid_mlp
from spd_fast.targets.tms import TMS, train_tms
from spd_fast.train.config import ResidMLPTarget, TMSTarget

__all__ = ["feature_data", "load_target", "make_target", "save_target", "train_target"]

TargetConfig = TMSTarget | ResidMLPTarget
# What a target was built from, as opposed to how it was trained.
_ARCHITECTURE = {
    "tms": ("kind", "features", "hidden", "identity_layers"),
    "resid_mlp": ("kind", "features", "d_embed", "d_mlp", "layers"),
}


def make_target(config: TargetConfig, seed: int) -> nn.Module:
    """The untrained network."""
    if isinstance(config, TMSTarget):
        return TMS(config.features, config.hidden, config.identity_layers)
    return ResidMLP(config.features, config.d_embed, config.d_mlp, config.layers, seed)


def feature_data(
    config: TargetConfig, batch_size: int, seed: int, stream: str, device: str = "cpu"
) -> SparseFeatures:
    """The target's input distribution: U[0, 1] (TMS) or U[−1, 1] (residual MLP), sparse."""
    low = 0.0 if isinstance(config, TMSTarget) else -1.0
    return SparseFeatures(
        config.features, config.probability, low, 1.0, batch_size, seed, stream, device
    )


def train_target(
    config: TargetConfig, seed: int, progress: Callable[[int], None] | None = None
) -> tuple[nn.Module, list[float]]:
    """A freshly trained target on the CPU, and its losses over the training."""
    model = make_target(config, seed)
    data = feature_data(config, config.batch_size, seed, "target")
    if isinstance(model, TMS):
        assert isinstance(config, TMSTarget)
        losses = train_tms(
            model, data, steps=config.steps, lr=config.lr, weight_decay=config.weight_decay,
            zero_bias=config.zero_bias, starts=config.starts, seed=seed, progress=progress,
        )  # fmt: skip
    else:
        assert isinstance(model, ResidMLP)
        losses = train_resid_mlp(
            model, data, steps=config.steps, lr=config.lr, weight_decay=config.weight_decay,
            progress=progress,
        )  # fmt: skip
    return model, losses


def _architecture(config: TargetConfig) -> dict[str, object]:
    return {key: getattr(config, key) for key in _ARCHITECTURE[config.kind]}


def save_target(model: nn.Module, config: TargetConfig, folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``. A tied weight is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    if isinstance(model, TMS):
        del tensors["linear2.weight"]
    write_bytes(folder / "model.safetensors", save(tensors))
    text = json.dumps(_architecture(config), indent=2) + "\n"
    write_bytes(folder / "config.json", text.encode())


def load_target(config: TargetConfig, folder: Path) -> nn.Module:
    """Read what :func:`save_target` wrote.

    Raises:
        UserError: nothing readable there, or another architecture than ``config`` asks for.
    """
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"no readable target in {folder}: {reason}") from None
    if given != _architecture(config):
        raise UserError(
            f"the target in {folder} is {given}, but the configuration asks for "
            f"{_architecture(config)}"
        )
    model = make_target(config, seed=0)
    try:
        if isinstance(model, TMS):
            tensors["linear2.weight"] = tensors["linear1.weight"].T
        model.load_state_dict(tensors)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the target in {folder} does not fit: {reason}") from None
    if isinstance(model, TMS):
        model.tie()
    return model.requires_grad_(False)
