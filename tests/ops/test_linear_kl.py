"""KL of a head's logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from spd_fast.ops import kl_divergence, linear_kl
from tests import oracle
from tests.checks import LAYOUTS, assert_matches_oracle, evaluate, normal

GRAD = {"loss": torch.tensor(1.7, dtype=torch.float64)}


def make_inputs(shape: tuple[int, ...], d: int, vocabulary: int) -> dict[str, Tensor]:
    return {
        "prediction": normal(1, *shape, d),
        "target": normal(2, *shape, d),
        "head": normal(3, vocabulary, d),
        "bias": normal(4, vocabulary),
    }


def runner(backend: str | None, bias: bool = True) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        fixed = (t[name].detach() for name in ("target", "head", "bias"))
        target, head, offset = fixed
        return {
            "loss": linear_kl(
                t["prediction"], target, head, offset if bias else None, backend=backend
            )
        }

    return run


def truth(bias: bool = True) -> Callable[[dict], dict]:
    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        target, head, offset = (t[name].detach() for name in ("target", "head", "bias"))
        return {"loss": oracle.linear_kl(t["prediction"], target, head, offset if bias else None)}

    return run


SIZES = [((1,), 2, 3), ((7,), 5, 19), ((2, 3), 4, 6), ((), 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "d", "vocabulary"), SIZES)
def test_loss_and_gradient_are_the_oracles(shape, d, vocabulary, bias, dtype):
    assert_matches_oracle(
        runner(None, bias), truth(bias), make_inputs(shape, d, vocabulary), GRAD, dtype
    )


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make_inputs((4,), 3, 5).values()]
    assert torch.autograd.gradcheck(linear_kl, inputs)


def test_opcheck():
    inputs = tuple(make_inputs((4,), 3, 5).values())
    library.opcheck(torch.ops.spd_fast.linear_kl.default, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    inputs = make_inputs((6,), 5, 9)
    expected = evaluate(runner(None), inputs, GRAD)

    def run(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return runner(None)({k: LAYOUTS[layout](v) if v.ndim == 2 else v for k, v in t.items()})

    got = evaluate(run, inputs, GRAD)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_equal_rows_diverge_by_nothing():
    t = make_inputs((6,), 5, 9)
    assert linear_kl(t["target"], t["target"], t["head"]).item() == 0


def test_no_positions_give_zero():
    loss = linear_kl(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(9, 5))
    assert loss.item() == 0


def test_it_is_the_divergence_of_the_logits():
    t = make_inputs((6,), 5, 9)
    logits = (t[k] @ t["head"].T + t["bias"] for k in ("prediction", "target"))
    torch.testing.assert_close(linear_kl(*t.values()), kl_divergence(*logits))


def test_every_backend_of_a_cpu_is_torchs_own(backend):
    t = make_inputs((6,), 5, 9)
    assert torch.equal(linear_kl(*t.values(), backend=backend), linear_kl(*t.values()))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 5), (4, 3), (9, 5), (9,)), r"prediction \(4, 5\) and target \(4, 3\) differ"),
        (((4, 5), (4, 5), (5, 9), (9,)), r"head \(5, 9\) does not fit prediction \(4, 5\)"),
        (((4, 5), (4, 5), (9, 5), (8,)), r"bias is \(8,\), need \(9,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        linear_kl(*(torch.zeros(shape) for shape in shapes))
