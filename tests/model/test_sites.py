"""Naming sites by path and glob, and the errors for what cannot be one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from spd_fast.errors import UserError
from spd_fast.model.sites import resolve_sites
from spd_fast.targets import TMS
from tests.toys import Net


def test_a_target_that_is_a_site_itself_says_what_to_do():
    with pytest.raises(UserError, match=r"is a Linear itself.*nn\.Sequential"):
        resolve_sites(nn.Linear(3, 4), {"*": 5})


def test_a_dotted_path_names_one_site():
    sites = resolve_sites(Net(), {"blocks.1.up": 3})
    assert list(sites) == ["blocks.1.up"]
    assert sites["blocks.1.up"].components == 3


def test_a_glob_names_every_match():
    assert list(resolve_sites(Net(), {"blocks.*.up": 3})) == ["blocks.0.up", "blocks.1.up"]


def test_sites_come_in_the_targets_order_whatever_the_order_of_patterns():
    sites = resolve_sites(Net(), {"head": 1, "blocks.*.down": 2, "blocks.0.up": 3})
    assert list(sites) == ["blocks.0.up", "blocks.0.down", "blocks.1.down", "head"]
    assert [s.index for s in sites.values()] == [0, 1, 2, 3]


def test_the_last_matching_pattern_decides_the_number_of_components():
    sites = resolve_sites(Net(), {"*.up": 3, "blocks.1.*": 5})
    assert {n: s.components for n, s in sites.items()} == {
        "blocks.0.up": 3, "blocks.1.up": 5, "blocks.1.down": 5,
    }  # fmt: skip


def test_a_path_with_glob_characters_names_itself():
    target = nn.Sequential()
    target.add_module("layer[0]", nn.Linear(2, 2))
    assert list(resolve_sites(target, {"layer[0]": 2})) == ["layer[0]"]


def test_weight_and_bias_share_the_targets_storage():
    net = Net()
    site = resolve_sites(net, {"head": 2})["head"]
    assert site.weight.data_ptr() == net.head.weight.data_ptr()
    assert site.bias.data_ptr() == net.head.bias.data_ptr()
    assert not site.weight.requires_grad


def test_a_site_knows_its_sizes():
    site = resolve_sites(Net(), {"blocks.0.up": 2})["blocks.0.up"]
    assert (site.d_in, site.d_out) == (4, 6)


def test_a_site_without_bias_has_none():
    assert resolve_sites(Net(), {"blocks.0.down": 2})["blocks.0.down"].bias is None


def test_no_match_lists_the_closest_names_with_shapes():
    with pytest.raises(UserError, match=r"'blocks.\*.upp' matches no module") as caught:
        resolve_sites(Net(), {"blocks.*.upp": 3})
    assert "'blocks.0.up' (Linear 4 → 6)" in str(caught.value)


def test_a_module_that_is_no_linear_layer_is_named_with_its_kind():
    with pytest.raises(UserError, match=r"site 'blocks.0' \(Block\) cannot be decomposed"):
        resolve_sites(Net(), {"blocks.0": 3})


@pytest.mark.parametrize("components", [True, 2.5, "4", None])
def test_a_number_of_components_that_is_not_whole_is_an_error(components):
    with pytest.raises(UserError, match="'head' needs a whole number C, got"):
        resolve_sites(Net(), {"head": components})


def test_a_whole_number_of_another_library_counts():
    sites = resolve_sites(Net(), {"head": np.int64(3)})
    assert type(sites["head"].components) is int


@pytest.mark.parametrize("patterns", ["head", ["head"], {1: 3}, 4])
def test_sites_that_are_no_mapping_are_an_error(patterns):
    with pytest.raises(UserError, match="sites map module paths to numbers of components"):
        resolve_sites(Net(), patterns)


@pytest.mark.parametrize("components", [0, -1])
def test_fewer_than_one_component_is_an_error(components):
    with pytest.raises(UserError, match="'head' needs at least one component"):
        resolve_sites(Net(), {"head": components})


def test_no_patterns_is_an_error():
    with pytest.raises(UserError, match="no sites"):
        resolve_sites(Net(), {})


def test_a_target_without_linear_layers_is_an_error():
    with pytest.raises(UserError, match=r"\(ReLU\) has no nn.Linear"):
        resolve_sites(nn.ReLU(), {"*": 3})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(value):
    net = Net()
    with torch.no_grad():
        net.blocks[1].up.weight[2, 3] = value
    with pytest.raises(UserError, match=r"'blocks.1.up' is not finite"):
        resolve_sites(net, {"blocks.*.up": 3})


def test_a_transpose_in_the_same_storage_is_tied_to_the_earlier_site():
    sites = resolve_sites(TMS(5, 2), {"linear1": 4, "linear2": 4})
    assert sites["linear1"].tied_to is None
    assert sites["linear2"].tied_to == "linear1"


def test_an_equal_transpose_in_another_storage_is_not_tied():
    target = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    with torch.no_grad():
        target[1].weight.copy_(target[0].weight.T)
    assert resolve_sites(target, {"*": 4})["1"].tied_to is None


def test_the_same_square_weight_used_twice_is_not_taken_for_a_transpose():
    target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    target[1].weight = target[0].weight
    assert resolve_sites(target, {"*": 4})["1"].tied_to is None


def test_tied_sites_with_different_numbers_of_components_are_an_error():
    with pytest.raises(UserError, match="'linear1' and 'linear2' are tied and need the same C"):
        resolve_sites(TMS(5, 2), {"linear1": 4, "linear2": 3})


def test_shapes_read_as_in_a_plan_whatever_the_kind():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6))
    with pytest.raises(UserError) as caught:
        resolve_sites(net, {"2": 3})
    assert "'0' (Embedding 9 → 4)" in str(caught.value)
    assert "'1' (Linear 4 → 6)" in str(caught.value)
