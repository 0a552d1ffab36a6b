"""Typed configuration of a run. Unknown keys are errors that name the nearest valid one."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from spd_fast.errors import UserError, nearest
from spd_fast.model.ci_fns import CIFnKind
from spd_fast.train.fields import (
    NAME,
    NUMBER,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Strict,
)
from spd_fast.train.loggers import LoggerName
from spd_fast.train.loss_config import LossConfig, MinimalityConfig

__all__ = [
    "PRESETS",
    "Config",
    "DatasetData",
    "EvaluationConfig",
    "HFTarget",
    "LanguageConfig",
    "LoopConfig",
    "LossConfig",
    "MinimalityConfig",
    "ResidMLPTarget",
    "RunConfig",
    "StartsConfig",
    "TMSTarget",
    "TokenData",
    "TrainConfig",
    "WarmUpConfig",
    "difference",
    "flat",
    "load_config",
    "parse_config",
    "plain_name",
    "set_keys",
    "validate",
]

ModelT = TypeVar("ModelT", bound=BaseModel)

# What a preset decides. `paper`: the code that made the figures of arXiv 2506.20790.
# `2026`: the authors' later torch version.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "sigmoid": "paper",
        "init": "paper",
        "delta": False,
        "lr_schedule": "quarter_cosine",
        "warm_up": {"steps": 0},
        "losses": {"faithfulness": 1.0},
    },
    "2026": {
        "sigmoid": "2026",
        "init": "2026",
        "delta": True,
        "lr_schedule": "cosine",
        "warm_up": {"steps": 200, "lr": 0.01, "weight_decay": 0.1},
        "losses": {"faithfulness": 0.0},
    },
}


def plain_name(value: str) -> str:
    """``value``, a run's name, checked: it becomes a folder's name and a page's title."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", value):
        raise PydanticCustomError(
            "name", "input should be one word of letters, digits and _ . + -, at most 100 long"
        )
    return value


class TMSTarget(Strict):
    """A toy model of superposition, trained by the run itself unless ``path`` is given."""

    kind: Literal["tms"] = "tms"
    features: Count
    hidden: Count
    identity_layers: CountOrZero = 0
    zero_bias: bool = False
    starts: Count = 32
    probability: Fraction = 0.05
    steps: Count = 10_000
    batch_size: Count = 1024
    lr: Positive = 5e-3
    weight_decay: NonNegative = 0.01
    path: str | None = None


class ResidMLPTarget(Strict):
    """A residual MLP, trained by the run itself unless ``path`` is given."""

    kind: Literal["resid_mlp"] = "resid_mlp"
    features: Count
    d_embed: Count = 1000
    d_mlp: Count
    layers: Count
    probability: Fraction = 0.01
    steps: Count = 1000
    batch_size: Count = 2048
    lr: Positive = 3e-3
    weight_decay: NonNegative = 0.01
    path: str | None = None


class WarmUpConfig(Strict):
    """Faithfulness warm-up: AdamW on V and U alone, its moments then discarded."""

    steps: CountOrZero
    lr: Positive = 0.01
    weight_decay: NonNegative = 0.0


class LoopConfig(Strict):
    """What every :class:`~spd_fast.train.loop.TrainingLoop` needs.

    ``log_to``: where the lines of metrics.jsonl go as well. It says nothing of what is trained, and
    is no part of config.yaml: a run may be continued with another one.
    """

    steps: Count
    batch_size: Count
    lr: Positive
    seed: Annotated[int, NUMBER, Field(ge=0, lt=2**32)] = 0
    log_every: Count = 100
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = 2
    log_to: Annotated[tuple[LoggerName, ...], Field(exclude=True)] = ()

    if not TYPE_CHECKING:  # which reads the arguments' names and types off the fields

        def __init__(self, /, **data):
            """From keyword arguments.

            Raises:
                UserError: one line naming the key, what was given, and what is needed.
            """
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise UserError(_one_line(error, type(self))) from None


class TrainConfig(LoopConfig):
    """What the :class:`~spd_fast.train.Trainer` needs.

    ``ci_fn_lr``: of the importance functions, ``lr`` where not given. ``lr_warm_up``:
    the fraction of the steps in which the components' learning rate rises from zero; importance
    functions have theirs at once.
    ``grad_clip``, ``ci_fn_grad_clip``: largest gradient norm of all components, and of all
    importance functions.
    ``precision`` bf16: forwards under autocast; parameters, their moments, divergences and
    faithfulness stay float32. ``accumulation``: pieces in which a batch is worked through.
    ``cuda_graph``: on a GPU, record a step and replay it as long as it stays the same.
    """

    losses: LossConfig
    divergence: Literal["mse", "kl"] = "mse"
    draws: Count = 1
    sampling: Literal["continuous", "binomial"] = "continuous"
    lr_schedule: Literal["constant", "quarter_cosine", "cosine"]
    ci_fn_lr: Positive | None = None
    lr_warm_up: Fraction = 0.0
    grad_clip: Positive | None = None
    ci_fn_grad_clip: Positive | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: Count = 1
    activation_checkpointing: bool = False
    cuda_graph: bool = True
    warm_up: WarmUpConfig

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.batch_size % self.accumulation:
            raise PydanticCustomError(
                "accumulation",
                f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}",
            )
        return self


