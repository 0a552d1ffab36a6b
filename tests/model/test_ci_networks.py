"""Importance functions that read whole input vectors, against their formulas one position and one
number at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel, ci_fns
from spd_fast.model.ci_fns import make_ci_fn
from spd_fast.ops import Penalty
from tests import oracle, toys

X = toys.batch(1, 2, 3, 4)
SHAPE = {"d_model": 8, "layers": 2, "heads": 2}


def mlp(net: nn.Module, x: Tensor) -> Tensor:
    """One vector through layers W [in, out], b."""
    layers = list(net.layers.values())
    for i, layer in enumerate(layers):
        x = (oracle.gelu(x) if i else x) @ layer.W + layer.b
    return x


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1.19e-7)


def rotate(x: Tensor, position: int) -> Tensor:
    """Pairs (i, i + width / 2) turned by position · 10000^(−2i / width)."""
    half = len(x) // 2
    first, second = [], []
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(x))
        first.append(x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
        second.append(x[i] * math.sin(angle) + x[i + half] * math.cos(angle))
    return torch.stack(first + second)


def attention(block: nn.Module, sequence: list[Tensor], heads: int) -> list[Tensor]:
    width = len(sequence[0]) // heads
    out: list[list[Tensor]] = [[] for _ in sequence]
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        q = [rotate((x @ block.q.W)[part], t) for t, x in enumerate(sequence)]
        k = [rotate((x @ block.k.W)[part], t) for t, x in enumerate(sequence)]
        v = [(x @ block.v.W)[part] for x in sequence]
        for t in range(len(sequence)):
            scores = torch.stack([(q[t] * k_s).sum() / math.sqrt(width) for k_s in k])
            weights = torch.softmax(scores, dim=0)
            out[t].append(sum(w * v_s for w, v_s in zip(weights, v, strict=True)))
    return [torch.cat(parts) @ block.o.W for parts in out]


def transformer(net: nn.Module, inputs: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Site → s [B, T, C] of x [B, T, width]."""
    names = sorted(inputs)
    batch, length = inputs[names[0]].shape[:2]
    rows = []
    for b in range(batch):
        z = [
            torch.cat([rms(inputs[n][b, t]) for n in names]) @ net.input.W + net.input.b
            for t in range(length)
        ]
        for block in net.blocks:
            mixed = attention(block, [rms(x) for x in z], heads)
            z = [x + y for x, y in zip(z, mixed, strict=True)]
            z = [x + mlp(block.mlp, rms(x)) for x in z]
        rows.append(torch.stack([x @ net.head.W + net.head.b for x in z]))
    return split(torch.stack(rows), names, net.sizes)


def split(logits: Tensor, names: list[str], sizes: list[int]) -> dict[str, Tensor]:
    return dict(zip(names, logits.split(sizes, dim=-1), strict=True))


