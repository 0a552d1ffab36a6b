"""APD's losses (arXiv 2501.14926), each a scalar of one step's forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from spd_fast.baselines.apd import APDModel, Attributed
from spd_fast.baselines.config import APDConfig

__all__ = [
    "LOSSES",
    "APDStep",
    "activation_recon",
    "faithfulness",
    "schatten",
    "topk_recon",
]

# Inside the root of (‖A‖² ‖B‖²)^(p/2), whose slope at zero is infinite for p < 2; as in the
# authors' code.
EPS = 1e-16


@dataclass(frozen=True)
class APDStep:
    """The forwards that a step's losses share.

    Attributes:
        clean: the target's forward, with attributions.
        kept: bool [N, C].
        output: the target's output with the kept components alone, [N, O].
        outputs: every site's output in that forward.
    """

    model: APDModel
    config: APDConfig
    clean: Attributed
    kept: Tensor
    output: Tensor
    outputs: dict[str, Tensor]


def faithfulness(step: APDStep) -> Tensor:
    """Σ_l ‖W_l − (Σ_c A_cl B_cl)ᵀ‖² / Σ_l numel(W_l); tied matrices count twice."""
    total = sum(step.model.faithfulness().values())
    assert isinstance(total, Tensor)
    return total / _numel(step.model)


def topk_recon(step: APDStep) -> Tensor:
    """(kept output − target output)²: mean over samples, over outputs as configured."""
    error = (step.output - step.clean.output).square()
    if step.config.losses.topk_recon.over_outputs == "mean":
        return error.mean()
    return error.sum(dim=1).mean()


def schatten(step: APDStep) -> Tensor:
    """Simplicity: mean over samples of Σ over kept c, sites l and inner ranks m of
    (‖A_clm‖² ‖B_clm‖²)^(p/2), over Σ_l numel(W_l); tied sites count twice.

    A component adds its share as often as it is kept, so counts stand for samples.
    """
    model, p = step.model, step.config.losses.schatten.p
    often = step.kept.sum(dim=0).to(step.output.dtype) / step.kept.shape[0]  # [C]
    total = step.output.new_zeros(())
    for name, times in model.free_sites().items():
        size = model.A(name).square().sum(dim=1) * model.B(name).square().sum(dim=2)  # [C, m]
        total = total + times * (often @ (size + EPS).pow(p / 2)).sum()
    return total / _numel(model)


def activation_recon(step: APDStep) -> Tensor:
    """Error of the hidden activations ReLU(mlp_in) of a residual MLP, all layers side by side:
    mean over samples and activations."""
    names = [name for name in step.outputs if name.endswith("mlp_in")]
    errors = [
        (F.relu(step.outputs[n]) - F.relu(step.clean.outputs[n])).square().sum() for n in names
    ]
    total = sum(errors)
    assert isinstance(total, Tensor)
    return total / sum(step.outputs[n].numel() for n in names)


def _numel(model: APDModel) -> int:
    return sum(site.weight.numel() for site in model.sites.values())


LOSSES: dict[str, Callable[[APDStep], Tensor]] = {
    "faithfulness": faithfulness,
    "topk_recon": topk_recon,
    "schatten": schatten,
    "activation_recon": activation_recon,
}
