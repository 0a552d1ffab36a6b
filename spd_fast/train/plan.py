"""What a run will need, from formulas, before anything runs: memory by category, time of a step.

Memory is what tensors take, as ``torch.cuda.max_memory_allocated`` counts it. A process has more
resident: code, buffers of the matrix product, and what its allocator keeps between tensors.

Of one step with N positions, at float32, C components a site and P trained numbers, the larger of
two moments counts, each beside the target, its P numbers, Adam's 2 P moments and what the clean
forward holds: in a transformer N Σ (d_in + d_out) over all its matrices, else the sites' inputs.

When the forwards are done:

- per site and component h and g, 2 N C;
- of every masked forward its activations: in a transformer 5/4 of what the clean one holds, 2 N of
  the output, and 4 N of the inner width a layer for a GELU composed of elementary operations, as
  GPT-2's is; in a plain network the sites' inputs alone, for a frozen layer without a site keeps
  nothing. 3/8 of that where one site alone is masked: half of the network lies behind a site on
  average, and frozen layers keep no inputs;
- two activations of the widest matrix; with accumulation, P gradients.

When the masked forwards' backwards are done and those of the gates begin:

- h, g and the gradient of g, 3 N C; the logits' gradients, N C, of a network for all sites;
- the gradients of V and U, and P of the other pieces, with accumulation;
- scratch: 3 N of the largest C, and two activations of the widest matrix; where gates' hidden
  layers are formed, four of a part of the rows at embeddings, two and a half elsewhere.

A stream that is kept factored (:mod:`spd_fast.model.factored`) is as wide as its factors' rows; the
gradient of h is then there as well when the gates' backwards begin, N C more, for masked sums are
computed where they are read. The first forward alone forms it, 3 N of its width.

With activation checkpointing no activations are kept, but one masked forward's come back in the
backward, where several losses have all else of the second moment in memory already.

In all of these:

- adversarial sources, their gradients and moments: 2 N C a PGD loss, 4 N C persistent ones; N is 1
  where sources are shared, the positions of one sequence where each of those has its own, and
  persistent ones then are spread out over all positions once more;
- hidden layers that are kept: 2 hidden N C of ``vector_mlp``, where they are small; 2 N C for the
  logits of binomial sampling;
- on ``reference`` also masks, sources and the gates' hidden layers, (2 hidden + 7) N C in place of
  the h and g above, and 2 hidden N C more at the site whose gate's backward is under way.

The target's own operations are not looked at: its activations are an estimate. Nor are sites that
see fewer positions than the others (a head on a mean): N is that of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from spd_fast import backends
from spd_fast.losses import PersistentPGD
from spd_fast.model import DecomposedModel
from spd_fast.model.ci_fns import GLOBAL_CI_FNS, KEPT, MLPGate
from spd_fast.model.decomposed import NEURONS
from spd_fast.model.sites import matrix_of, submodules
from spd_fast.ops.gate import GateEval, definite_eval
from spd_fast.train.config import TrainConfig

__all__ = ["Plan", "make_plan"]

MIB = 2**20
# Neurons of gates a second and core, forward and backward, of the C++ kernels (docs/results.md).
GATE_FORWARD, GATE_BACKWARD = 1.7e9, 0.9e9
# An interpolated gate takes as long as this many of them, however many it has: gate against
# gate_interpolated in bench/results/cpu.csv, without their products (6.3 and 8.4).
INTERPOLATED = 8
# Activations of transformers that keep tensors which torch's own does not.
COMPOSED_GELUS = ("NewGELUActivation", "FastGELUActivation")

# Fitted to the networks of tests/train/test_plan.py; python -m bench.plan shows them on others.
# A masked forward of a transformer keeps so many times the widths of its matrices, its logits, and
# the inner width of a composed GELU; one with a single masked site, this share of all that.
WIDTHS_KEPT, LOGITS_KEPT, GELU_KEPT, ONE_SITE = 1.25, 2.0, 4.0, 3 / 8
# A gate's hidden layer that is formed is in memory so many times in its backward.
HIDDEN_OF_EMBEDDING, HIDDEN = 4.0, 2.5
# The first forward looks at the target's modules, and forms a factored stream so many times.
STREAM_FORMED = 3.0


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


def _forwards(config: TrainConfig, sites: int, positions: int) -> tuple[float, float, float]:
    """(masked forwards of all sites, masked forwards of one site, numbers of adversaries a
    component) that are alive together; ``positions`` of a piece of the batch."""
    whole = single = adversarial = 0.0
    options = config.losses.options()
    samples = config.batch_size // config.accumulation
    for name in config.losses.coefficients():
        if "faithfulness" in name or name == "importance_minimality":
            continue
        draws = config.draws if name.startswith("stochastic") else 1
        if name.endswith("layerwise"):
            single += draws * sites
        else:
            whole += draws
        if "pgd" in name:
            scope = options[name].scope
            own = {
                "per_position": positions // samples,
                "unique_per_datapoint": positions,
                "per_sample_and_position": positions * config.accumulation,
            }.get(scope, 1)
            adversarial += own * (4 if name.startswith("persistent") else 2)
            if name.startswith("persistent") and own < positions:
                adversarial += positions
    return whole, single, adversarial


def _ascents(config: TrainConfig, sites: int) -> tuple[int, int]:
    """(masked forwards of all sites, masked forwards of one site) by which adversaries find their
    sources in a step."""
    whole = single = 0
    options = config.losses.options()
    for name in config.losses.coefficients():
        if "pgd" not in name:
            continue
        attack = options[name]
        ascents = attack.n_warmup if isinstance(attack, PersistentPGD) else attack.steps
        if name.endswith("layerwise"):
            single += ascents * sites
        else:
            whole += ascents
    return whole, single


def _width(model: DecomposedModel) -> Callable[[int], int]:
    """What a width counts as: that of a factored stream as its factors' rows together."""
    widening = model.widening().values()
    rows = sum(W.shape[1] for W in widening)
    streams = {W.shape[0] for W in widening}
    return lambda d: min(rows, d) if d in streams else d


