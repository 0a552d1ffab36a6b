"""Which modules a masked forward may take over from the clean one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spd_fast.model import DecomposedModel, Given
from spd_fast.model.replay import overridden_forwards, prefixes
from spd_fast.model.sites import submodules
from tests.toys import Net, batch


def before(target, *sites):
    return prefixes(submodules(target), {s: s for s in sites}, lambda: target(batch(1)))


class Residual(Net):
    """``Net`` behind an encoder that may do something odd with its output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4).double()

    def forward(self, x):
        return super().forward(self.encode(x))

    def encode(self, x):
        return self.encoder(x)


def test_the_largest_modules_that_finish_before_a_site():
    assert before(Net(), "head", "blocks.0.up", "blocks.0.down", "blocks.1.down") == {
        "blocks.0.up": (),
        "blocks.0.down": ("blocks.0.up",),
        "blocks.1.down": ("blocks.0", "blocks.1.up"),
        "head": ("blocks.0", "blocks.1"),
    }


def test_modules_that_are_no_sites_count_too():
    assert before(Residual(), "blocks.0.up")["blocks.0.up"] == ("encoder",)


def test_modules_without_parameters_are_left_to_run():
    target = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    assert before(target, "2")["2"] == ("0",)


def test_modules_called_twice_are_left_to_run():
    class Twice(Residual):
        def encode(self, x):
            return self.encoder(self.encoder(x))

    assert before(Twice(), "blocks.0.up")["blocks.0.up"] == ()


def test_modules_whose_output_is_written_to_are_left_to_run():
    class Writes(Residual):
        def encode(self, x):
            return self.encoder(x).add_(1)

    assert before(Writes(), "blocks.0.up")["blocks.0.up"] == ()


@pytest.mark.parametrize("output", [{"x": 1}, None, (), (1, 2)])
def test_modules_that_return_no_tensors_are_left_to_run(output):
    class Odd(nn.Linear):
        def forward(self, x):
            return output

    class Uses(Residual):
        def __init__(self):
            super().__init__()
            self.encoder = Odd(4, 4)

        def encode(self, x):
            self.encoder(x)
            return x

    assert before(Uses(), "blocks.0.up")["blocks.0.up"] == ()


def test_modules_that_return_a_tuple_of_tensors_are_taken_over():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Uses(Residual):
        calls = 0

        def __init__(self):
            super().__init__()
            self.encoder = Pair(4, 4).double()

        def encode(self, x):
            return self.encoder(x)[0]

    model = DecomposedModel(Uses(), {"blocks.0.up": 3}, backend="reference")
    x = batch(1)
    clean = model.clean_forward(x)
    masking = Given({"blocks.0.up": batch(2, 9, 3)})
    reused = model.masked_forward(x, masking, clean=clean)
    torch.testing.assert_close(reused, model.masked_forward(x, masking), rtol=1e-13, atol=1e-13)


def test_what_is_taken_over_does_not_run():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    target = Residual()
    target.encoder = Counts(4, 4).double()
    model = DecomposedModel(target, {"head": 3}, backend="reference")
    x = batch(1)
    clean = model.clean_forward(x)
    target.encoder.calls = 0
    model.masked_forward(x, Given({"head": batch(2, 9, 3)}), clean=clean)
    assert target.encoder.calls == 0


def test_a_site_that_is_never_called_has_nothing_before_it():
    target = Residual()
    target.spare = nn.Linear(4, 4)
    assert before(target, "spare")["spare"] == ()


def test_an_overridden_forward_lasts_as_long_as_its_block():
    net = Net()
    with overridden_forwards({"head": net.head}, {"head": lambda x: x * 0}):
        assert not net(batch(1)).any()
    assert net(batch(1)).any()
    assert "forward" not in net.head.__dict__
