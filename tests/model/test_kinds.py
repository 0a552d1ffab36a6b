"""Sites that are no plain linear layer: transposed weights, embeddings, inserted identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spd_fast.errors import UserError
from spd_fast.model import Adversarial, CIMask, DecomposedModel, Given, Ones, Stochastic
from spd_fast.model.sites import resolve_sites
from spd_fast.ops import Penalty, make_key
from tests import oracle, toys

TOKENS = torch.tensor([[3, 0, 3], [6, 5, 5]])
SITES = {"embed": 5, "mix": 4, "norm.pre_identity": 3, "head": 6, "head.pre_identity": 2}


class Conv1D(nn.Module):
    """transformers' layer of that name: y = x W + b, W [d_in, d_out]."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(torch.empty(d_in, d_out))
        self.bias = nn.Parameter(torch.empty(d_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(
            *x.shape[:-1], self.nf
        )


class Tokens(nn.Module):
    """Embedding → Conv1D → norm → head, in float64."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = Conv1D(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.mix(self.embed(tokens)))))


def decomposed(sites=None, **options):
    options = {"backend": "reference", "ci_hidden": (3,), "delta": True} | options
    return DecomposedModel(Tokens(), sites or SITES, **options)


def by_hand(model, tokens, masks, deltas=None):
    """Every site by the oracle, with one-hot rows for tokens and explicit identities."""
    net = model.target

    def site(name, x):
        s = model.sites[name]
        y = oracle.component_linear(
            x.reshape(-1, x.shape[-1]), model.V(name), model.U(name),
            masks[name].flatten(0, -2), None if deltas is None else deltas[name].flatten(),
            None, s.weight, s.bias,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], s.d_out)

    x = torch.tanh(site("mix", site("embed", F.one_hot(tokens, 7).double())))
    normed = net.norm(site("norm.pre_identity", x))
    return site("head", site("head.pre_identity", normed))


def test_the_kinds_weights_and_order():
    sites = resolve_sites(Tokens(), SITES)
    assert {n: (s.kind, tuple(s.weight.shape)) for n, s in sites.items()} == {
        "embed": ("embedding", (4, 7)),
        "mix": ("conv1d", (4, 4)),
        "norm.pre_identity": ("identity", (4, 4)),
        "head.pre_identity": ("identity", (4, 4)),
        "head": ("linear", (7, 4)),
    }
    assert list(sites) == ["embed", "mix", "norm.pre_identity", "head.pre_identity", "head"]


def test_weights_are_views_of_the_targets():
    net = Tokens()
    sites = resolve_sites(net, SITES)
    for name in ("embed", "mix"):
        assert sites[name].weight.data_ptr() == getattr(net, name).weight.data_ptr()


def test_the_clean_output_is_the_targets_bit_for_bit():
    model = decomposed()
    clean = model.clean_forward(TOKENS)
    assert torch.equal(clean.output, model.target(TOKENS))
    assert clean.inputs["embed"] is TOKENS
    assert list(clean.inputs) == list(model.sites)
    assert torch.equal(clean.inputs["head"], clean.inputs["head.pre_identity"])


@pytest.mark.parametrize("ci", ["mlp", "linear", "global_mlp", "transformer"])
def test_importances_have_the_shape_of_the_tokens(ci):
    model = decomposed(ci_fn=ci)
    got = model.causal_importances(model.clean_forward(TOKENS), Penalty("lp", 1.0))
    assert got.positions == 6
    for name, site in model.sites.items():
        shape = (2, 3, site.components)
        assert got[name].lower.shape == got[name].upper.shape == got[name].inner.shape == shape


def test_an_embeddings_importances_are_the_gates_of_its_rows_of_V():
    model = decomposed()
    got = model.causal_importances(model.clean_forward(TOKENS), Penalty("lp", 2.0))["embed"]
    gate = model.ci_fn("embed")
    s = oracle.gate_logits(model.V("embed")[TOKENS.flatten()], gate.weights, gate.biases)
    lower = oracle.lower_importance(s, "paper")
    upper = oracle.upper_importance(s, "paper")
    expected = torch.cat([lower.flatten(), ((upper + 1e-12) ** 2).sum(dim=0)])
    toys.assert_same_gradients(
        model, torch.cat([got.lower.flatten(), got.penalty_sum]), expected
    )  # fmt: skip
    torch.testing.assert_close(got.upper.flatten(0, 1), upper)


@pytest.mark.parametrize("kind", ["stochastic", "ci", "ones", "given", "adversarial"])
def test_masked_forwards_are_those_of_one_hot_rows_and_explicit_identities(kind):
    model = decomposed()
    clean = model.clean_forward(TOKENS)
    ci = model.causal_importances(clean)
    lower = {n: s.lower for n, s in ci.items()}
    generator = torch.Generator().manual_seed(2)
    random = {n: torch.rand(g.shape, generator=generator).double() for n, g in lower.items()}
    deltas = {n: r[..., 0] for n, r in random.items()}
    if kind == "stochastic":
        masking = Stochastic(ci, make_key(3, 4), 5, delta=True)
        flat, flat_deltas = toys.stochastic_masks(
            model, {n: g.flatten(0, -2) for n, g in lower.items()}, 3, 4, 5
        )
        masks = {n: m.reshape(lower[n].shape) for n, m in flat.items()}
        deltas = {n: d.reshape(2, 3) for n, d in flat_deltas.items()}
    elif kind == "ci":
        masking, masks, deltas = CIMask(ci), lower, None
    elif kind == "ones":
        masking, deltas = Ones(), None
        masks = {n: torch.ones_like(g) for n, g in lower.items()}
    elif kind == "given":
        masking, masks = Given(random, deltas), random
    else:
        masking = Adversarial(ci, random, deltas)
        masks = {n: g + (1 - g) * random[n] for n, g in lower.items()}
    got = model.masked_forward(TOKENS, masking)
    toys.assert_same_gradients(model, got, by_hand(model, TOKENS, masks, deltas))


@pytest.mark.parametrize(
    "sites",
    [None, ["embed"], ["mix"], ["norm.pre_identity"], ["head"], ["head.pre_identity"],
     ["head.pre_identity", "head"], ["embed", "head"]],
)  # fmt: skip
@pytest.mark.parametrize("ci", ["mlp", "global_mlp"])
def test_reusing_the_clean_forward_changes_nothing(sites, ci):
    model = decomposed(ci_fn=ci)
    clean = model.clean_forward(TOKENS)
    importances = model.causal_importances(clean)
    masking = Stochastic(importances, make_key(1, 2), delta=True)
    plain = model.masked_forward(TOKENS, masking, sites=sites)
    reused = model.masked_forward(
        TOKENS, masking, sites=sites, clean=clean, importances=importances
    )
    toys.assert_same_gradients(model, reused, plain)


def test_every_backend_computes_them(backend):
    options = {"delta": True, "backend": backend}
    model = DecomposedModel(Tokens().float(), SITES, **options)
    truth = DecomposedModel(Tokens().float(), SITES, **options | {"backend": "reference"})
    outputs = []
    for m in (model, truth):
        ci = m.causal_importances(m.clean_forward(TOKENS))
        outputs.append(m.masked_forward(TOKENS, Stochastic(ci, make_key(1, 2), delta=True)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_a_head_tied_to_the_embedding_shares_its_components():
    model = DecomposedModel(Tokens(tied=True), {"embed": 5, "head": 5}, backend="reference")
    assert model.sites["head"].tied_to == "embed"
    assert torch.equal(model.V("head"), model.U("embed").T)
    assert model.U("head").data_ptr() == model.V("embed").data_ptr()
    torch.testing.assert_close(*model.faithfulness().values())
    ci = model.causal_importances(model.clean_forward(TOKENS))
    model.masked_forward(TOKENS, CIMask(ci)).square().sum().backward()
    for site in ("embed", "head"):
        assert model.V(site).grad.any()
        assert model.U(site).grad.any()


def test_an_untied_head_has_components_of_its_own():
    model = DecomposedModel(Tokens(), {"embed": 5, "head": 4}, backend="reference")
    assert model.sites["head"].tied_to is None


@pytest.mark.parametrize("kind", ["vector_mlp", "shared_mlp"])
def test_an_importance_function_of_vectors_cannot_read_tokens(kind):
    with pytest.raises(UserError, match=f"ci_fn '{kind}' needs vectors"):
        decomposed(ci_fn=kind)


def test_an_embedding_that_rescales_its_weights_is_an_error():
    with pytest.raises(UserError, match=r"'0' \(Embedding\) rescales its weights .*max_norm"):
        resolve_sites(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), {"0": 2})


def test_a_quantised_weight_is_an_error():
    target = nn.Sequential(nn.Linear(3, 2))
    target[0].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"'0' \(Linear\) has weights of torch.uint8"):
        resolve_sites(target, {"0": 2})


def test_weights_that_are_not_loaded_are_an_error():
    with pytest.raises(UserError, match="has no weights yet"):
        resolve_sites(nn.Sequential(nn.Linear(3, 2, device="meta")), {"0": 2})


def test_an_identity_at_a_module_of_unknown_width_is_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(UserError, match=r"nothing tells the width of the input of '1' \(ReLU\)"):
        resolve_sites(net, {"1.pre_identity": 3})


def test_an_identity_without_a_module_names_the_nearest():
    with pytest.raises(UserError, match=r"'hed.pre_identity' matches no module; closest: 'head'"):
        resolve_sites(Tokens(), {"hed.pre_identity": 3})


def test_identities_may_be_named_by_a_glob():
    sites = resolve_sites(toys.Net(), {"blocks.*.up.pre_identity": 3})
    assert list(sites) == ["blocks.0.up.pre_identity", "blocks.1.up.pre_identity"]


def test_a_glob_alone_inserts_no_identities():
    assert list(resolve_sites(Tokens(), {"*": 3})) == ["embed", "mix", "head"]


def test_an_unsupported_module_is_named_with_its_type_and_shape():
    target = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"'0' \(Conv2d\) cannot be decomposed"):
        resolve_sites(target, {"0": 2})


def test_a_module_that_does_not_compute_what_its_weight_says_is_an_error():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = DecomposedModel(nn.Sequential(Scaled(3, 2)), {"0": 2}, backend="reference")
    with pytest.raises(UserError, match="'0' computes something else than its weight and bias"):
        model.clean_forward(torch.randn(4, 3))


def test_a_module_called_by_keyword_is_a_site_too():
    class Keyword(toys.Net):
        def forward(self, x):
            return self.head(input=x)

    model = DecomposedModel(Keyword(), {"head": 2, "head.pre_identity": 2}, backend="reference")
    x = toys.batch(1)
    assert torch.equal(model.clean_forward(x).output, model.target(x))
    head = model.sites["head"]
    y = x @ model.V("head.pre_identity") @ model.U("head.pre_identity")
    expected = y @ model.V("head") @ model.U("head") + head.bias
    torch.testing.assert_close(model.masked_forward(x, Ones()), expected)


def test_names_that_only_differ_in_dots_and_dashes_are_an_error():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("a-b", nn.Linear(2, 2))
            self.a = nn.ModuleDict({"b": nn.Linear(2, 2)})

    with pytest.raises(UserError, match="two sites share the name 'a-b'"):
        DecomposedModel(Clash(), {"a*b": 2})
