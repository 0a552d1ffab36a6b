"""Typed configuration of an APD run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from spd_fast.train.config import LoopConfig, ResidMLPTarget, TMSTarget, plain_name, validate
from spd_fast.train.fields import Count, CountOrZero, Fraction, NonNegative, Positive, Strict
from spd_fast.train.loss_config import NOTHING_TO_TRAIN

__all__ = ["APDConfig", "APDLossConfig", "SchattenConfig", "parse_apd_config"]


def _name(value: str) -> str:
    plain_name(value.removeprefix("apd/"))
    return value


class SchattenConfig(Strict):
    """coeff · mean over samples of Σ over kept c, l, m of (‖A_clm‖² ‖B_clm‖²)^(p/2) / numel."""

    coeff: NonNegative
    p: Positive


class ReconConfig(Strict):
    """coeff · (kept output − target output)², its mean over samples and, over a sample's outputs,
    the ``mean`` (as the authors' code does it) or the ``sum`` (as their text writes it)."""

    coeff: NonNegative
    over_outputs: Literal["mean", "sum"]


class APDLossConfig(Strict):
    """Coefficients of the losses; 0 leaves one out."""

    faithfulness: NonNegative = 1.0
    topk_recon: ReconConfig
    schatten: SchattenConfig
    activation_recon: NonNegative = 0.0

    @model_validator(mode="after")
    def _trains_something(self) -> APDLossConfig:
        if not self.coefficients():
            raise PydanticCustomError("losses", NOTHING_TO_TRAIN)
        return self

    def coefficients(self) -> dict[str, float]:
        """Name → coefficient of every loss that takes part."""
        everything = {
            "faithfulness": self.faithfulness,
            "topk_recon": self.topk_recon.coeff,
            "schatten": self.schatten.coeff,
            "activation_recon": self.activation_recon,
        }
        return {name: c for name, c in everything.items() if c > 0}


class APDConfig(LoopConfig):
    """A whole run of APD: target, sites, components and training.

    ``rank``: inner rank m of every component, or null for that of each site's matrix plus
    ``extra_rank``. ``top_k``: components kept per sample, on average over a batch.
    ``lr_warm_up``: the fraction of the steps in which the learning rate rises from zero; the
    schedule fills the rest.
    """

    method: Literal["apd"]
    name: Annotated[str, AfterValidator(_name)]
    target: Annotated[TMSTarget | ResidMLPTarget, Field(discriminator="kind")]
    sites: Annotated[tuple[str, ...], Field(min_length=1)]
    components: Count
    rank: Count | None = None
    extra_rank: CountOrZero = 0
    top_k: Positive
    losses: APDLossConfig
    unit_norm: bool = False
    lr_schedule: Literal["constant", "quarter_cosine", "cosine"]
    lr_warm_up: Fraction = 0.0
    divergence: Literal["mse"] = "mse"

    @model_validator(mode="after")
    def _keeps_something(self) -> APDConfig:
        if int(self.top_k * self.batch_size + 1e-9) < 1:
            raise ValueError(
                f"top_k {self.top_k} keeps no component of a batch of {self.batch_size}; "
                "top_k · batch_size needs to be at least 1"
            )
        if self.top_k > self.components:
            raise ValueError(
                f"top_k {self.top_k} is more than there are components, {self.components}"
            )
        if self.losses.activation_recon > 0 and not isinstance(self.target, ResidMLPTarget):
            raise ValueError(
                "losses.activation_recon compares activations after mlp_in: residual MLPs only"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_apd_config(data: Mapping[str, Any]) -> APDConfig:
    """Validate a mapping.

    Raises:
        UserError: one line naming the key, what was given, and what is needed.
    """
    return validate(data, APDConfig)
