"""A residual stream that is kept as its factors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spd_fast import ops
from spd_fast._adamw import AdamW
from spd_fast.errors import UserError
from spd_fast.losses import LOSSES, Routing, Step
from spd_fast.model import DecomposedModel, Given, Stochastic
from spd_fast.model.factored import Factored, Product
from spd_fast.ops import Penalty, make_key
from spd_fast.targets import ResidMLP
from tests.checks import normal
from tests.conftest import needs_extension

N, FEATURES, WIDTH, NEURONS, C = 23, 5, 24, 4, 7
SITES = {"layers.*.mlp_in": C, "layers.*.mlp_out": C}


def example():
    """A sum of a product and a masked sum, and the tensor that it is."""
    z, B, a, U = normal(1, 3, 2), normal(2, 2, 6), normal(3, 3, 2), normal(4, 2, 6)
    z.requires_grad_(True)
    held = Factored(torch.Size((3, 6)), (Product(z, B),))
    written = Factored(torch.Size((3, 6)), sums=(lambda M: a @ (U if M is None else U @ M),))
    return held + written, z @ B + a @ U


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x @ normal(5, 6, 4),
        lambda x: F.linear(x, normal(5, 4, 6)),
        lambda x: F.linear(x, normal(5, 4, 6), normal(6, 4)),
        lambda x: F.linear(x, weight=normal(5, 4, 6), bias=normal(6, 4)),
        lambda x: torch.nn.Identity()(x) * 2 - 1,
        lambda x: x + normal(5, 3, 6),
        lambda x: normal(5, 3, 6) + x,
        lambda x: normal(5, 3, 6) - x,
        lambda x: torch.relu(x),
        lambda x: torch.cat([x[0], x[1]]),
        lambda x: x.mean(dim=-1),
        lambda x: x.T @ normal(5, 3, 4),
        lambda x: x @ normal(5, 6),
        lambda x: F.linear(input=x, weight=normal(5, 4, 6)),
        lambda x: F.linear(normal(5, 4, 6), x),
        lambda x: torch.cat([x, x + 1], dim=-1),
        lambda x: torch.stack(tensors=(x, x)).sum(0),
        lambda x: 2**x + x % 0.3 - +x,
        lambda x: (x == x).double() + (x != 0),
        lambda x: normal(5, 4, 3) @ x,
    ],
)
def test_whatever_is_done_with_it_is_done_with_the_tensor_it_stands_for(use):
    factored, tensor = example()
    torch.testing.assert_close(use(factored), use(tensor))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: torch.relu_(x),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(input=x, inplace=True),
        lambda x: x.__setitem__(0, 0.0),
    ],
)
def test_it_cannot_be_written_to(write):
    with pytest.raises(UserError, match=r"in place .*factored=False"):
        write(example()[0])


def test_what_was_multiplied_cannot_be_written_to():
    z = normal(1, 3, 2)
    x = Factored(torch.Size((3, 6)), (Product(z, normal(2, 2, 6)),))
    z.mul_(2)
    for use in (x.dense, x.rows, lambda: x @ normal(3, 6, 4)):
        with pytest.raises(UserError, match=r"in place .*factored=False"):
            use()


def test_who_reads_it_may_write_to_what_comes_of_it():
    z, B, M = normal(1, 3, 2), normal(2, 2, 6), normal(3, 6, 4)
    x = Factored(torch.Size((3, 6)), (Product(z, B),))
    first, second = x @ M, x @ M
    expected = first.clone()
    second.mul_(2)
    torch.testing.assert_close([first, second, x @ M], [expected, 2 * expected, expected])


def change(M):
    M.mul_(2)


def replace(M):
    M.data = 2 * M


@pytest.mark.parametrize("same", [lambda M: M, lambda M: M.T.T])
@pytest.mark.parametrize("double", [change, replace])
def test_a_product_without_gradient_is_kept_until_its_matrix_changes(same, double):
    product, M = Product(normal(1, 3, 2), normal(2, 2, 6)), normal(3, 6, 4)
    first = product.times(same(M))
    assert product.times(M) is first
    double(M)
    torch.testing.assert_close(product.times(M), 2 * first)


def test_a_product_of_inference_mode_is_kept():
    with torch.inference_mode():
        product, M = Product(normal(1, 3, 2), normal(2, 2, 6)), normal(3, 6, 4)
        assert product.times(M) is product.times(M)


def test_a_product_with_a_gradient_is_made_anew():
    product, M = Product(normal(1, 3, 2), normal(2, 2, 6)), normal(3, 6, 4).requires_grad_(True)
    assert product.times(M) is not product.times(M)


def model(factored=True, backend="cpu", wanted=None, **options):
    target = ResidMLP(FEATURES, WIDTH, NEURONS, 2, 0).double()
    target.factored_stream = factored
    return of(target, SITES, backend=backend, factored=wanted, **options)


def of(target, sites, **options):
    return DecomposedModel(target, sites, **{"ci_hidden": (3,), "backend": "cpu"} | options)


BATCH = normal(9, N, FEATURES)


def step_of(made, loss, binomial=False, **options):
    clean = made.clean_forward(BATCH)
    importances = made.causal_importances(clean, Penalty("lp", 1.0))
    return Step(
        made, BATCH, clean, importances, make_key(3, 4), binomial=binomial,
        options={loss: options["routing"]} if "routing" in options else {},
    )  # fmt: skip


def gradients(made, output):
    output.backward()
    return {n: p.grad for n, p in made.named_parameters()}


@needs_extension
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize(
    ("delta", "routed", "binomial", "known"), list(itertools.product(*4 * [[False, True]]))
)
def test_masked_forwards_and_gradients_are_the_references(factored, delta, routed, binomial, known):
    routing = {"layers.0.mlp_out": normal(2, N) > 0, "layers.1.mlp_in": normal(3, N) > 0}
    found = []
    for backend in ("cpu", "reference"):
        made = model(factored, backend, delta=delta)
        clean = made.clean_forward(BATCH)
        importances = made.causal_importances(clean)
        masking = Stochastic(
            importances, make_key(3, 4), delta=delta, binomial=binomial,
            routing=routing if routed else {},
        )  # fmt: skip
        reuse = {"clean": clean, "importances": importances} if known else {}
        output = made.masked_forward(BATCH, masking, **reuse)
        found.append((output, gradients(made, output.square().sum())))
    (ours, mine), (reference, its) = found
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    for name, gradient in its.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-11)


@needs_extension
@pytest.mark.parametrize("loss", [n for n in LOSSES if "pgd" not in n])
def test_every_loss_is_the_references(loss):
    options = {"routing": Routing()} if "subset" in loss else {}
    ours, reference = (
        LOSSES[loss](step_of(model(backend=b, delta=True), loss, **options))
        for b in ("cpu", "reference")
    )
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-14)


@needs_extension
def test_no_tensor_of_the_streams_width_is_formed_in_a_step(monkeypatch):
    made = model(delta=True)
    made.clean_forward(BATCH)  # the first one also looks at the target's modules

    def forbidden(self):
        raise AssertionError("formed")

    monkeypatch.setattr(Factored, "dense", forbidden)
    step = step_of(made, "stochastic_recon")
    total = sum(LOSSES[n](step) for n in ("stochastic_recon", "stochastic_recon_layerwise"))
    gradients(made, total + step.importances["layers.0.mlp_in"].penalty_sum.sum())


@needs_extension
def test_the_first_clean_forward_has_the_bits_of_the_later_ones():
    made = model()
    first, second = (made.clean_forward(BATCH) for _ in range(2))
    assert torch.equal(first.output, second.output)
    for name in made.sites:
        assert torch.equal(first.inputs[name], second.inputs[name])


@needs_extension
def test_site_inputs_are_the_targets_own():
    ours, reference = (model(backend=b).clean_forward(BATCH) for b in ("cpu", "reference"))
    torch.testing.assert_close(dict(ours.inputs), dict(reference.inputs))


@needs_extension
def test_other_importance_functions_see_the_tensor():
    for kind in ("vector_mlp", "shared_mlp", "global_mlp"):
        lower = []
        for backend in ("cpu", "reference"):
            made = model(backend=backend, ci_fn=kind)
            found = made.causal_importances(made.clean_forward(BATCH))
            lower.append(found["layers.1.mlp_in"].lower)
        torch.testing.assert_close(*lower)


@needs_extension
def test_active_components_are_counted_from_the_factors():
    counts = [
        model(backend=b).active_counts(model(backend=b).clean_forward(BATCH), 0.1)
        for b in ("cpu", "reference")
    ]
    assert all(torch.equal(counts[0][n], counts[1][n]) for n in counts[0])
    assert sum(int(c.sum()) for c in counts[0].values()) > 0


def test_a_target_that_does_not_ask_for_it_gets_tensors():
    clean = model(factored=False).clean_forward(BATCH)
    assert all(isinstance(x, torch.Tensor) for x in clean.inputs.held.values())


def test_the_reference_is_plain():
    clean = model(backend="reference").clean_forward(BATCH)
    assert all(isinstance(x, torch.Tensor) for x in clean.inputs.held.values())


@needs_extension
def test_shapes_and_modules_of_sequences_are_kept():
    made = model()
    batch = BATCH[:20].reshape(4, 5, FEATURES)
    clean = made.clean_forward(batch)
    importances = made.causal_importances(clean)
    masking = Stochastic(importances, make_key(0, 0), delta=False)
    flat = made.masked_forward(BATCH[:20], Stochastic(
        made.causal_importances(made.clean_forward(BATCH[:20])), make_key(0, 0)
    ))  # fmt: skip
    torch.testing.assert_close(made.masked_forward(batch, masking).flatten(0, 1), flat)


@needs_extension
def test_ops_get_factors_no_wider_than_they_need(monkeypatch):
    """The gate of ``layers.1.mlp_in`` reads features and the first layer's neurons."""
    widths = []
    gate = ops.gate

    def seen(x, *args, **kwargs):
        widths.append(x.shape[-1])
        return gate(x, *args, **kwargs)

    monkeypatch.setattr(ops, "gate", seen)
    made = model()
    made.causal_importances(made.clean_forward(BATCH))
    assert widths == [FEATURES, NEURONS, FEATURES + NEURONS, NEURONS]


