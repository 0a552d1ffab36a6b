"""Evaluation: weights, importances, reconstruction, and the ground truth of toy targets."""

from spd_fast.evaluate.ground_truth import (
    WIDER,
    Contradiction,
    Expected,
    dense_error,
    identity_error,
    live,
    live_components,
    probe_importances,
)
from spd_fast.evaluate.neurons import NeuronContributions, neuron_contributions
from spd_fast.evaluate.reconstruction import importance_l0, reconstruction
from spd_fast.evaluate.weights import (
    MECHANISM_COSINE,
    WeightMatch,
    match_matrices,
    match_weights,
    mechanism_cosines,
)

__all__ = [
    "MECHANISM_COSINE",
    "WIDER",
    "Contradiction",
    "Expected",
    "NeuronContributions",
    "WeightMatch",
    "dense_error",
    "identity_error",
    "importance_l0",
    "live",
    "live_components",
    "match_matrices",
    "match_weights",
    "mechanism_cosines",
    "neuron_contributions",
    "probe_importances",
    "reconstruction",
]
