"""APD's components, attributions, selection and forwards, against sums over single samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spd_fast.baselines import APDModel, apd
from spd_fast.baselines.apd import batch_topk, routes
from spd_fast.errors import UserError
from tests.baselines import naive
from tests.baselines.naive import KINDS, make_batch, make_model, make_target

ALL = pytest.mark.parametrize("kind", KINDS)


# Parametrisation.


@ALL
def test_components_are_products_of_inner_rank(kind):
    model = make_model(kind)
    for name, site in model.sites.items():
        m = min(site.d_in, site.d_out)
        assert model.A(name).shape == (4, site.d_in, m)
        assert model.B(name).shape == (4, m, site.d_out)
        for c in range(4):
            expected = naive.matrix(model, name, c).T
            torch.testing.assert_close(model.matrices(name)[c], expected, rtol=1e-13, atol=1e-15)


def test_extra_rank_adds_to_each_sites_own_and_rank_replaces_it():
    assert make_model("tms", extra_rank=1).A("linear1").shape[2] == 3
    assert make_model("mlp2", rank=1, extra_rank=1).A("layers.0.mlp_out").shape[2] == 1


@ALL
def test_side_by_side_the_factors_multiply_to_the_sum_of_all_components(kind):
    model = make_model(kind)
    for name in model.sites:
        whole = sum(naive.matrix(model, name, c) for c in range(4))
        torch.testing.assert_close(model.V(name) @ model.U(name), whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model.total(name), whole.T, rtol=1e-12, atol=1e-14)


def test_a_tied_site_is_the_transpose_and_has_no_parameters():
    model = make_model("tms")
    assert set(dict(model.named_parameters())) == {"factors.linear1.A", "factors.linear1.B"}
    torch.testing.assert_close(
        model.matrices("linear2"), model.matrices("linear1").mT, rtol=1e-13, atol=1e-15
    )


def test_the_initial_spread_is_xaviers():
    torch.manual_seed(0)
    model = APDModel(make_target("tms").float(), {"linear1": 300}, rank=40)
    A, B = model.A("linear1").detach(), model.B("linear1").detach()
    # torch takes dimension 1 as inputs, 0 as outputs and the rest as a receptive field.
    for parameter in (A, B):
        fan_in = parameter.shape[1] * parameter.shape[2]
        fan_out = parameter.shape[0] * parameter.shape[2]
        assert parameter.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.02)


def test_the_seed_decides_the_start():
    def start(seed):
        return APDModel(make_target("tms"), {"linear1": 2}, seed=seed).A("linear1")

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_components_span_all_sites():
    with pytest.raises(
        UserError, match=r"need the same C, got .*'linear1': 2, 'hidden_layers.0': 3"
    ):
        APDModel(make_target("tms-id"), {"linear1": 2, "hidden_layers.0": 3})


def test_the_target_is_not_trained():
    model = make_model("mlp2")
    assert not any(p.requires_grad for p in model.target.parameters())
    assert not any(p is q for p in model.parameters() for q in model.target.parameters())


# Attributions.


@ALL
def test_attributions_are_those_of_single_samples_and_outputs(kind):
    model, batch = make_model(kind), make_batch(kind)
    found = model.attribute(batch).attributions
    torch.testing.assert_close(found, naive.attributions(model, batch), rtol=1e-11, atol=1e-13)


@ALL
def test_attributions_need_a_contribution_of_every_site(kind):
    """Tied, identity and further layers all count: without one site the numbers are others."""
    model, batch = make_model(kind), make_batch(kind)
    whole = model.attribute(batch).attributions
    for name in model.sites:
        if model.sites[name].tied_to is not None:
            continue
        one = make_model(kind)
        with torch.no_grad():
            one.B(name).zero_()
        assert not torch.allclose(one.attribute(batch).attributions, whole)


@ALL
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_of_rows_change_nothing(kind, rows, monkeypatch):
    model, batch = make_model(kind), make_batch(kind)
    whole = model.attribute(batch)
    seen = []
    slopes, squares = model._slopes, model._squares
    shares = _shared(model, batch) == set(model.sites)

    def counted(x, *, rest=True):  # the first, of all rows, only finds what is shared
        if rest:
            seen.append(len(x))
        return slopes(x, rest=rest)

    monkeypatch.setattr(model, "_slopes", counted)
    if shares:
        monkeypatch.setattr(
            model, "_squares", lambda p, on, found: seen.append(len(on)) or squares(p, on, found)
        )
    ranks = sum(model.B(name).shape[1] for name in model.sites)
    per_row = 4 * (ranks + whole.output.shape[1])
    if not shares:
        width = sum(site.d_out for site in model.sites.values())
        per_row += (whole.output.shape[1] + 4) * width
    monkeypatch.setattr(apd, "CHUNK", rows * per_row)
    parts = model.attribute(batch)
    assert seen == [len(part) for part in batch.split(rows)]
    for name in ("output", "attributions"):
        torch.testing.assert_close(
            getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-14
        )
    for name in model.sites:
        for part, all_rows in ((parts.inputs, whole.inputs), (parts.outputs, whole.outputs)):
            torch.testing.assert_close(part[name], all_rows[name], rtol=1e-12, atol=1e-14)


@ALL
def test_a_batch_of_one_chunk_runs_through_the_target_thrice(kind):
    """A row for the number of outputs, all rows, and a row an output that gives M."""
    model, batch = make_model(kind), make_batch(kind)
    seen = []
    model.target.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    outputs = model.attribute(batch).output.shape[1]
    assert seen == [1, len(batch), outputs]


def _shared(model, batch):
    """The sites whose slopes are found to be the same in all rows; they and the others are all."""
    slopes = model._slopes(batch)
    assert set(slopes.shared) | set(slopes.gradients) == set(model.sites)
    assert not set(slopes.shared) & set(slopes.gradients)
    return set(slopes.shared)


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        ("tms", {"linear1", "linear2"}),
        ("tms-id", {"linear1", "hidden_layers.0", "linear2"}),
        ("mlp1", {"layers.0.mlp_out"}),
        ("mlp2", {"layers.1.mlp_out"}),
        ("partly", set()),
    ],
)
def test_slopes_are_shared_where_the_rest_is_linear_and_nowhere_else(kind, shared):
    model, batch = make_model(kind), make_batch(kind, 40)
    if kind.startswith("tms"):  # its ReLU does something: outputs are on in some rows, off in some
        on = model.target(batch) > 0
        assert (on.any(dim=0) & ~on.all(dim=0)).any()
    assert _shared(model, batch) == shared


class _Tail(nn.Module):
    """Two linear maps and a function at the end."""

    def __init__(self, tail):
        super().__init__()
        torch.manual_seed(8)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 6)
        self.tail = tail
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.tail(self.second(self.first(x)))


def _nearly_linear(z):
    """Other slopes at the largest inputs alone, by a little."""
    return z + 1e-3 * (z - 1).relu()


TAILS = {
    "linear": (lambda z: z, True),
    "relu": (torch.relu, True),
    "shifted relu": (lambda z: torch.relu(z) + 1, False),
    "relu below": (lambda z: -torch.relu(z), False),
    "always on": (lambda z: torch.relu(z + 100), True),
    "leaky relu": (torch.nn.functional.leaky_relu, False),
    "abs": (torch.abs, False),
    "sigmoid": (torch.sigmoid, False),
    "nearly linear": (_nearly_linear, False),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rows", [1, 40])
def test_whatever_ends_the_target_attributions_are_those_of_single_samples(tail, rows):
    function, shares = TAILS[tail]
    model = APDModel(_Tail(function), {"first": 3, "second": 3}, seed=2)
    generator = torch.Generator().manual_seed(6)
    batch = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    expected = torch.zeros(rows, 3, dtype=torch.float64)
    for n, x in enumerate(batch):
        middle = model.target.first(x).requires_grad_()
        last = model.target.second(middle)
        for output in model.target.tail(last):
            slopes = torch.autograd.grad(output, [middle, last], retain_graph=True)
            for c in range(3):
                moved = slopes[0] @ (model.matrices("first")[c] @ x)
                moved += slopes[1] @ (model.matrices("second")[c] @ middle)
                expected[n, c] += moved.item() ** 2
    found = model.attribute(batch).attributions
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    if rows > 1:
        assert _shared(model, batch) == ({"first", "second"} if shares else set())


@pytest.mark.parametrize("numbers", [1, 50, 2**10])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_blocks_of_rows_and_components_change_nothing(numbers, rows, monkeypatch):
    model, batch = make_model("tms-id"), make_batch("tms-id", 70)
    whole = model.attribute(batch).attributions
    monkeypatch.setattr(apd, "BLOCK", numbers)
    monkeypatch.setattr(apd, "ROWS", rows)
    parts = model.attribute(batch).attributions
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@ALL
def test_the_clean_forward_is_the_targets(kind):
    model, batch = make_model(kind), make_batch(kind)
    clean = model.attribute(batch)
    torch.testing.assert_close(clean.output, model.target(batch), rtol=1e-13, atol=1e-14)
    assert not clean.output.requires_grad
    assert not clean.attributions.requires_grad
    assert not any(y.requires_grad for y in clean.outputs.values())


@ALL
def test_shares_are_those_of_single_samples_and_outputs(kind):
    model, batch = make_model(kind), make_batch(kind)
    found = model.shares(batch)
    assert set(found) == set(model.sites)
    for name, share in found.items():
        torch.testing.assert_close(share, naive.shares(model, batch, name), rtol=1e-11, atol=1e-13)


# Selection.


def test_the_largest_of_the_whole_batch_are_kept():
    a = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert batch_topk(a, 1.5).tolist() == [[True, True, True], [False, False, False]]
    assert batch_topk(a, 2).tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize(
    ("k", "rows", "count"),
    [(0.211, 2048, 432), (1.28, 256, 327), (0.29, 100, 29), (0.5, 3, 1), (0.1, 5, 0), (9, 4, 12)],
)
def test_how_many_are_kept_is_rounded_down(k, rows, count):
    """0.29 · 100 is 28.999… in floating point; 9 · 4 is more than there are."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(rows, 3, generator=generator)
    kept = batch_topk(a, k)
    assert int(kept.sum()) == count
    if 0 < count < a.numel():
        assert a[kept].min() > a[~kept].max()


