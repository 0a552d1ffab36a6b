"""Tile choices: shipped defaults, small candidate sets, a tuner that is off until asked for.

The first configuration of a set is the shipped default, so that a first call never tunes.
SPD_FAST_TUNE=1 times the candidates once per (architecture, kernel, dtype, shape) and remembers the
winner in a file; torch.use_deterministic_algorithms(True) pins the shipped default, because tiles
decide the order of partial sums.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = [
    "CONFIGS", "Config", "by_divisibility", "launch", "operand_class", "pick", "tf32_allowed",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tile sizes (constexpr arguments of the kernel), warps and pipeline depth."""

    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1

    def without_product(self) -> Config:
        """For a kernel whose product is compiled out: BLOCK_K is an argument without a use."""
        return Config({**self.blocks, "BLOCK_K": 16}, self.num_warps, self.num_stages)

    def __str__(self) -> str:
        tiles = "x".join(str(v) for v in self.blocks.values())
        return f"{tiles} w{self.num_warps} s{self.num_stages}"


def _tile(n: int, c: int, k: int | None = None, *, warps: int = 4, stages: int = 1) -> Config:
    blocks = {"BLOCK_N": n, "BLOCK_C": c}
    if k is not None:
        blocks["BLOCK_K"] = k
    return Config(blocks, warps, stages)


# kernel → operand class → candidates. "mma": bf16 or tf32 products on matrix units; "ieee": fp32
# products on the fp32 pipe (toys); "any": no product in the kernel. "… ragged" stands for a class
# that would spill where sizes, strides or addresses do not divide by 16 (by_divisibility).
CONFIGS: dict[str, dict[str, Sequence[Config]]] = {
    "gate_forward": {
        "mma": (_tile(64, 64, 32, stages=3), _tile(128, 64, 32, warps=8, stages=3)),
        "mma ragged": (_tile(64, 32, 32, warps=8, stages=3),),
        "ieee": (_tile(32, 32, 16, warps=2, stages=2),),
        "any": (_tile(32, 32, warps=1), _tile(64, 32)),
    },
    # One warp: a sum over rows is additions in registers.
    "gate_backward": {"any": (_tile(32, 16, warps=1),)},
    "mask_forward": {
        "mma": (_tile(64, 64, 32, stages=3), _tile(128, 64, 32, warps=8, stages=3)),
        "mma ragged": (_tile(64, 64, 32, warps=8, stages=3),),
        "ieee": (_tile(32, 32, 16, stages=2),),
        "any": (_tile(32, 64), _tile(16, 128)),
    },
    "mask_backward": {
        "mma": (_tile(64, 32, 32, stages=3), _tile(64, 32, 32, warps=8, stages=3)),
        "mma ragged": (_tile(32, 32, 32, warps=8, stages=3),),
        "ieee": (_tile(32, 32, 16, stages=2),),
        "any": (_tile(16, 64), _tile(32, 64)),
        "any ragged": (_tile(16, 64, warps=8),),
    },
    "small_forward": {
        "mma": (_tile(64, 32, 32, warps=8, stages=2),),
        "ieee": (_tile(32, 16, 16), _tile(16, 32, 16, warps=8)),
        "ieee ragged": (_tile(32, 16, 16, warps=8),),
    },
    "importances": {"any": (_tile(64, 64), _tile(32, 128, warps=8))},
    "embedding_backward": {"any": (_tile(8, 128), _tile(16, 128))},
    "squared_error": {"any": (Config({"BLOCK": 1024}), Config({"BLOCK": 2048}, 8))},
    "kl": {"any": (Config({"BLOCK": 2048}, 8), Config({"BLOCK": 4096}, 16))},
}


def tf32_allowed() -> bool:
    """Whether torch's own setting asks for tf32 products of fp32 matrices."""
    matmul = torch.backends.cuda.matmul
    # Where the newer setting exists, reading the older one is an error once the newer is used.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def operand_class(tensor: Tensor) -> str:
    """ "mma" where products run on matrix units, "ieee" where on the fp32 pipe."""
    if tensor.dtype != torch.float32:
        return "mma"
    return "mma" if tensor.is_cuda and tf32_allowed() else "ieee"


def by_divisibility(kernel: str, operands: str, *facts: int | Tensor | None) -> str:
    """``operands``, or its ragged class where it has one and the launch needs it.

    Triton compiles into a launch what it finds: sizes, row strides and addresses that 16 divides,
    columns side by side. Where all of that is so of ``facts`` (sizes, addresses, and matrices by
    both strides and address), elements are loaded several at a time; where not, each has an address
    and a mask of its own, and these take registers. How many rows there are does not matter.
    """
    ragged = f"{operands} ragged"
    if ragged not in CONFIGS[kernel]:
        return operands
    for fact in facts:
        if fact is None:
            continue
        if isinstance(fact, Tensor):
            row, column = fact.stride()
            if column != 1 or row % 16 or fact.data_ptr() % 16:
                return ragged
        elif fact % 16:
            return ragged
    return operands


def launch(kernel: Any, like: Tensor, grid: Any, *args: Any, config: Config | None = None,
           **constants: Any) -> None:  # fmt: skip
    """Run ``kernel`` on the device and current stream of ``like``.

    Raises ValueError for a tensor on another device, by its name in the kernel.

    Fusing a product with a sum is off unless a kernel writes tl.fma: masks must round like the
    reference, and Triton's own default differs between versions.
    """
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, Tensor) and value.device != like.device:
            raise ValueError(
                f"{name} {tuple(value.shape)} is on {value.device}, need {like.device}"
            )
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if config is not None:
        options |= {**config.blocks, "num_warps": config.num_warps, "num_stages": config.num_stages}
    device = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with device:
        kernel[grid](*args, **constants, **options)


def _cache_file() -> Path:
    root = os.environ.get("SPD_FAST_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "spd_fast" / "tuning.json"


@functools.cache
def _remembered() -> dict[str, str]:
    try:
        entries = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, str)}


def _remember(key: str, winner: str) -> None:
    _remembered()[key] = winner
    path = _cache_file()
    # A cache that cannot be written costs a repeated tuning, not a failed run.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(_remembered(), file, indent=1, sort_keys=True)
        os.replace(name, path)


def _bucket(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}-sm{properties.major}{properties.minor}"


def pick(
    kernel: str, operands: str, like: Tensor, shape: Sequence[int], trial: Callable[[Config], None]
) -> Config:
    """The configuration for this call; ``trial`` launches one candidate on the call's own data."""
    options = CONFIGS[kernel][operands]
    if len(options) == 1 or not like.is_cuda or torch.are_deterministic_algorithms_enabled():
        return options[0]
    sizes = "x".join(str(_bucket(s)) for s in shape)
    key = f"{_architecture(like.device.index)}/{triton.__version__}/{kernel}/{operands}/"
    key += f"{str(like.dtype).removeprefix('torch.')}/{sizes}"
    known = _remembered().get(key)
    for config in options:  # by its tile: the candidates of another version may be others
        if str(config) == known:
            return config
    if os.environ.get("SPD_FAST_TUNE") != "1" or torch.cuda.is_current_stream_capturing():
        return options[0]
    times = [triton.testing.do_bench(lambda c=c: trial(c), warmup=5, rep=20) for c in options]
    winner = options[times.index(min(times))]
    _remember(key, str(winner))
    return winner
