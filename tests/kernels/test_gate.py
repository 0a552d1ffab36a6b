"""The Triton gate, forward and recomputing backward, against the oracle."""

from __future__ import annotations

import pytest
import torch

from spd_fast.ops import Penalty, gate, gate_counts
from tests.checks import LAYOUTS, assert_matches_oracle
from tests.kernels.bf16 import assert_right_in_bf16
from tests.ops import test_gate as cases
from tests.ops import test_gate_counts

pytestmark = pytest.mark.usefixtures("triton_ops")

PENALTIES = [
    Penalty(),
    Penalty("lp", 1.0),
    Penalty("lp", 2.0),
    Penalty("lp", 0.7, 0.01),
    Penalty("smooth_l0", 0.3),
]


def check(sigmoid, penalty, shape, hidden, layout=None):
    def run(t):
        laid_out = t if layout is None else {k: layout(v) for k, v in t.items()}
        return cases.runner(sigmoid, penalty, "triton")(laid_out)

    assert_matches_oracle(
        run,
        cases.truth(sigmoid, penalty),
        cases.make_inputs(*shape, hidden),
        cases.incoming(shape[0], shape[2]),
        torch.float32,
    )


@pytest.mark.parametrize("sigmoid", ["paper", "2026"])
@pytest.mark.parametrize("hidden", [(), (1,), (16,)])
@pytest.mark.parametrize("shape", [(3, 1, 2), (35, 19, 34), (35, 16, 48)])
def test_results_and_gradients_are_the_oracles(shape, hidden, sigmoid, regime):
    check(sigmoid, Penalty("lp", 2.0), shape, hidden)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_every_penalty_is_the_oracles(penalty, regime):
    check("paper", penalty, (21, 3, 13), (8,))


def test_chunks_of_components_are_the_oracles(regime):
    check("2026", Penalty("lp", 2.0), (5, 3, 131), (2,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, regime):
    check("2026", Penalty("lp", 1.0), (9, 4, 5), (3,), LAYOUTS[layout])


@pytest.mark.parametrize("needed", ["inner", "lower", "penalty_sum"])
def test_each_output_alone_carries_its_gradient(needed):
    t = {k: v.float() for k, v in cases.make_inputs(9, 4, 5, (3,)).items()}
    runs = cases.runner("paper", cases.LP, "triton"), cases.truth("paper", cases.LP)
    results = []
    for run in runs:
        leaves = {k: v.clone().requires_grad_() for k, v in t.items()}
        total = run(leaves)[needed].sin().sum()
        results.append(
            torch.autograd.grad(
                total, list(leaves.values()), materialize_grads=True, allow_unused=True
            )
        )
    for got, truth in zip(*results, strict=True):
        torch.testing.assert_close(got, truth, atol=2e-5, rtol=1e-4)


def test_expanded_rows_and_expanded_gradients():
    t = {k: v.float() for k, v in cases.make_inputs(1, 4, 5, (3,)).items()}
    row = t["x"].requires_grad_()
    grads = []
    for x in (row.expand(9, 4), row.expand(9, 4).contiguous()):
        out = cases.runner("paper", Penalty("lp", 1.0), "triton")({**t, "x": x})
        # The gradient of a sum arrives expanded, with stride 0.
        total = out["inner"].sum() + out["lower"].sum() + out["penalty_sum"].sum()
        grads.append(torch.autograd.grad(total, row)[0])
    leaf = t["x"].detach().clone().requires_grad_()
    truth = cases.truth("paper", Penalty("lp", 1.0))({**t, "x": leaf.expand(9, 4)})
    (expected,) = torch.autograd.grad(sum(v.sum() for v in truth.values()), leaf)
    torch.testing.assert_close(grads[0], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(*grads)


def test_counts_are_the_positions_above_the_threshold():
    from spd_fast.kernels.gate import gate_forward_counted

    t = {k: v.float() for k, v in cases.make_inputs(70, 4, 35, (3,)).items()}
    arguments = (t["x"], t["V"], t["W0"][:, 0], t["b0"], t["W1"][:, :, 0], t["b1"][:, 0])
    _, lower, _, counts = gate_forward_counted(*arguments, "2026", "lp", 1.0, 1e-12, 0.1)
    assert torch.equal(counts, (lower > 0.1).sum(0))


def test_recomputed_inner_activations_give_the_same_gradients(regime):
    from spd_fast.kernels.gate import gate_backward

    t = {k: v.float() for k, v in cases.make_inputs(21, 4, 131, (3,)).items()}
    gate_tensors = (t["W0"][:, 0], t["b0"], t["W1"][:, :, 0], t["b1"][:, 0])
    grads = [g.float() for g in cases.incoming(21, 131).values()]
    options = ("2026", "lp", 2.0, 1e-12, True)
    saved = gate_backward(*grads, t["x"], t["V"], t["x"] @ t["V"], *gate_tensors, *options)
    again = gate_backward(*grads, t["x"], t["V"], None, *gate_tensors, *options)
    for a, b in zip(saved, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1, 2**26])
@pytest.mark.parametrize("hidden", [(), (3,)])
def test_the_operation_counts_in_the_kernel_a_part_of_the_rows_at_a_time(
    hidden, chunk, regime, monkeypatch
):
    from spd_fast.kernels import gate as kernels
    from spd_fast.kernels import regimes

    monkeypatch.setattr(regimes, "CHUNK_ELEMENTS", chunk)
    launched = []

    def spy(*args, original=kernels.launch, **options):
        launched.append(options["COUNT"])
        original(*args, **options)

    monkeypatch.setattr(kernels, "launch", spy)
    given = test_gate_counts.arguments(200, 4, 35, hidden)
    counts = gate_counts(*given, 0.1, sigmoid="2026", backend="triton")
    assert launched == [True] * (1 if chunk > 1 else 2)
    lower = gate(*given, sigmoid="2026", backend="triton").lower
    assert torch.equal(counts, (lower > 0.1).sum(0))


@pytest.mark.without_kernels
def test_wider_gates_than_the_widest_are_not_the_kernels():
    from spd_fast.ops.gate import unsupported

    x, weights = torch.ones(2, 3), [torch.ones(4, 1, 1025), torch.ones(4, 1025, 1)]
    assert "at most 1024 hidden neurons, not 1025" in str(
        unsupported("triton", x, weights, "paper")
    )
    assert unsupported("cpu", x, weights, "paper") is None


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 3, 0)])
def test_empty_inputs_give_empty_outputs(shape):
    t = {k: v.float() for k, v in cases.make_inputs(*shape, (2,)).items()}
    out = gate(t["x"], t["V"], [t["W0"], t["W1"]], [t["b0"], t["b1"]], sigmoid="paper",
               penalty=Penalty("lp", 1.0), backend="triton")  # fmt: skip
    assert out.inner.shape == out.lower.shape == (shape[0], shape[2])
    assert not out.penalty_sum.any()


