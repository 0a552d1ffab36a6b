"""The types of a configuration's values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "NAME",
    "NUMBER",
    "Count",
    "CountOrZero",
    "Fraction",
    "NonNegative",
    "Positive",
    "Strict",
]


def _not_a_bool(value: Any) -> Any:
    # To Python `true` is the number 1; in a configuration it is a slip.
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


NUMBER = BeforeValidator(_not_a_bool)
# YAML reads the preset `2026` as a number.
NAME = BeforeValidator(lambda value: str(value) if type(value) is int else value)
# Sizes and steps have 31 bits: step numbers are words of the random counter.
Count = Annotated[int, NUMBER, Field(ge=1, lt=2**31)]
CountOrZero = Annotated[int, NUMBER, Field(ge=0, lt=2**31)]
Positive = Annotated[float, NUMBER, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, NUMBER, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, NUMBER, Field(ge=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