def _stream(model: DecomposedModel) -> int:
    """Width of a factored stream; 0 where there is none."""
    return max((W.shape[0] for W in model.widening().values()), default=0)


def _products(model: DecomposedModel, N: int) -> tuple[float, float, float]:
    """Multiply-adds of the components, N C d_in for x V and N C d_out for a U: of x V at the clean
    inputs; in a forward with all sites masked; in one with a single site masked, on average. A
    masked site that has its clean input has x V already.

    Of a factored stream a reader of k columns meets the r rows of what is in it so far, r k (N + d)
    multiply-adds, of which r k d do not depend on N. The output counts as one more reader, as wide
    as what the stream begins with: a residual MLP returns its features.
    """
    widening = model.widening()
    streams = {W.shape[0] for W in widening.values()}
    sites = list(model.sites.values())
    begins = sum(W.shape[1] for path, W in widening.items() if path not in model.sites)
    clean_rows = masked_rows = begins
    clean = together = alone = 0
    for i, s in enumerate(sites):
        C, reads, writes = s.components, s.d_in in streams, s.name in widening
        if s.kind != "embedding":
            clean += C * (clean_rows * (N + s.d_in) if reads else N * s.d_in)
            if i:
                together += C * (masked_rows * (N + s.d_in) if reads else N * s.d_in)
        behind = sum(t.d_out for t in sites[i + 1 :] if t.d_in in streams)
        together += C * (begins * (N + s.d_out) if writes else N * s.d_out)
        alone += C * ((begins + behind) * (N + s.d_out) if writes else N * s.d_out)
        if writes:
            clean_rows, masked_rows = clean_rows + s.d_in, masked_rows + C
    return float(clean), float(together), alone / len(sites)


