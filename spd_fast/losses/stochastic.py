"""Stochastic reconstruction (the paper, eq. 6 and 7; subsets and hidden activations: the authors'
2026 code)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spd_fast.losses.step import Step, mean_of

__all__ = [
    "stochastic_hidden_acts_recon",
    "stochastic_recon",
    "stochastic_recon_layerwise",
    "stochastic_recon_subset",
]


def stochastic_recon(step: Step) -> Tensor:
    """Mean over S draws of D(output with every site masked, target output)."""
    draws = (step.draw("stochastic_recon", index) for index in range(step.draws))
    return mean_of([step.reconstruction(step.stochastic(d)) for d in draws])


def stochastic_recon_layerwise(step: Step) -> Tensor:
    """Mean over S draws and sites of D with that site alone masked; other sites keep their W.

    Its draws are others than those of :func:`stochastic_recon`.
    """
    losses = []
    for index in range(step.draws):
        masking = step.stochastic(step.draw("stochastic_recon_layerwise", index))
        losses += [step.reconstruction(masking, [name]) for name in step.model.sites]
    return mean_of(losses)


def stochastic_recon_subset(step: Step) -> Tensor:
    """Mean over S draws of D with a random subset of sites masked, drawn per position."""
    name = "stochastic_recon_subset"
    losses = []
    for index in range(step.draws):
        masking = step.stochastic(step.draw(name, index), step.routing(name, index))
        losses.append(step.reconstruction(masking))
    return mean_of(losses)


def stochastic_hidden_acts_recon(step: Step) -> Tensor:
    """Mean over S draws of Σ (x̃ − x)² / Σ numel over the decomposed sites' inputs: x in the clean
    forward, x̃ with every site masked. Token ids, the inputs of embeddings, do not count."""
    name = "stochastic_hidden_acts_recon"
    draws = [step.draw(name, index) for index in range(step.draws)]
    losses = []
    for draw in draws:

        def run(draw: int = draw) -> Tensor:
            seen: dict[str, Tensor] = {}
            step.model.masked_forward(
                step.batch,
                step.stochastic(draw),
                clean=step.clean,
                importances=step.importances,
                inputs=seen,
            )
            pairs = [(seen[n], x) for n, x in step.clean.inputs.items() if x.is_floating_point()]
            numel = sum(x.numel() for _, x in pairs)
            errors = [(masked.to(x.dtype) - x).square().sum() for masked, x in pairs]
            return torch.stack(errors).sum() / numel

        if step.recompute:
            losses.append(checkpoint(run, use_reentrant=False, preserve_rng_state=False))
        else:
            losses.append(run())
    return mean_of(losses)