def by_hand(model, kind: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Site → logits [B, T, C]."""
    if kind == "transformer":
        return transformer(model.global_ci_fn, inputs, SHAPE["heads"])
    shape = next(iter(inputs.values())).shape[:-1]
    flat = {n: x.flatten(0, -2) for n, x in inputs.items()}
    if kind == "global_mlp":
        names = sorted(flat)
        net = model.global_ci_fn
        joined = torch.cat([flat[n] for n in names], dim=-1)
        logits = torch.stack([mlp(net.net, x) for x in joined])
        return split(logits.reshape(*shape, -1), names, net.sizes)
    found = {}
    for name, x in flat.items():
        net = model.ci_fns[name.replace(".", "-")]
        if kind == "shared_mlp":
            logits = torch.stack([mlp(net, row) for row in x])
        else:
            columns = []
            for c in range(model.sites[name].components):
                z = x
                for i, (W, b) in enumerate(zip(net.weights, net.biases, strict=True)):
                    z = (oracle.gelu(z) if i else z) @ W[c] + b[c]
                columns.append(z[:, 0])
            logits = torch.stack(columns, dim=1)
        found[name] = logits.reshape(*shape, -1)
    return found


def decomposed(kind, **options):
    if kind == "transformer":
        options["ci_transformer"] = SHAPE
    return toys.decomposed(ci_fn=kind, ci_hidden=(6, 5), **options)


KINDS = ["vector_mlp", "shared_mlp", "global_mlp", "transformer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
def test_importances_penalties_and_gradients_are_the_formulas(kind, sigmoid):
    model = decomposed(kind, sigmoid=sigmoid)
    with torch.no_grad():  # biases start at zero, where a mistake in them would not show
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * toys.batch(i, *parameter.shape))
    got = model.causal_importances(model.clean_forward(X), Penalty("lp", 1.5))
    logits = by_hand(model, kind, toys.site_inputs(model, X))
    assert {n: tuple(s.shape) for n, s in logits.items()} == {
        n: (2, 3, s.components) for n, s in model.sites.items()
    }
    values, truth = [], []
    for name, s in logits.items():
        upper = oracle.upper_importance(s, sigmoid)
        torch.testing.assert_close(got[name].upper, upper, rtol=1e-11, atol=1e-12)
        values += [got[name].lower.flatten(), got[name].penalty_sum]
        truth += [
            oracle.lower_importance(s, sigmoid).flatten(),
            ((upper + 1e-12) ** 1.5).flatten(0, -2).sum(dim=0),
        ]
    toys.assert_same_gradients(model, torch.cat(values), torch.cat(truth))


@pytest.mark.parametrize("kind", KINDS)
def test_inner_activations_are_computed_when_asked_for(kind):
    model = decomposed(kind)
    got = model.causal_importances(model.clean_forward(X))
    for name, x in toys.site_inputs(model, X).items():
        assert got[name].known_inner is None
        torch.testing.assert_close(got[name].inner, x @ model.V(name), rtol=1e-13, atol=1e-13)


def test_a_vector_mlp_in_parts_is_the_whole(monkeypatch):
    model, x = decomposed("vector_mlp"), X
    whole = model.causal_importances(model.clean_forward(x))["head"].lower
    monkeypatch.setattr(ci_fns, "KEPT", 80)
    parts = model.causal_importances(model.clean_forward(x))["head"].lower
    toys.assert_same_gradients(model, parts, whole)


def test_samples_without_positions_are_sequences_of_one():
    model, x = decomposed("transformer"), toys.batch(1)
    flat = model.causal_importances(model.clean_forward(x))
    alone = model.causal_importances(model.clean_forward(x[:, None]))
    for name in model.sites:
        torch.testing.assert_close(flat[name].lower, alone[name].lower[:, 0])


def test_the_transformer_looks_both_ways():
    model = decomposed("transformer", sigmoid="normal")
    x = X.clone()
    before = model.causal_importances(model.clean_forward(x))["head"].lower
    x[:, 2] += 1
    after = model.causal_importances(model.clean_forward(x))["head"].lower
    assert (before[:, 0] != after[:, 0]).all()


def test_the_transformer_knows_positions():
    model = decomposed("transformer", sigmoid="normal")
    got = model.causal_importances(model.clean_forward(X))["head"].lower
    swapped = model.causal_importances(model.clean_forward(X.flip(1)))["head"].lower.flip(1)
    assert (got - swapped).abs().max() > 1e-6


def test_networks_start_with_the_authors_spreads():
    generator = torch.Generator().manual_seed(0)
    net = make_ci_fn("shared_mlp", 300, (400,), generator, d_in=200)
    torch.testing.assert_close(net.layers["0"].W.std().item(), (2 / 200) ** 0.5, rtol=0.02, atol=0)
    torch.testing.assert_close(net.layers["2"].W.std().item(), (1 / 400) ** 0.5, rtol=0.02, atol=0)
    assert not net.layers["0"].b.any()


def test_parameters_are_named_and_shaped_as_the_authors():
    generator = torch.Generator()
    shared = make_ci_fn("shared_mlp", 5, (7,), generator, d_in=3)
    assert {n: tuple(p.shape) for n, p in shared.named_parameters()} == {
        "layers.0.W": (3, 7), "layers.0.b": (7,), "layers.2.W": (7, 5), "layers.2.b": (5,),
    }  # fmt: skip
    vector = make_ci_fn("vector_mlp", 5, (7,), generator, d_in=3)
    assert {n: tuple(p.shape) for n, p in vector.named_parameters()} == {
        "layers.0.W": (5, 3, 7), "layers.0.b": (5, 7),
        "layers.2.W": (5, 7, 1), "layers.2.b": (5, 1),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_widths_below_one_are_an_error(kind):
    with pytest.raises(UserError, match=f"ci_fn '{kind}' needs hidden widths"):
        toys.decomposed(ci_fn=kind, ci_hidden=())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"d_modl": 8}, "unknown size 'd_modl' of the transformer; nearest: 'd_model'"),
        ({"layers": 0}, "'layers' must be at least 1, got 0"),
        ({"d_model": 10, "heads": 2}, r"d_model \(10\) must be a multiple of twice its heads"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(shape, message):
    with pytest.raises(UserError, match=message):
        toys.decomposed(ci_fn="transformer", ci_transformer=shape)


def test_sizes_of_a_transformer_belong_to_a_transformer():
    with pytest.raises(UserError, match="ci_transformer belongs to ci_fn 'transformer', not"):
        toys.decomposed(ci_fn="mlp", ci_transformer=SHAPE)


def test_sites_that_see_different_positions_cannot_be_joined():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x).mean(dim=1))

    model = DecomposedModel(Pooled(), {"*": 3}, ci_fn="global_mlp", backend="reference")
    clean = model.clean_forward(torch.randn(2, 3, 4))
    with pytest.raises(UserError, match=r"'a' sees positions \(2, 3\) and 'b' \(2,\)"):
        model.causal_importances(clean)