def _matrices(target: nn.Module) -> list[tuple[int, int]]:
    """(d_in, d_out) of every matrix of the target, also of one that no site can be; a table has
    d_in 0."""
    found = [m for m in map(matrix_of, submodules(target).values()) if m is not None]
    return [(0 if kind == "embedding" else W.shape[1], W.shape[0]) for kind, W in found]


def _activations(target: nn.Module, inputs: float) -> tuple[float, float]:
    """Numbers a position that the clean forward holds, and those that a masked forward of all sites
    keeps; ``inputs`` are the sites'."""
    config = getattr(target, "config", None)
    if not hasattr(config, "num_attention_heads"):
        return inputs, inputs
    matrices = _matrices(target)
    widths = float(sum(a + b for a, b in matrices))
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = inner or 4 * getattr(config, "hidden_size", 0)
    gelus = sum(type(m).__name__ in COMPOSED_GELUS for m in target.modules())
    return widths, (
        WIDTHS_KEPT * widths + LOGITS_KEPT * matrices[-1][1] + GELU_KEPT * gelus * inner
    )


def _importances(
    model: DecomposedModel, config: TrainConfig, backend: str, N: int
) -> tuple[float, float]:
    """Numbers that importances hold in the forward, and their gradients' in the backward."""
    sites = model.sites.values()
    components = sum(s.components for s in sites)
    hidden = max(model.options["ci_hidden"], default=0)
    kind = model.options["ci_fn"]
    if backend == "reference":
        kept = 2.0 * hidden if kind == "mlp" else 0.0
        most = max(s.components for s in sites)
        return N * ((kept + 7) * components + kept * most), 0.0
    held = 2.0 * components
    if config.sampling == "binomial":
        held += 2.0 * components
    if kind == "vector_mlp":
        held += sum(2.0 * hidden * s.components for s in sites if N * hidden * s.components <= KEPT)
    return N * held, float(N * components * (2 if kind in GLOBAL_CI_FNS else 1))


def _hidden_layers(model: DecomposedModel, config: TrainConfig, N: int) -> float:
    """Of gates whose hidden layer is formed, a part of the rows at a time: numbers of that part."""
    hidden = max(model.options["ci_hidden"], default=0) if model.options["ci_fn"] == "mlp" else 0
    formed = [
        (HIDDEN_OF_EMBEDDING if s.kind == "embedding" else HIDDEN)
        * min(s.components * hidden * N, NEURONS)
        for s in model.sites.values()
        if s.kind == "embedding" or config.sampling == "binomial"
    ]
    return max(formed, default=0.0)


def _memory(
    model: DecomposedModel,
    config: TrainConfig,
    backend: str,
    N: int,
    forwards: tuple[float, float, float],
) -> dict[str, float]:
    """Category → bytes, at the largest of the moments."""
    whole, single, adversarial = forwards
    sites = model.sites.values()
    size = next(model.parameters()).element_size()
    # Tied components are two sets of parameters in one storage: moments and gradients are double.
    trained = sum(p.numel() for p in model.parameters())
    stored = sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    target = sum({t.data_ptr(): t.nbytes for t in model.target.state_dict().values()}.values())
    vectors = sum(p.numel() for p in model.components.parameters())
    before = trained if config.accumulation > 1 else 0
    width = _width(model)
    clean, masked = _activations(
        model.target, float(sum(width(s.d_in) for s in sites if s.kind != "embedding"))
    )
    kept = 0.0 if config.activation_checkpointing else masked * (whole + ONE_SITE * single)
    again = masked * (1.0 if whole else ONE_SITE) if whole + single > 1 else 0.0
    held, gradient = _importances(model, config, backend, N)
    stream = _stream(model)
    if stream and whole:
        gradient *= 2
    wide = 2.0 * max(width(d) for m in _matrices(model.target) for d in m)
    tiles = (3 * max(s.components for s in sites) + wide) * N
    # Numbers of importances, of activations or gradients, and of scratch.
    moments = [
        (held, (clean + kept) * N + before, wide * N),
        (held + gradient, clean * N + vectors + before, tiles + _hidden_layers(model, config, N)),
    ]
    if stream:  # at the first step, when there are no moments of Adam yet
        moments.append((0.0, STREAM_FORMED * N * stream - 2 * trained, 0.0))
    if config.activation_checkpointing:
        moments.append((held + gradient, (clean + again) * N + vectors + before, wide * N))
    importances, activations, scratch = max(moments, key=sum)
    return {
        "target": float(target),
        "components, importance fns": float(stored * size),
        "Adam's moments": float(2 * trained * size),
        "importances": importances * size,
        "adversarial sources": adversarial * sum(s.components for s in sites) * size,
        "activations or gradients": activations * size,
        "scratch": scratch * size,
    }