class TransformerConfig(Strict):
    """The importance function ``transformer``: width of its stream, heads and layers."""

    d_model: Count
    heads: Count
    layers: Count


class RunConfig(TrainConfig):
    """A whole run but for its target and data: sites, model and training."""

    name: Annotated[str, AfterValidator(plain_name)]
    preset: Annotated[Literal["paper", "2026"], NAME]
    sites: Annotated[dict[str, Count], Field(min_length=1)]
    ci_fn: CIFnKind = "mlp"
    ci_hidden: tuple[Count, ...] = (16,)
    ci_transformer: TransformerConfig | None = None
    gate_eval: Literal["auto", "exact", "interpolated"] = "auto"
    sigmoid: Annotated[Literal["paper", "2026", "hard", "normal"], NAME]
    init: Annotated[Literal["paper", "2026", "inputs"], NAME]
    delta: bool

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        preset = PRESETS.get(str(data.get("preset"))) if isinstance(data, dict) else None
        return data if preset is None else _merge(preset, data)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class StartsConfig(Strict):
    """``count`` starts do the first ``fraction`` of the steps, each with a seed of its own; the one
    with the lowest loss is continued."""

    count: Count = 1
    fraction: Annotated[float, NUMBER, Field(gt=0, lt=1)] = 0.25


class Config(RunConfig):
    """A run on a network with known mechanisms."""

    starts: StartsConfig = StartsConfig()
    target: Annotated[TMSTarget | ResidMLPTarget, Field(discriminator="kind")]


class HFTarget(Strict):
    """A Hugging Face model: a local folder or a hub id, and the field of its output that is
    reconstructed."""

    kind: Literal["hf"] = "hf"
    path: str
    output: str = "logits"
    revision: str | None = None


class TokenData(Strict):
    """Token ids in an ``.npy`` ([rows, positions] or [positions]) or ``.bin`` (ids of ``dtype``);
    a path that is no file is looked for in the target's folder. ``length``: positions of a
    sequence. ``eval_path``: what is evaluated on; without it, the same tokens."""

    kind: Literal["tokens"] = "tokens"
    path: str
    eval_path: str | None = None
    length: Count | None = None
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = "uint16"


class DatasetData(Strict):
    """A Hugging Face dataset with a column of token ids, whose rows are laid end to end and cut
    into sequences of ``length``."""

    kind: Literal["huggingface"] = "huggingface"
    path: str
    split: str = "train"
    eval_split: str | None = None
    column: str = "input_ids"
    streaming: bool = False
    length: Count


class EvaluationConfig(Strict):
    """What a language model is evaluated on: ``batches`` of ``batch_size`` sequences, against
    adversaries of each number of ``pgd_steps``."""

    batches: Count = 8
    batch_size: Count = 8
    pgd_steps: tuple[CountOrZero, ...] = (1, 4, 16)
    pgd_step_size: Positive = 0.1


class LanguageConfig(RunConfig):
    """A run on a language model."""

    target: HFTarget
    data: Annotated[TokenData | DatasetData, Field(discriminator="kind")]
    divergence: Literal["mse", "kl"] = "kl"
    evaluation: EvaluationConfig = EvaluationConfig()


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration objects that an annotation (a union, an Annotated) can hold."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for a in getattr(annotation, "__args__", ()) for m in _models(a)]


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _fields_at(path: tuple[Any, ...], kind: type[BaseModel]) -> list[str]:
    """Valid keys of the (nested) object at ``path`` of a configuration of this kind."""
    models: list[type[BaseModel]] = [kind]
    for key in path:
        if key in _TAGS:
            models = [m for m in models if _kind(m) in (None, key)]
            continue
        fields = [m.model_fields[key] for m in models if key in m.model_fields]
        models = [m for field in fields for m in _models(field.annotation)]
    return [name for m in models for name in m.model_fields]


# What pydantic puts into an error's path to say which member of a union it tried.
_TAGS = ("tms", "resid_mlp", "number", "mapping", "tokens", "huggingface")


# What pydantic says, in Python's words, of a value where YAML needs a mapping.
_NO_MAPPING = ("dict_type", "model_type", "model_attributes_type")
_SOME_KEYS = 8  # of a mapping, in an error message

# For error messages: a few lines of YAML can stand for a value of astronomical size.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxlong = 2, 3, 80, 80


