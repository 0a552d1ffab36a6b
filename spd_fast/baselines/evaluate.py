"""What a finished APD run is measured by, in the terms in which SPD's runs are.

APD has no importances in [0, 1]: a component is kept or not, and its matrix at a site may be zero.
The share of a component at a site on a sample stands for an importance:

    share = [kept] · clamp(⟨D_c, D⟩ / ‖D‖² / FULL, 0, 1),   D_c = ∂f/∂post · (P_c pre),
                                                            D = ∂f/∂post · (W pre)

in words: kept, and how much it has of the effect that the site has on the network's outputs, where
80 % counts as all of it, because a component that is merely too short (the paper reports lengths of
0.89 and 0.93) has found its mechanism: length is what ML2R reports. Kept on a single-feature probe
means an attribution above the threshold that keeps k components a sample on the data.

``recovered`` in eval.json asks of APD what it asks of SPD, with shares for importances: at every
site with known mechanisms :func:`site_error` is 0, and of residual MLPs the neuron contributions
agree too (shrinkage lowers their R²). MMCS, ML2R and the number of mechanisms found take
component c's column j, (P_c)_:j, in place of u_c V_jc.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spd_fast.baselines.apd import APDModel, batch_topk
from spd_fast.evaluate.ground_truth import OFF, ON, Expected, identity_error
from spd_fast.targets.tms import PROBE

__all__ = ["FULL", "OnData", "on_data", "probe_shares", "site_error"]

FULL = 0.8


@dataclass(frozen=True)
class OnData:
    """A model on a batch of the data.

    Attributes:
        kept: bool [N, C]. threshold: the smallest attribution that is kept.
        reconstruction: mean squared error of the output with the kept components, with all of
            them (``unmasked``) and with none (``zero``).
    """

    kept: Tensor
    threshold: float
    reconstruction: dict[str, float]

    @property
    def l0(self) -> float:
        """Components kept per sample."""
        return (self.kept.sum() / self.kept.shape[0]).item()


@torch.no_grad()
def on_data(model: APDModel, batch: Tensor, top_k: float) -> OnData:
    """Attribute ``batch`` [N, features] and keep ⌊k N⌋ components."""
    clean = model.attribute(batch)
    kept = batch_topk(clean.attributions, top_k)
    forwards = {
        "topk": model.kept_forward(batch, kept)[0],
        "unmasked": model.whole_forward(batch),
        "zero": model.kept_forward(batch, torch.zeros_like(kept))[0],
    }
    errors = {n: (y - clean.output).square().mean().item() for n, y in forwards.items()}
    return OnData(kept, clean.attributions[kept].min().item(), errors)


@torch.no_grad()
def probe_shares(
    model: APDModel, features: int, threshold: float
) -> dict[str, NDArray[np.floating]]:
    """Site → shares [features, C] on the probes 0.75 · one-hot."""
    device = next(model.parameters()).device
    probes = torch.eye(features, device=device) * PROBE
    kept = model.attribute(probes).attributions >= threshold
    return {
        name: ((share / FULL).clamp(0, 1) * kept).cpu().numpy()
        for name, share in model.shares(probes).items()
    }


def site_error(known: Expected, shares: NDArray[np.floating]) -> int:
    """How many entries of a site's shares contradict the known mechanisms; 0 is recovered.

    identity: as for SPD, one component a feature. dense: APD's components are whole matrices, so
    any number from one to the site's k may hold it, if on every probe those kept have all of its
    effect: each component beyond k counts one, and so does each probe short of that.
    """
    if known.pattern == "identity":
        return identity_error(shares, known.components)
    live = int((shares > OFF).any(axis=0).sum())
    return max(live - known.components, 0) + int((shares.sum(axis=1) < ON).sum())
