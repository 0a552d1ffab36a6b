"""Causal-importance functions: from site inputs to logits s (the paper, §2.4; VPD for the
transformer).

Names, shapes of parameters and initialisation follow the authors' code: weights are ``W``, biases
``b`` and start at zero, layers of an MLP are numbered 0, 2, 4, … (GELUs between). Weights are
N(0, std²) with std √2/√fan_in before a GELU and 1/√fan_in elsewhere.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd_fast.errors import UserError, nearest

__all__ = [
    "CI_FNS",
    "GLOBAL_CI_FNS",
    "CIFnKind",
    "GlobalMLP",
    "MLPGate",
    "SharedMLP",
    "TransformerCI",
    "TransformerShape",
    "VectorMLP",
    "hidden_widths",
    "make_ci_fn",
    "make_global_ci_fn",
]

CIFnKind = Literal["mlp", "linear", "vector_mlp", "shared_mlp", "global_mlp", "transformer"]
CI_FNS: tuple[CIFnKind, ...] = (
    "mlp", "linear", "vector_mlp", "shared_mlp", "global_mlp", "transformer",
)  # fmt: skip
# One network for all sites instead of one a site.
GLOBAL_CI_FNS: tuple[CIFnKind, ...] = ("global_mlp", "transformer")

# eps of the normalisations: float32's own, in every dtype.
_EPS = 1.19e-7
# Above this many elements of a hidden layer, it is made again in the backward, part by part.
KEPT = 2**22


def _std(fan_in: int, head: bool) -> float:
    return (1.0 if head else 2.0**0.5) / fan_in**0.5


class _ParallelLinear(nn.Module):
    """One layer of C independent small MLPs: W [C, in, out], b [C, out]."""

    def __init__(
        self, C: int, d_in: int, d_out: int, head: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(C, d_in, d_out, generator=generator) * _std(d_in, head))
        self.b = nn.Parameter(torch.zeros(C, d_out))


class _Linear(nn.Module):
    """x W + b with W [in, out], b [out]."""

    def __init__(
        self, d_in: int, d_out: int, head: bool, generator: torch.Generator, bias: bool = True
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(d_in, d_out, generator=generator) * _std(d_in, head))
        self.b = nn.Parameter(torch.zeros(d_out)) if bias else None

    @property
    def bias(self) -> Tensor:
        assert self.b is not None
        return self.b

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.W
        return y if self.b is None else y + self.b


class _Parallel(nn.Module):
    """C independent MLPs of the same widths, as lists of weights and biases."""

    def __init__(self, components: int, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {}
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            head = i == len(widths) - 2
            layers[str(2 * i)] = _ParallelLinear(components, d_in, d_out, head, generator)
        self.layers = nn.ModuleDict(layers)

    @property
    def weights(self) -> list[Tensor]:
        return [layer.W for layer in self._ordered()]

    @property
    def biases(self) -> list[Tensor]:
        return [layer.b for layer in self._ordered()]

    def _ordered(self) -> list[_ParallelLinear]:
        return [layer for layer in self.layers.values() if isinstance(layer, _ParallelLinear)]


class MLPGate(_Parallel):
    """``mlp``: one scalar MLP per component on its own inner activation, 1 → hidden… → 1.

    ``hidden=()`` is the ``linear`` gate s = w h + b. :func:`spd_fast.ops.gate` computes it.
    """

    def __init__(self, components: int, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__(components, [1, *hidden, 1], generator)


class VectorMLP(_Parallel):
    """``vector_mlp``: one MLP per component on the site's input vector, d_in → hidden… → 1."""

    def __init__(
        self, components: int, d_in: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__(components, [d_in, *hidden, 1], generator)

    def forward(self, x: Tensor) -> Tensor:
        """s [..., C] of x [..., d_in]."""
        rows = x.reshape(-1, x.shape[-1])
        weights, biases = self.weights, self.biases
        components, wide = weights[0].shape[0], max(w.shape[2] for w in weights)
        size = max(KEPT // max(rows.shape[0] * wide, 1), 1)
        parts = []
        for begin in range(0, components, size):
            part = slice(begin, begin + size)
            arguments = (rows, [w[part] for w in weights], [b[part] for b in biases])
            whole = size >= components
            parts.append(
                _vector_logits(*arguments)
                if whole
                else checkpoint(
                    _vector_logits, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            )
        return torch.cat(parts).T.reshape(*x.shape[:-1], components)


def _vector_logits(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """s [C, N] of x [N, d_in]."""
    z = x.expand(weights[0].shape[0], *x.shape)  # [C, N, in]
    for index, (W, b) in enumerate(zip(weights, biases, strict=True)):
        z = torch.baddbmm(b[:, None], F.gelu(z) if index else z, W)
    return z[..., 0]


class _MLP(nn.Module):
    """An MLP with GELUs between its layers."""

    def __init__(self, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                str(2 * i): _Linear(d_in, d_out, i == len(widths) - 2, generator)
                for i, (d_in, d_out) in enumerate(itertools.pairwise(widths))
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.layers.items():
            x = layer(x if name == "0" else F.gelu(x))
        return x


class SharedMLP(_MLP):
    """``shared_mlp``: one MLP per site, d_in → hidden… → C."""

    def __init__(
        self, components: int, d_in: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__([d_in, *hidden, components], generator)


def make_ci_fn(
    kind: CIFnKind,
    components: int,
    hidden: Sequence[int],
    generator: torch.Generator,
    d_in: int | None = None,
) -> MLPGate | VectorMLP | SharedMLP:
    """The causal-importance function of one site; ``d_in`` is the width of its input vectors, or
    None where the input is no vector (tokens).

    Raises:
        UserError: unknown kind, hidden widths that do not go with it, or a kind that needs vectors.
    """
    _check(kind, hidden)
    if kind == "linear":
        return MLPGate(components, (), generator)
    if kind == "mlp":
        return MLPGate(components, hidden, generator)
    if d_in is None:
        raise UserError(
            f"ci_fn {kind!r} needs vectors, but the input of an embedding site is tokens; use "
            "'mlp', 'linear', 'global_mlp' or 'transformer'"
        )
    return (VectorMLP if kind == "vector_mlp" else SharedMLP)(components, d_in, hidden, generator)


def hidden_widths(given: Iterable[int]) -> list[int]:
    """``given`` as a list of whole numbers.

    Raises:
        UserError: it is something else.
    """
    try:
        return [operator.index(width) for width in given]
    except TypeError:
        raise UserError(f"ci_hidden lists hidden widths, such as (16,); got {given!r}") from None


def _check(kind: str, hidden: Sequence[int]) -> None:
    if kind not in CI_FNS:
        raise UserError(f"unknown ci_fn {kind!r}; nearest: {nearest(kind, CI_FNS)}")
    if kind != "linear" and (not hidden or any(width < 1 for width in hidden)):
        raise UserError(f"ci_fn {kind!r} needs hidden widths of at least 1, got {tuple(hidden)}")


class GlobalMLP(nn.Module):
    """``global_mlp``: one MLP from all sites' inputs, joined in the order of their names, to all
    components."""

    def __init__(
        self,
        inputs: Mapping[str, int],
        components: Mapping[str, int],
        hidden: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.order = sorted(inputs)
        self.sizes = [components[name] for name in self.order]
        widths = [sum(inputs.values()), *hidden, sum(self.sizes)]
        self.net = _MLP(widths, generator)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Site → s [..., C] of site → x [..., width]."""
        logits = self.net(torch.cat([inputs[name] for name in self.order], dim=-1))
        return dict(zip(self.order, logits.split(self.sizes, dim=-1), strict=True))


_TRANSFORMER = {"d_model": 64, "layers": 1, "heads": 4}


class TransformerShape(dict[str, int]):
    """Sizes of the transformer: ``d_model``, ``layers``, ``heads``; its MLPs have the hidden widths
    of ``ci_hidden``."""

    def __init__(self, given: Mapping[str, int] | None = None) -> None:
        given = dict(given or {})
        for name, value in given.items():
            if name not in _TRANSFORMER:
                raise UserError(
                    f"unknown size {name!r} of the transformer; nearest: "
                    f"{nearest(name, _TRANSFORMER)}"
                )
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"the transformer's {name!r} must be at least 1, got {value!r}")
        super().__init__(_TRANSFORMER | given)
        if self["d_model"] % (2 * self["heads"]):
            raise UserError(
                f"the transformer's d_model ({self['d_model']}) must be a multiple of twice its "
                f"heads ({self['heads']}): rotary positions turn pairs"
            )


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=_EPS)


def _rotary(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [length, width / 2] of position · 10000^(−2i / width)."""
    exponent = torch.arange(0, width, 2, device=like.device, dtype=torch.float64) / width
    position = torch.arange(length, device=like.device, dtype=torch.float64)
    angle = position[:, None] * 10000.0**-exponent
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): entries i and i + width/2 are a pair."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _Block(nn.Module):
    """x + attention(norm x), then + MLP(norm x); norms without weight, attention both ways."""

    def __init__(
        self, d_model: int, heads: int, hidden: Sequence[int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (
            _Linear(d_model, d_model, True, generator, bias=False) for _ in range(4)
        )
        self.mlp = _MLP([d_model, *hidden, d_model], generator)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = _rms_norm(x)
        q, k, v = (self._split(f(normed)) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(_rms_norm(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, width]


class TransformerCI(nn.Module):
    """``transformer``: all sites' inputs, each RMS-normalised, joined in the order of their names,
    projected to d_model; blocks; projected to all components. No norm before the head."""

    def __init__(
        self,
        inputs: Mapping[str, int],
        components: Mapping[str, int],
        hidden: Sequence[int],
        shape: TransformerShape,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.order = sorted(inputs)
        self.widths = [inputs[name] for name in self.order]
        self.sizes = [components[name] for name in self.order]
        d_model, heads = shape["d_model"], shape["heads"]
        self.d_head = d_model // heads
        self.input = _Linear(sum(self.widths), d_model, True, generator)
        self.blocks = nn.ModuleList(
            _Block(d_model, heads, hidden, generator) for _ in range(shape["layers"])
        )
        self.head = _Linear(d_model, sum(self.sizes), True, generator)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Site → s [..., C] of site → x [..., T, width]. Inputs of two dimensions are samples, each
        a sequence of one."""
        leading = inputs[self.order[0]].shape[:-1]
        z = torch.zeros((), dtype=self.input.W.dtype, device=self.input.W.device)
        # Site by site, so that the joined input is never formed.
        for name, W in zip(self.order, self.input.W.split(self.widths), strict=True):
            z = z + _rms_norm(inputs[name]) @ W
        z = z + self.input.bias
        length = leading[-1] if len(leading) > 1 else 1
        z = z.reshape(-1, length, z.shape[-1])
        cos, sin = _rotary(length, self.d_head, z)
        for block in self.blocks:
            z = block(z, cos, sin)
        z = z.reshape(*leading, z.shape[-1])
        parts = zip(
            self.order,
            self.head.W.split(self.sizes, dim=1),
            self.head.bias.split(self.sizes),
            strict=True,
        )
        return {name: z @ W + b for name, W, b in parts}


def make_global_ci_fn(
    kind: CIFnKind,
    inputs: Mapping[str, int],
    components: Mapping[str, int],
    hidden: Sequence[int],
    shape: TransformerShape,
    generator: torch.Generator,
) -> GlobalMLP | TransformerCI:
    """The one causal-importance function of all sites: site → width of what it reads there (the
    input vector, or the C inner activations of an embedding), site → C.

    Raises:
        UserError: hidden widths below 1.
    """
    _check(kind, hidden)
    if kind == "global_mlp":
        return GlobalMLP(inputs, components, hidden, generator)
    return TransformerCI(inputs, components, hidden, shape, generator)
