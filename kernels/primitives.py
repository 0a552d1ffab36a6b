"""The primitives of spd_fast.ops that these kernels implement, by name."""

from __future__ import annotations

from spd_fast.kernels.component_linear import component_linear_backward, component_linear_forward
from spd_fast.kernels.divergence import kl_backward, kl_forward, mse_backward, mse_forward
from spd_fast.kernels.embedding_inner import embedding_backward, embedding_forward
from spd_fast.kernels.faithfulness import faithfulness_backward, faithfulness_forward
from spd_fast.kernels.gate import (
    gate_backward,
    gate_counts,
    gate_forward,
    gate_inner_backward,
    gate_inner_forward,
)
from spd_fast.kernels.importances import importances_backward, importances_forward
from spd_fast.kernels.linear_kl import linear_kl_forward

TABLE = {
    "gate_forward": gate_forward,
    "gate_backward": gate_backward,
    "gate_counts_forward": gate_counts,
    "gate_inner_forward": gate_inner_forward,
    "gate_inner_backward": gate_inner_backward,
    "component_linear_forward": component_linear_forward,
    "component_linear_backward": component_linear_backward,
    "faithfulness_forward": faithfulness_forward,
    "faithfulness_backward": faithfulness_backward,
    "mse_divergence_forward": mse_forward,
    "mse_divergence_backward": mse_backward,
    "kl_divergence_forward": kl_forward,
    "kl_divergence_backward": kl_backward,
    "linear_kl_forward": linear_kl_forward,
    "importances_forward": importances_forward,
    "importances_backward": importances_backward,
    "embedding_forward": embedding_forward,
    "embedding_backward": embedding_backward,
}
