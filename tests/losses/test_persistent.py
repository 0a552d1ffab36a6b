"""Persistent PGD: sources that live across steps, by hand in float64."""

from __future__ import annotations

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.losses import PersistentPGD, PersistentSources, persistent_pgd_recon
from spd_fast.losses.persistent import INITIAL_STEP
from tests import oracle, toys
from tests.losses.steps import SEED, X, lower, parts, step

NAME = "persistent_pgd_recon"
SCOPES = ["shared", "per_position", "per_sample_and_position"]
# Three samples of three positions.
BATCH = X.reshape(3, 3, 4)


def options(scope, **more):
    return PersistentPGD(
        **({"lr": 0.05, "n_warmup": 2, "scope": scope, "betas": (0.5, 0.9)} | more)
    )


def run(model, chosen, steps=3, look=lambda index, loss: None):
    """What a trainer does, without moving the parameters; ``look`` sees each step's loss."""
    sources = PersistentSources(chosen, SEED)
    for index in range(steps):
        current = step(model, x=BATCH, options={NAME: chosen}, persistent=sources)
        sources.prepare(current)
        sources.warm_up(lambda current=current: [current])
        loss = persistent_pgd_recon(current)
        look(index, loss)
        (0.3 * loss).backward()
        sources.ascend_from_backward(0.3)
    return sources


def repeated(raw, scope):
    """Raw sources [9, C + 1] of the nine positions."""
    if scope == "shared":
        return raw.expand(9, -1)
    if scope == "per_position":
        return raw.repeat(3, 1)
    return raw


def by_hand(model, chosen, steps=3):
    scope = chosen.scope
    rows = {"shared": 1, "per_position": 3, "per_sample_and_position": 9}[scope]
    channels = 1 if model.delta else 0
    raw = {
        n: oracle.uniforms(
            SEED, INITIAL_STEP, 0, s.index, range(rows), range(s.components + channels)
        )
        for n, s in model.sites.items()
    }
    moments = {n: [torch.zeros_like(t), torch.zeros_like(t)] for n, t in raw.items()}
    masks = lower(model)
    time, values = 0, []

    def attacked(raw, masks):
        mixed, delta = {}, {}
        for n, g in masks.items():
            full = repeated(raw[n], scope)
            r = full[:, : g.shape[1]]
            mixed[n], delta[n] = g + (1 - g) * r, full[:, -1]
        linear = toys.masked(model, mixed, delta if model.delta else None)
        return oracle.mse(toys.by_hand(X, linear), model.target(X))

    for _ in range(steps):
        for ascent in range(chosen.n_warmup + 1):
            raw = {n: t.detach().requires_grad_() for n, t in raw.items()}
            value = attacked(raw, masks)
            if ascent == chosen.n_warmup:
                values.append(value)
            grads = torch.autograd.grad(value, list(raw.values()), retain_graph=True)
            time += 1
            b1, b2 = chosen.betas
            moved = {}
            for (n, t), g in zip(raw.items(), grads, strict=True):
                m, v = moments[n]
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                moments[n] = [m, v]
                ascent_by = m / (1 - b1**time) / ((v / (1 - b2**time)).sqrt() + chosen.eps)
                moved[n] = (t.detach() + chosen.lr * ascent_by).clamp(0, 1)
            raw = moved
    return values, raw


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_it_is_adams_ascent_across_steps(scope, delta):
    model = toys.decomposed(delta=delta)
    chosen = options(scope)
    expected, final = by_hand(model, chosen)
    sources = run(
        model,
        chosen,
        look=lambda index, loss: toys.assert_same_gradients(model, loss, expected[index]),
    )
    for name, raw in sources.r.items():
        flat = raw.detach().reshape(final[name].shape)
        torch.testing.assert_close(flat, final[name], rtol=0, atol=1e-9)


def test_without_warm_up_there_is_one_ascent_a_step():
    sources = run(toys.decomposed(), options("shared", n_warmup=0), steps=3)
    assert sources.count == 3


def test_warm_up_leaves_the_models_gradients_alone():
    model = toys.decomposed()
    chosen = options("shared")
    sources = PersistentSources(chosen, SEED)
    current = step(model, x=BATCH, options={NAME: chosen}, persistent=sources)
    sources.prepare(current)
    sources.warm_up(lambda: [current])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert sources.count == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_parts_of_a_batch_ascend_as_the_whole(scope):
    model = toys.decomposed(delta=True)
    chosen = options(scope)
    whole = run(model, chosen, steps=2)
    sources = PersistentSources(chosen, SEED)
    more = {"x": BATCH, "options": {NAME: chosen}, "persistent": sources}
    for _ in range(2):
        sources.prepare(step(model, **more))
        sources.warm_up(lambda: parts(model, 3, **more))
        for part in parts(model, 3, **more):
            (part.part.share * persistent_pgd_recon(part)).backward()
        sources.ascend_from_backward(1.0)
    for name, raw in sources.r.items():
        torch.testing.assert_close(raw, whole.r[name], rtol=0, atol=1e-9)


def test_its_state_goes_on_where_it_was():
    model, chosen = toys.decomposed(), options("per_position")
    whole = run(model, chosen, steps=2)
    resumed = PersistentSources(chosen, SEED)
    resumed.load_state_dict({k: v.clone() for k, v in whole.state_dict().items()}, X.device)
    for sources in (whole, resumed):
        current = step(model, x=BATCH, options={NAME: chosen}, persistent=sources)
        sources.prepare(current)
        sources.warm_up(lambda current=current: [current])
    assert whole.count == resumed.count == 8
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key])


def test_an_empty_state_is_a_fresh_start():
    sources = PersistentSources(options("shared"), SEED)
    sources.load_state_dict(sources.state_dict(), X.device)
    assert sources.r == {}


def test_a_batch_of_another_shape_is_an_error():
    model, chosen = toys.decomposed(), options("per_position")
    sources = run(model, chosen, steps=1)
    other = step(model, x=X.reshape(1, 9, 4), options={NAME: chosen}, persistent=sources)
    with pytest.raises(UserError, match="all batches must have one shape"):
        sources.prepare(other)


def test_sources_stay_in_the_unit_interval():
    sources = run(toys.decomposed(), options("shared", lr=0.7))
    for raw in sources.r.values():
        assert raw.min() >= 0
        assert raw.max() <= 1
