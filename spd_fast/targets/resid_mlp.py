"""Residual MLP toy: ReLU MLPs on a residual stream, fixed random embedding (the paper, §3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast._adamw import adamw
from spd_fast._seeds import mixed_seed
from spd_fast.targets.data import SparseFeatures

__all__ = ["ResidMLP", "train_resid_mlp"]


class _Layer(nn.Module):
    def __init__(self, d_embed: int, d_mlp: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_embed, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_embed, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(x)))


class ResidMLP(nn.Module):
    """x → x W_E → residual stream with L blocks → W_U = W_Eᵀ.

    W_E [features, d_embed] has unit Gaussian rows and is fixed; d_mlp is per layer.
    """

    # The stream is only read by matrices and added to (spd_fast.model.factored).
    factored_stream = True

    def __init__(self, features: int, d_embed: int, d_mlp: int, layers: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(mixed_seed(seed, "initialise target"))
        embedding = torch.randn(features, d_embed, generator=generator)
        # A module of its own, so that its output is computed once a step.
        self.embedding = nn.Linear(features, d_embed, bias=False)
        self.embedding.weight = nn.Parameter(
            (embedding / embedding.norm(dim=1, keepdim=True)).T, requires_grad=False
        )
        blocks = [_Layer(d_embed, d_mlp) for _ in range(layers)]
        self.layers = nn.ModuleList(blocks)
        with torch.no_grad():
            for layer in blocks:
                for linear in (layer.mlp_in, layer.mlp_out):
                    std = math.sqrt(2 / (linear.in_features + linear.out_features))
                    linear.weight.normal_(0, std, generator=generator)

    @property
    def W_E(self) -> Tensor:
        """[features, d_embed]."""
        return self.embedding.weight.T

    def forward(self, x: Tensor) -> Tensor:
        residual = self.embedding(x)
        for layer in self.layers:
            residual = residual + layer(residual)
        return residual @ self.embedding.weight


def train_resid_mlp(
    model: ResidMLP,
    data: SparseFeatures,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Train ``model`` in place towards x + ReLU(x): MSE, AdamW, half-wave cosine schedule.

    The label is zero where a feature is absent, so no mask is needed. Returns the loss every
    hundredth of the way.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([parameters], lr, weight_decay)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / max(steps - 1, 1)))
        x = data(step)
        loss = F.mse_loss(model(x), x + F.relu(x))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(steps // 100, 1) == 0 or step == steps - 1:
            losses.append(loss.item())
        if progress is not None:
            progress(step + 1)
    model.requires_grad_(False)
    return losses