def test_it_can_be_asked_for_anywhere_and_forbidden_everywhere():
    def held(**options):
        return list(model(**options).clean_forward(BATCH).inputs.held.values())

    assert any(isinstance(x, Factored) for x in held(backend="reference", wanted=True))
    assert not any(isinstance(x, Factored) for x in held(backend="auto", wanted=False))


class Other(nn.Module):
    """A target of another kind: ``body`` is its forward."""

    def __init__(self, body, **layers):
        super().__init__()
        self.body = body
        generator = torch.Generator().manual_seed(5)
        shapes = {"up": (FEATURES, WIDTH), "read": (WIDTH, NEURONS), "write": (NEURONS, WIDTH)}
        for name, (d_in, d_out) in {**shapes, **layers}.items():
            layer = nn.Linear(d_in, d_out, bias=name == "read").double()
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            self.add_module(name, layer)

    def forward(self, x):
        return self.body(self, x)

    def stream(self, x):
        residual = self.up(x)
        return residual + self.write(torch.relu(self.read(residual)))


def results(target, sites, batch=BATCH, **options):
    """What a masked forward gives, and the gradients, with and without factors."""
    found = []
    for factored in (True, False):
        made = of(target, sites, factored=factored, **options)
        made.clean_forward(batch)
        clean = made.clean_forward(batch)
        importances = made.causal_importances(clean)
        masking = Stochastic(importances, make_key(3, 4), delta=made.delta)
        output = made.masked_forward(batch, masking, clean=clean, importances=importances)
        found.append({"clean": clean.output, "": output, **gradients(made, output.square().sum())})
    return found