def test_of_equal_attributions_the_first_are_kept_and_no_more():
    a = torch.tensor([[0.0, 5.0], [5.0, 5.0], [7.0, 5.0]])
    assert batch_topk(a, 1).tolist() == [[False, True], [True, False], [True, False]]
    assert batch_topk(torch.zeros(3, 2), 1).tolist() == [
        [True, True],
        [True, False],
        [False, False],
    ]


def test_what_is_no_number_is_kept_and_so_seen():
    a = torch.tensor([[0.0, torch.nan], [5.0, torch.inf], [7.0, 6.0]])
    assert batch_topk(a, 1).tolist() == [[False, True], [False, True], [True, False]]


@pytest.mark.parametrize("k", [-1, float("nan"), float("inf")])
def test_how_many_to_keep_is_a_number(k):
    with pytest.raises(UserError, match="k needs to be a number from 0 on"):
        batch_topk(torch.rand(4, 3), k)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank needs to be a whole number from 1 on, got 0"),
        ({"rank": -1}, "rank needs to be a whole number from 1 on, got -1"),
        ({"rank": 1.5}, "rank needs to be a whole number from 1 on, got 1.5"),
        ({"extra_rank": -1}, "extra_rank needs to be a whole number from 0 on, got -1"),
    ],
)
def test_a_rank_that_is_none_is_refused(options, match):
    with pytest.raises(UserError, match=match):
        make_model("tms", **options)


