"""What a step knows of a site's causal importances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from spd_fast.ops.sigmoids import SigmoidKind, upper_importance

__all__ = ["Importances", "SiteImportances"]


class SiteImportances:
    """Importances of one site for one batch.

    Attributes:
        lower: g [..., C], what masks are made of.
        penalty_sum: S [C] = Σ over positions of ψ(g⁺).
        known_inner: h [..., C] where the importance function has computed it, else None.
        positions: N, how many positions this site saw. sigmoid: that makes g and g⁺ of s.
    """

    def __init__(
        self,
        lower: Tensor,
        penalty_sum: Tensor,
        *,
        logits: Callable[[], Tensor],
        sigmoid: SigmoidKind,
        inner: Callable[[], Tensor],
        known_inner: Tensor | None = None,
    ) -> None:
        self.lower = lower
        self.penalty_sum = penalty_sum
        self.known_inner = known_inner
        self.sigmoid: SigmoidKind = sigmoid
        self._logits, self._inner = logits, inner

    @property
    def positions(self) -> int:
        return self.lower[..., :1].numel()

    @property
    def inner(self) -> Tensor:
        """h [..., C], computed when asked for where the importances did not need it."""
        return self._inner() if self.known_inner is None else self.known_inner

    @property
    def logits(self) -> Tensor:
        """s [..., C], computed when asked for."""
        return self._logits()

    @property
    def upper(self) -> Tensor:
        """g⁺ [..., C], computed when asked for: no loss needs it whole."""
        return upper_importance(self.logits, self.sigmoid)

    def detach(self) -> SiteImportances:
        """The same numbers without gradients."""
        known = self.known_inner
        return SiteImportances(
            self.lower.detach(),
            self.penalty_sum.detach(),
            logits=self._logits,
            sigmoid=self.sigmoid,
            inner=self._inner,
            known_inner=None if known is None else known.detach(),
        )

    def with_lower(self, lower: Tensor) -> SiteImportances:
        """The same with other lower importances."""
        return SiteImportances(
            lower,
            self.penalty_sum,
            logits=self._logits,
            sigmoid=self.sigmoid,
            inner=self._inner,
            known_inner=self.known_inner,
        )


class Importances(Mapping[str, SiteImportances]):
    """Site name → :class:`SiteImportances`; ``positions`` is the number N of the batch's positions
    (the most that a site saw)."""

    def __init__(self, sites: dict[str, SiteImportances]) -> None:
        self._sites = sites
        self.positions = max((site.positions for site in sites.values()), default=0)

    def detach(self) -> Importances:
        """The same numbers without gradients."""
        return Importances({n: s.detach() for n, s in self._sites.items()})

    def __getitem__(self, name: str) -> SiteImportances:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)
