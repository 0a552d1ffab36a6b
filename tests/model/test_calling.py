"""Calling targets: output selectors, batches, modes, compiled modules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel, Ones, Stochastic
from spd_fast.model.calling import Caller, select_output
from spd_fast.ops import make_key
from tests.toys import SITES, Net, batch

X = torch.arange(3.0)


class Output(dict):
    """A mapping, like transformers' outputs."""


@pytest.mark.parametrize(
    ("output", "selector"),
    [
        (X, None),
        ({"logits": X}, "logits"),
        (Output(logits=X, loss=None), "logits"),
        (("a", X), 1),
        (("a", X), -1),
        (("a", X), "1"),
        ({"hidden_states": (0, 1, X)}, "hidden_states.2"),
        ({"hidden_states": (0, 1, X)}, "hidden_states.-1"),
        ({"a": {"b": X}}, lambda out: out["a"]["b"]),
        (type("Named", (), {"logits": X})(), "logits"),
    ],
)
def test_a_selector_finds_its_tensor(output, selector):
    assert select_output(output, selector) is X


@pytest.mark.parametrize(
    ("output", "selector", "message"),
    [
        ({"logits": X}, None, r"returns a dict, need a tensor: .*`output`; it has 'logits'"),
        ((X, X), None, r"returns a tuple, need a tensor: .*it has '0', '1'"),
        ({"logits": X}, "logit", r"output 'logit': .* dict without it; it has 'logits'"),
        ((X,), 3, r"output 3: .* tuple without it; it has '0'"),
        (3, 0, r"output 0: the target returns a int without it"),
        (
            {"loss": None},
            "loss",
            r"output 'loss' of the target's dict is a NoneType, need a tensor",
        ),
        ((X,), lambda out: out, r"output function '<lambda>' of .* is a tuple, need a tensor"),
        ((X,), partial(list), r"output function 'partial' of the target's tuple is a list"),
        (
            {"logits": X},
            lambda out: out["logit"],
            r"output function '<lambda>' fails on the target's dict: 'logit'; it has 'logits'",
        ),
    ],
)
def test_a_selector_without_a_tensor_is_an_error(output, selector, message):
    with pytest.raises(UserError, match=message):
        select_output(output, selector)


class Pairs(Net):
    def forward(self, x, scale=1.0):
        return {"y": super().forward(x) * scale, "x": x}


def test_a_decomposed_model_selects_the_output_of_every_forward():
    model = DecomposedModel(Pairs(), SITES, output="y", backend="reference")
    plain = DecomposedModel(Net(), SITES, backend="reference")
    x = batch(1)
    assert torch.equal(model.clean_forward(x).output, plain.clean_forward(x).output)
    assert torch.equal(model.masked_forward(x, Ones()), plain.masked_forward(x, Ones()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), r"\(int64 \[3, 4\]\): mat1 and mat2 must"),
        ({"y": batch(0, 3, 4)}, r"\(y: float64 \[3, 4\]\): .*unexpected keyword"),
        ([[1.0] * 4], r"\(a list\): "),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_a_batch_that_the_target_cannot_take_is_one_line(given, message, later):
    model = DecomposedModel(Net(), SITES, backend="reference")
    if later:
        model.clean_forward(batch(1))
    with pytest.raises(UserError, match=f"the target cannot take this batch {message}") as found:
        model.clean_forward(given)
    assert "\n" not in str(found.value)
    assert found.value.__cause__ is not None


def test_vectors_of_another_width_are_one_line():
    model = DecomposedModel(Net(), {"head": 3}, backend="reference")
    with pytest.raises(UserError, match=r"this batch \(float64 \[3, 9\]\): mat1 and mat2 shapes"):
        model.clean_forward(batch(0, 3, 9))


def test_tokens_beyond_an_embedding_are_one_line():
    target = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    model = DecomposedModel(target, {"1": 2}, backend="reference")
    with pytest.raises(UserError, match=r"this batch \(int64 \[1, 2\]\): index out of range"):
        model.clean_forward(torch.tensor([[1, 5]]))


def test_activations_that_are_not_finite_are_named():
    model = DecomposedModel(Net(), SITES, backend="reference")
    with pytest.raises(UserError, match=r"not finite from site 'blocks\.0\.up' on"):
        model.clean_forward(batch(1) * float("nan"))


def test_layers_of_torchs_own_transformer_are_sites():
    # In evaluation its fused path would call none of them.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    target = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = DecomposedModel(target, {"layers.*.linear1": 5}, backend="reference")
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    clean = model.clean_forward(x)
    torch.testing.assert_close(clean.output, target(x))
    assert not torch.allclose(model.masked_forward(x, Ones()), clean.output)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_mapping_is_the_targets_keyword_arguments():
    model = DecomposedModel(Pairs(), SITES, output="y", backend="reference")
    got = model.clean_forward({"x": batch(1), "scale": 2.0}).output
    torch.testing.assert_close(got, 2 * Net()(batch(1)))


def test_an_adapter_calls_the_target_itself():
    model = DecomposedModel(
        Net(), SITES, adapter=lambda target, pair: target(pair[0] + pair[1]), backend="reference"
    )
    pair = (batch(1), batch(2))
    torch.testing.assert_close(model.clean_forward(pair).output, Net()(batch(1) + batch(2)))
    assert model.masked_forward(pair, Ones()).shape == (9, 3)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(3)])
def test_a_target_in_training_mode_is_an_error_where_it_matters(layer):
    target = nn.Sequential(nn.Linear(2, 3), layer)
    model = DecomposedModel(target, {"0": 2})
    with pytest.raises(UserError, match=f"holds a {type(layer).__name__} in training mode"):
        model.clean_forward(torch.randn(4, 2))
    target.eval()
    assert model.clean_forward(torch.randn(4, 2)).output.shape == (4, 3)


def test_dropout_of_nothing_is_no_error():
    target = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.0))
    DecomposedModel(target, {"0": 2}).clean_forward(torch.randn(4, 2))


def test_inputs_of_another_width_name_the_site():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3)

        def forward(self, x):
            return self.a(x)

    model = DecomposedModel(Reads(), {"a": 2})
    model.clean_forward(torch.randn(4, 2))
    with pytest.raises(UserError, match=r"'a' takes vectors of width 2, got \(4, 5\)"):
        model.clean_forward(torch.randn(4, 5))


def through(model, x):
    clean = model.clean_forward(x)
    ci = model.causal_importances(clean)
    masking = Stochastic(ci, make_key(1, 2), delta=True)
    return clean.output, model.masked_forward(x, masking, clean=clean, importances=ci)


def whole(net):
    return torch.compile(net, backend="eager")


def inside(net):
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    return net


def in_place(net):
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("compiled", [whole, inside, in_place])
def test_a_compiled_target_has_its_own_names_and_the_same_results(compiled):
    torch._dynamo.reset()
    plain = DecomposedModel(Net(), SITES, delta=True, backend="reference")
    model = DecomposedModel(compiled(Net()), SITES, delta=True, backend="reference")
    assert list(model.sites) == list(plain.sites)
    # A graph compiled before would not see the sites' forwards.
    model.target(batch(1))
    for got, expected in zip(through(model, batch(1)), through(plain, batch(1)), strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(model.target(batch(1)), Net()(batch(1)))


def test_a_caller_leaves_plain_batches_alone():
    seen = []
    target = Net()
    Caller(target, adapter=lambda t, b: seen.append(b) or b)(X)
    assert seen[0] is X
