"""The toy model of superposition, x̂ = ReLU(Wᵀ (I) W x + b), tied (the paper, §3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast._adamw import adamw
from spd_fast._seeds import mixed_seed
from spd_fast._threads import SMALL, one_thread_where
from spd_fast.targets.data import SparseFeatures

__all__ = ["PROBE", "TMS", "represented_features", "train_tms"]

PROBE = 0.75
# A start that has lost a feature after this fraction of the steps does not find it again: its
# output is a dead ReLU, without a gradient.
CHECK_AFTER = 0.2


class TMS(nn.Module):
    """Features → hidden → (frozen identity layers) → features.

    ``linear2.weight`` is ``linear1.weight`` transposed, in the same storage.
    """

    def __init__(self, features: int, hidden: int, identity_layers: int = 0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, hidden, bias=False)
        identities = [nn.Linear(hidden, hidden, bias=False) for _ in range(identity_layers)]
        for layer in identities:
            nn.init.eye_(layer.weight)
        self.hidden_layers = nn.ModuleList(identities)
        self.linear2 = nn.Linear(hidden, features)
        self.tie()

    def tie(self) -> None:
        """Make the second weight the first one's transpose again (after loading)."""
        self.linear2.weight = nn.Parameter(self.linear1.weight.detach().T, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TMS:
        # Moving or casting gives every parameter a storage of its own.
        super()._apply(fn, recurse)
        self.tie()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        for layer in self.hidden_layers:
            x = layer(x)
        return F.relu(self.linear2(x))


def represented_features(target: nn.Module, features: int, device: torch.device) -> list[bool]:
    """Which features a target represents: going from nothing to 0.75 · one-hot must move the
    feature's own output by more than a third of that."""
    with torch.no_grad():
        probes = torch.eye(features, device=device) * PROBE
        response = target(probes).diagonal() - target(torch.zeros_like(probes))[0]
    return (response > PROBE / 3).tolist()


def train_tms(
    model: TMS,
    data: SparseFeatures,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    zero_bias: bool,
    starts: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Train ``model`` in place to reconstruct |x|: loss = mean (|x| − x̂)², AdamW, constant lr.

    Training from ``nn.Linear``'s default initialisation often leaves features out for good, so up
    to ``starts`` initialisations (a function of ``seed``) are tried and the first that keeps
    every feature is trained to the end; the last one is, whatever it keeps. The identity layers
    stay frozen; being exactly the identity they are left out of the training forward.

    Returns:
        the loss at every hundredth of the way.
    """
    generator = torch.Generator().manual_seed(mixed_seed(seed, "initialise target"))
    with one_thread_where(data.batch_size * data.features <= SMALL):
        for start in range(starts):
            _initialise(model, zero_bias, generator)
            losses = []
            for step, loss in _descend(model, data, steps, lr, weight_decay):
                if step % max(steps // 100, 1) == 0 or step == steps - 1:
                    losses.append(loss.item())
                if progress is not None:
                    progress(step + 1)
                if step + 1 == max(int(CHECK_AFTER * steps), 1) and start + 1 < starts:
                    device = model.linear1.weight.device
                    if not all(represented_features(model, model.linear1.in_features, device)):
                        break
            else:
                break
    model.requires_grad_(False)
    model.tie()
    return losses


def _initialise(model: TMS, zero_bias: bool, generator: torch.Generator) -> None:
    """``nn.Linear``'s own default: U[−1, 1] / √fan_in."""
    with torch.no_grad():
        for linear in (model.linear1, model.linear2):
            bound = linear.in_features**-0.5
            tensor = model.linear1.weight if linear is model.linear1 else model.linear2.bias
            tensor.uniform_(-bound, bound, generator=generator)
        if zero_bias:
            model.linear2.bias.zero_()


def _descend(
    model: TMS, data: SparseFeatures, steps: int, lr: float, weight_decay: float
) -> Iterator[tuple[int, Tensor]]:
    W, b = model.linear1.weight.requires_grad_(True), model.linear2.bias.requires_grad_(True)
    optimizer = adamw([[W, b]], lr, weight_decay)
    for step in range(steps):
        x = data(step)
        loss = F.mse_loss(F.relu(F.linear(F.linear(x, W), W.T, b)), x.abs())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield step, loss.detach()
