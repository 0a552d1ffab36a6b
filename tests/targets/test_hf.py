"""Hugging Face models from a folder, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel
from spd_fast.targets import load_hf

pytest.importorskip("transformers")

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason="../shared/models/stories260k is not beside the repository"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=10,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_holds_the_model_that_its_config_names(folder):
    model = load_hf(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32


def test_weights_may_be_read_in_another_dtype(folder):
    assert next(load_hf(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_a_decomposed_model_takes_a_folder(folder):
    model = DecomposedModel(folder, {"*.q_proj": 3}, output="logits")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.clean_forward(tokens).output, load_hf(folder)(tokens).logits)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[1, 16]]), "token 16 is out of range: the model's vocabulary has 16 tokens"),
        (torch.tensor([[-1, 3]]), "token -1 is out of range"),
        (torch.zeros(2, 11, dtype=torch.long), "of 11 tokens are longer than the model's context"),
        (torch.zeros(2, 3), "takes token ids, got a tensor of torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"takes tokens \[batch, position\], got \(3,\)"),
    ],
)
@pytest.mark.parametrize("as_mapping", [False, True])
def test_tokens_that_the_model_cannot_take_are_an_error(folder, tokens, message, as_mapping):
    model = DecomposedModel(folder, {"*.q_proj": 3}, output="logits")
    with pytest.raises(UserError, match=message):
        model.clean_forward({"input_ids": tokens} if as_mapping else tokens)


def test_small_integers_are_tokens_too(folder):
    model = DecomposedModel(folder, {"*.q_proj": 3}, output="logits")
    tokens = torch.from_numpy(np.array([[1, 2, 3]], dtype=np.uint16))
    assert torch.equal(
        model.clean_forward(tokens).output, model.clean_forward(tokens.long()).output
    )  # fmt: skip


def test_no_output_selector_names_the_fields(folder):
    model = DecomposedModel(folder, {"*.q_proj": 3})
    with pytest.raises(UserError, match=r"CausalLMOutputWithPast, need a tensor: .*has 'logits'"):
        model.clean_forward(torch.tensor([[1, 2]]))


def test_a_model_in_training_mode_is_an_error(folder):
    model = DecomposedModel(load_hf(folder).train(), {"*.q_proj": 3}, output="logits")
    with pytest.raises(UserError, match=r"in training mode: call target.eval\(\)"):
        model.clean_forward(torch.tensor([[1, 2]]))


def test_a_folder_without_safetensors_is_an_error(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no .safetensors weights"):
        load_hf(folder)


def test_a_folder_without_a_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no Hugging Face model \(no config.json\)"):
        load_hf(tmp_path)


def test_a_damaged_folder_is_an_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="no readable model at the folder"):
        load_hf(folder)


def test_weights_that_are_not_all_there_are_an_error(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 'model.norm.weight' of LlamaForCausalLM"):
        load_hf(folder)


def test_a_folder_that_wants_its_own_code_is_not_given_it(folder, tmp_path):
    marker = tmp_path / "ran"
    config = folder / "config.json"
    text = config.read_text().replace(
        '"model_type": "llama"',
        '"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.M"}',
    )
    config.write_text(text)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(UserError, match="no readable model at the folder"):
        load_hf(folder)
    assert not marker.exists()


def test_an_absent_folder_is_an_error():
    with pytest.raises(UserError, match=r"no folder \./nowhere"):
        load_hf("./nowhere")


def test_a_hub_id_is_not_fetched_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no readable model at the folder or hub id nobody/nothing"):
        load_hf("nobody/nothing")


@needs_stories
def test_stories260k_loads_and_predicts_its_own_text():
    model = load_hf(STORIES)
    tokens = torch.from_numpy(np.load(STORIES / "tokens_eval.npy")[:8].astype(np.int64))
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    # Its README: about 1.28 nats a token.
    assert 1.1 < loss < 1.45


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="need transformers: pip install"):
        load_hf(shutil.copytree(folder, folder.with_name("copy")))
