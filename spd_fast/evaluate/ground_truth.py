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
        """Number of entries that contradict the pattern; 0 is recovered."""
        if self.pattern == "identity":
            return identity_error(importances, self.components, tolerance)
        return dense_error(importances, self.components, tolerance)

    def contradictions(
        self, importances: Matrix, tolerance: float = TOLERANCE
    ) -> list[Contradiction]:
        """The entries that :meth:`error` counts, all but those of components that are missing."""
        order = self.permute(importances)
        ordered = importances[:, order]
        if self.pattern == "identity":
            wanted, wrong = _check_identity(ordered, tolerance)
        else:
            wanted, wrong = _check_dense(ordered, self.components, tolerance)
        return [
            Contradiction(int(i), int(order[c]), float(ordered[i, c]), int(wanted[i, c]))
            for i, c in np.argwhere(wrong)
        ]

    def margins(self, importances: Matrix) -> tuple[float, float]:
        """How clear the pattern is: the lowest importance that the check wants on (of a dense
        component its largest) and the highest that it wants off. What is missing counts as 0."""
        n, ordered = self.components, importances[:, self.permute(importances)]
        if self.pattern == "identity":
            wanted = np.eye(*ordered.shape) == 1
            on, off = ordered[wanted], ordered[~wanted]
            missing = n > min(ordered.shape)
        else:
            on, off = ordered[:, :n].max(axis=0, initial=0), ordered[:, n:]
            missing = n > ordered.shape[1]
        lowest = 0.0 if missing else float(on.min(initial=1))
        return lowest, float(off.max(initial=0))

    def permute(self, importances: Matrix) -> NDArray[np.intp]:
        """Order of the columns that shows the pattern."""
        if self.pattern == "identity":
            return permute_identity(importances)
        return permute_dense(importances)


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
    ordered = importances[:, permute_identity(importances)]
    missing = max(n - min(ordered.shape), 0)
    return int(_check_identity(ordered, tolerance)[1].sum()) + missing


def dense_error(importances: Matrix, k: int, tolerance: float = TOLERANCE) -> int:
    """Of the columns in descending mass: each of the first k without a value ≥ 1 − tolerance counts
    one, in the rest every value > tolerance counts one."""
    ordered = importances[:, permute_dense(importances)]
    missing = max(k - ordered.shape[1], 0)
    return int(_check_dense(ordered, k, tolerance)[1].sum()) + missing


_Mask = NDArray[np.bool_]


def _check_identity(ordered: Matrix, tolerance: float) -> tuple[_Mask, _Mask]:
    """Which entries of permuted importances are wanted on, and which contradict that."""
    wanted = np.eye(*ordered.shape) == 1
    return wanted, np.where(wanted, ordered < 1 - tolerance, ordered > tolerance)


def _check_dense(ordered: Matrix, k: int, tolerance: float) -> tuple[_Mask, _Mask]:
    """The same, where an entry of each of the first k columns is wanted on: its largest."""
    wanted = np.zeros(ordered.shape, dtype=bool)
    first = ordered[:, :k]
    wanted[first.argmax(axis=0), np.arange(first.shape[1])] = True
    rest = np.arange(ordered.shape[1]) >= k
    return wanted, np.where(wanted, ordered < 1 - tolerance, rest & (ordered > tolerance))


def live(importances: Matrix) -> NDArray[np.bool_]:
    """Which components exceed 0.1 on at least one probe, [C]."""
    return np.asarray((importances > OFF).any(axis=0))


def live_components(importances: Matrix) -> int:
    """How many components exceed 0.1 on at least one probe."""
    return int(live(importances).sum())
