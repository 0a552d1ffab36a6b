"""Routing: which sites are masked where."""

from __future__ import annotations

import pytest
import torch

from spd_fast.errors import UserError
from spd_fast.losses import Routing, draw_routing
from spd_fast.ops import make_key
from tests import oracle, toys
from tests.losses.steps import ROUTING_SITE, SEED, STEP, uniform_k

KEY = make_key(SEED, STEP)


def drawn(kind="uniform_k", sites=5, shape=(4000,), draw=0, offset=0, probability=0.5):
    shapes = {str(i): shape for i in range(sites)}
    return draw_routing(Routing(kind, probability), shapes, KEY, draw, offset)


def test_uniform_k_is_the_formula_drawn_from_philox():
    model = toys.decomposed()
    shapes = dict.fromkeys(model.sites, (9,))
    got = draw_routing(Routing("uniform_k"), shapes, KEY, 3)
    assert {n: r.tolist() for n, r in got.items()} == {
        n: r.tolist() for n, r in uniform_k(model, 3).items()
    }


def test_static_probability_is_the_formula_drawn_from_philox():
    got = drawn("static_probability", sites=3, shape=(7,), draw=2, probability=0.3)
    for i in range(3):
        u = [oracle.uniform(SEED, STEP, 2, ROUTING_SITE, row, i + 1) for row in range(7)]
        assert got[str(i)].tolist() == [v < 0.3 for v in u]


def test_uniform_k_routes_one_to_all_sites_equally_often():
    counts = torch.stack(list(drawn().values())).sum(dim=0)
    histogram = torch.bincount(counts, minlength=6)
    assert histogram[0] == 0
    # 4000 positions, 800 expected each: 5 standard deviations are 126.
    assert (histogram[1:] - 800).abs().max() < 126


def test_uniform_k_routes_every_site_equally_often():
    # Mean of k is 3 of 5 sites: 2400 expected, 5 standard deviations are 155.
    for routed in drawn().values():
        assert abs(routed.sum().item() - 2400) < 155


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 4000)])
def test_static_probability_of_none_or_all(probability, expected):
    for routed in drawn("static_probability", probability=probability).values():
        assert routed.sum().item() == expected


@pytest.mark.parametrize("kind", ["uniform_k", "static_probability"])
def test_a_part_of_the_batch_sees_the_routing_of_the_whole(kind):
    whole, part = drawn(kind, shape=(10,)), drawn(kind, shape=(4,), offset=6)
    for name, routed in part.items():
        assert routed.tolist() == whole[name][6:].tolist()


def test_leading_dimensions_are_all_positions():
    flat, shaped = drawn(shape=(6,)), drawn(shape=(2, 3))
    for name, routed in shaped.items():
        assert torch.equal(routed, flat[name].reshape(2, 3))


def test_sites_with_other_positions_are_an_error():
    with pytest.raises(UserError, match="'b' has 3 and 'a' has 4"):
        draw_routing(Routing(), {"a": (4,), "b": (3,)}, KEY, 0)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="uniform_k"):
        Routing("uniform")
