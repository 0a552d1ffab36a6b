"""L0 counts of gates: positions above a threshold."""

from __future__ import annotations

import pytest
import torch

from spd_fast import UserError
from spd_fast.ops import gate, gate_counts
from tests.checks import LAYOUTS
from tests.ops import test_gate as cases


def arguments(rows, d_in, components, hidden):
    t = {k: v.float() for k, v in cases.make_inputs(rows, d_in, components, hidden).items()}
    return t["x"], t["V"], cases.layers(t, "W"), cases.layers(t, "b")


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("hidden", [(), (3,), (3, 2)])
def test_counts_are_those_of_the_gates_importances(hidden, threshold, backend):
    if backend == "cpu" and len(hidden) > 1:
        pytest.skip("one hidden layer")
    given = arguments(70, 4, 35, hidden)
    lower = gate(*given, sigmoid="paper", backend=backend).lower
    counts = gate_counts(*given, threshold, sigmoid="paper", backend=backend)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, (lower > threshold).sum(0))
    assert threshold > 0 or counts.any()


def test_leading_dimensions_are_positions(backend):
    x, *rest = arguments(12, 4, 5, (3,))
    counts = gate_counts(x, *rest, 0.1, sigmoid="2026", backend=backend)
    shaped = gate_counts(x.view(2, 3, 2, 4), *rest, 0.1, sigmoid="2026", backend=backend)
    assert torch.equal(shaped, counts)
    alone = gate_counts(x[0], *rest, 0.1, sigmoid="2026", backend=backend)
    assert torch.equal(alone, gate_counts(x[:1], *rest, 0.1, sigmoid="2026", backend=backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout, backend):
    x, V, *rest = arguments(12, 4, 5, (3,))
    counts = gate_counts(x, V, *rest, 0.1, sigmoid="2026", backend=backend)
    lay_out = LAYOUTS[layout]
    assert torch.equal(
        gate_counts(lay_out(x), lay_out(V), *rest, 0.1, sigmoid="2026", backend=backend), counts
    )


def test_nothing_is_counted_where_there_is_nothing(backend):
    counts = gate_counts(*arguments(0, 3, 4, (2,)), -1.0, sigmoid="paper", backend=backend)
    assert torch.equal(counts, torch.zeros(4, dtype=torch.int64))


def test_no_gradient_is_kept():
    x, V, *rest = arguments(12, 4, 5, (3,))
    assert not gate_counts(x, V.requires_grad_(), *rest, 0.1, sigmoid="paper").requires_grad


def test_bad_arguments_are_those_of_the_gate():
    x, V, weights, biases = arguments(12, 4, 5, (3,))
    with pytest.raises(ValueError, match="V has d_in 4 but x has 3 columns"):
        gate_counts(x[:, :3], V, weights, biases, 0.1, sigmoid="paper")
    with pytest.raises(UserError, match="sigmoid"):
        gate_counts(x, V, weights, biases, 0.1, sigmoid="papr")  # type: ignore[arg-type]


def test_the_fake_primitive_has_the_shape_of_the_counts():
    t = [torch.empty(*s, device="meta") for s in ((7, 4), (4, 5), (5, 3), (5, 3), (5, 3), (5,))]
    counts = torch.ops.spd_fast.gate_counts_forward(*t, "paper", 0.1)
    assert (counts.shape, counts.dtype) == ((5,), torch.int64)
