"""Neuron contributions of a residual MLP: does each feature's component use the neurons that the
target uses? (The paper, §3.3, figures 6, 7, 10 and 11.)"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spd_fast.model.sites import SiteModel
from spd_fast.targets.resid_mlp import ResidMLP

__all__ = ["NeuronContributions", "best_components", "neuron_contributions"]


@dataclass(frozen=True)
class NeuronContributions:
    """What every neuron contributes to a feature's own output, per layer.

    Attributes:
        target: [layers, features, d_mlp], of the target. found: likewise, of each feature's
            component. component: [layers, features], which component that is.
    """

    target: Tensor
    found: Tensor
    component: Tensor

    @property
    def r2(self) -> float:
        """How well ``found`` predicts ``target`` as it stands, 1 − Σ (found − target)² /
        Σ (target − its mean)²: no line is fitted, so shrinkage lowers it. 1 at best."""
        return _r2(self.target, self.found)

    @property
    def slope(self) -> float:
        """Least-squares slope through the origin of ``found`` against ``target``: below 1 is
        shrinkage."""
        return _slope(self.target, self.found)

    def by_layer(self) -> list[dict[str, float]]:
        """``r2`` and ``slope`` of every layer alone."""
        pairs = zip(self.target, self.found, strict=True)
        return [{"r2": _r2(t, f), "slope": _slope(t, f)} for t, f in pairs]


def _r2(target: Tensor, found: Tensor) -> float:
    spread = (target - target.mean()).square().sum()
    return (1 - (found - target).square().sum() / spread).item()


def _slope(target: Tensor, found: Tensor) -> float:
    return ((target * found).sum() / target.square().sum()).item()


def best_components(candidates: Tensor) -> Tensor:
    """The maximising component of each feature: the one with the largest single contribution.

    Args:
        candidates: [features, C, d_mlp], every component's contributions.

    Returns:
        [features], indices below C.
    """
    return candidates.amax(dim=-1).argmax(dim=-1)


@torch.no_grad()
def neuron_contributions(model: SiteModel) -> NeuronContributions:
    """Contributions of feature i, layer by layer and in float64.

    target: (W_U[i] W_out) ⊙ (W_in W_E[:, i]). found: the same with a single component P_c
    in place of W_in and the sum of all components in place of W_out; c maximises the largest
    contribution of a neuron.

    Raises:
        ValueError: the target is no residual MLP with every matrix decomposed.
    """
    target = model.target
    if not isinstance(target, ResidMLP):
        raise ValueError(f"neuron contributions need a ResidMLP, got {type(target).__name__}")
    W_E = target.W_E.double()  # [features, d_embed], and W_U = W_Eᵀ
    of_target, of_components, indices = [], [], []
    for i in range(len(target.layers)):
        names = [f"layers.{i}.mlp_in", f"layers.{i}.mlp_out"]
        if missing := [name for name in names if name not in model.sites]:
            raise ValueError(f"neuron contributions need site {missing[0]!r} decomposed")
        W_in, W_out = (model.sites[name].weight.double() for name in names)
        read = model.component_outputs(names[0], W_E)
        write = W_E @ model.total(names[1])  # [features, d_mlp]
        candidates = read * write[:, None]
        component = best_components(candidates)
        of_target.append((W_E @ W_out) * (W_E @ W_in.T))
        of_components.append(candidates[torch.arange(len(component)), component])
        indices.append(component)
    return NeuronContributions(
        torch.stack(of_target), torch.stack(of_components), torch.stack(indices)
    )
