"""The target's own forward: captured, and otherwise untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spd_fast.errors import UserError
from spd_fast.model import DecomposedModel, Ones
from tests.toys import SITES, Net, batch, decomposed, site_inputs


def assert_unpatched(target):
    assert all("forward" not in module.__dict__ for module in target.modules())


def test_the_output_is_the_targets_bit_for_bit():
    model, x = decomposed(), batch(1)
    assert torch.equal(model.clean_forward(x).output, model.target(x))


def test_site_inputs_are_what_the_modules_receive():
    model, x = decomposed(), batch(1)
    clean = model.clean_forward(x)
    expected = site_inputs(model, x)
    assert list(clean.inputs) == list(expected)
    for name, seen in clean.inputs.items():
        torch.testing.assert_close(seen, expected[name], rtol=1e-14, atol=1e-14)


def test_site_inputs_are_captured_without_a_copy():
    class Keeps(Net):
        def forward(self, x):
            self.seen = [x]
            for block in self.blocks:
                x = x + block(x)
                self.seen.append(x)
            return self.head(x)

    model = DecomposedModel(Keeps(), {"blocks.0.up": 2, "blocks.1.up": 2, "head": 2})
    clean = model.clean_forward(batch(1))
    assert all(a is b for a, b in zip(clean.inputs.values(), model.target.seen, strict=True))


def test_leading_dimensions_are_kept():
    clean = decomposed().clean_forward(batch(1, 2, 3, 4))
    assert clean.inputs["head"].shape == (2, 3, 4)
    assert clean.output.shape == (2, 3, 3)


def test_the_clean_forward_builds_no_graph():
    clean = decomposed().clean_forward(batch(1))
    assert not clean.output.requires_grad
    assert not any(x.requires_grad for x in clean.inputs.values())


def test_the_target_is_frozen():
    assert not any(p.requires_grad for p in decomposed().target.parameters())


def test_the_targets_parameters_are_not_the_models():
    model = decomposed()
    theirs = {p.data_ptr() for p in model.target.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in model.parameters())
    assert not any("target" in name for name in model.state_dict())


def test_the_target_is_untouched_bit_for_bit_after_forwards_and_backward():
    target, x = Net(), batch(1)
    state, output = copy.deepcopy(target.state_dict()), target(x).detach()
    keys = {name: set(module.__dict__) for name, module in target.named_modules()}
    model = DecomposedModel(target, SITES, backend="reference")
    clean = model.clean_forward(x)
    ci = model.causal_importances(clean)
    (model.masked_forward(x, Ones(), clean=clean, importances=ci).sum()).backward()
    assert all(torch.equal(state[k], v) for k, v in target.state_dict().items())
    assert torch.equal(target(x), output)
    assert {name: set(module.__dict__) for name, module in target.named_modules()} == keys
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("forward", ["clean_forward", "masked_forward"])
def test_an_exception_in_the_forward_leaves_no_module_patched(forward):
    class Breaks(Net):
        broken = False

        def forward(self, x):
            y = super().forward(x)
            if self.broken:
                raise RuntimeError("halfway")
            return y

    model = DecomposedModel(Breaks(), SITES, backend="reference")
    model.clean_forward(batch(1))
    model.target.broken = True
    arguments = () if forward == "clean_forward" else (Ones(),)
    with pytest.raises((RuntimeError, UserError), match="halfway"):
        getattr(model, forward)(batch(1), *arguments)
    assert_unpatched(model.target)


def test_an_exception_in_the_very_first_forward_leaves_no_module_patched():
    model = decomposed()
    with pytest.raises(UserError):
        model.clean_forward(batch(1, 9, 5))
    assert_unpatched(model.target)


def test_a_forward_that_a_module_already_carries_comes_back():
    net = Net()
    own = net.head.forward
    net.head.forward = wrapped = lambda x: own(x)
    model = DecomposedModel(net, SITES, backend="reference")
    model.clean_forward(batch(1))
    assert net.head.__dict__["forward"] is wrapped


def test_a_site_called_twice_is_an_error():
    class Twice(Net):
        def forward(self, x):
            return super().forward(self.blocks[0](x))

    model = DecomposedModel(Twice(), SITES, backend="reference")
    with pytest.raises(UserError, match=r"'blocks.0.up' is called more than once"):
        model.clean_forward(batch(1))
    assert_unpatched(model.target)


def test_a_site_never_called_is_an_error():
    class Skips(Net):
        def forward(self, x):
            return self.head(x)

    model = DecomposedModel(Skips(), SITES, backend="reference")
    with pytest.raises(UserError, match=r"'blocks.0.up' is not called"):
        model.clean_forward(batch(1))


def test_a_target_that_returns_no_tensor_is_an_error():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x

    model = DecomposedModel(Pair(), SITES, backend="reference")
    with pytest.raises(UserError, match="returns a tuple, need a tensor"):
        model.clean_forward(batch(1))


def test_an_input_that_is_written_to_after_its_site_is_an_error():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = 2 * x
            x += self.a(x)
            return self.b(x)

    model = DecomposedModel(Adds(), {"a": 2, "b": 2}, backend="reference")
    with pytest.raises(UserError, match="writes in place to the input of site 'a'"):
        model.clean_forward(torch.randn(2, 3))


def test_a_batch_made_in_inference_mode_is_taken():
    with torch.inference_mode():
        x = batch(1)
    model = decomposed()
    torch.testing.assert_close(model.clean_forward(x).output, model.target(x))


def test_an_empty_batch_has_empty_importances():
    model = decomposed()
    ci = model.causal_importances(model.clean_forward(batch(1, 0, 4)))
    assert ci.positions == 0
    assert ci["head"].lower.shape == (0, 6)


def test_sites_may_have_names_that_containers_use():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.values(self.keys(x))

    model = DecomposedModel(Attention(), {"keys": 2, "values": 2}, backend="reference")
    assert list(model.clean_forward(torch.randn(2, 3)).inputs) == ["keys", "values"]
