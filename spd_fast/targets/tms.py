"""The toy model of superposition, x̂ = ReLU(Wᵀ (I) W x + b), tied (the paper, §3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.targets.data import SparseFeatures

__all__ = ["TMS", "train_tms"]


class TMS(nn.Module):
    """Features → hidden → (frozen identity layers) → features.

    ``linear2.weight`` is ``linear1.weight`` transposed, in the same storage.
    """

    def __init__(self, features: int, hidden: int, identity_layers: int = 0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, hidden, bias=False)
        self.hidden_layers = nn.ModuleList(
            nn.Linear(hidden, hidden, bias=False) for _ in range(identity_layers)
        )
        self.linear2 = nn.Linear(hidden, features)
        for layer in self.hidden_layers:
            nn.init.eye_(layer.weight)
        self.tie()

    def tie(self) -> None:
        """Make the second weight the first one's transpose again (after loading or moving)."""
        self.linear2.weight = nn.Parameter(self.linear1.weight.detach().T, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        for layer in self.hidden_layers:
            x = layer(x)
        return F.relu(self.linear2(x))


def train_tms(
    model: TMS,
    data: SparseFeatures,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    zero_bias: bool,
    seed: int,
    progress: object = None,
) -> list[float]:
    """Train ``model`` in place to reconstruct |x|: loss = mean (|x| − x̂)², AdamW, constant lr.

    Returns the loss every hundredth of the way. The identity layers stay frozen; being exactly
    the identity they are left out of the training forward.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bound = model.linear1.in_features**-0.5  # nn.Linear's own default
        model.linear1.weight.uniform_(-bound, bound, generator=generator)
        bound = model.linear2.in_features**-0.5
        model.linear2.bias.uniform_(-bound, bound, generator=generator)
        if zero_bias:
            model.linear2.bias.zero_()
    W, b = model.linear1.weight, model.linear2.bias
    W.requires_grad_(True)
    b.requires_grad_(True)
    optimizer = torch.optim.AdamW([W, b], lr=lr, weight_decay=weight_decay, fused=True)
    losses = []
    for step in range(steps):
        x = data(step)
        loss = F.mse_loss(F.relu(F.linear(F.linear(x, W), W.T, b)), x.abs())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(steps // 100, 1) == 0 or step == steps - 1:
            losses.append(loss.item())
        if callable(progress):
            progress(step + 1)
    model.requires_grad_(False)
    model.tie()
    return losses