def _flops(
    model: DecomposedModel, config: TrainConfig, N: int, forwards: tuple[float, float]
) -> float:
    """Floating-point operations of the matrix products of a step in pieces of N positions."""
    sites, widening, width = list(model.sites.values()), model.widening(), _width(model)
    read = [s for s in sites if s.kind != "embedding"]
    clean, together, alone = _products(model, N)
    # The target's own matrices; what a factored stream begins with is not multiplied out.
    own = sum(width(a) * width(b) for a, b in _matrices(model.target))
    own -= sum(W.shape[1] * width(W.shape[0]) for p, W in widening.items() if p not in model.sites)
    # Those beside masked sites.
    passed = own
    if not model.options["delta"]:
        passed -= sum(width(s.d_in) * width(s.d_out) for s in read)

    def masked(whole: float, single: float, products: int) -> float:
        """Of forwards of all sites and of one; there half of the target runs before and half behind
        the site. A frozen matrix has one product backward."""
        trained = together * whole + alone * single
        return 2 * products * trained + 4 * N * (passed * whole + own * single / 2)

    piece = 2 * N * own + 4 * clean + masked(*forwards, 3)
    # An adversary's ascents need no gradients of V and U.
    piece += masked(*_ascents(config, len(sites)), 2)
    faithfulness = 6.0 * sum(s.components * s.d_in * s.d_out for s in read)
    return config.accumulation * piece + faithfulness


def _evaluated(model: DecomposedModel) -> int:
    """Neurons of gates a position, an interpolated gate counting as :data:`INTERPOLATED`."""
    evaluated = 0
    # One network for all sites is no gate.
    for site, network in zip(model.sites.values(), model.ci_fns.values(), strict=False):
        if not isinstance(network, MLPGate):
            continue
        hidden = max(model.options["ci_hidden"])
        how: GateEval = "exact"
        if site.kind != "embedding":
            how = definite_eval(
                model.gate_eval, model.backend, model.V(site.name), network.weights, model.sigmoid
            )
        most = INTERPOLATED if how == "interpolated" else hidden
        evaluated += site.components * min(hidden, most)
    return evaluated


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
    sites = list(model.sites.values())
    whole, single, adversarial = _forwards(config, len(sites), N)
    components = sum(s.components for s in sites)
    hidden = max(model.options["ci_hidden"], default=0)
    gates = [m for m in model.ci_fns.values() if isinstance(m, MLPGate)]
    memory = _memory(model, config, backend, N, (whole, single, adversarial))
    flops = _flops(model, config, N, (whole, single))
    neurons = float(positions * components * hidden) if gates else 0.0
    rate = (measure or _products_rate)(device)
    seconds = None
    if rate:
        evaluated = positions * _evaluated(model) / torch.get_num_threads()
        seconds = flops / rate + evaluated * (1 / GATE_FORWARD + 1 / GATE_BACKWARD)
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
