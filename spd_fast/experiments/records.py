"""What a run's eval.json and metrics.jsonl hold, checked when they are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from spd_fast.errors import UserError

__all__ = [
    "StartsRecord",
    "read_evaluation",
    "read_language_evaluation",
    "read_metrics",
    "read_starts",
]


class _Site(BaseModel):
    mmcs: float
    mmcs_std: float
    ml2r: float
    ml2r_std: float
    components: int
    live_components: int
    expected: tuple[str, int] | None
    ci_error: int | None
    l0: float
    faithfulness: float
    relative_error: float


class StartsRecord(BaseModel):
    """Several starts of a run. ``chosen``: the number of the one that is continued. ``losses``: of
    all of them when it was chosen, None for one that diverged. ``seeds``: theirs. ``steps``: that
    each of them did."""

    chosen: int = Field(ge=0)
    losses: list[Annotated[float, Field(allow_inf_nan=False)] | None]
    seeds: list[int]
    steps: int = Field(ge=1)

    @model_validator(mode="after")
    def _chosen_is_one_of_them(self) -> StartsRecord:
        if not self.chosen < len(self.losses) == len(self.seeds):
            raise ValueError(f"start {self.chosen} is none of {len(self.losses)}")
        if self.losses[self.chosen] is None:
            raise ValueError("the chosen start has no loss")
        return self


class _Evaluation(BaseModel):
    name: str
    recovered: bool
    target_represents_all_features: bool
    features_not_represented: list[int]
    sites: dict[str, _Site] = Field(min_length=1)
    reconstruction: dict[str, float]
    steps: int
    seconds: float
    ms_per_step: float
    peak_memory_mb: float
    backend: str
    device: str
    seed: int
    starts: StartsRecord | None = None


class _LanguageEvaluation(BaseModel):
    name: str
    ce: dict[str, float]
    kl: dict[str, float]
    l0: float
    sites: dict[str, dict[str, Any]] = Field(min_length=1)
    groups: dict[str, dict[str, Any]]
    frontier: list[dict[str, float]]
    steps: int
    seconds: float
    ms_per_step: float
    seed: int


class _MetricsLine(BaseModel):
    step: int
    lr: float
    p: float
    losses: dict[str, float]
    l0: dict[str, float]
    live: dict[str, int]
    ms_per_step: float


def _check(data: Any, kind: type[BaseModel], what: str) -> None:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(f"{what} ({where}: {first['msg'].lower()})") from None


def read_evaluation(folder: Path) -> dict[str, Any]:
    """A run's eval.json.

    Raises:
        UserError: absent, unreadable, or not what an evaluation writes.
    """
    return _read(folder, _Evaluation, "a run")


def read_language_evaluation(folder: Path) -> dict[str, Any]:
    """The eval.json of a run on a language model.

    Raises:
        UserError: absent, unreadable, or not what such an evaluation writes.
    """
    return _read(folder, _LanguageEvaluation, "a language model")


def _read(folder: Path, kind: type[BaseModel], of: str) -> dict[str, Any]:
    path = folder / "eval.json"
    try:
        evaluation: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} holds no finished run ({error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); `spd-fast eval` makes it again") from None
    _check(evaluation, kind, f"{path} is not the evaluation of {of}, which `spd-fast eval` makes")
    return evaluation


def read_starts(path: Path, count: int) -> StartsRecord:
    """The record of a run's starts.

    Raises:
        UserError: unreadable, or not of ``count`` starts.
    """
    try:
        record = StartsRecord.model_validate_json(path.read_bytes())
        if len(record.losses) == count:
            return record
        reason = f"{len(record.losses)} starts, not {count}"
    except OSError as error:
        reason = str(error)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).lower()
    raise UserError(f"{path} is damaged ({reason}); remove it and use --resume")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file.

    Raises:
        UserError: a line that cannot be read, or is not what training writes.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    advice = "`run … --resume` mends what a kill cut off"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None
    for number, line in enumerate(lines, start=1):
        _check(line, _MetricsLine, f"{path} is damaged in line {number}; {advice}")
    return lines
