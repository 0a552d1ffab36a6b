"""How well ``spd-fast plan`` foretells memory: predicted over measured peak of a step's tensors,
for networks of several families and sizes, most of them none that its formulas were fitted to.

    python -m bench.plan [--target FOLDER] [--only TEXT]

Takes some minutes. ``--target``: a language model's folder, as well.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.machine import machine
from bench.tensor_peak import tensor_peak
from spd_fast.experiments import recipe
from spd_fast.experiments.runs import make_trainer
from spd_fast.model import DecomposedModel
from spd_fast.targets import make_target
from spd_fast.train import TrainConfig, Trainer, parse_config, set_keys
from spd_fast.train.plan import make_plan

VOCABULARY, BOUND = 512, 0.15
MINIMALITY = {"coeff": 1e-3, "p": 1.0}
LOSSES = {"faithfulness": 1.0, "stochastic_recon_layerwise": 0, "importance_minimality": MINIMALITY}
# Width, layers, rows and positions of a batch, components a site.
SIZES = ((32, 2, 4, 64, 128), (48, 2, 8, 96, 256), (96, 2, 4, 128, 512), (128, 4, 2, 256, 256))
TOYS = (
    ("tms_5-2", 4096, "cpu"), ("tms_40-10", 2048, "cpu"), ("resid_mlp1", 512, "cpu"),
    ("resid_mlp2", 128, "cpu"), ("tms_5-2", 512, "reference"),
)  # fmt: skip
Network = tuple[str, Callable[[], nn.Module], dict[str, int], str | None, Tensor]


class MLP(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def networks() -> Iterator[Network]:
    """(name, builder, sites, output, batch)."""
    import transformers

    for width, layers, rows, length, C in SIZES:
        tokens = torch.zeros(rows, length, dtype=torch.long)
        size = f"{layers} layers of width {width}, {rows} × {length} positions, C {C}"
        shape = {
            "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": 4, "intermediate_size": 4 * width,
            "max_position_embeddings": 256,
        }  # fmt: skip
        gpt2 = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=width, n_layer=layers, n_head=4
        )
        neox, llama = transformers.GPTNeoXConfig(**shape), transformers.LlamaConfig(**shape)
        bert = transformers.BertConfig(**shape)
        yield (f"GPT-2, {size}", lambda c=gpt2: transformers.GPT2LMHeadModel(c),
               {"transformer.h.*": C}, "logits", tokens)  # fmt: skip
        yield (f"GPT-NeoX, {size}", lambda c=neox: transformers.GPTNeoXForCausalLM(c),
               {"*layers*": C}, "logits", tokens)  # fmt: skip
        yield (f"Llama, {size}", lambda c=llama: transformers.LlamaForCausalLM(c),
               {"*layers*": C}, "logits", tokens)  # fmt: skip
        yield (f"BERT, {size}", lambda c=bert: transformers.BertModel(c, add_pooling_layer=False),
               {"encoder.*": C}, "last_hidden_state", tokens)  # fmt: skip
        yield (f"residual MLP, {size}", lambda w=width, n=layers: MLP(w, n), {"*": C}, None,
               torch.zeros(rows * length, width))  # fmt: skip


def ratio(network: Network, layerwise: bool) -> float:
    """Predicted over measured bytes of one network."""
    _, build, sites, output, batch = network
    config = TrainConfig(
        steps=4, batch_size=batch.shape[0], lr=1e-3, lr_schedule="constant",
        warm_up={"steps": 0}, losses=LOSSES | {"stochastic_recon_layerwise": int(layerwise)},
        divergence="kl" if output == "logits" else "mse",
    )  # fmt: skip

    def make() -> Trainer:
        torch.manual_seed(0)
        model = DecomposedModel(build().eval(), sites, delta=True, output=output, backend="cpu")
        return Trainer(model, config, lambda _: batch, quiet=True)

    return _ratio(make, len(batch) if batch.is_floating_point() else batch.numel())


def toy_ratio(name: str, batch_size: int, backend: str) -> float:
    """The same of a toy of the paper, with its recipe."""
    config = parse_config(set_keys(recipe(name), [f"batch_size={batch_size}"]))

    def make() -> Trainer:
        return make_trainer(config, make_target(config.target, config.seed), None, backend, True)

    return _ratio(make, batch_size)


def _ratio(make: Callable[[], Trainer], positions: int) -> float:
    made: list[Trainer] = []

    def train() -> None:
        made.append(make())
        for step in range(2):  # moments are there from the second step on
            made[0].train_step(step)

    measured = tensor_peak(train)
    trainer = made[0]
    plan = make_plan(trainer.model, trainer.config, positions, measure=lambda _: None)
    return plan.total / measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, help="a language model's folder")
    parser.add_argument("--only", default="", help="networks with this in their name")
    options = parser.parse_args()
    for key, value in machine().items():
        print(f"{key}: {value}")
    found = list(networks())
    if options.target is not None:
        from spd_fast.targets import load_hf

        tokens = torch.zeros(4, 256, dtype=torch.long)
        found.append((options.target.name, lambda: load_hf(options.target),
                      {"*.mlp.*": 512, "*.self_attn.*": 512}, "logits", tokens))  # fmt: skip
    cases: list[tuple[str, Callable[[], float]]] = [
        (f"{name}, {backend}, batch {size}", functools.partial(toy_ratio, name, size, backend))
        for name, size, backend in TOYS
    ]
    for network in found:
        for layerwise, losses in ((False, "all sites masked"), (True, "with layerwise")):
            case = functools.partial(ratio, network, layerwise)
            cases.append((f"{network[0]}; {losses}", case))
    ratios = []
    for name, measured in cases:
        if options.only in name:
            ratios.append(measured())
            print(f"{ratios[-1]:5.2f}  {name}", flush=True)
    if not ratios:
        parser.error(f"--only {options.only!r} is in no network's name")
    inside = sum(abs(r - 1) < BOUND for r in ratios)
    print(f"{inside} of {len(ratios)} within {BOUND:.0%}; {min(ratios):.2f} to {max(ratios):.2f}, "
          f"median {statistics.median(ratios):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
