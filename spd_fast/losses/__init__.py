"""The losses, one file a family; each reads a step's forwards."""

from collections.abc import Callable

from torch import Tensor

from spd_fast.losses.faithfulness import faithfulness, faithfulness_loss
from spd_fast.losses.minimality import importance_minimality
from spd_fast.losses.step import Step
from spd_fast.losses.stochastic import stochastic_recon, stochastic_recon_layerwise

LOSSES: dict[str, Callable[[Step], Tensor]] = {
    "faithfulness": faithfulness_loss,
    "stochastic_recon": stochastic_recon,
    "stochastic_recon_layerwise": stochastic_recon_layerwise,
    "importance_minimality": importance_minimality,
}

__all__ = [
    "LOSSES",
    "Step",
    "faithfulness",
    "importance_minimality",
    "stochastic_recon",
    "stochastic_recon_layerwise",
]
