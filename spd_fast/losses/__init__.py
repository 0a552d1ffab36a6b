"""The losses, one file a family; each reads a step's forwards."""

from collections.abc import Callable

from torch import Tensor

from spd_fast.losses.adversary import PGD, find_sources
from spd_fast.losses.faithfulness import (
    faithfulness,
    faithfulness_loss,
    relative_faithfulness,
    relative_faithfulness_loss,
)
from spd_fast.losses.minimality import Frequency, importance_minimality
from spd_fast.losses.persistent import PersistentPGD, PersistentSources, persistent_pgd_recon
from spd_fast.losses.pgd import pgd_recon, pgd_recon_layerwise, pgd_recon_subset
from spd_fast.losses.reconstruction import (
    ci_masked_recon,
    ci_masked_recon_layerwise,
    ci_masked_recon_subset,
    unmasked_recon,
)
from spd_fast.losses.routing import Routing, draw_routing
from spd_fast.losses.sampling import jittered
from spd_fast.losses.step import Part, Step
from spd_fast.losses.stochastic import (
    stochastic_hidden_acts_recon,
    stochastic_recon,
    stochastic_recon_layerwise,
    stochastic_recon_subset,
)

LOSSES: dict[str, Callable[[Step], Tensor]] = {
    "faithfulness": faithfulness_loss,
    "relative_faithfulness": relative_faithfulness_loss,
    "stochastic_recon": stochastic_recon,
    "stochastic_recon_layerwise": stochastic_recon_layerwise,
    "stochastic_recon_subset": stochastic_recon_subset,
    "stochastic_hidden_acts_recon": stochastic_hidden_acts_recon,
    "ci_masked_recon": ci_masked_recon,
    "ci_masked_recon_layerwise": ci_masked_recon_layerwise,
    "ci_masked_recon_subset": ci_masked_recon_subset,
    "unmasked_recon": unmasked_recon,
    "pgd_recon": pgd_recon,
    "pgd_recon_layerwise": pgd_recon_layerwise,
    "pgd_recon_subset": pgd_recon_subset,
    "persistent_pgd_recon": persistent_pgd_recon,
    "importance_minimality": importance_minimality,
}

__all__ = [
    "LOSSES",
    "PGD",
    "Frequency",
    "Part",
    "PersistentPGD",
    "PersistentSources",
    "Routing",
    "Step",
    "ci_masked_recon",
    "ci_masked_recon_layerwise",
    "ci_masked_recon_subset",
    "draw_routing",
    "faithfulness",
    "find_sources",
    "importance_minimality",
    "jittered",
    "persistent_pgd_recon",
    "pgd_recon",
    "pgd_recon_layerwise",
    "pgd_recon_subset",
    "relative_faithfulness",
    "stochastic_hidden_acts_recon",
    "stochastic_recon",
    "stochastic_recon_layerwise",
    "stochastic_recon_subset",
    "unmasked_recon",
]
