"""A workload made concrete for one provider: its tensors, and the call that is timed.

Providers:

- ``reference``: the plain eager implementation.
- ``compile``: torch.compile (inductor, static shapes) of the reference: of an operation its whole
  function; of a training step everything from the batch to the losses as one graph, with its
  backward; the fused AdamW and the batch are what they are for everybody.
- ``cpu`` and other backends of spd_fast, with exact gates.
- ``cpu-interpolated``: a training step with the gates that `spd-fast run` takes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.registry import OPERATIONS, OperationWorkload, Shape, StepWorkload, Workload
from spd_fast import backends, ops, targets
from spd_fast.experiments.recipes import recipe
from spd_fast.losses import LOSSES, Step
from spd_fast.model import DecomposedModel
from spd_fast.ops import Penalty, make_key
from spd_fast.ops._fused import per_component
from spd_fast.train import Trainer, parse_config

__all__ = [
    "INTERPOLATED",
    "PROVIDERS",
    "Problem",
    "prepare",
    "site_tensors",
    "step_trainer",
    "unavailable_reason",
]

INTERPOLATED = "cpu-interpolated"
PROVIDERS = ("reference", "compile", "cpu", INTERPOLATED, "triton", "cuda")
SEED = 0
# A logit this close to 0 or 1 gets its sigmoid's derivative by a coin toss in float32.
KINK = 1e-5
# [N, C] tensors that one operation hands to another, in the layout of the kernels at both ends.
PER_COMPONENT = ("inner", "lower", "grad_inner", "grad_lower")


def unavailable_reason(provider: str) -> str | None:
    """Why a provider cannot run here, or None."""
    backend = provider.removesuffix("-interpolated")
    return None if provider == "compile" else backends.unavailable_reason(backend)


class Problem(Protocol):
    """``call`` is what is timed; ``results`` are the named tensors of the last call, to be checked;
    ``clear`` drops them."""

    def call(self) -> None: ...

    def results(self) -> dict[str, Tensor]: ...

    def clear(self) -> None: ...


def prepare(
    workload: Workload,
    provider: str,
    dtype: torch.dtype | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Problem:
    """The workload for one provider, in another dtype than its own if asked for.

    Args:
        provider: one of ``PROVIDERS``, or ``reference-interpolated``, what interpolated gates are
            held to.
        tensors: of an operation, where several providers share them; drawn anew otherwise.
    """
    dtype = dtype or workload.dtype
    if isinstance(workload, StepWorkload):
        return _StepProblem(workload, provider, dtype)
    assert isinstance(workload, OperationWorkload)
    if tensors is None:
        tensors = site_tensors(workload.shape, workload.dtype, workload.device)
    return _OperationProblem(workload, provider, dtype, tensors)


def site_tensors(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", *, avoid_kinks: bool = False
) -> dict[str, Tensor]:
    """Everything that an operation may read of a site, from a fixed seed.

    x [N, d_in], V, U, weight, bias, gate (w_in, b_in, w_out [C, hidden], b_out [C]), inner and
    lower [N, C], key; and by ``grad_<output>`` what flows into the outputs.

    Args:
        avoid_kinks: draw rows again until no logit lies within ``KINK`` of a kink of the sigmoids,
            where rounding alone decides the derivative.
    """
    generator = torch.Generator().manual_seed(SEED)
    N, d_in, d_out, C, hidden = shape.N, shape.d_in, shape.d_out, shape.C, shape.hidden

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator).mul_(scale).to(dtype)

    t = {
        "V": normal(d_in, C, scale=d_in**-0.5),
        "U": normal(C, d_out, scale=C**-0.5),
        "weight": normal(d_out, d_in, scale=d_in**-0.5),
        "bias": normal(d_out),
        "w_in": normal(C, hidden, scale=2**0.5),
        "b_in": normal(C, hidden, scale=0.5),
        "w_out": normal(C, hidden, scale=hidden**-0.5),
        "b_out": normal(C, scale=0.5),
        "x": normal(N, d_in),
        "inner": normal(N, C),
        "lower": torch.rand(N, C, generator=generator).mul_(1.02).sub_(0.01).to(dtype),
        "grad_y": normal(N, d_out),
        "grad_inner": normal(N, C),
        "grad_lower": normal(N, C),
        "grad_penalty_sum": normal(C),
        "grad_error": normal(1).reshape(()),
    }
    if avoid_kinks:
        # Low precision tosses the coin for too many logits to avoid them all; so does eager.
        for _ in range(20 if dtype in (torch.float32, torch.float64) else 0):
            near = _rows_near_kinks(t)
            if not len(near):
                break
            t["x"][near] = normal(len(near), d_in)
    t["key"] = make_key(SEED, 1)
    return {name: tensor.to(device) for name, tensor in t.items()}


def _rows_near_kinks(t: dict[str, Tensor]) -> Tensor:
    weights = [t["w_in"].unsqueeze(1).double(), t["w_out"].unsqueeze(2).double()]
    biases = [t["b_in"].double(), t["b_out"].unsqueeze(1).double()]
    V = t["V"].double()
    near = []
    for rows in t["x"].split(64):
        s = ops.gate_logits(rows.double() @ V, weights, biases)
        near.append(((s.abs() < KINK) | ((s - 1).abs() < KINK)).any(dim=1))
    return torch.cat(near).nonzero().flatten()


class _OperationProblem:
    """Outputs and, where asked for, gradients of one operation."""

    def __init__(
        self,
        workload: OperationWorkload,
        provider: str,
        dtype: torch.dtype,
        tensors: dict[str, Tensor],
    ) -> None:
        operation = OPERATIONS[workload.operation]
        differentiated = operation.inputs.split() if workload.backward else []
        self.tensors = {
            name: t.detach().to(dtype if t.is_floating_point() else t.dtype)
            for name, t in tensors.items()
        }
        if provider == "cpu":
            for name in PER_COMPONENT:
                t = self.tensors[name]
                self.tensors[name] = per_component(t, *t.shape).copy_(t)
        self.leaves = {n: self.tensors[n].requires_grad_(True) for n in differentiated}
        backend = "reference" if provider == "compile" else provider
        run = operation.run
        self.forward: Callable[[dict[str, Tensor]], dict[str, Tensor]]
        self.forward = lambda t: run(t, backend)
        if provider == "compile":
            self.forward = torch.compile(self.forward, dynamic=False)
        self.last: dict[str, Tensor] = {}

    def call(self) -> None:
        outputs = self.forward(self.tensors)
        gradients: tuple[Tensor, ...] = ()
        if self.leaves:
            incoming = [self.tensors[f"grad_{name}"] for name in outputs]
            gradients = torch.autograd.grad(
                list(outputs.values()), list(self.leaves.values()), incoming
            )
        named = {f"grad_{n}": g for n, g in zip(self.leaves, gradients, strict=True)}
        self.last = {**outputs, **named}

    def results(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in self.last.items()}

    def clear(self) -> None:
        self.last = {}


class _CompiledTrainer(Trainer):
    """A trainer whose forwards and losses are one compiled graph."""

    compiled: Callable[[Any, Tensor], dict[str, Tensor]] | None = None

    def train_step(self, index: int) -> tuple[dict[str, Tensor], Any]:
        self._set_lr(index)
        batch, key = self.batches(index), make_key(self.config.seed, index, self.device)
        if self.compiled is None:
            # What the model learns of its target at its first forward stays out of the graph.
            self.model.clean_forward(batch)
            self.compiled = torch.compile(self._losses, dynamic=False)
        losses = self.compiled(batch, key)
        self.optimizer.zero_grad(set_to_none=True)
        gradients = [torch.full_like(losses[n], c) for n, c in self.coefficients.items()]
        torch.autograd.backward(list(losses.values()), gradients)
        self.optimizer.step()
        return losses, None

    def _losses(self, batch: Any, key: Tensor) -> dict[str, Tensor]:
        config, minimality = self.config, self.config.losses.importance_minimality
        clean = self.model.clean_forward(batch)
        penalty = Penalty("lp", minimality.p, minimality.eps) if minimality.coeff > 0 else None
        importances = self.model.causal_importances(clean, penalty)
        step = Step(self.model, batch, clean, importances, key, config.divergence, config.draws)
        return {name: LOSSES[name](step) for name in self.coefficients}


def step_trainer(
    experiment: str,
    provider: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int | None = None,
    factored: bool | None = None,
) -> Trainer:
    """A trainer at step 0 of an experiment. Its target is freshly initialised, not trained: what a
    step costs does not depend on the target's weights."""
    interpolated = provider.endswith("-interpolated")
    provider = provider.removesuffix("-interpolated")
    gate_eval: ops.GateEval = "interpolated" if interpolated else "exact"
    config = parse_config(recipe(experiment))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        target = targets.make_target(config.target, SEED)
    target = target.to(device, dtype)
    if isinstance(target, targets.TMS):
        target.tie()
    model = DecomposedModel(
        target, config.sites, ci_fn=config.ci_fn, ci_hidden=config.ci_hidden,
        sigmoid=config.sigmoid, gate_eval=gate_eval, init=config.init, delta=config.delta,
        seed=SEED, backend="reference" if provider == "compile" else provider, factored=factored,
    )  # fmt: skip
    size = batch or config.batch_size
    data = targets.feature_data(config.target, size, SEED, "decompose", device)
    kind = _CompiledTrainer if provider == "compile" else Trainer
    if dtype == torch.float32:
        return kind(model, config, data, quiet=True)
    return kind(model, config, lambda step: data(step).to(dtype), quiet=True)


class _StepProblem:
    """Consecutive training steps; results are the losses and every parameter's gradient."""

    def __init__(self, workload: StepWorkload, provider: str, dtype: torch.dtype) -> None:
        self.trainer = step_trainer(
            workload.experiment, provider, dtype=dtype, device=workload.device,
            batch=workload.batch,
        )  # fmt: skip
        self.index = 0
        self.losses: dict[str, Tensor] = {}

    def call(self) -> None:
        self.losses = self.trainer.train_step(self.index)[0]
        self.index += 1

    def results(self) -> dict[str, Tensor]:
        gradients = {
            f"grad_{name}": p.grad
            for name, p in self.trainer.model.named_parameters()
            if p.grad is not None
        }
        losses = {f"loss_{name}": loss.detach() for name, loss in self.losses.items()}
        return {**losses, **gradients}

    def clear(self) -> None:
        self.losses = {}
        self.trainer.optimizer.zero_grad(set_to_none=True)