def test_batches_and_selections_of_other_shapes_are_refused():
    model, batch = make_model("tms"), make_batch("tms")
    for wrong in (batch[:0], batch[0], batch[None]):
        with pytest.raises(UserError, match=r"attribute needs a batch \[N, features\]"):
            model.attribute(wrong)
    kept = torch.ones(len(batch), 4, dtype=torch.bool)
    for wrong_kept in (kept[:1], kept[:, :3], kept[None]):
        with pytest.raises(UserError, match=rf"kept needs the shape \[{len(batch)}, 4\]"):
            model.kept_forward(batch, wrong_kept)


def test_no_gradient_passes_the_selection():
    a = torch.rand(4, 3, requires_grad=True)
    assert not batch_topk(a, 1).requires_grad


def test_routes_list_the_rows_of_every_component():
    kept = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0]]).bool()
    assert routes(kept).tolist() == [[0, 1, 3], [4, 4, 4], [1, 2, 4]]
    assert routes(torch.zeros(4, 3, dtype=torch.bool)).shape == (3, 0)


# Forwards.


def some_kept(rows: int, components: int = 4) -> torch.Tensor:
    kept = torch.rand(rows, components, generator=torch.Generator().manual_seed(2)) < 0.4
    kept[0], kept[1] = False, True
    return kept


