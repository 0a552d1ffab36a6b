"""Looking at components: contexts, tokens and how components go together, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spd_fast.errors import UserError
from spd_fast.evaluate.components import component_cosines, harvest
from spd_fast.model import DecomposedModel

T, VOCABULARY = 7, 11


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.linear = nn.Linear(4, VOCABULARY)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DecomposedModel(Net(), {"linear": 6}, ci_hidden=(4,), backend="reference", seed=2)


def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (12, T), generator=generator)
    return [tokens[:5], tokens[5:8], tokens[8:]]


@pytest.fixture(scope="module")
def found(model):
    return harvest(model, "linear", batches, top=4, contexts=3, window=2, statistics=3)


@pytest.fixture(scope="module")
def whole(model):
    """All tokens [12, T] and importances [12, T, C]."""
    tokens = torch.cat(batches())
    with torch.no_grad():
        lower = model.causal_importances(model.clean_forward(tokens))["linear"].lower
    return tokens, lower.clamp_min(0)


def test_components_are_chosen_by_mean_importance(found, whole):
    _, lower = whole
    mean = lower.flatten(0, 1).mean(dim=0)
    torch.testing.assert_close(found.mean, mean)
    assert found.components == mean.argsort(descending=True, stable=True)[:4].tolist()
    torch.testing.assert_close(found.frequency, (lower > 0.01).flatten(0, 1).float().mean(dim=0))
    torch.testing.assert_close(found.peak, lower.flatten(0, 1).amax(dim=0))
    assert found.positions == 12 * T


def test_contexts_are_the_sequences_of_highest_importance(found, whole):
    tokens, lower = whole
    for i, c in enumerate(found.components):
        values = lower[..., c].amax(dim=1).sort(descending=True).values[:3]
        got = [context.importances[context.at] for context in found.contexts[i]]
        assert got == pytest.approx([v for v in values.tolist() if v > 0.01])
        for context in found.contexts[i]:
            assert len(context.tokens) == len(context.importances) <= 5
            rows = tokens.unfold(1, len(context.tokens), 1)
            same = (rows == torch.tensor(context.tokens)).all(dim=-1)
            assert same.any()
            row, start = same.nonzero()[0].tolist()
            around = lower[row, start : start + len(context.tokens), c].tolist()
            assert context.importances == pytest.approx(around)


def test_token_shares_and_lifts(found, whole):
    tokens, lower = whole
    for i, c in enumerate(found.components):
        g = lower[..., c]
        if not found.tokens[i]:
            assert g.sum() == 0
            continue
        token, share, lift = found.tokens[i][0]
        here = tokens == token
        assert share == pytest.approx((g[here].sum() / g.sum()).item(), rel=1e-5)
        assert lift == pytest.approx((g[here].mean() / g.mean()).item(), rel=1e-5)


def test_how_components_go_together(found, whole, model):
    _, lower = whole
    g = lower.flatten(0, 1)[:, found.components]
    unit = g / g.norm(dim=0).clamp_min(1e-15)
    torch.testing.assert_close(found.together, unit.T @ unit, rtol=1e-4, atol=1e-5)
    matrices = torch.einsum("ic,co->cio", model.V("linear"), model.U("linear")).flatten(1)
    unit = matrices / matrices.norm(dim=1, keepdim=True)
    cosines = component_cosines(model.V("linear"), model.U("linear"))
    torch.testing.assert_close(cosines, unit @ unit.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm, matrices.norm(dim=1).detach())


def test_one_batch_or_many_find_the_same(found, model):
    once = harvest(
        model, "linear", lambda: [torch.cat(batches())], top=4, contexts=3, window=2, statistics=3
    )
    assert once.components == found.components
    for one, other in zip(once.contexts, found.contexts, strict=True):
        assert [c.importances[c.at] for c in one] == pytest.approx(
            [c.importances[c.at] for c in other]
        )


def test_an_unknown_site_is_an_error(model):
    with pytest.raises(UserError, match="unknown site 'linaer'; nearest: 'linear'"):
        harvest(model, "linaer", batches)


def test_no_data_is_an_error(model):
    with pytest.raises(UserError, match="no data"):
        harvest(model, "linear", list)
