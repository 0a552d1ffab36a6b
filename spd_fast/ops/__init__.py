"""The operations: mathematics, autograd, validation and dispatch, one file each."""

from spd_fast.ops.component_embedding import component_embedding
from spd_fast.ops.component_linear import component_linear
from spd_fast.ops.divergence import divergence, kl_divergence, mse_divergence
from spd_fast.ops.embedding_inner import embedding_inner
from spd_fast.ops.faithfulness import faithfulness, weight_delta
from spd_fast.ops.gate import GATE_EVALS, GateEval, GateOutput, gate, gate_logits
from spd_fast.ops.gate_counts import gate_counts
from spd_fast.ops.gate_inner import gate_inner
from spd_fast.ops.importances import ImportancesOutput, importances
from spd_fast.ops.layer import LayerOutput, layer
from spd_fast.ops.linear_kl import linear_kl
from spd_fast.ops.masks import MaskRecipe, materialize_mask
from spd_fast.ops.penalty import Penalty, penalty_sums
from spd_fast.ops.random import RandomSource, make_key, philox_4x32, uniform
from spd_fast.ops.sigmoids import SIGMOIDS, lower_importance, upper_importance

__all__ = [
    "GATE_EVALS",
    "SIGMOIDS",
    "GateEval",
    "GateOutput",
    "ImportancesOutput",
    "LayerOutput",
    "MaskRecipe",
    "Penalty",
    "RandomSource",
    "component_embedding",
    "component_linear",
    "divergence",
    "embedding_inner",
    "faithfulness",
    "gate",
    "gate_counts",
    "gate_inner",
    "gate_logits",
    "importances",
    "kl_divergence",
    "layer",
    "linear_kl",
    "lower_importance",
    "make_key",
    "materialize_mask",
    "mse_divergence",
    "penalty_sums",
    "philox_4x32",
    "uniform",
    "upper_importance",
    "weight_delta",
]