@pytest.mark.parametrize("hidden", [(), (5,)])
@pytest.mark.parametrize(("d_in", "C"), [(19, 35), (48, 32)], ids=["ragged", "even"])
def test_errors_in_bf16_are_at_most_twice_the_eager_ones(d_in, C, hidden, regime):
    assert_right_in_bf16(
        cases.runner("2026", cases.LP, "triton"), cases.runner("2026", cases.LP, "reference"),
        cases.make_inputs(37, d_in, C, hidden), cases.incoming(37, C),
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "programs"), [(100, 3), (33, 1), (64, 1)])
def test_several_row_tiles_a_program_are_the_oracles(rows, programs, monkeypatch):
    from spd_fast.kernels import gate as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check("2026", Penalty("lp", 2.0), (rows, 3, 5), (3,))


@pytest.mark.without_kernels
def test_programs_cover_every_row_once():
    from spd_fast.kernels.gate import PROGRAMS, backward_groups

    for N in (1, 31, 32, 33, 1000, 8192):
        for count in (1, 33, 4096, 16384):
            groups, tiles = backward_groups(N, count, 32, 32)
            assert (groups - 1) * tiles * 32 < N <= groups * tiles * 32
            column_tiles = -(-count // 32)
            assert (groups - 1) * column_tiles < PROGRAMS


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_a_nan_stays_one(hidden):
    t = {k: v.float() for k, v in cases.make_inputs(5, 3, 4, hidden).items()}
    t["x"][2, 1] = torch.nan
    out = {b: cases.runner("paper", Penalty("lp", 2.0), b)(t) for b in ("triton", "reference")}
    for name, expected in out["reference"].items():
        assert expected.isnan().any(), name
        assert torch.equal(out["triton"][name].isnan(), expected.isnan()), name
