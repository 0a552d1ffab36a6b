"""The losses section of a configuration: coefficients, their schedules, and each loss's options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Tag, model_validator
from pydantic_core import PydanticCustomError

from spd_fast.losses import PGD, Frequency, PersistentPGD, Routing
from spd_fast.ops.penalty import Penalty
from spd_fast.train.fields import CountOrZero, Fraction, NonNegative, Positive, Strict

__all__ = ["NOTHING_TO_TRAIN", "LossConfig", "MinimalityConfig", "Term"]

NOTHING_TO_TRAIN = "every coefficient is 0, so that nothing would be trained"


def _between(first: float, last: float | None, begin: float, end: float, now: float) -> float:
    """Linear from ``first`` to ``last`` between two fractions of the run, constant elsewhere."""
    if last is None:
        return first
    past, width = now - begin, end - begin
    done = past / width if width > 0 else float(past >= 0)
    return first + (last - first) * min(max(done, 0.0), 1.0)


class Term(Strict):
    """A loss with its coefficient, which moves linearly to ``coeff_final`` between two fractions
    of the run."""

    coeff: NonNegative
    coeff_final: NonNegative | None = None
    coeff_anneal_start: Fraction = 0.0
    coeff_anneal_end: Fraction = 1.0

    def coeff_at(self, fraction: float) -> float:
        """The coefficient after this fraction of the steps."""
        return _between(
            self.coeff, self.coeff_final, self.coeff_anneal_start, self.coeff_anneal_end, fraction
        )

    def takes_part(self) -> bool:
        return self.coeff > 0 or (self.coeff_final or 0) > 0

    def options(self) -> Any:
        """What the loss itself is told; None where it has no options."""
        return None


class SubsetTerm(Term):
    """A loss on random subsets of the sites."""

    routing: Literal["uniform_k", "static_probability"] = "uniform_k"
    probability: Fraction = 0.5

    def options(self) -> Routing:
        return Routing(self.routing, self.probability)


class PGDTerm(Term):
    """An adversary that starts anew at every step: ``pgd_steps`` ascents by ``step_size``."""

    pgd_steps: CountOrZero
    step_size: Positive
    scope: Literal["unique_per_datapoint", "shared_across_batch"] = "unique_per_datapoint"
    init: Literal["random", "ones", "zeros"] = "random"

    def options(self) -> PGD:
        return PGD(self.pgd_steps, self.step_size, self.scope, self.init)


class PGDSubsetTerm(PGDTerm):
    """The same, on a random subset of the sites."""

    routing: Literal["uniform_k", "static_probability"] = "uniform_k"
    probability: Fraction = 0.5

    def options(self) -> PGD:
        routing = Routing(self.routing, self.probability)
        return PGD(self.pgd_steps, self.step_size, self.scope, self.init, routing)


class PersistentPGDTerm(Term):
    """An adversary that goes on from step to step; ``lr``, ``betas`` and ``eps`` of its Adam."""

    lr: Positive
    n_warmup: CountOrZero = 0
    scope: Literal["shared", "per_position", "per_sample_and_position"] = "shared"
    init: Literal["random", "ones", "zeros"] = "random"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    routing: Literal["all", "uniform_k", "static_probability"] = "all"
    probability: Fraction = 0.5

    def options(self) -> PersistentPGD:
        routing = None if self.routing == "all" else Routing(self.routing, self.probability)
        return PersistentPGD(
            self.lr, self.n_warmup, self.scope, self.init, self.betas, self.eps, routing
        )


class MinimalityConfig(Term):
    """coeff · Σ_c f_c (1 + β log2(1 + a f_c)), f_c = mean ψ(g⁺).

    ``penalty`` lp: ψ = (g⁺ + eps)^p, p moving linearly to ``p_final``; smooth_l0: ψ = g²/(g² + γ²),
    γ moving linearly from ``gamma`` to ``gamma_final``; both between the fractions
    ``p_anneal_start`` and ``p_anneal_end`` of the run. ``frequency_scale`` is a; without it, the
    number of positions of the whole batch.
    """

    penalty: Literal["lp", "smooth_l0"] = "lp"
    p: Positive | None = None
    p_final: Positive | None = None
    gamma: Positive = 1.0
    gamma_final: Positive = 0.01
    p_anneal_start: Fraction = 0.0
    p_anneal_end: Fraction = 1.0
    eps: NonNegative = 1e-12
    beta: NonNegative = 0.0
    frequency_scale: Positive | None = None

    @model_validator(mode="after")
    def _has_p(self) -> MinimalityConfig:
        if self.penalty == "lp" and self.p is None:
            raise PydanticCustomError("p", "penalty lp needs the exponent p")
        return self

    def p_at(self, fraction: float) -> float:
        """p of ``lp``, γ of ``smooth_l0``, after this fraction of the steps."""
        first, last = self.p, self.p_final
        if self.penalty == "smooth_l0":
            first, last = self.gamma, self.gamma_final
        assert first is not None
        return _between(first, last, self.p_anneal_start, self.p_anneal_end, fraction)

    def penalty_at(self, fraction: float) -> Penalty | None:
        """ψ after this fraction of the steps; None where the loss takes no part."""
        if not self.takes_part():
            return None
        return Penalty(self.penalty, self.p_at(fraction), self.eps)

    def options(self) -> Frequency:
        return Frequency(self.beta, self.frequency_scale)


def _shape(value: Any) -> str:
    return "mapping" if isinstance(value, dict | BaseModel) else "number"


# A coefficient, or a mapping with its schedule and the loss's options.
_Choice = Discriminator(_shape)
Plain = Annotated[Annotated[NonNegative, Tag("number")] | Annotated[Term, Tag("mapping")], _Choice]
Subset = Annotated[
    Annotated[NonNegative, Tag("number")] | Annotated[SubsetTerm, Tag("mapping")], _Choice
]


class LossConfig(Strict):
    """The losses by name; 0, or not naming one, leaves it out."""

    faithfulness: Plain
    relative_faithfulness: Plain = 0.0
    stochastic_recon: Plain = 1.0
    stochastic_recon_layerwise: Plain = 1.0
    stochastic_recon_subset: Subset = 0.0
    stochastic_hidden_acts_recon: Plain = 0.0
    ci_masked_recon: Plain = 0.0
    ci_masked_recon_layerwise: Plain = 0.0
    ci_masked_recon_subset: Subset = 0.0
    unmasked_recon: Plain = 0.0
    pgd_recon: PGDTerm | None = None
    pgd_recon_layerwise: PGDTerm | None = None
    pgd_recon_subset: PGDSubsetTerm | None = None
    persistent_pgd_recon: PersistentPGDTerm | None = None
    importance_minimality: MinimalityConfig

    @model_validator(mode="after")
    def _trains_something(self) -> LossConfig:
        if not self.terms():
            raise PydanticCustomError("losses", NOTHING_TO_TRAIN)
        return self

    def terms(self) -> dict[str, Term]:
        """Name → every loss that takes part at some time."""
        found = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int | float):
                value = (SubsetTerm if name.endswith("_subset") else Term)(coeff=value)
            if value is not None and value.takes_part():
                found[name] = value
        return found

    def coefficients(self, fraction: float = 0.0) -> dict[str, float]:
        """Name → coefficient, after this fraction of the steps, of every loss that takes part."""
        return {name: term.coeff_at(fraction) for name, term in self.terms().items()}

    def options(self) -> dict[str, Any]:
        """Name → options of the losses that have any."""
        given = {name: term.options() for name, term in self.terms().items()}
        return {name: options for name, options in given.items() if options is not None}
