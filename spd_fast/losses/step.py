"""What every loss of a step reads: the forwards they share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spd_fast.losses.routing import Routing, draw_routing
from spd_fast.model import CleanForward, DecomposedModel, Importances, Masking, Stochastic
from spd_fast.ops.divergence import DivergenceKind, divergence

if TYPE_CHECKING:
    from spd_fast.losses.adversary import Sources
    from spd_fast.losses.persistent import PersistentSources

__all__ = ["DRAWN", "Part", "Step", "mean_of"]

# The losses that draw random numbers, each with draws of its own: S indices after those of the
# one before it.
DRAWN = (
    "stochastic_recon",
    "stochastic_recon_layerwise",
    "stochastic_recon_subset",
    "stochastic_hidden_acts_recon",
    "ci_masked_recon_subset",
    "pgd_recon",
    "pgd_recon_layerwise",
    "pgd_recon_subset",
    "persistent_pgd_recon",
)


def mean_of(losses: Sequence[Tensor]) -> Tensor:
    """The mean of some scalars; one alone is itself."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).mean()


@dataclass(frozen=True)
class Part:
    """Which part of the whole batch a step's forwards cover.

    A loss that is a mean over positions returns the mean over its part; ``share`` times that,
    summed over the parts, is the loss of the whole batch.

    Attributes:
        share: fraction of the whole batch's positions. row_offset: global index of its first
            position. sample_offset: index of its first sample.
        penalty_totals: site → S [C] over the whole batch, without gradient; None where the part
            is the whole batch or the penalty is linear in S.
    """

    share: float = 1.0
    row_offset: int = 0
    sample_offset: int = 0
    penalty_totals: Mapping[str, Tensor] | None = None


@dataclass
class Step:
    """One training step's shared forwards, for the whole batch or a part of it.

    Attributes:
        key: (seed, step) of the random sources. divergence: D of the reconstruction losses.
        draws: S, masks drawn per reconstruction loss.
        options: loss → its options, where it has any (:class:`~spd_fast.losses.routing.Routing`,
            :class:`~spd_fast.losses.adversary.PGD`, …).
        binomial: component sources in {0, 1}.
        recompute: activation checkpointing: a masked forward keeps nothing for its backward and
            is computed again there. Its masks are the same, being functions of the key.
        sources: loss → adversarial sources that were found over the whole batch before.
        persistent: the sources of persistent PGD.
    """

    model: DecomposedModel
    batch: Any
    clean: CleanForward
    importances: Importances
    key: Tensor
    divergence: DivergenceKind = "mse"
    draws: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    part: Part = field(default_factory=Part)
    binomial: bool = False
    recompute: bool = False
    sources: Mapping[str, list[Sources]] = field(default_factory=dict)
    persistent: PersistentSources | None = None

    def draw(self, loss: str, index: int = 0) -> int:
        """The random counter's draw for this loss's ``index``-th forward."""
        return DRAWN.index(loss) * self.draws + index

    def stochastic(self, draw: int, routing: Mapping[str, Tensor] | None = None) -> Stochastic:
        return Stochastic(
            self.importances,
            self.key,
            draw,
            delta=self.model.delta,
            binomial=self.binomial,
            row_offset=self.part.row_offset,
            routing=routing or {},
        )

    def routing(self, loss: str, index: int = 0) -> dict[str, Tensor]:
        """Site → routed positions, by the routing among the loss's options."""
        options = self.options.get(loss)
        kind = options if isinstance(options, Routing) else getattr(options, "routing", None)
        if kind is None:
            return {}
        shapes = {name: site.lower.shape[:-1] for name, site in self.importances.items()}
        return draw_routing(kind, shapes, self.key, self.draw(loss, index), self.part.row_offset)

    def divergence_of(self, output: Tensor) -> Tensor:
        """D(output, clean output)."""
        return divergence(output, self.clean.output, self.divergence, backend=self.model.backend)

    def reconstruction(
        self,
        masking: Masking,
        sites: Collection[str] | None = None,
        importances: Importances | None = None,
    ) -> Tensor:
        """D of the output with ``sites`` (all by default) masked."""

        def run() -> Tensor:
            output = self.model.masked_forward(
                self.batch,
                masking,
                sites=sites,
                clean=self.clean,
                importances=importances or self.importances,
            )
            return self.divergence_of(output)

        if self.recompute:
            return checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        return run()
