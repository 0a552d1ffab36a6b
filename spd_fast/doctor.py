"""``spd-fast doctor``: what this installation can do, tried out."""

from __future__ import annotations

import importlib
import importlib.metadata

import torch

from spd_fast import backends, ops
from spd_fast.experiments.runs import environment

__all__ = ["examine"]

EXTRAS = ("transformers", "datasets", "huggingface_hub", "wandb", "tensorboard", "triton")


def examine() -> int:
    """Print versions, device and backends; run each usable backend on a tiny problem.

    Returns:
        0, or 1 if a backend that should work gave a wrong result.
    """
    for key, value in environment().items():
        if key != "command":
            print(f"{key:<10} {value if value is not None else 'none'}")
    for name in EXTRAS:
        try:
            print(f"{name:<16} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name:<16} not installed (optional)")
    status = 0
    for name in backends.BACKENDS[1:]:
        if reason := backends.unavailable_reason(name):
            print(f"backend {name:<10} not usable: {reason}")
            continue
        error = _try(name)
        good = error < 1e-5
        status = status if good else 1
        print(f"backend {name:<10} {'ok' if good else 'WRONG'} (relative error {error:.1e})")
    return status


def _try(backend: str) -> float:
    """Relative error of a tiny masked layer and its gradient against float64."""
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    results = []
    for dtype, name, where in (
        (torch.float32, backend, device),
        (torch.float64, "reference", "cpu"),
    ):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(where, dtype)  # noqa: B023

        x, V, U, W = draw(9, 5), draw(5, 6), draw(6, 4), draw(4, 5)
        V.requires_grad_(True)
        gates = [draw(6, 1, 8), draw(6, 8, 1)], [draw(6, 8), draw(6, 1)]
        penalty = ops.Penalty("lp", 2.0)
        g = ops.gate(x, V, *gates, sigmoid="2026", penalty=penalty, backend=name)
        recipe = ops.MaskRecipe(g.lower, ops.RandomSource(ops.make_key(0, 0, where)), delta=True)
        y = ops.component_linear(x, V, U, recipe, weight=W, inner=g.inner, backend=name)
        (y.square().sum() + g.penalty_sum.sum()).backward()
        assert V.grad is not None
        results.append(torch.cat([y.detach().flatten(), V.grad.flatten()]).double().cpu())
    return ((results[0] - results[1]).norm() / results[1].norm()).item()
