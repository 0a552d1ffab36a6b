"""Every kernel of the registry once, in its branches, at sizes that leave a tail in every tile.

    compute-sanitizer --tool memcheck python -m tests.kernels.every_kernel

The script that the sanitizer watches; ``run(device)`` is the same in the interpreter.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from spd_fast.ops import (
    MaskRecipe,
    Penalty,
    RandomSource,
    component_linear,
    divergence,
    embedding_inner,
    gate,
    gate_inner,
    importances,
    linear_kl,
    make_key,
)

if TYPE_CHECKING:
    import pytest

__all__ = ["DTYPES", "REGIMES", "SIZES", "SMALL_SIZES", "run", "watch"]


SIZES = (70, 19, 132, 70, 300)
SMALL_SIZES = (3, 2, 130, 2, 7)
DTYPES = (torch.float32, torch.bfloat16)
# Settings of spd_fast.kernels.regimes: as a shape has it; what a large one has, in several chunks
# of components, with masks' products in the kernels (bf16) or, whatever the depth, by the library.
_LARGE = {"SMALL_PRODUCTS": 0, "CHUNK_ELEMENTS": 1, "NARROW_ELEMENTS": 1}
REGIMES = {
    "default": {},
    "large": _LARGE,
    "library": {**_LARGE, "IN_KERNEL_DEPTH": 0, "IN_KERNEL_DEPTH_DUAL": 0},
}


def watch(monkeypatch: pytest.MonkeyPatch, look: Callable[..., object]) -> None:
    """Have ``look`` called with the arguments of every launch of the registry's kernels."""
    from spd_fast.kernels.registry import cases

    for name in {getattr(case.kernel, "fn", case.kernel).__module__ for case in cases()}:
        module = sys.modules[name]

        def launch(*args: Any, original: Any = module.launch, **options: Any) -> None:
            look(*args, **options)
            original(*args, **options)

        monkeypatch.setattr(module, "launch", launch)


def run(
    device: str,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = SIZES,
    backend: str = "triton",
) -> Tensor:
    """The sum of everything that was computed, gradients included. ``sizes``: N, d_in, C, d_out
    and a width of logits."""
    from spd_fast.kernels import random

    generator = torch.Generator(device).manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=device)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device).to(dtype)
        return drawn.requires_grad_()

    def account(*outputs: Tensor, of: tuple[Tensor, ...]) -> None:
        nonlocal total
        results = outputs
        if of:
            loss = sum(o.float().square().sum() for o in outputs)
            assert isinstance(loss, Tensor)
            results += torch.autograd.grad(loss, of, allow_unused=True)
        for t in results:
            if t is not None:
                total = total + t.detach().double().sum()

    N, d_in, C, d_out, width = sizes
    H = 5
    key = make_key(3, 4, device)
    x, V, U = normal(N, d_in), normal(d_in, C), normal(C, d_out)
    weight, bias = normal(d_out, d_in).detach(), normal(d_out)
    layers = [normal(C, 1, H), normal(C, H, 1)], [normal(C, H), normal(C, 1)]
    for sigmoid, penalty in (("paper", Penalty("lp", 0.7, 0.1)), ("2026", Penalty("smooth_l0", 1))):
        out = gate(x, V, *layers, sigmoid=sigmoid, penalty=penalty, backend=backend)  # type: ignore[arg-type]
        account(*out, of=(x, V, *layers[0], *layers[1]))
        inner = out.inner.detach().requires_grad_()
        account(*gate_inner(inner, *layers, sigmoid=sigmoid, penalty=penalty, backend=backend),  # type: ignore[arg-type]
                of=(inner, *layers[0]))  # fmt: skip
        account(*importances(inner, sigmoid=sigmoid, penalty=penalty, backend=backend), of=(inner,))  # type: ignore[arg-type]
    lower, given = torch.rand(2, N, C, generator=generator, device=device).to(dtype).unbind()
    lower.requires_grad_(), given.requires_grad_()
    delta = torch.rand(N, generator=generator, device=device).to(dtype).requires_grad_()
    routing = torch.rand(N, generator=generator, device=device) < 0.6
    drawn = RandomSource(key, 1, 2, 3, binomial=True)
    for recipe, leaves in (
        (MaskRecipe(lower, given, delta, routing), (lower, given, delta)),
        (MaskRecipe(lower, drawn, True, routing), (lower,)),
        (MaskRecipe(lower), (lower,)),
    ):
        for h in (None, inner):
            y = component_linear(x, V, U, recipe, weight=weight, bias=bias, inner=h,
                                 backend=backend)  # fmt: skip
            account(y, of=(*leaves, U, bias, V if h is None else h))
    account(random.uniform(key, N, C, 1, 2, 3), random.delta_mask(key, N, C, 1, 2, 3), of=())
    tokens = torch.randint(9, (N,), generator=generator, device=device)
    table = normal(9, C)
    account(embedding_inner(tokens, table, backend=backend), of=(table,))
    q, p, head = normal(N, width), normal(N, width).detach(), normal(41, width).detach()
    for kind in ("mse", "kl"):
        account(divergence(q, p, kind), of=(q,))  # type: ignore[arg-type]
    account(linear_kl(q, p, head, backend=backend), of=(q,))
    return total


def main() -> None:
    from spd_fast.kernels import regimes

    for name, settings in REGIMES.items():
        for dtype in DTYPES:
            with contextlib.ExitStack() as stack:
                for setting, value in settings.items():
                    stack.enter_context(mock.patch.object(regimes, setting, value))
                total = run("cuda", dtype)
            torch.cuda.synchronize()
            assert total.isfinite(), (name, dtype)
    print("every kernel ran")


if __name__ == "__main__":
    main()