@ALL
def test_the_kept_forward_is_that_of_single_samples(kind):
    model, batch = make_model(kind), make_batch(kind)
    kept = some_kept(len(batch))
    output, outputs = model.kept_forward(batch, kept)
    expected, posts = naive.kept_outputs(model, batch, kept)
    naive.assert_same(model, output, expected)
    assert set(outputs) == set(model.sites)
    for name, y in outputs.items():
        torch.testing.assert_close(y, posts[name], rtol=1e-12, atol=1e-14)


@ALL
@pytest.mark.parametrize("everything", [False, True])
def test_nothing_or_everything_kept(kind, everything):
    model, batch = make_model(kind), make_batch(kind)
    kept = torch.full((len(batch), 4), everything)
    output, _ = model.kept_forward(batch, kept)
    expected, _ = naive.kept_outputs(model, batch, kept)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)
    if everything:
        torch.testing.assert_close(model.whole_forward(batch), expected, rtol=1e-12, atol=1e-13)


# Unit norm.


def columns(model: APDModel, name: str):
    A = model.A(name)
    return [A[c, :, m] for c in range(A.shape[0]) for m in range(A.shape[2])]


@ALL
def test_normalise_gives_every_column_length_one(kind):
    model = make_model(kind)
    before = {n: [a.detach().clone() for a in columns(model, n)] for n in model.free_sites()}
    model.normalise()
    for name, old in before.items():
        for a, b in zip(columns(model, name), old, strict=True):
            assert float(a.detach() @ a.detach()) == pytest.approx(1)
            torch.testing.assert_close(a.detach(), b / b.norm())


def test_a_zero_column_stays_zero():
    model = make_model("tms")
    with torch.no_grad():
        model.A("linear1")[1, :, 0] = 0
    model.normalise()
    assert model.A("linear1")[1, :, 0].tolist() == [0] * 5
    assert model.A("linear1").isfinite().all()


@ALL
def test_the_parallel_part_of_every_columns_gradient_is_removed(kind):
    model = make_model(kind)
    model.normalise()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {n: model.A(n).grad.clone() for n in model.free_sites()}
    others = {n: model.B(n).grad.clone() for n in model.free_sites()}
    model.remove_parallel_gradients()
    for name in model.free_sites():
        A, new = model.A(name).detach(), model.A(name).grad
        for c in range(A.shape[0]):
            for m in range(A.shape[2]):
                a, old = A[c, :, m], before[name][c, :, m]
                torch.testing.assert_close(new[c, :, m], old - (old @ a) * a)
                assert abs(float(new[c, :, m] @ a)) < 1e-12
        assert torch.equal(model.B(name).grad, others[name])


# On disk.


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    model = make_model("tms-id", extra_rank=1)
    model.save_pretrained(tmp_path)
    again = APDModel.from_pretrained(tmp_path, make_target("tms-id"))
    for name in model.sites:
        assert torch.equal(model.A(name), again.A(name))
        assert torch.equal(model.B(name), again.B(name))
    assert again.A("linear1").stride() == model.A("linear1").stride()


def test_another_target_is_refused(tmp_path):
    model = make_model("tms")
    model.save_pretrained(tmp_path)
    other = make_target("tms")
    other.linear1.weight[0, 0] += 1
    with pytest.raises(UserError, match="other weights"):
        APDModel.from_pretrained(tmp_path, other)
