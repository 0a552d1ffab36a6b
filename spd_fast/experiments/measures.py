"""Each method's own answer to: which components does an input need, and does that fit the known
mechanisms?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spd_fast.baselines import APDConfig, APDModel
from spd_fast.baselines.evaluate import on_data, probe_shares, site_error
from spd_fast.evaluate import (
    WeightMatch,
    importance_l0,
    live,
    match_matrices,
    match_weights,
    probe_importances,
    reconstruction,
)
from spd_fast.experiments.recipes import AnyConfig, expected_sites
from spd_fast.model import DecomposedModel
from spd_fast.train.trainer import ACTIVE_THRESHOLD

__all__ = ["AnyModel", "Measures", "match", "measure"]

AnyModel = DecomposedModel | APDModel


@dataclass(frozen=True)
class Measures:
    """On one batch of the data and on single-feature probes.

    Attributes:
        probes: site → importances (SPD) or shares (APD) [features, C]. errors: site → entries of
            them that contradict the known mechanisms. l0: site → active components per sample.
        reconstruction: name → divergence from the target's output.
    """

    probes: dict[str, NDArray[np.floating]]
    errors: dict[str, int]
    l0: dict[str, float]
    reconstruction: dict[str, float]


def measure(config: AnyConfig, model: AnyModel, batch: Tensor) -> Measures:
    """Measure a model on ``batch`` [N, features]."""
    features = config.target.features
    expected = expected_sites(config)
    if isinstance(model, APDModel):
        assert isinstance(config, APDConfig)
        data = on_data(model, batch, config.top_k)
        probes = probe_shares(model, features, data.threshold)
        errors = {n: site_error(e, probes[n]) for n, e in expected.items() if n in probes}
        return Measures(probes, errors, dict.fromkeys(model.sites, data.l0), data.reconstruction)
    probes = probe_importances(model, features)
    return Measures(
        probes,
        {n: e.error(probes[n]) for n, e in expected.items() if n in probes},
        importance_l0(model, batch, ACTIVE_THRESHOLD),
        reconstruction(model, batch, config.divergence, config.seed),
    )


def match(model: AnyModel, site: str, probe: NDArray[np.floating] | None = None) -> WeightMatch:
    """How well components match the columns of a site's weight: those live on ``probe``
    [features, C], or all."""
    weight = model.sites[site].weight
    among = None if probe is None else torch.from_numpy(live(probe)).to(weight.device)
    if isinstance(model, APDModel):
        return match_matrices(model.matrices(site), weight, among)
    return match_weights(model.V(site), model.U(site), weight, among)
