"""The operations that stand beside the layer, each at one language model's size, in bf16: what
``bench.gpu`` predicts and measures of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.registry import Bar

__all__ = ["OPERATIONS", "OperationWork", "timed_steps"]

# Positions of a batch; a GPT-2's vocabulary, width and MLP; components of one site.
N, VOCABULARY, D_MODEL, D_MLP, C = 8192, 50257, 768, 3072, 4096

# The tensors of a forward, and what is differentiated with the gradient that flows in.
Run = Callable[[], tuple[list[Any], list[Any]]]


@dataclass(frozen=True)
class OperationWork:
    """One operation, by the name that docs/kernels.md gives it."""

    name: str
    sizes: str
    prepare: Callable[[str, str], tuple[Run, list[Any]]]
    products: int = 0  # of [N, d] with [d, vocabulary]: forward, and one more backward
    bars: tuple[Bar, ...] = ()
    compiled: bool = False

    def product_flops(self, backward: bool) -> float:
        return 2.0 * N * D_MODEL * VOCABULARY * (self.products + (self.products > 0) * backward)

    def product_of(self, a: Any, b: Any) -> str:
        return "x Wᵀ, t Wᵀ" if b.stride(1) != 1 else "(Q − P) W"

    def launch_of(self, operation: str) -> str:
        """The row of a launch of torch's own."""
        if operation == "index_select":
            return "embedding gather"
        if operation in ("zeros", "zero_", "fill_"):
            return "zero fill"
        return "sort by token" if operation in ("sort", "searchsorted") else "rounding"

    def step(self, backend: str, device: str, compiled: bool = False) -> Callable[[bool], None]:
        """The forward, or forward and backward, on inputs made here."""
        import torch

        torch.manual_seed(0)
        return timed_steps(*self.prepare(backend, device), compiled)


def timed_steps(forward: Run, leaves: list[Any], compiled: bool) -> Callable[[bool], None]:
    """What is timed: ``forward``, or ``forward`` and the gradients of ``leaves``."""
    import torch

    run = torch.compile(forward) if compiled else forward

    def step(backward: bool) -> None:
        if not backward:
            with torch.no_grad():
                run()
            return
        outputs, grads = run()
        torch.autograd.grad(outputs, leaves, grads)

    return step


def _normal(device: str, *shape: int, scale: float = 1.0) -> Any:
    import torch

    return torch.randn(*shape, device=device).mul_(scale).bfloat16()


def _importances(backend: str, device: str) -> tuple[Run, list[Any]]:
    import torch

    from spd_fast.ops import Penalty, importances

    logits, grad = _normal(device, N, C).requires_grad_(), _normal(device, N, C)
    sums = torch.ones(C, device=device)

    def run() -> tuple[list[Any], list[Any]]:
        out = importances(logits, sigmoid="2026", penalty=Penalty("lp", 2.0), backend=backend)
        return [out.lower, out.penalty_sum], [grad, sums]

    return run, [logits]


def _embedding(backend: str, device: str) -> tuple[Run, list[Any]]:
    import torch

    from spd_fast.ops import embedding_inner

    V, grad = _normal(device, VOCABULARY, 1024).requires_grad_(), _normal(device, N, 1024)
    tokens = torch.randint(VOCABULARY, (N,), device=device)
    return lambda: ([embedding_inner(tokens, V, backend=backend)], [grad]), [V]


def _divergence(kind: Any, width: int) -> Callable[[str, str], tuple[Run, list[Any]]]:
    def prepare(backend: str, device: str) -> tuple[Run, list[Any]]:
        import torch

        from spd_fast.ops import divergence

        q, p = _normal(device, N, width).requires_grad_(), _normal(device, N, width)

        def run() -> tuple[list[Any], list[Any]]:
            loss = divergence(q, p, kind, backend=backend)
            return [loss], [torch.ones_like(loss)]

        return run, [q]

    return prepare


def _linear_kl(backend: str, device: str) -> tuple[Run, list[Any]]:
    import torch

    from spd_fast.ops import linear_kl

    x, t = _normal(device, N, D_MODEL).requires_grad_(), _normal(device, N, D_MODEL)
    head = _normal(device, VOCABULARY, D_MODEL, scale=D_MODEL**-0.5)

    def run() -> tuple[list[Any], list[Any]]:
        loss = linear_kl(x, t, head, backend=backend)
        return [loss], [torch.ones_like(loss)]

    return run, [x]


OPERATIONS = (
    OperationWork("importances", f"logits [{N}, {C}]", _importances),
    OperationWork("embedding", f"{N} tokens, V [{VOCABULARY}, 1024]", _embedding),
    OperationWork("squared_error", f"[{N}, {D_MLP}]", _divergence("mse", D_MLP)),
    OperationWork("kl", f"logits [{N}, {VOCABULARY}]", _divergence("kl", VOCABULARY)),
    OperationWork("linear_kl", f"[{N}, {D_MODEL}], head [{VOCABULARY}, {D_MODEL}]", _linear_kl, 2),
)
