"""A tensor known as a sum of products with matrices that all rows share, formed only if looked at.

    x [..., d] = Σ_k z_k B_k + Σ_s y_s        z_k [..., r_k],  B_k [r_k, d],  r_k < d

What a residual stream holds is of this kind: an embedding of few features, outputs of narrow
layers, masked sums a U of fewer components than the stream is wide. A matrix M [d, k] that reads
the stream then meets B_k M and U M, which are as small as r_k and C and the same for all rows:

    x M = Σ_k z_k (B_k M) + Σ_s (y_s with U M for U)

and no tensor of the stream's width is ever formed, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Factored", "Inputs", "MaskedSum", "Product", "dense"]

# y_s M of a masked sum y_s = a U; y_s itself for None.
MaskedSum = Callable[[Tensor | None], Tensor]


class Product:
    """rows z [..., r] times a matrix B [r, d]. Neither may be written to while this lives."""

    def __init__(self, rows: Tensor, matrix: Tensor) -> None:
        self.rows, self.matrix = rows, matrix
        self._known: list[tuple[Tensor, int, Tensor]] = []

    def times(self, M: Tensor | None) -> Tensor:
        """z (B M), or z B for None; kept where no gradient goes through it, for a frozen part of
        the stream meets the same frozen matrices in every masked forward of a step."""
        if M is None:
            return self.rows @ self.matrix
        if any(t.requires_grad for t in (self.rows, self.matrix, M)):
            return self.rows @ (self.matrix @ M)
        for known, version, result in self._known:
            if known is M or (_same_storage(known, M) and version == M._version):
                return result
        result = self.rows @ (self.matrix @ M)
        self._known.append((M, M._version, result))
        return result


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class Factored:
    """Σ_k z_k B_k + Σ_s y_s of a known shape [..., d].

    Sums with its like, products with matrices and ``F.linear`` stay factored or give the product;
    whatever else is done with it is done with the tensor it stands for.
    """

    def __init__(
        self,
        shape: torch.Size,
        products: tuple[Product, ...] = (),
        sums: tuple[MaskedSum, ...] = (),
    ) -> None:
        self.shape, self.products, self.sums = shape, products, sums

    def times(self, M: Tensor | None) -> Tensor:
        """x M [..., k]; x itself for None."""
        parts = [product.times(M) for product in self.products] + [y(M) for y in self.sums]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x Wᵀ + b."""
        y = self.times(weight.T)
        return y if bias is None else y + bias

    def dense(self) -> Tensor:
        """x [..., d]."""
        return self.times(None)

    def first(self, count: int) -> Tensor:
        """x of the first ``count`` positions, [count, d], where no masked sum is in it."""
        rows, matrix = self.rows()
        return rows.flatten(0, -2)[:count] @ matrix

    def rows(self) -> tuple[Tensor, Tensor]:
        """Z [..., R] and B [R, d] with x = Z B, where no masked sum is in it."""
        assert not self.sums
        if len(self.products) == 1:
            return self.products[0].rows, self.products[0].matrix
        return (
            torch.cat([p.rows for p in self.products], dim=-1),
            torch.cat([p.matrix for p in self.products]),
        )

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Factored) and other.shape == self.shape:
            return Factored(self.shape, self.products + other.products, self.sums + other.sums)
        return self.dense() + dense(other)

    def __radd__(self, other: Any) -> Any:
        return other + self.dense()

    def __matmul__(self, M: Any) -> Tensor:
        return self.times(M) if isinstance(M, Tensor) and M.ndim == 2 else self.dense() @ dense(M)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[0], Factored):
            return args[0].linear(*args[1:], **kwargs)
        return func(*map(dense, args), **{name: dense(value) for name, value in kwargs.items()})


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def method(self: Factored, *args: Any) -> Any:
        return getattr(self.dense(), name)(*map(dense, args))

    return method


# Python looks these up in the class alone.
for _name in (
    "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs", "getitem", "len",
    "iter", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(Factored, f"__{_name}__", _of_the_tensor(f"__{_name}__"))


def dense(x: Any) -> Any:
    """The tensor that ``x`` stands for, where it is factored; ``x`` itself elsewhere."""
    return x.dense() if isinstance(x, Factored) else x


class Inputs(Mapping[str, Tensor]):
    """Site → its input, a factored one as the tensor it stands for; ``held`` has it as it is."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def __getitem__(self, site: str) -> Tensor:
        x: Tensor = dense(self.held[site])
        return x

    def __contains__(self, site: object) -> bool:
        return site in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)
