"""APD written out sample by sample and output by output, in float64, from its formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spd_fast.baselines import APDModel
from spd_fast.targets import TMS, ResidMLP

Linear = Callable[[str, Tensor], Tensor]

# Target → its sites. "tms" is tied, "tms-id" has a frozen identity in between.
SITES = {
    "tms": ("linear1", "linear2"),
    "tms-id": ("linear1", "hidden_layers.*", "linear2"),
    "mlp1": ("layers.*.mlp_in", "layers.*.mlp_out"),
    "mlp2": ("layers.*.mlp_in", "layers.*.mlp_out"),
    "partly": ("layers.0.mlp_out", "layers.1.mlp_in"),
}
KINDS = list(SITES)


def make_target(kind: str) -> nn.Module:
    """A random target of few features in float64."""
    torch.manual_seed(3)
    if kind.startswith("tms"):
        target: nn.Module = TMS(5, 2, int(kind == "tms-id"))
    else:
        target = ResidMLP(6, 8, 3, 1 if kind == "mlp1" else 2, seed=4)
    return target.double().requires_grad_(False)


def make_model(kind: str, components: int = 4, **options: object) -> APDModel:
    return APDModel(
        make_target(kind), dict.fromkeys(SITES[kind], components), seed=1, **options
    )  # fmt: skip


def make_batch(kind: str, rows: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 5 if kind.startswith("tms") else 6, generator=generator)
    return x.double()


def by_hand(target: nn.Module, x: Tensor, linear: Linear) -> Tensor:
    """The target's forward with ``linear(name, x)`` in place of its weights."""
    if isinstance(target, TMS):
        h = linear("linear1", x)
        for i in range(len(target.hidden_layers)):
            h = linear(f"hidden_layers.{i}", h)
        return F.relu(linear("linear2", h))
    W_E = target.W_E
    residual = x @ W_E
    for i in range(len(target.layers)):
        hidden = F.relu(linear(f"layers.{i}.mlp_in", residual))
        residual = residual + linear(f"layers.{i}.mlp_out", hidden)
    return residual @ W_E.T


def matrix(model: APDModel, name: str, c: int) -> Tensor:
    """P_c as [d_in, d_out], entry by entry."""
    A, B = model.A(name)[c], model.B(name)[c]
    P = A.new_zeros(A.shape[0], B.shape[1])
    for i in range(P.shape[0]):
        for j in range(P.shape[1]):
            P[i, j] = sum(A[i, m] * B[m, j] for m in range(A.shape[1]))
    return P


def original(target: nn.Module, name: str, x: Tensor) -> Tensor:
    module = target.get_submodule(name)
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def attributions(model: APDModel, batch: Tensor) -> Tensor:
    """a_c = Σ_o (Σ_l ∂f_o/∂post_l · (pre_l P_cl))², one backward for each sample and output."""
    P = {
        (name, c): matrix(model, name, c).detach()
        for name in model.sites
        for c in range(model.components)
    }
    found = torch.zeros(len(batch), model.components, dtype=batch.dtype)
    for n, x in enumerate(batch):
        pre: dict[str, Tensor] = {}
        post: dict[str, Tensor] = {}

        def linear(
            name: str, x: Tensor, pre: dict[str, Tensor] = pre, post: dict[str, Tensor] = post
        ) -> Tensor:
            y = original(model.target, name, x)
            if name in model.sites:
                y = y if y.requires_grad else y.requires_grad_()
                pre[name], post[name] = x.detach(), y
            return y

        outputs = by_hand(model.target, x, linear)
        for output in outputs:
            for c in range(model.components):
                slopes = torch.autograd.grad(output, list(post.values()), retain_graph=True)
                total = sum(
                    g @ (pre[name] @ P[name, c]) for name, g in zip(post, slopes, strict=True)
                )
                found[n, c] += total**2
    return found


def shares(model: APDModel, batch: Tensor, site: str) -> Tensor:
    """⟨D_c, D⟩ / ‖D‖², the derivatives D taken by moving the site's output a little by hand."""
    weight = model.sites[site].weight
    found = torch.zeros(len(batch), model.components, dtype=batch.dtype)
    for n, x in enumerate(batch):
        inputs: list[Tensor] = []

        def moved(size: Tensor, by: Tensor | None = None, x: Tensor = x,
                  inputs: list[Tensor] = inputs) -> Tensor:  # fmt: skip
            def linear(name: str, x: Tensor) -> Tensor:
                y = original(model.target, name, x)
                if name == site:
                    inputs.append(x.detach())
                    return y if by is None else y + size * by
                return y

            return by_hand(model.target, x, linear)

        def derivative(by: Tensor, moved: Callable[..., Tensor] = moved) -> Tensor:
            size = torch.zeros((), dtype=torch.float64)
            return torch.autograd.functional.jacobian(lambda s: moved(s, by), size)

        moved(torch.zeros((), dtype=torch.float64))
        pre = inputs[0]
        whole = derivative(weight @ pre)
        for c in range(model.components):
            part = derivative(pre @ matrix(model, site, c).detach())
            found[n, c] = part @ whole / (whole @ whole) if whole.any() else 0
    return found


def kept_outputs(model: APDModel, batch: Tensor, kept: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and site outputs, sample by sample with the sum of its kept components as weight."""
    outputs, posts = [], []
    for n, x in enumerate(batch):
        post: dict[str, Tensor] = {}

        def linear(name: str, x: Tensor, n: int = n, post: dict[str, Tensor] = post) -> Tensor:
            if name not in model.sites:
                return original(model.target, name, x)
            site = model.sites[name]
            y = torch.zeros(site.d_out, dtype=x.dtype)
            for c in range(model.components):
                if kept[n, c]:
                    y = y + (x @ model.A(name)[c]) @ model.B(name)[c]
            post[name] = y if site.bias is None else y + site.bias
            return post[name]

        outputs.append(by_hand(model.target, x, linear))
        posts.append(post)
    return torch.stack(outputs), {n: torch.stack([p[n] for p in posts]) for n in model.sites}


def gradients(model: APDModel, value: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(
        (value * weights).sum(), list(named.values()), allow_unused=True, materialize_grads=True,
        retain_graph=True,
    )  # fmt: skip
    return dict(zip(named, found, strict=True))


def assert_same(model: APDModel, got: Tensor, expected: Tensor) -> None:
    """Values and every parameter's gradient agree to float64 rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    truth = gradients(model, expected)
    for name, gradient in gradients(model, got).items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-10, atol=1e-12, msg=name)
