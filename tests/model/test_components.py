"""Initialisation of V and U, and components that two sites share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spd_fast.errors import UserError
from spd_fast.losses import faithfulness
from spd_fast.model import DecomposedModel, Ones
from spd_fast.model.components import Components, recurring_directions
from spd_fast.model.sites import resolve_sites
from spd_fast.targets import TMS


def components(init, d_in=8, d_out=6, C=4000, seed=0):
    torch.manual_seed(1)
    target = nn.Sequential(nn.Linear(d_in, d_out).double())
    site = resolve_sites(target, {"0": C})["0"]
    made = Components(site, init, torch.Generator().manual_seed(seed))
    return made.V.detach(), made.U.detach(), site.weight


def test_paper_columns_of_V_are_unit_vectors():
    V, _, _ = components("paper")
    torch.testing.assert_close(V.norm(dim=0), torch.ones_like(V[0]), rtol=1e-6, atol=0)


def test_paper_columns_of_V_point_everywhere_alike():
    V, _, _ = components("paper")
    # Of a unit vector in 8 dimensions each coordinate has mean 0 and variance 1/8.
    assert V.mean(dim=1).abs().max() < 4 * (1 / 8 / 4000) ** 0.5
    torch.testing.assert_close(V.var(dim=1), torch.full_like(V[:, 0], 1 / 8), rtol=0.1, atol=0)


def test_paper_rows_of_U_have_the_length_of_their_overlap_with_the_weight():
    V, U, W = components("paper")
    for c in range(0, 4000, 371):
        # u_c = k û_c with k = ⟨v_c û_cᵀ, Wᵀ⟩, so ⟨v_c u_cᵀ, Wᵀ⟩ = k² = ‖u_c‖².
        overlap = (torch.outer(V[:, c], U[c]) * W.T).sum()
        torch.testing.assert_close(overlap, U[c].square().sum(), rtol=1e-5, atol=1e-9)


def test_paper_components_sum_to_a_multiple_of_the_weight():
    V, U, W = components("paper", C=200_000)
    # E[v û û ᵀ…] = Wᵀ / (d_in d_out): each component adds its share.
    torch.testing.assert_close((V @ U).T * 8 * 6 / 200_000, W, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("C", [50, 4000])
def test_2026_entries_have_the_variances_of_the_recipe(C):
    V, U, _ = components("2026", d_in=300, d_out=200, C=C)
    torch.testing.assert_close(V.var().item() * 300, 1.0, rtol=0.05, atol=0)
    torch.testing.assert_close(U.var().item() * C, 1.0, rtol=0.05, atol=0)
    assert abs(V.mean().item()) < 0.01
    assert abs(U.mean().item()) < 0.01


@pytest.mark.parametrize("init", ["paper", "2026", "inputs"])
def test_the_seed_decides_the_components(init):
    same, again, other = (components(init, C=3, seed=s)[0] for s in (5, 5, 6))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_components_have_the_targets_dtype():
    V, U, _ = components("paper", C=3)
    assert V.dtype == U.dtype == torch.float64


def test_an_unknown_init_is_an_error():
    with pytest.raises(UserError, match="unknown init 'papr'; known: paper, 2026, inputs"):
        components("papr")


def sparse_rows(k=6, d=20, n=400):
    """Rows with one or two of k orthogonal directions, of either sign; and the directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d, k, generator=generator)).Q  # [d, k]
    value = 2 * torch.rand(n, k, generator=generator) - 1
    value[torch.rand(n, k, generator=generator) > 0.2] = 0.0
    return value @ directions.T, directions


def test_directions_that_recur_are_found_each_once():
    x, directions = sparse_rows()
    found = recurring_directions(x, 15)
    assert found.shape == (20, 6)
    cosines = (directions.T @ found).abs()
    assert sorted(cosines.argmax(0).tolist()) == list(range(6))
    assert cosines.max(0).values.min() > 0.95**0.5
    torch.testing.assert_close(found.norm(dim=0), torch.ones(6))


def test_no_more_directions_are_found_than_asked_for_or_than_there_are():
    x, _ = sparse_rows()
    assert recurring_directions(x, 2).shape == (20, 2)
    plane = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    assert recurring_directions(plane, 9).shape[1] <= 2
    for rows in (torch.zeros(5, 3), torch.zeros(0, 3)):
        assert recurring_directions(rows, 4).shape == (3, 0)


def from_inputs(d_out, C=9):
    x, directions = sparse_rows()
    torch.manual_seed(0)
    model = DecomposedModel(
        nn.Sequential(nn.Linear(20, d_out)), {"0": C}, init="inputs", backend="reference"
    )
    before = model.V("0").detach().clone(), model.U("0").detach().clone()
    model.start_from_inputs([x[:150], x[150:]])
    V, U = model.V("0").detach(), model.U("0").detach()
    return V, U, model.sites["0"].weight, directions, before


def test_components_start_from_what_recurs_in_the_inputs():
    V, U, W, directions, (_, old_U) = from_inputs(d_out=5)
    assert sorted((directions.T @ V[:, :6]).abs().argmax(0).tolist()) == list(range(6))
    # u_c = α W v_c, α by least squares: what is left of Wᵀ is orthogonal to their sum.
    alpha = U[:6] / (V[:, :6].T @ W.T)
    torch.testing.assert_close(alpha, torch.full_like(alpha, alpha[0, 0].item()))
    total = V[:, :6] @ U[:6]
    assert abs(((W.T - total) * total).sum()) < 1e-5
    # The others read nothing of those directions.
    assert (V[:, :6].T @ V[:, 6:]).abs().max() < 1e-5
    assert torch.equal(U[6:], old_U[6:])