BOTH = {"read": C, "write": C}


@needs_extension
@pytest.mark.parametrize(
    ("body", "sites", "options"),
    [
        (lambda t, x: t.stream(x), BOTH, {}),
        (lambda t, x: t.stream(x), {"read": C}, {}),
        (lambda t, x: {"found": [t.stream(x)]}, BOTH, {"output": "found.0"}),
        (lambda t, x: (t.stream(x), 1), BOTH, {"output": lambda pair: pair[0]}),
        (lambda t, x: t.write(input=t.read(input=t.up(input=x))), BOTH, {"delta": True}),
    ],
    ids=["all sites", "a reader", "a path", "a function", "keywords"],
)
def test_the_output_may_be_the_stream(body, sites, options):
    torch.testing.assert_close(*results(Other(body), sites, **options))


@needs_extension
def test_one_position_without_a_batch():
    target = Other(lambda t, x: t.read(t.up(x)))
    torch.testing.assert_close(*results(target, {"read": C}, BATCH[0], delta=True))


@needs_extension
@pytest.mark.parametrize("width", [WIDTH, 3 * WIDTH])
def test_a_reader_as_wide_as_the_stream_forms_no_matrix_of_its_own_size(width, monkeypatch):
    target = Other(lambda t, x: t.wide(t.stream(x)), wide=(WIDTH, width))
    sites = BOTH | {"wide": C}
    torch.testing.assert_close(*results(target, sites, delta=True))
    eye, made = torch.eye, []
    monkeypatch.setattr(torch, "eye", lambda d, **options: made.append(d) or eye(d, **options))
    results(target, sites, delta=True)
    assert made
    assert width not in made


