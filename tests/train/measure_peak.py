"""Prints the predicted and the measured peak memory of a training step, in bytes; a process of its
own, for a peak belongs to one: ``python -m tests.train.measure_peak``."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from spd_fast import _extension
from spd_fast.model import DecomposedModel
from spd_fast.train import Trainer, parse_config
from spd_fast.train.plan import make_plan

C, ROWS, LENGTH = 512, 4, 128


def decomposed(components: int) -> DecomposedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    sites = {"model.layers.*": components}
    return DecomposedModel(target, sites, output="logits", delta=True, backend="cpu")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name}")


def main() -> None:
    torch.set_num_threads(1)
    _extension.keep_freed_memory()
    config = parse_config(
        {
            "name": "plan", "preset": "2026", "target": {"kind": "tms", "features": 5, "hidden": 2},
            "sites": {"any": 1}, "divergence": "kl", "lr": 1e-3,
            "losses": {"importance_minimality": {"coeff": 1e-4, "p": 1.0},
                       "stochastic_recon_layerwise": 0.0},
            "batch_size": ROWS, "steps": 4, "warm_up": {"steps": 0},
        }
    )  # fmt: skip

    def train(model: DecomposedModel, length: int) -> None:
        batch = torch.zeros(ROWS, length, dtype=torch.long)
        trainer = Trainer(model, config, lambda _: batch, quiet=True)
        for _ in range(2):
            trainer.train_step(0)

    # What the libraries take, once, for their code and threads is not the run's.
    train(decomposed(2), 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, mapped = _status("VmRSS"), _status("RssFile")
    model = decomposed(C)
    plan = make_plan(model, config, ROWS * LENGTH, measure=lambda _: None)
    train(model, LENGTH)
    # The kernel drops pages of libraries that lie idle and maps them again when they are used, on a
    # busy machine more of them: they are no memory of the run's.
    measured = _status("VmHWM") - before - (_status("RssFile") - mapped)
    print(json.dumps({"predicted": plan.total, "measured": measured}))


if __name__ == "__main__":
    main()
