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

from spd_fast.errors import UserError

__all__ = ["Factored", "Inputs", "MaskedSum", "Product", "dense", "version_of"]

# y_s M of a masked sum y_s = a U; y_s itself for None.
MaskedSum = Callable[[Tensor | None], Tensor]


class Product:
    """rows z [..., r] times a matrix B [r, d]. Neither may be written to while this lives."""

    def __init__(self, rows: Tensor, matrix: Tensor) -> None:
        self._rows, self.matrix, self._since = rows, matrix, version_of(rows)
        self._known: list[tuple[Tensor, int, Tensor]] = []

    @property
    def rows(self) -> Tensor:
        """z.

        Raises:
            UserError: it was written to.
        """
        if version_of(self._rows) != self._since:
            raise _written("after a layer has read what is written to")
        return self._rows

    def times(self, M: Tensor | None, keep: bool = True) -> Tensor:
        """z (B M), or z B for None; kept where no gradient goes through it, for a frozen part of
        the stream meets the same frozen matrices in every masked forward of a step. ``keep`` is
        False for an M that is trained: torch's fused optimisers write to it without a trace."""
        if M is None:
            return self.rows @ self.matrix
        if not keep or any(t.requires_grad for t in (self.rows, self.matrix, M)):
            return self.rows @ (self.matrix @ M)
        for known, version, result in self._known:
            if _same_storage(known, M) and version == version_of(M):
                return result
        result = self.rows @ (self.matrix @ M)
        # An alias of its own: M may come to hold another storage.
        self._known.append((M.detach(), version_of(M), result))
        return result


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def version_of(M: Tensor) -> int:
    """How often M was written to; tensors of inference mode do not tell."""
    return 0 if M.is_inference() else M._version


class Factored:
    """Σ_k z_k B_k + Σ_s y_s of a known shape [..., d].

    Sums with its like, products with matrices and ``F.linear`` stay factored or give the product;
    whatever else is done with it is done with the tensor it stands for. That tensor is made anew
    each time, so nothing can be written to it: ``x += y`` makes another, the rest raises UserError.
    """

    def __init__(
        self,
        shape: torch.Size,
        products: tuple[Product, ...] = (),
        sums: tuple[MaskedSum, ...] = (),
    ) -> None:
        self.shape, self.products, self.sums = shape, products, sums

    def times(self, M: Tensor | None, keep: bool = True) -> Tensor:
        """x M [..., k]; x itself for None. ``keep``: as of :meth:`Product.times`."""
        parts = [product.times(M, keep) for product in self.products] + [y(M) for y in self.sums]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        # A product that is kept must not be written to by who gets it.
        return total.clone() if len(parts) == 1 and not total.requires_grad else total

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
        return rows.reshape(-1, rows.shape[-1])[:count] @ matrix

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
        if name.endswith("_"):
            raise _written(name)
        return getattr(self.dense(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _written("to entries of the stream")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        if writes and isinstance(args[0] if args else kwargs.get("input"), Factored):
            raise _written(name)
        return func(*_formed(args), **_formed(kwargs))


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if isinstance(input, Factored):
        return input.linear(dense(weight), dense(bias))
    return F.linear(input, dense(weight), dense(bias))


def _formed(value: Any) -> Any:
    """``value`` with the tensors that factored ones in its lists, tuples and dicts stand for."""
    if type(value) is dict:
        return {key: _formed(inside) for key, inside in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_formed, value))
    return dense(value)


def _written(how: str) -> UserError:
    return UserError(
        f"the target writes in place ({how}), so its residual stream cannot be kept as its "
        "factors: make the DecomposedModel with factored=False"
    )


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def method(self: Factored, *args: Any) -> Any:
        return getattr(self.dense(), name)(*map(dense, args))

    return method


# Python looks these up in the class alone.
for _name in (
    "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "pow", "rpow", "rmatmul", "pos", "neg", "abs", "getitem", "len", "iter", "bool", "float", "int",
    "eq", "ne", "lt", "le", "gt", "ge",
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
