"""The ground-truth check: do the importances single out the known mechanisms?

Probe the model with 0.75 · one-hot of every feature and look at the lower importances
[features, C] of each site. On means ≥ 1 − tolerance, off ≤ tolerance. As in the authors' 2026 code
the tolerance is 0.1, and 0.2 is told besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spd_fast.model import DecomposedModel
from spd_fast.targets.tms import PROBE

__all__ = [
    "OFF",
    "ON",
    "TOLERANCE",
    "WIDER",
    "Contradiction",
    "Expected",
    "dense_error",
    "identity_error",
    "live",
    "live_components",
    "permute_dense",
    "permute_identity",
    "probe_importances",
]

TOLERANCE, WIDER = 0.1, 0.2
ON, OFF = 1 - TOLERANCE, TOLERANCE
Matrix = NDArray[np.floating]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Contradiction:
    """An importance that is not what the check wants: of a component on the probe of a feature,
    both counted from 0. ``wanted``: 1 (on) or 0 (off). For a dense component that is never on, its
    largest importance stands here."""

    feature: int
    component: int
    importance: float
    wanted: int


@dataclass(frozen=True)
class Expected:
    """What a recovered site looks like: n components, one a feature (``identity``), or k that
    act together (``dense``)."""

    pattern: Literal["identity", "dense"]
    components: int

    def error(self, importances: Matrix, tolerance: float = TOLERANCE) -> int:
        """Number of entries that contradict the pattern, and of components that are missing; 0 is
        recovered."""
        ordered = importances[:, self.permute(importances)]
        return int(self._wrong(ordered, tolerance).sum()) + self._missing(ordered)

    def contradictions(
        self, importances: Matrix, tolerance: float = TOLERANCE
    ) -> list[Contradiction]:
        """The entries that :meth:`error` counts; what is missing has none."""
        order = self.permute(importances)
        ordered = importances[:, order]
        on, _ = self._roles(ordered)
        return [
            Contradiction(int(i), int(order[c]), float(ordered[i, c]), int(on[i, c]))
            for i, c in np.argwhere(self._wrong(ordered, tolerance))
        ]

    def margins(self, importances: Matrix) -> tuple[float, float]:
        """How clear the pattern is: the lowest importance that the check wants on (of a dense
        component its largest) and the highest that it wants off. What is missing counts as 0."""
        ordered = importances[:, self.permute(importances)]
        on, off = self._roles(ordered)
        lowest = 0.0 if self._missing(ordered) else float(ordered[on].min(initial=1))
        return lowest, float(ordered[off].max(initial=0))

    def permute(self, importances: Matrix) -> NDArray[np.intp]:
        """Order of the columns that shows the pattern."""
        if self.pattern == "identity":
            return permute_identity(importances)
        return permute_dense(importances)

    def _roles(self, ordered: Matrix) -> tuple[Mask, Mask]:
        """Which entries of permuted importances the check wants on, and which off. Of a dense
        component one must be on, whichever: its largest."""
        if self.pattern == "identity":
            on = np.eye(*ordered.shape) == 1
            return on, ~on
        on = np.zeros(ordered.shape, dtype=bool)
        first = ordered[:, : self.components]
        on[first.argmax(axis=0), np.arange(first.shape[1])] = True
        idle = np.arange(ordered.shape[1]) >= self.components
        return on, np.broadcast_to(idle, ordered.shape)

    def _wrong(self, ordered: Matrix, tolerance: float) -> Mask:
        on, off = self._roles(ordered)
        return (on & (ordered < 1 - tolerance)) | (off & (ordered > tolerance))

    def _missing(self, ordered: Matrix) -> int:
        """How many components there are too few for the pattern."""
        most = min(ordered.shape) if self.pattern == "identity" else ordered.shape[1]
        return max(self.components - most, 0)


def probe_importances(model: DecomposedModel, features: int) -> dict[str, Matrix]:
    """Site → lower importances [features, C] of the single-feature probes."""
    device = next(model.parameters()).device
    with torch.no_grad():
        clean = model.clean_forward(torch.eye(features, device=device) * PROBE)
        importances = model.causal_importances(clean)
        return {name: site.lower.cpu().numpy() for name, site in importances.items()}


def permute_identity(importances: Matrix) -> NDArray[np.intp]:
    """Columns ordered so that the optimal assignment (Hungarian algorithm, largest total
    importance) lies on the diagonal; unassigned columns follow in descending mass."""
    rows, columns = linear_sum_assignment(-importances)
    assigned = columns[np.argsort(rows)]
    rest = np.setdiff1d(np.arange(importances.shape[1]), assigned)
    rest = rest[np.argsort(-importances[:, rest].sum(axis=0), kind="stable")]
    return np.concatenate([assigned, rest])


def permute_dense(importances: Matrix) -> NDArray[np.intp]:
    """Columns in descending mass."""
    return np.argsort(-importances.sum(axis=0), kind="stable")


def identity_error(importances: Matrix, n: int, tolerance: float = TOLERANCE) -> int:
    """#(off-diagonal > tolerance) + #(diagonal < 1 − tolerance) after :func:`permute_identity`.

    With fewer than n rows or columns the missing diagonal entries count as errors.
    """
    return Expected("identity", n).error(importances, tolerance)


def dense_error(importances: Matrix, k: int, tolerance: float = TOLERANCE) -> int:
    """Of the columns in descending mass: each of the first k without a value ≥ 1 − tolerance counts
    one, in the rest every value > tolerance counts one."""
    return Expected("dense", k).error(importances, tolerance)


def live(importances: Matrix) -> Mask:
    """Which components exceed 0.1 on at least one probe, [C]."""
    return np.asarray((importances > OFF).any(axis=0))


def live_components(importances: Matrix) -> int:
    """How many components exceed 0.1 on at least one probe."""
    return int(live(importances).sum())
