"""Memory of one training step of a language model, each backend in a process of its own.

    python -m bench.language --target PATH [--components 1024] [--sequences 4] [--length 256]

Every attention and MLP matrix of a Llama is decomposed into C components, with gates of 16 neurons
and the preset 2026; the step has the stochastic loss, faithfulness and importance minimality.
Counted is what :mod:`bench.memory` counts: the highest resident set during a step that comes after
a first one, over the resident set right before it, and that highest resident set itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys

import torch

from bench.machine import ROOT
from bench.memory import MALLOC, peak, reset_peak

__all__ = ["main", "measure"]

SITES = ("self_attn.[qkvo]_proj", "mlp.*_proj")


def measure(
    target: str, backend: str, components: int, sequences: int, length: int
) -> dict[str, float]:
    """One step in this process."""
    from spd_fast.model import DecomposedModel
    from spd_fast.targets import load_hf
    from spd_fast.train import Trainer
    from spd_fast.train.config import LanguageConfig, validate

    config = validate(
        {
            "name": "memory",
            "preset": "2026",
            "target": {"kind": "hf", "path": target},
            "data": {"kind": "tokens", "path": "none"},
            "sites": {f"model.layers.*.{site}": components for site in SITES},
            "losses": {
                "faithfulness": 1.0,
                "stochastic_recon_layerwise": 0,
                "importance_minimality": {"coeff": 1e-3, "p": 1.0},
            },
            "warm_up": {"steps": 0},
            "lr": 1e-3,
            "steps": 10,
            "batch_size": sequences,
        },
        LanguageConfig,
    )
    model = DecomposedModel(
        load_hf(target), config.sites, ci_hidden=config.ci_hidden, sigmoid=config.sigmoid,
        init=config.init, delta=config.delta, output="logits", backend=backend,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.target.config.vocab_size
    tokens = torch.randint(0, vocabulary, (sequences, length), generator=generator)
    trainer = Trainer(model, config, lambda step: tokens, quiet=True)
    trainer.train_step(0)
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    before = reset_peak()
    trainer.train_step(1)
    highest = peak()
    return {"extra_mb": highest - before, "peak_mb": highest}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="a Llama's folder or hub id")
    parser.add_argument("--components", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--backends", nargs="+", default=["cpu", "reference"])
    parser.add_argument("--measure", metavar="BACKEND", help="in this process; prints JSON")
    given = parser.parse_args(arguments)
    shape = (given.components, given.sequences, given.length)
    if given.measure:
        print(json.dumps(measure(given.target, given.measure, *shape)))
        return
    found: dict[str, dict[str, float]] = {}
    for backend in given.backends:
        command = [sys.executable, "-m", "bench.language", "--measure", backend]
        command += ["--target", given.target, "--components", str(shape[0])]
        command += ["--sequences", str(shape[1]), "--length", str(shape[2])]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | MALLOC, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{backend}: {done.stderr.strip().splitlines()[-1]}")
        found[backend] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{backend:<10} extra {found[backend]['extra_mb']:8.0f} MB  "
              f"peak {found[backend]['peak_mb']:8.0f} MB", flush=True)  # fmt: skip
    if {"cpu", "reference"} <= found.keys():
        for kind in ("extra_mb", "peak_mb"):
            ratio = found["cpu"][kind] / found["reference"][kind]
            print(f"{kind.removesuffix('_mb'):<5} cpu / reference: {ratio:.3f}")


if __name__ == "__main__":
    main()