def test_where_the_inputs_fill_the_space_the_other_components_stay():
    torch.manual_seed(0)
    model = DecomposedModel(nn.Sequential(nn.Linear(3, 2)), {"0": 5}, init="inputs")
    before = model.V("0").detach().clone()
    x = torch.eye(3).repeat(20, 1) * torch.rand(60, 1)
    model.start_from_inputs(iter([x]))
    assert torch.equal(model.V("0")[:, 3:], before[:, 3:])
    assert torch.equal(model.V("0")[:, :3].abs().sum(0), torch.ones(3))


def test_where_nothing_recurs_nothing_changes():
    torch.manual_seed(0)
    model = DecomposedModel(nn.Sequential(nn.Linear(3, 2)), {"0": 5}, init="inputs")
    before = model.V("0").detach().clone(), model.U("0").detach().clone()
    for rows in (torch.zeros(7, 3), torch.eye(3)):
        model.start_from_inputs([rows])
        assert torch.equal(model.V("0"), before[0])
        assert torch.equal(model.U("0"), before[1])


def test_directions_of_noise_do_not_recur():
    noise = torch.randn(400, 40, generator=torch.Generator().manual_seed(0))
    assert recurring_directions(noise, 9).shape == (40, 0)


def test_what_lies_near_a_chosen_direction_is_not_chosen():
    angle = torch.deg2rad(torch.tensor([0.0] * 100 + [48.0] + [-8.0] * 40 + [104.0] * 40))
    x = torch.stack([angle.cos(), angle.sin(), 0 * angle], dim=1)
    found = recurring_directions(x, 3)
    gram = (found.T @ found).fill_diagonal_(0)
    assert found.shape[1] == 2
    assert gram.square().max() < 1 / 3


def test_a_loaded_model_does_not_start_anew(tmp_path):
    target = nn.Sequential(nn.Linear(3, 2))
    model = DecomposedModel(target, {"0": 5}, init="inputs")
    assert model.awaits_inputs
    model.save_pretrained(tmp_path)
    assert not DecomposedModel.from_pretrained(tmp_path, target).awaits_inputs
    assert not DecomposedModel(target, {"0": 5}).awaits_inputs


def test_a_start_from_inputs_keeps_ties_and_leaves_token_sites_alone():
    model = DecomposedModel(TMS(5, 2), {"linear1": 4, "linear2": 4}, init="inputs")
    before = model.V("linear1").detach().clone()
    model.start_from_inputs([torch.eye(5).repeat(9, 1)])
    assert_tied(model)
    assert not torch.equal(model.V("linear1"), before)
    tokens = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    model = DecomposedModel(tokens, {"0": 3, "1": 3}, init="inputs")
    before = model.V("0").detach().clone()
    model.start_from_inputs([torch.arange(7)[None]])
    assert torch.equal(model.V("0"), before)


def tied(C=4, dtype=torch.float64):
    sites = {"linear1": C, "linear2": C}
    return DecomposedModel(TMS(5, 2).to(dtype), sites, backend="reference")


def assert_tied(model):
    for one, other in ((model.V, model.U), (model.U, model.V)):
        assert one("linear2").data_ptr() == other("linear1").data_ptr()
        assert torch.equal(one("linear2"), other("linear1").T)


def test_tied_sites_share_one_storage():
    assert_tied(tied())


def test_tied_sites_share_one_storage_after_a_cast():
    model = tied(dtype=torch.float32).double()
    assert model.V("linear2").dtype == torch.float64
    assert_tied(model)


def test_tied_sites_share_one_storage_after_loading():
    model, other = tied(), tied()
    with torch.no_grad():
        other.V("linear1").add_(1)
    model.load_state_dict(other.state_dict())
    assert_tied(model)
    assert torch.equal(model.V("linear1"), other.V("linear1"))


def test_both_tied_sites_send_gradients_to_the_shared_components():
    model = tied()
    x = torch.rand(7, 5, dtype=torch.float64)
    output = model.masked_forward(x, Ones()).sum()
    output.backward()
    # The same function of two free leaves: the sum of both sites' gradients is the derivative.
    V, U = (p.detach().clone().requires_grad_() for p in (model.V("linear1"), model.U("linear1")))
    bias = model.sites["linear2"].bias
    expected = torch.relu(x @ V @ U @ U.T @ V.T + bias).sum()
    expected.backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(model.V("linear1").grad + model.U("linear2").grad.T, V.grad)
    torch.testing.assert_close(model.U("linear1").grad + model.V("linear2").grad.T, U.grad)
    for site in ("linear1", "linear2"):
        assert model.V(site).grad.abs().sum() > 0
        assert model.U(site).grad.abs().sum() > 0


def test_both_tied_sites_count_in_faithfulness():
    model = tied()
    one = model.faithfulness()
    torch.testing.assert_close(one["linear1"], one["linear2"])
    torch.testing.assert_close(faithfulness(model), 2 * one["linear1"] / 20)


def test_an_optimiser_step_of_every_group_leaves_tied_sites_tied():
    model = tied()
    before = model.V("linear1").detach().clone()
    groups = [{"params": group} for group in model.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    faithfulness(model).backward()
    optimizer.step()
    assert not torch.equal(before, model.V("linear1"))
    assert_tied(model)


def test_parameter_groups_hold_every_parameter_once():
    model = tied()
    grouped = [p for group in model.parameter_groups() for p in group]
    assert len(grouped) == len(set(map(id, grouped)))
    assert set(map(id, grouped)) == set(map(id, model.parameters()))


def test_no_group_holds_two_views_of_one_storage():
    for group in tied().parameter_groups():
        pointers = [p.data_ptr() for p in group]
        assert len(pointers) == len(set(pointers))
