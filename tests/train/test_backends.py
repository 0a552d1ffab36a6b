"""The fused backend trains as the reference does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spd_fast import targets
from spd_fast.model import DecomposedModel, Stochastic
from spd_fast.ops import Penalty, make_key
from spd_fast.targets import TMS
from spd_fast.train import Trainer, parse_config
from tests.checks import normal
from tests.conftest import needs_extension

pytestmark = needs_extension
TIED = {"linear1": 7, "linear2": 7}


TOYS = {
    "tms": {
        "target": {"kind": "tms", "features": 5, "hidden": 2, "probability": 0.3},
        "sites": TIED,
    },
    "resid_mlp": {
        "target": {
            "kind": "resid_mlp", "features": 5, "d_embed": 30, "d_mlp": 4, "layers": 2,
            "probability": 0.3,
        },
        "sites": {"layers.*.mlp_in": 7, "layers.*.mlp_out": 7},
    },
}  # fmt: skip


def losses_of_a_run(
    backend: str, preset: str, batch: int, steps: int, toy: str = "tms", **options
) -> Tensor:
    """Every loss [steps, losses] of training on an untrained toy: a TMS with tied sites, or a
    residual MLP whose stream the fused backend keeps as its factors."""
    config = parse_config(
        {
            "name": "toy",
            "preset": preset,
            **TOYS[toy],
            "losses": {"importance_minimality": {"coeff": 3e-3, "p": 1}},
            "lr": 1e-3,
            "steps": steps,
            "batch_size": batch,
        }
    )
    torch.manual_seed(0)
    model = DecomposedModel(
        targets.make_target(config.target, 0), config.sites, ci_hidden=(8,),
        sigmoid=config.sigmoid, init=config.init, delta=config.delta, backend=backend, **options,
    )  # fmt: skip
    data = targets.feature_data(config.target, batch, 0, "decompose", "cpu")
    trainer = Trainer(model, config, data, quiet=True)
    trainer.warm_up()
    found = [torch.stack(list(trainer.train_step(i)[0].values())) for i in range(steps)]
    return torch.stack(found).detach()


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("preset", ["paper", "2026"])
def test_losses_of_200_steps_are_the_references(preset, toy):
    ours, reference = (losses_of_a_run(b, preset, 37, 200, toy) for b in ("cpu", "reference"))
    assert len(reference) == 200
    assert (reference[-1] < 0.9 * reference[0]).any(), "nothing was learnt"
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-8)


def test_losses_with_interpolated_gates_are_the_exact_references():
    ours = losses_of_a_run("cpu", "paper", 600, 60, gate_eval="interpolated")
    exact = losses_of_a_run("reference", "paper", 600, 60)
    assert not torch.equal(ours, exact)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-8)


def test_two_runs_are_bit_identical():
    first, second = (losses_of_a_run("cpu", "2026", 37, 20) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("sigmoid", "delta", "binomial", "routed", "tied"),
    list(itertools.product(["paper", "2026"], *4 * [[False, True]])),
)
def test_masked_forward_and_gradients_are_the_references(sigmoid, delta, binomial, routed, tied):
    torch.manual_seed(0)
    target = TMS(5, 2).double()
    target.tie()
    x = normal(1, 23, 5)
    routing = {"linear2": normal(2, 23) > 0} if routed else {}
    found = []
    for backend in ("cpu", "reference"):
        model = DecomposedModel(
            target, TIED if tied else {"linear2": 7}, ci_hidden=(8,), sigmoid=sigmoid,
            delta=delta, backend=backend,
        )  # fmt: skip
        ci = model.causal_importances(model.clean_forward(x), Penalty("lp", 2.0))
        masking = Stochastic(ci, make_key(1, 2), 3, delta, binomial, 11, routing)
        y = model.masked_forward(x, masking)
        sums = [site.penalty_sum.sum() for site in ci.values()]
        total = (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum() + sum(sums)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        assert all(g is not None for g in gradients)
        found.append({"y": y.detach(), **dict(zip(parameters, gradients, strict=True))})
    ours, reference = found
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-12, msg=name)
