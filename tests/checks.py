"""Inputs in every memory layout, and the rule by which a result is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# What a result may be off, relative to its largest entry, whatever the eager error is. In float64
# the kernels' error function is off by 2e-15 where torch's happens to be exact.
FLOOR = {torch.float32: 1e-6, torch.float64: 5e-15}


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def unit(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def error(got: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of the truth."""
    if truth.numel() == 0:
        return 0.0
    return ((got.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def assert_right(
    got: Tensor, eager: Tensor, truth: Tensor, name: str, floor: float | None = None
) -> None:
    """The error of ``got`` is at most twice that of ``eager``, both against the float64 truth, plus
    ``floor`` (that of its dtype by default)."""
    assert got.shape == truth.shape, name
    assert got.dtype == eager.dtype, name
    allowed = 2 * error(eager, truth) + (FLOOR[got.dtype] if floor is None else floor)
    assert error(got, truth) <= allowed, f"{name}: {error(got, truth):.2e} > {allowed:.2e}"


Run = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def evaluate(run: Run, inputs: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict:
    """Outputs of ``run`` and, by ``grad_<input>``, the gradients for incoming ``grads``."""
    leaves = {
        name: t.detach().clone().requires_grad_(t.is_floating_point() and name != "weight")
        for name, t in inputs.items()
    }
    outputs = run(leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    results = torch.autograd.grad(
        [outputs[name] for name in grads],
        list(wanted.values()),
        list(grads.values()),
        materialize_grads=True,
        allow_unused=True,
    )
    named = {f"grad_{name}": g for name, g in zip(wanted, results, strict=True)}
    return {**{name: t.detach() for name, t in outputs.items()}, **named}


def assert_matches_oracle(
    run: Run,
    oracle: Run,
    inputs: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    dtype: torch.dtype,
    floor: float | None = None,
) -> None:
    """Every output and gradient of ``run`` in ``dtype`` is right by :func:`assert_right`."""

    def to(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}

    inputs, grads = to(inputs, dtype), to(grads, dtype)
    got, eager = evaluate(run, inputs, grads), evaluate(oracle, inputs, grads)
    # From the rounded inputs, so that their rounding is nobody's error.
    truth = evaluate(oracle, to(inputs, torch.float64), to(grads, torch.float64))
    for name in truth:
        assert_right(got[name], eager[name], truth[name], name, floor)


def transposed(t: Tensor) -> Tensor:
    """The same matrix with the other dimension contiguous."""
    return t.mT.contiguous().mT


def strided(t: Tensor) -> Tensor:
    """The same values in every second column and row of a larger storage: no unit stride."""
    wide = torch.full([2 * n for n in t.shape], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


LAYOUTS = {"transposed": transposed, "strided": strided}
