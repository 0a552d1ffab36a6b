"""APD's losses, against sums over samples, components, sites and ranks one by one."""

from __future__ import annotations

import pytest
import torch

from spd_fast.baselines import APDModel, parse_apd_config
from spd_fast.baselines import losses as apd_losses
from spd_fast.baselines.losses import EPS, LOSSES, APDStep
from tests.baselines import naive
from tests.baselines.naive import KINDS, SITES, make_batch, make_model

ALL = pytest.mark.parametrize("kind", KINDS)


def make_step(kind: str, *, p: float = 0.9, over_outputs: str = "mean") -> APDStep:
    config = parse_apd_config({
        "method": "apd", "name": "x", "components": 4, "top_k": 1.5, "steps": 1, "batch_size": 7,
        "lr": 1e-3, "lr_schedule": "constant", "sites": list(SITES[kind]),
        "target": {"kind": "tms", "features": 5, "hidden": 2},
        "losses": {"topk_recon": {"coeff": 1, "over_outputs": over_outputs},
                   "schatten": {"coeff": 1, "p": p}},
    })  # fmt: skip
    model, batch = make_model(kind, extra_rank=1), make_batch(kind)
    clean = model.attribute(batch)
    kept = torch.rand(7, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    return APDStep(model, config, clean, kept, *model.kept_forward(batch, kept))


def numel(model: APDModel) -> int:
    return sum(site.d_in * site.d_out for site in model.sites.values())


@ALL
def test_faithfulness_counts_every_site_tied_ones_twice(kind):
    step = make_step(kind)
    total = torch.zeros((), dtype=torch.float64)
    for name, site in step.model.sites.items():
        whole = sum(naive.matrix(step.model, name, c) for c in range(4))
        for i in range(site.d_in):
            for j in range(site.d_out):
                total = total + (site.weight[j, i] - whole[i, j]) ** 2
    naive.assert_same(step.model, apd_losses.faithfulness(step), total / numel(step.model))


@ALL
@pytest.mark.parametrize("over_outputs", ["mean", "sum"])
def test_topk_recon_is_the_error_of_single_samples(kind, over_outputs):
    step = make_step(kind, over_outputs=over_outputs)
    outputs, _ = naive.kept_outputs(step.model, make_batch(kind), step.kept)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(7):
        target = step.model.target(make_batch(kind)[n : n + 1])[0]
        for o in range(len(target)):
            total = total + (outputs[n, o] - target[o]) ** 2
    divisor = 7 * (outputs.shape[1] if over_outputs == "mean" else 1)
    naive.assert_same(step.model, apd_losses.topk_recon(step), total / divisor)


@ALL
@pytest.mark.parametrize("p", [1.0, 0.9, 2.0])
def test_schatten_sums_over_kept_components_sites_and_ranks(kind, p):
    step = make_step(kind, p=p)
    model, total = step.model, torch.zeros((), dtype=torch.float64)
    for n in range(7):
        for c in range(4):
            if not step.kept[n, c]:
                continue
            for name in model.sites:
                A, B = model.A(name)[c], model.B(name)[c]
                for m in range(A.shape[1]):
                    size = (A[:, m] ** 2).sum() * (B[m] ** 2).sum()
                    total = total + (size + EPS) ** (p / 2)
    naive.assert_same(model, apd_losses.schatten(step), total / 7 / numel(model))


def test_schatten_has_a_finite_gradient_at_zero():
    step = make_step("tms")
    with torch.no_grad():
        step.model.A("linear1").zero_()
    apd_losses.schatten(step).backward()
    assert all(p.grad.isfinite().all() for p in step.model.parameters())


@pytest.mark.parametrize("kind", ["mlp1", "mlp2", "partly"])
def test_activation_recon_is_the_error_after_mlp_in_and_relu(kind):
    step = make_step(kind)
    _, posts = naive.kept_outputs(step.model, make_batch(kind), step.kept)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for name in (n for n in step.model.sites if n.endswith("mlp_in")):
        for n in range(7):
            for j in range(posts[name].shape[1]):
                clean = step.clean.outputs[name][n, j].clamp(min=0)
                total = total + (posts[name][n, j].clamp(min=0) - clean) ** 2
                count += 1
    naive.assert_same(step.model, apd_losses.activation_recon(step), total / count)


def test_every_loss_has_its_name():
    assert set(LOSSES) == {"faithfulness", "topk_recon", "schatten", "activation_recon"}
