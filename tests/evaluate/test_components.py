"""Looking at components: contexts, tokens and how components go together, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spd_fast.errors import UserError
from spd_fast.evaluate.components import component_cosines, harvest, head_norms
from spd_fast.model import DecomposedModel

T, VOCABULARY = 7, 11


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.linear = nn.Linear(4, VOCABULARY)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DecomposedModel(Net(), {"linear": 6}, ci_hidden=(4,), backend="reference", seed=2)


def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (12, T), generator=generator)
    return [tokens[:5], tokens[5:8], tokens[8:]]


@pytest.fixture(scope="module")
def found(model):
    return harvest(model, "linear", batches, top=4, contexts=3, window=2, statistics=3)


@pytest.fixture(scope="module")
def whole(model):
    """All tokens [12, T] and importances [12, T, C]."""
    tokens = torch.cat(batches())
    with torch.no_grad():
        lower = model.causal_importances(model.clean_forward(tokens))["linear"].lower
    return tokens, lower.clamp_min(0)


def test_components_are_chosen_by_mean_importance(found, whole):
    _, lower = whole
    mean = lower.flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(found.mean, mean)
    assert found.components == mean.argsort(descending=True, stable=True)[:4].tolist()
    torch.testing.assert_close(found.frequency, (lower > 0.01).flatten(0, 1).float().mean(dim=0))
    torch.testing.assert_close(found.peak, lower.flatten(0, 1).amax(dim=0))
    assert found.positions == 12 * T


def test_contexts_are_the_sequences_of_highest_importance(found, whole):
    tokens, lower = whole
    for i, c in enumerate(found.components):
        values = lower[..., c].amax(dim=1).sort(descending=True).values[:3]
        got = [context.importances[context.at] for context in found.contexts[i]]
        assert got == pytest.approx([v for v in values.tolist() if v > 0.01])
        for context in found.contexts[i]:
            assert len(context.tokens) == len(context.importances) <= 5
            rows = tokens.unfold(1, len(context.tokens), 1)
            same = (rows == torch.tensor(context.tokens)).all(dim=-1)
            assert same.any()
            row, start = same.nonzero()[0].tolist()
            around = lower[row, start : start + len(context.tokens), c].tolist()
            assert context.importances == pytest.approx(around)


def test_token_shares_and_lifts(found, whole):
    tokens, lower = whole
    for i, c in enumerate(found.components):
        g = lower[..., c]
        if not found.tokens[i]:
            assert g.sum() == 0
            continue
        token, share, lift = found.tokens[i][0]
        here = tokens == token
        assert share == pytest.approx((g[here].sum() / g.sum()).item(), rel=1e-5)
        assert lift == pytest.approx((g[here].mean() / g.mean()).item(), rel=1e-5)


def test_how_components_go_together(found, whole, model):
    _, lower = whole
    g = lower.flatten(0, 1)[:, found.components]
    unit = g / g.norm(dim=0).clamp_min(1e-15)
    torch.testing.assert_close(found.together, unit.T @ unit, rtol=1e-4, atol=1e-5)
    matrices = torch.einsum("ic,co->cio", model.V("linear"), model.U("linear")).flatten(1)
    unit = matrices / matrices.norm(dim=1, keepdim=True)
    cosines = component_cosines(model.V("linear"), model.U("linear"))
    torch.testing.assert_close(cosines, unit @ unit.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm, matrices.norm(dim=1).detach())


def test_one_batch_or_many_find_the_same(found, model):
    once = harvest(
        model, "linear", lambda: [torch.cat(batches())], top=4, contexts=3, window=2, statistics=3
    )
    assert once.components == found.components
    for one, other in zip(once.contexts, found.contexts, strict=True):
        assert [c.importances[c.at] for c in one] == pytest.approx(
            [c.importances[c.at] for c in other]
        )


def test_an_unknown_site_is_an_error(model):
    with pytest.raises(UserError, match="unknown site 'linaer'; nearest: 'linear'"):
        harvest(model, "linaer", batches)


def test_no_data_is_an_error(model):
    with pytest.raises(UserError, match="no data"):
        harvest(model, "linear", list)


# Attention heads: 2 of width 4; of a Llama's keys one alone.
WIDTH = 4


def attention(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 2 * WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 6, "max_position_embeddings": T,
    }  # fmt: skip
    if family == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config)
    if family == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 2 * WIDTH, "n_layer": 1, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    if family == "neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


# What a site writes to (or, of an output, reads from) in head 1: rows of its weight [d_out, d_in].
SECOND = range(WIDTH, 2 * WIDTH)


@pytest.mark.parametrize(
    ("family", "site", "side", "entries"),
    [
        ("llama", "model.layers.0.self_attn.q_proj", "U", SECOND),
        ("llama", "model.layers.0.self_attn.o_proj", "V", SECOND),
        ("gpt2", "transformer.h.0.attn.c_attn", "U", [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]),
        ("gpt2", "transformer.h.0.attn.c_proj", "V", SECOND),
        ("neox", "gpt_neox.layers.0.attention.query_key_value", "U", range(12, 24)),
        ("neox", "gpt_neox.layers.0.attention.dense", "V", SECOND),
        ("bert", "bert.encoder.layer.0.attention.self.key", "U", SECOND),
        ("bert", "bert.encoder.layer.0.attention.output.dense", "V", SECOND),
    ],
)
def test_the_norm_of_a_component_lies_in_its_attention_heads(family, site, side, entries):
    target = attention(family).eval()
    model = DecomposedModel(target, {site: 5}, output="logits", backend="reference")
    vectors = model.U(site) if side == "U" else model.V(site).T
    with torch.no_grad():
        vectors[2, list(entries)] *= 3
        chosen = vectors[[2, 0]].square()
        expected = chosen[:, list(entries)].sum(dim=1) / chosen.sum(dim=1)
    found = head_norms(model, site, [2, 0])
    assert found.shape == (2, 2)
    torch.testing.assert_close(found[:, 1], expected)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


def test_keys_have_their_own_number_of_heads():
    site = "model.layers.0.self_attn.k_proj"
    model = DecomposedModel(attention("llama").eval(), {site: 5}, output="logits")
    assert head_norms(model, site, [0, 1, 2]).shape == (3, 1)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("llama", "model.layers.0.mlp.up_proj"),
        ("gpt2", "transformer.h.0.mlp.c_proj"),
        ("neox", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
        ("bert", "bert.encoder.layer.0.output.dense"),
    ],
)
def test_what_is_no_attention_matrix_has_no_heads(family, site):
    model = DecomposedModel(attention(family).eval(), {site: 5}, output="logits")
    assert head_norms(model, site, [0]) is None