def _one_line(error: ValidationError, kind: type[BaseModel]) -> str:
    # A mistyped key or no preset is often why others are missing: it comes first.
    first = min(error.errors(), key=lambda e: e["type"] == "missing" and e["loc"] != ("preset",))
    if isinstance(told := first.get("ctx", {}).get("error"), UserError):
        return str(told)  # the model's own __init__ has put it into words
    path = tuple(first["loc"])
    name = ".".join(str(p) for p in path if p not in _TAGS) or "configuration"
    if first["type"] == "extra_forbidden":
        close = nearest(str(path[-1]), _fields_at(path[:-1], kind), n=1)
        return f"unknown key {name!r}; nearest valid key: {close}"
    if first["type"] == "missing":
        return f"missing key {name!r}"
    if first["type"] == "union_tag_not_found":
        return f"missing key '{name}.kind'"
    given = first.get("input")
    shown = "" if isinstance(given, Mapping) else f", got {_SHORT.repr(given)}"
    if first["type"] in _NO_MAPPING:
        keys = [repr(key) for key in dict.fromkeys(_fields_at(path, kind))]
        some = ", ".join([*keys[:_SOME_KEYS], *("…" for _ in keys[_SOME_KEYS : _SOME_KEYS + 1])])
        return f"{name}: input should be a mapping{some and f' with keys {some}'}{shown}"
    if first["type"] == "tuple_type":
        return f"{name}: input should be a list{shown}"
    return f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}{shown}"


def validate(data: Any, kind: type[ModelT]) -> ModelT:
    """Validate a mapping as a configuration of this kind.

    Raises:
        UserError: one line naming the key, what was given, and what is needed.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"a configuration is a mapping of keys, got {type(data).__name__}")
    if odd := [key for key in data if not isinstance(key, str)]:
        raise UserError(f"a configuration's keys are text, got {_SHORT.repr(odd[0])}")
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(_one_line(error, kind)) from None


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


_TOLD = 2  # settings that differ, in an error message


def difference(held: dict[str, Any], config: BaseModel) -> str | None:
    """How a run's file differs from ``config``, for an error message; None where it does not.
    Settings that the file does not know have their defaults."""
    try:
        there = validate(held, type(config))
    except UserError as error:
        return str(error)
    if there.model_dump_json() == config.model_dump_json():
        return None
    theirs, ours = (flat(c.model_dump(mode="json")) for c in (there, config))
    keys = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    said = [
        f"{k}: {_SHORT.repr(theirs.get(k))} there, {_SHORT.repr(ours.get(k))} here"
        for k in keys[:_TOLD]
    ]
    said += [f"{len(keys) - _TOLD} more"] if len(keys) > _TOLD else []
    return "; ".join(said) or "its sites are in another order"


def parse_config(data: Any) -> Config:
    """Validate a mapping as a configuration of SPD; see :func:`validate`."""
    return validate(data, Config)


class _KeyTwiceError(yaml.YAMLError):
    """A mapping with the same key twice."""


class _Loader(yaml.SafeLoader):
    """Plain YAML whose mappings name a key once; YAML itself lets the last one count."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            # Several `<<` are no slip: all of their mappings are merged.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    where = f"in line {line}" if first == line else f"in lines {first} and {line}"
                    raise _KeyTwiceError(f"key {key.value!r} stands twice, {where}")
                lines[key.tag, key.value] = line
        return node


def _plain(text: str) -> Any:
    """What a YAML text says; nothing that it names is executed."""
    return yaml.load(text, Loader=_Loader)


def load_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, loaded without executing anything it names.

    Raises:
        UserError: a file that cannot be read, is not plain YAML, holds no mapping, or names a key
            of a mapping twice.
    """
    try:
        data = _plain(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except _KeyTwiceError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not plain YAML: {reason}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a mapping of keys")
    return data


def set_keys(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """``data`` with dotted ``key=value`` assignments applied; values are YAML.

    A mapping as a value takes the place of the whole mapping that was there: ``sites={linear1: 4}``
    leaves one site, ``sites.linear1=4`` all of them.

    Raises:
        UserError: no ``key=value``, or a value that is not plain YAML.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set needs key=value, got {assignment!r}")
        try:
            value = _plain(text)
        except _KeyTwiceError as error:
            raise UserError(f"--set {key}: {error}") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--set {key}: the value {text!r} is not plain YAML") from None
        data = _with(data, _site_aware_split(key), value)
    return data


def _with(data: Any, path: list[str], value: Any) -> Any:
    """``data`` with ``value`` at a path of keys; what is no mapping on the way becomes one."""
    if not path:
        return value
    held = data if isinstance(data, Mapping) else {}
    return {**held, path[0]: _with(held.get(path[0]), path[1:], value)}


def _site_aware_split(key: str) -> list[str]:
    # Site names hold dots themselves: everything after `sites.` is one name.
    if key.startswith("sites."):
        return ["sites", key[len("sites.") :]]
    return key.split(".")
