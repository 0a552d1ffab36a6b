"""Stochastic reconstruction (the paper, eq. 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from spd_fast.losses.step import Step

__all__ = ["stochastic_recon", "stochastic_recon_layerwise"]


def stochastic_recon(step: Step) -> Tensor:
    """Mean over S draws of D(output with every site masked, target output)."""
    losses = []
    for draw in range(step.draws):
        output = step.model.masked_forward(
            step.batch,
            step.stochastic(draw),
            clean=step.clean,
            importances=step.importances,
        )
        losses.append(step.divergence_of(output))
    return torch.stack(losses).mean()


def stochastic_recon_layerwise(step: Step) -> Tensor:
    """Mean over S draws and sites of D with that site alone masked; other sites keep their W.

    Its draws are numbered after those of :func:`stochastic_recon`, so they are independent.
    """
    losses = []
    for draw in range(step.draws, 2 * step.draws):
        masking = step.stochastic(draw)
        for name in step.model.sites:
            output = step.model.masked_forward(
                step.batch,
                masking,
                sites=[name],
                clean=step.clean,
                importances=step.importances,
            )
            losses.append(step.divergence_of(output))
    return torch.stack(losses).mean()
