"""What a run will need, from formulas, before anything runs: memory by category, time of a step.

Memory is what tensors take, as ``torch.cuda.max_memory_allocated`` counts it. A process has more
resident: code, buffers of the matrix product, and what its allocator keeps between tensors.

Of one step with N positions, at float32, C components a site and P trained numbers:

- parameters P, Adam's moments 2 P;
- per site and component: h, g and the gradient of g, 3 N C, where a fused backend computes them; on
  ``reference`` also masks, sources and the gates' hidden layers, (2 hidden + 7) N C, and 2 hidden
  N C more at the site whose gate's backward is under way;
- adversarial sources, their gradients and moments: 2 N C a PGD loss, 4 N C persistent ones;
- the larger of what the forwards keep and of what is left of it when all P gradients are there:

  - kept in a transformer: 2 N Σ (d_in + d_out) over all its matrices and 4 N of the output a masked
    forward, for its norms, attention and gating keep about as much again; a quarter of that where
    one site alone is masked (half of the network lies behind a site on average, and frozen layers
    keep no inputs);
  - kept in a plain network: the sites' inputs of the clean forward and of each that masks all
    sites, for a frozen layer without a site keeps nothing;
  - left: the sites' inputs of the clean forward, which the gates' gradients need;

- scratch: 4 N of the largest C, and two activations of the widest matrix.

The target's own operations are not looked at: its activations are an estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from spd_fast import backends
from spd_fast.model import DecomposedModel
from spd_fast.model.ci_fns import MLPGate
from spd_fast.model.sites import resolve_sites
from spd_fast.train.config import TrainConfig

__all__ = ["Plan", "make_plan"]

MIB = 2**20
# Neurons of gates a second and core, forward and backward, of the C++ kernels (docs/results.md).
GATE_FORWARD, GATE_BACKWARD = 1.7e9, 0.9e9


@dataclass(frozen=True)
class Plan:
    """The prediction.

    Attributes:
        positions: N of a step. backend: who computes.
        sites: name → (kind, d_in, d_out, C, trained numbers).
        memory: category → bytes at the peak.
        flops: of the matrix products of a step. neurons: of the gates, forward.
        seconds: of a step, at the speed of this machine's matrix products just measured; None
            where nothing is known of the device.
    """

    positions: int
    backend: str
    sites: dict[str, tuple[str, int, int, int, int]]
    memory: dict[str, float]
    flops: float
    neurons: float
    seconds: float | None

    @property
    def total(self) -> float:
        """Bytes at the peak, over what the process takes without a model."""
        return sum(self.memory.values())

    def table(self) -> str:
        """For a terminal."""
        width = max(map(len, self.sites))
        lines = [f"{'site'.ljust(width)}  kind       d_in → d_out       C   parameters"]
        for name, (kind, d_in, d_out, C, numbers) in self.sites.items():
            shape = f"{d_in} → {d_out}"
            lines.append(f"{name.ljust(width)}  {kind:9}  {shape:14} {C:6}  {numbers:11,}")
        lines += ["", f"{self.positions:,} positions a step, backend {self.backend}; at the peak:"]
        lines += [f"  {name:26} {size / MIB:10,.1f} MiB" for name, size in self.memory.items()]
        lines += [f"  {'together':26} {self.total / MIB:10,.1f} MiB", ""]
        lines.append(f"{self.flops / 1e9:,.1f} GFLOP in matrix products a step")
        if self.seconds is None:
            lines.append("time of a step: not predicted for this device")
        else:
            lines.append(f"about {1e3 * self.seconds:,.0f} ms a step on this machine, as it is now")
        return "\n".join(lines)


def _forwards(config: TrainConfig, sites: int) -> tuple[float, float, float]:
    """(masked forwards of all sites, masked forwards of one site, N C tensors of adversaries) whose
    graphs are alive together."""
    whole = single = adversarial = 0.0
    for name in config.losses.coefficients():
        if "faithfulness" in name or name == "importance_minimality":
            continue
        draws = config.draws if name.startswith("stochastic") else 1
        if name.endswith("layerwise"):
            single += draws * sites
        else:
            whole += draws
        if "pgd" in name:
            adversarial += 4 if name.startswith("persistent") else 2
    return whole, single, adversarial


def _matrices(target: nn.Module) -> list[tuple[int, int]]:
    """(d_in, d_out) of every matrix of the target that could be a site; a table has d_in 0."""
    found = resolve_sites(target, {"*": 1}).values()
    return [(0 if s.kind == "embedding" else s.d_in, s.d_out) for s in found]


def make_plan(
    model: DecomposedModel,
    config: TrainConfig,
    positions: int,
    *,
    measure: Callable[[torch.device], float | None] | None = None,
) -> Plan:
    """What training ``model`` by ``config`` with ``positions`` positions a step will need.

    ``measure`` gives the floating-point operations a second of a device's matrix products; by
    default a short product on this machine, on a CPU.
    """
    device = next(model.parameters()).device
    backend = backends.name_for(model.backend, device)
    N = positions // config.accumulation
    size = next(model.parameters()).element_size()
    sites = list(model.sites.values())
    whole, single, adversarial = _forwards(config, len(sites))
    components = sum(s.components for s in sites)
    matrices = _matrices(model.target)
    widths = float(sum(a + b for a, b in matrices))
    transformer = hasattr(getattr(model.target, "config", None), "num_attention_heads")
    inputs = float(sum(s.d_in for s in sites if s.kind != "embedding"))
    if transformer:
        kept = (2 * widths + 4 * matrices[-1][1]) * (whole + single / 4)
    else:
        kept = inputs * (1 + whole)
    most = max(s.components for s in sites)
    scratch = 4 * most + 2 * max(max(m) for m in matrices)
    hidden = max(model.options["ci_hidden"], default=0)
    gates = [m for m in model.ci_fns.values() if isinstance(m, MLPGate)]
    importances = 3.0 * components
    if backend == "reference":
        neurons_kept = 2.0 * hidden if gates else 0.0
        importances = (neurons_kept + 7) * components + neurons_kept * most
    # Tied components are two sets of parameters in one storage: moments and gradients are double.
    trained = sum(p.numel() for p in model.parameters())
    stored = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    target = sum({t.data_ptr(): t.nbytes for t in model.target.state_dict().values()}.values())
    memory = {
        "target": float(target),
        "components, importance fns": float(stored * size),
        "Adam's moments": float(2 * trained * size),
        "importances": importances * N * size,
        "adversarial sources": adversarial * N * components * size,
        "activations or gradients": max(kept * N, inputs * N + trained) * size,
        "scratch": float(scratch * N * size),
    }
    product = sum(
        s.components * ((0 if s.kind == "embedding" else s.d_in) + s.d_out) for s in sites
    )
    own = sum(a * b for a, b in matrices)
    # A site masked once: 6 N C (d_in + d_out); alone, half of the target runs before and behind it.
    share = whole + (single / len(sites))
    flops = 6.0 * positions * product * share + 4.0 * positions * own * (whole + single / 2)
    neurons = float(positions * components * hidden) if gates else 0.0
    rate = (measure or _products_rate)(device)
    seconds = None
    if rate:
        cores = torch.get_num_threads()
        seconds = flops / rate + neurons / cores * (1 / GATE_FORWARD + 1 / GATE_BACKWARD)
    described: dict[str, tuple[str, int, int, int, int]] = {
        s.name: (
            s.kind, s.d_in, s.d_out, s.components,
            sum(p.numel() for p in (model.V(s.name), model.U(s.name))),
        )
        for s in sites
    }  # fmt: skip
    return Plan(positions, backend, described, memory, flops, neurons, seconds)


def _products_rate(device: torch.device) -> float | None:
    """Floating-point operations a second of this CPU's matrix products; some milliseconds."""
    if device.type != "cpu":
        return None
    a = torch.ones(512, 512)
    a @ a
    begin = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 512**3 / (time.perf_counter() - begin)
