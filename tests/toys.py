"""A small network with sites at different depths, and its forward written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.model import DecomposedModel
from tests import oracle

SITES = {"blocks.*.up": 7, "blocks.*.down": 5, "head": 6}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """x [..., 4] → two residual blocks → head [..., 3]. Weights are a function of the seed."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)
        self.to(dtype)
        fill(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def fill(module: nn.Module, seed: int) -> None:
    """Normal parameters, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)


def decomposed(seed: int = 0, **options: Any) -> DecomposedModel:
    """``Net`` decomposed in float64 by the reference backend."""
    options = {"backend": "reference", "ci_hidden": (3,), "seed": seed} | options
    return DecomposedModel(Net(seed), SITES, **options)


def batch(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (9, 4)), generator=generator, dtype=torch.float64).to(dtype)


Linear = Callable[[str, Tensor], Tensor]


def by_hand(x: Tensor, linear: Linear) -> Tensor:
    """``Net``'s forward with ``linear(name, x)`` in place of its modules."""
    for i in range(2):
        x = x + linear(f"blocks.{i}.down", F.gelu(linear(f"blocks.{i}.up", x)))
    return linear("head", x)


def original(net: nn.Module) -> Linear:
    def linear(name: str, x: Tensor) -> Tensor:
        module = net.get_submodule(name)
        y = x @ module.weight.T
        return y if module.bias is None else y + module.bias

    return linear


def masked(
    model: DecomposedModel,
    masks: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor] | None = None,
    routing: Mapping[str, Tensor] | None = None,
) -> Linear:
    """Masked components with explicit deltas at the sites of ``masks``, W elsewhere."""

    def linear(name: str, x: Tensor) -> Tensor:
        if name not in masks:
            return original(model.target)(name, x)
        site = model.sites[name]
        return oracle.component_linear(
            x, model.V(name), model.U(name), masks[name], (deltas or {}).get(name),
            (routing or {}).get(name), site.weight, site.bias,
        )  # fmt: skip

    return linear


def site_inputs(model: DecomposedModel, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def linear(name: str, x: Tensor) -> Tensor:
        seen[name] = x
        return original(model.target)(name, x)

    by_hand(x, linear)
    return seen


def importances(
    model: DecomposedModel, x: Tensor, power: float = 1.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Site → (g [N, C], Σ over positions of (g⁺ + eps)^p [C])."""
    found = {}
    for name, inputs in site_inputs(model, x).items():
        gate = model.ci_fn(name)
        _, lower, sums = oracle.gate(
            inputs, model.V(name), gate.weights, gate.biases, model.sigmoid, ("lp", power, 1e-12)
        )
        found[name] = lower, sums
    return found


def stochastic_masks(
    model: DecomposedModel, lower: Mapping[str, Tensor], seed: int, step: int, draw: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Site → m = g + (1 − g) u, and δ from column C, both by the Philox of the oracle."""
    masks, deltas = {}, {}
    for name, g in lower.items():
        site = model.sites[name]
        rows, C = range(g.shape[0]), site.components
        u = oracle.uniforms(seed, step, draw, site.index, rows, range(C + 1))
        masks[name], deltas[name] = g + (1 - g) * u[:, :C], u[:, C]
    return masks, deltas


def gradients(model: DecomposedModel, value: Tensor) -> dict[str, Tensor]:
    """Parameter name → gradient of ``value`` (a scalar, or summed with fixed weights)."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(
        (value * weights).sum(),
        list(named.values()),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(named, grads, strict=True))


def assert_same_gradients(model: DecomposedModel, got: Tensor, expected: Tensor) -> None:
    """Values and every parameter's gradient agree to float64 rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    truth = gradients(model, expected)
    for name, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-10, atol=1e-12, msg=name)