@needs_extension
def test_a_forward_of_a_modules_own_is_kept():
    target = Other(lambda t, x: t.read(t.up(x)))
    own = target.up.forward
    target.up.forward = lambda x: 2 * own(x)
    torch.testing.assert_close(*results(target, {"read": C}))


@needs_extension
@pytest.mark.parametrize("site", ["write", "pass_on"])
def test_a_site_that_computes_something_else_is_refused(site):
    class PassesOn(nn.Linear):
        def forward(self, x):
            return x + x

    target = Other(lambda t, x: t.read(t.pass_on(t.stream(x))))
    target.pass_on = PassesOn(WIDTH, WIDTH).double()
    own = target.write.forward
    if site == "write":
        target.write.forward = lambda x: 2 * own(x)
    with pytest.raises(UserError, match=f"{site}.*computes something else"):
        of(target, {site: C}, factored=True).clean_forward(BATCH)


@needs_extension
def test_components_that_change_between_two_forwards_are_read_anew():
    """Also where they take no gradient and the optimiser leaves no trace, as in PGD's ascents."""
    target, found = Other(lambda t, x: t.stream(x) @ normal(7, WIDTH, 2)), []
    for factored in (True, False):
        made = of(target, {"read": C}, factored=factored)
        made.requires_grad_(False)
        clean = made.clean_forward(BATCH)
        masking = Stochastic(made.causal_importances(clean), make_key(3, 4))
        made.masked_forward(BATCH, masking, clean=clean)
        optimizer = AdamW([[made.V("read")]], 0.1, 0.0)
        made.V("read").grad = torch.ones_like(made.V("read"))
        optimizer.step()
        found.append(made.masked_forward(BATCH, masking, clean=clean))
    torch.testing.assert_close(*found)


@needs_extension
@pytest.mark.parametrize("kind", ["global_mlp", "shared_mlp"])
def test_other_importance_functions_form_an_input_once(kind, monkeypatch):
    made = model(ci_fn=kind)
    made.clean_forward(BATCH)
    clean, formed = made.clean_forward(BATCH), []
    dense = Factored.dense

    def counted(self):
        formed.append(self.shape)
        return dense(self)

    monkeypatch.setattr(Factored, "dense", counted)
    made.causal_importances(clean)
    assert len(formed) == sum(isinstance(x, Factored) for x in clean.inputs.held.values())


@needs_extension
@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("deltas", normal(1, 1)),
        ("deltas", normal(1, N, 1)),
        ("routing", normal(1, N, 2) > 0),
        ("routing", normal(1, N)),
    ],
)
def test_deltas_and_routing_of_another_kind_are_an_error(what, given):
    name = "layers.0.mlp_out"
    masking = Given(**{"masks": {name: normal(2, N, C)}, what: {name: given}})
    with pytest.raises(ValueError, match=r"mask\.(delta|routing)"):
        model().masked_forward(BATCH, masking, sites=[name])
