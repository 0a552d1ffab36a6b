"""The families of networks that people bring, small and random, from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spd_fast.model import DecomposedModel, Ones
from spd_fast.targets import load_hf
from spd_fast.train import Trainer, parse_config
from tests.train.test_trainer import assert_same, state

transformers = pytest.importorskip("transformers")

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
VOCABULARY, LENGTH = 23, 6


class VisionMLP(nn.Module):
    """An MLP-Mixer: patches, mixed across positions and channels; no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.across = nn.Linear(4, 4)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, 4, 4]
        x = pixels.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, 3, 2, 2, 2, 2]
        x = self.patch(x.permute(0, 2, 3, 1, 4, 5).reshape(-1, 4, 12))
        x = x + self.across(self.norm(x).mT).mT
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean(dim=1))


def tokens(step: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(vocabulary, (4, LENGTH), generator=generator)


def stories_tokens(step: int) -> Tensor:
    data = np.load(STORIES / "tokens_train.npy", mmap_mode="r")
    return torch.from_numpy(data[4 * step : 4 * step + 4, :LENGTH].astype(np.int64))


def masked_tokens(step: int) -> dict[str, Tensor]:
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": tokens(step), "attention_mask": mask}


def pixels(step: int) -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, n_inner=16
        )
    )


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


@dataclass
class Case:
    build: Callable[[], nn.Module]
    batches: Callable[[int], Any]
    sites: dict[str, int]
    output: str | None
    divergence: str
    options: dict[str, Any]


CASES = {
    "gpt2": Case(
        gpt2, tokens,
        {"transformer.h.*.attn.c_attn": 24, "transformer.h.*.mlp.c_*": 20, "transformer.wte": 24,
         "lm_head": 24},
        "logits", "kl", {},
    ),
    "pythia": Case(
        neox, tokens, {"gpt_neox.layers.*": 20}, "logits", "kl", {"ci_fn": "shared_mlp"},
    ),
    "bert": Case(
        bert, masked_tokens, {"encoder.layer.*": 20, "encoder.layer.0.output.dense": 9},
        "last_hidden_state", "mse", {"ci_fn": "transformer", "ci_hidden": (16,),
                                     "ci_transformer": {"d_model": 8, "heads": 2}},
    ),
    "vision mlp": Case(
        VisionMLP, pixels, {"*": 16, "up.pre_identity": 12}, None, "mse", {"ci_fn": "mlp"},
    ),
    "stories260k": Case(
        lambda: load_hf(STORIES), stories_tokens,
        {"*.mlp.*": 72, "*.self_attn.*": 64}, "logits", "kl",
        {"ci_fn": "global_mlp", "ci_hidden": (32,)},
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    if request.param == "stories260k" and not STORIES.is_dir():
        pytest.skip("../shared/models/stories260k is not beside the repository")
    return CASES[request.param]


@pytest.fixture
def target(case):
    torch.manual_seed(0)
    return case.build().eval()


def decomposed(case, target, **options):
    return DecomposedModel(
        target, case.sites, output=case.output,
        **{"delta": True, "init": "2026", "sigmoid": "2026"} | case.options | options,
    )  # fmt: skip


def factorise(model):
    """V and U whose product is W: one of them W itself, the other an identity."""
    with torch.no_grad():
        for name, site in model.sites.items():
            if site.tied_to is not None:
                continue
            V, U = model.V(name).zero_(), model.U(name).zero_()
            if site.d_in < site.d_out:
                V[:, : site.d_in].fill_diagonal_(1)
                U[: site.d_in] = site.weight.T
            else:
                V[:, : site.d_out] = site.weight.T
                U[: site.d_out].fill_diagonal_(1)


def config(case, **changes):
    return parse_config(
        {
            "name": "architecture", "preset": "2026",
            "target": {"kind": "tms", "features": 5, "hidden": 2},
            "sites": case.sites, "divergence": case.divergence, "lr": 5e-3, "batch_size": 4,
            "lr_schedule": "constant",
            "losses": {"importance_minimality": {"coeff": 1e-4, "p": 1.0},
                       "stochastic_recon_layerwise": 0.0},
            "warm_up": {"steps": 0}, "log_every": 100, "checkpoint_every": 2,
        }
        | changes
    )  # fmt: skip


def test_the_clean_forward_is_the_targets_bit_for_bit(case, target):
    model, batch = decomposed(case, target), case.batches(0)
    with torch.no_grad():
        raw = target(**batch) if isinstance(batch, dict) else target(batch)
    expected = raw if case.output is None else getattr(raw, case.output)
    assert torch.equal(model.clean_forward(batch).output, expected)


def test_an_exact_factorisation_reproduces_the_output(case, target, backend):
    model, batch = decomposed(case, target, backend=backend), case.batches(0)
    factorise(model)
    clean = model.clean_forward(batch).output
    got = model.masked_forward(batch, Ones())
    # Measured: at most 2e-6 of the largest entry.
    assert (got - clean).abs().max() <= 1e-5 * clean.abs().max()
    assert max(model.faithfulness().values()) < 1e-10


def test_a_few_steps_lower_the_losses(case, target):
    model = decomposed(case, target)
    trainer = Trainer(model, config(case, steps=25), lambda _: case.batches(0), quiet=True)
    seen = [trainer.train_step(0)[0] for _ in range(25)]
    total = [sum(trainer.coefficients[n] * v for n, v in losses.items()) for losses in seen]
    assert seen[-1]["stochastic_recon"] < 0.2 * seen[0]["stochastic_recon"]
    assert total[-1] < 0.5 * total[0]


def test_a_resumed_run_is_the_uninterrupted_one(case, target, tmp_path):
    whole = Trainer(decomposed(case, target), config(case, steps=4), case.batches, quiet=True)
    whole.fit()
    (tmp_path / "run").mkdir()
    cut = Trainer(
        decomposed(case, target), config(case, steps=4), case.batches, out=tmp_path / "run",
        quiet=True,
    )  # fmt: skip
    for _ in range(2):
        cut.train_step(cut.step)
        cut.step += 1
    cut.save()
    again = Trainer(
        decomposed(case, target, seed=1), config(case, steps=4), case.batches,
        out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    assert again.resume()
    again.fit()
    assert_same(state(again), state(whole))


def test_what_was_saved_comes_back(case, target, tmp_path):
    model, batch = decomposed(case, target), case.batches(0)
    model.save_pretrained(tmp_path)
    again = DecomposedModel.from_pretrained(tmp_path, target)
    assert torch.equal(model.masked_forward(batch, Ones()), again.masked_forward(batch, Ones()))
    one, other = (m.causal_importances(m.clean_forward(batch)) for m in (model, again))
    assert all(torch.equal(one[name].lower, other[name].lower) for name in model.sites)
