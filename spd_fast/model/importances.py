"""What a step knows of a site's causal importances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

__all__ = ["Importances", "SiteImportances"]


class SiteImportances:
    """Importances of one site for one batch.

    Attributes:
        inner: h [..., C]. lower: g [..., C], what masks are made of.
        penalty_sum: S [C] = Σ over positions of ψ(g⁺).
        upper: g⁺ [..., C], computed when asked for: no loss needs it whole.
    """

    def __init__(
        self, inner: Tensor, lower: Tensor, penalty_sum: Tensor, upper: Callable[[Tensor], Tensor]
    ) -> None:
        self.inner = inner
        self.lower = lower
        self.penalty_sum = penalty_sum
        self._upper = upper

    @property
    def upper(self) -> Tensor:
        return self._upper(self.inner)

    def detach(self) -> SiteImportances:
        """The same numbers without gradients."""
        return SiteImportances(
            self.inner.detach(), self.lower.detach(), self.penalty_sum.detach(), self._upper
        )


class Importances(Mapping[str, SiteImportances]):
    """Site name → :class:`SiteImportances`; ``positions`` is the number N they cover."""

    def __init__(self, sites: dict[str, SiteImportances], positions: int) -> None:
        self._sites = sites
        self.positions = positions

    def detach(self) -> Importances:
        """The same numbers without gradients."""
        return Importances({n: s.detach() for n, s in self._sites.items()}, self.positions)

    def __getitem__(self, name: str) -> SiteImportances:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)
