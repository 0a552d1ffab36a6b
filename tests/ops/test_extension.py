"""The compiled CPU kernels against the formulas in float64: every mask kind, every gradient."""

import itertools

import pytest
import torch

from spd_fast import _extension

_C = _extension.module()
pytestmark = pytest.mark.skipif(_C is None, reason=str(_extension.unavailable_reason()))

# Relative error that is rounding noise, whatever the eager error is.
FLOOR = {torch.float32: 4e-7, torch.float64: 2e-14}


def component_major(t):
    return t.t().contiguous().t()


def random(seed, *shape, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(name, got, eager, oracle):
    """The error of `got` is at most twice that of `eager`, both against the float64 oracle.

    Errors are relative to the largest entry, or to one, the size of the inputs, if larger.
    """
    assert got is not None, name
    assert got.shape == oracle.shape, (name, got.shape, oracle.shape)
    if oracle.numel() == 0:
        return
    scale = max(oracle.abs().max().item(), 1.0)
    error = (got.double() - oracle).abs().max().item() / scale
    eager_error = (eager.double() - oracle).abs().max().item() / scale
    allowed = 2 * eager_error + FLOOR[got.dtype]
    assert error <= allowed, f"{name}: error {error:.2e}, eager {eager_error:.2e}"


# ---- the formulas


class Lower2026(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s):
        ctx.save_for_backward(s)
        return s.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        leak = torch.where(grad < 0, 0.01 * grad, torch.zeros_like(grad))
        return torch.where(s <= 0, leak, torch.where(s <= 1, grad, torch.zeros_like(grad)))


def lower_sigmoid(s, kind):
    if kind == "2026":
        return Lower2026.apply(s)
    return torch.where(s <= 0, 0.01 * s, s.clamp(max=1))


def upper_sigmoid(s):
    return torch.where(s > 1, 1 + 0.01 * (s - 1), s.clamp(0, 1))


def penalty_of(g, kind, power, eps):
    if kind == "lp":
        return (g + eps) ** power
    return g**2 / (g**2 + power**2)


def eager_gate(x, V, w_in, b_in, w_out, b_out, sigmoid, penalty, power, eps):
    h = x @ V
    if w_in.shape[1] == 0:
        s = h * w_out[:, 0] + b_out
    else:
        z = h[..., None] * w_in + b_in
        s = (torch.nn.functional.gelu(z) * w_out).sum(-1) + b_out
    sums = None
    if penalty != "none":
        sums = penalty_of(upper_sigmoid(s), penalty, power, eps).sum(0)
    return h, lower_sigmoid(s, sigmoid), sums


def eager_linear(x, inner, V, U, lower, r, delta, weight, bias, routing):
    h = x @ V if inner is None else inner
    if r is None:
        m = torch.ones_like(h) if lower is None else lower
    else:
        m = r if lower is None else lower + (1 - lower) * r
    if delta is None:
        y = (h * m) @ U
    else:
        y = (h * (m - delta[:, None])) @ U + delta[:, None] * (x @ weight.T)
    if routing is not None:
        y = torch.where(routing[:, None], y, x @ weight.T)
    return y if bias is None else y + bias


# ---- random numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert _C.philox4x32(counter, key) == words


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_uniform_follows_the_counter(isa, dtype, monkeypatch):
    select_isa(monkeypatch, isa)
    seed, step, draw, site, offset = 2**40 + 7, 123456, 3, 5, 2**32 - 20
    key = torch.tensor([seed, step])
    u = _C.uniform(key, 300, 11, draw, site, offset, dtype)
    for row, column in itertools.product((0, 1, 15, 19, 20, 21, 255, 256, 299), range(11)):
        counter = [column // 4, (offset + row) % 2**32, draw, site]
        word = _C.philox4x32(counter, [seed % 2**32, step])[column % 4]
        assert u[row, column].item() == (word >> 8) * 2.0**-24


# ---- kernels under every instruction set and path


def select_isa(monkeypatch, isa):
    monkeypatch.setenv("SPD_FAST_CPU_ISA", isa)
    try:
        assert _C.instruction_set() == isa
    except RuntimeError:
        pytest.skip(f"this machine has no {isa}")


SHAPES = [
    (0, 5, 7, 2),
    (1, 3, 1, 1),
    (7, 1, 5, 3),
    (300, 5, 20, 2),
    (517, 13, 37, 11),
    (700, 40, 70, 10),
]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, monkeypatch):
    select_isa(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=["small", "large"])
def path(request, monkeypatch):
    monkeypatch.setenv("SPD_FAST_CPU_PATH", request.param)
    return request.param


def gate_tensors(rows, d_in, components, hidden):
    return {
        "x": random(1, rows, d_in),
        "V": random(2, d_in, components, scale=d_in**-0.5),
        "w_in": random(3, components, hidden, scale=1.4),
        "b_in": random(4, components, hidden, scale=0.5),
        "w_out": random(5, components, max(hidden, 1), scale=max(hidden, 1) ** -0.5),
        "b_out": random(6, components, scale=0.5),
    }


def run_gate(tensors, grads, options, fused):
    """(outputs, gradients) of the gate, fused or eager, in the tensors' dtype."""
    leaves = {k: v.clone().requires_grad_(not fused) for k, v in tensors.items()}
    args = list(leaves.values())
    if not fused:
        h, lower, sums = eager_gate(*args, *options)
        terms = [(h, grads[0]), (lower, grads[1]), (sums, grads[2])]
        total = sum((o * g).sum() for o, g in terms if o is not None and g is not None)
        # Keeps every leaf in the graph where an output is not used.
        total = total + 0 * h.sum() + 0 * lower.sum()
        return (h, lower, sums), torch.autograd.grad(
            total, args, allow_unused=True, materialize_grads=True
        )
    outputs = _C.gate_forward(*args, *options)
    x, V, *rest = args
    return outputs, _C.gate_backward(*grads, x, V, outputs[0], *rest, *options, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sigmoid", "penalty", "power"),
    [
        ("paper", "lp", 1.0),
        ("2026", "lp", 2.0),
        ("paper", "lp", 0.9),
        ("2026", "smooth_l0", 0.3),
        ("paper", "none", 1.0),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", [0, 1, 16])
def test_gate(shape, hidden, sigmoid, penalty, power, dtype, path, isa):
    rows, d_in, components, _ = shape
    # A larger eps where (g + eps)^p is too steep at zero to compare in float32.
    eps = 1e-2 if power < 1 else 1e-12
    options = (sigmoid, penalty, power, eps)
    exact = gate_tensors(rows, d_in, components, hidden)
    exact_grads = [random(7, rows, components), random(8, rows, components), random(9, components)]
    tensors = {k: v.to(dtype) for k, v in exact.items()}
    grads = [g.to(dtype) for g in exact_grads]
    # The oracle starts from the rounded inputs.
    oracle = run_gate(
        {k: v.double() for k, v in tensors.items()}, [g.double() for g in grads], options, False
    )
    eager = run_gate(tensors, grads, options, False)
    before = [t.clone() for t in [*tensors.values(), *grads]]
    fused = run_gate(tensors, grads, options, True)
    for name, got, other, truth in zip(
        ("inner", "lower", "penalty"), fused[0], eager[0], oracle[0], strict=True
    ):
        if truth is not None:
            assert_close(name, got, other.detach(), truth.detach())
    for name, got, other, truth in zip(exact, fused[1], eager[1], oracle[1], strict=True):
        assert_close(f"grad_{name}", got, other, truth)
    for old, new in zip(before, [*tensors.values(), *grads], strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [0, 1, 16])
@pytest.mark.parametrize("zeros", [0.3, 0.8, 1.0])
def test_gate_of_inputs_that_are_often_zero(zeros, hidden, dtype, path, isa):
    options = ("paper", "lp", 2.0, 1e-12)
    exact = gate_tensors(700, 5, 20, hidden)
    exact["x"][torch.rand(700, generator=torch.Generator().manual_seed(0)) < zeros] = 0
    tensors = {k: v.to(dtype) for k, v in exact.items()}
    shapes = [(700, 20), (700, 20), (20,)]
    grads = [random(7 + i, *shape).to(dtype) for i, shape in enumerate(shapes)]
    oracle = run_gate(
        {k: v.double() for k, v in tensors.items()}, [g.double() for g in grads], options, False
    )
    eager = run_gate(tensors, grads, options, False)
    fused = run_gate(tensors, grads, options, True)
    for name, got, other, truth in zip(
        ("inner", "lower", "penalty"), fused[0], eager[0], oracle[0], strict=True
    ):
        assert_close(name, got, other.detach(), truth.detach())
    for name, got, other, truth in zip(exact, fused[1], eager[1], oracle[1], strict=True):
        assert_close(f"grad_{name}", got, other, truth)


def test_gate_keeps_a_nan_among_zeros(isa):
    tensors = gate_tensors(300, 5, 20, 16)
    tensors["x"][1:] = 0
    tensors["x"][0] = float("nan")
    _, lower, _ = _C.gate_forward(*tensors.values(), "paper", "lp", 1.0, 1e-12)
    assert lower[0].isnan().all()
    assert lower[1:].isfinite().all()


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_gate_backward_with_absent_gradients(given, path):
    options = ("paper", "lp", 2.0, 1e-12)
    tensors = gate_tensors(300, 6, 9, 4)
    all_grads = [random(7, 300, 9), random(8, 300, 9), random(9, 9)]
    grads = [g if on else None for g, on in zip(all_grads, given, strict=True)]
    oracle = run_gate(tensors, grads, options, False)[1]
    fused = run_gate(tensors, grads, options, True)[1]
    for name, got, truth in zip(tensors, fused, oracle, strict=True):
        assert_close(f"grad_{name}", got, truth, truth)


MASKS = ["ones", "lower", "source", "lower_source", "lower_key", "key", "lower_binomial"]
DELTAS = ["none", "given", "random"]
NAMES = ["x", "inner", "V", "U", "lower", "source", "delta", "bias"]


def linear_case(rows, d_in, components, d_out, mask, delta, routed, with_inner, with_bias):
    t = {
        "x": random(1, rows, d_in),
        "U": random(3, components, d_out),
        "weight": random(4, d_out, d_in),
        "bias": random(5, d_out) if with_bias else None,
        "inner": random(2, rows, components) if with_inner else None,
        "V": None if with_inner else random(2, d_in, components),
        "lower": random(6, rows, components).clamp(-0.02, 1) if "lower" in mask else None,
        "source": random(7, rows, components).abs().clamp(0, 1) if "source" in mask else None,
        "delta": random(8, rows).abs().clamp(0, 1) if delta == "given" else None,
        "grad_y": random(9, rows, d_out),
    }
    key = (
        torch.tensor([11, 17]) if "key" in mask or "binomial" in mask or delta == "random" else None
    )
    routing = random(10, rows) > 0 if routed else None
    return t, key, routing


def run_linear(t, key, routing, binomial, random_delta, fused):
    draw, site, offset = 2, 3, 1000
    if fused:
        recipe = {
            "x": t["x"],
            "inner": t["inner"],
            "V": t["V"],
            "U": t["U"],
            "lower": t["lower"],
            "source": t["source"],
            "key": key,
            "draw": draw,
            "site": site,
            "row_offset": offset,
            "binomial": binomial,
            "delta": t["delta"],
            "random_delta": random_delta,
            "weight": t["weight"],
            "bias": t["bias"],
            "routing": routing,
        }
        y = _C.component_linear_forward(**recipe)
        needs = {f"need_{n}": t[n] is not None for n in NAMES}
        grads = _C.component_linear_backward(grad_y=t["grad_y"], **recipe, **needs)
        return y, dict(zip(NAMES, grads, strict=True))
    leaves = {n: t[n].clone().requires_grad_() if t[n] is not None else None for n in NAMES}
    rows, components = t["x"].shape[0], t["U"].shape[0]
    r, delta = leaves["source"], leaves["delta"]
    if key is not None:
        u = _C.uniform(key, rows, components + 1, draw, site, offset, t["x"].dtype)
        r = (u[:, :components] >= 0.5).to(u.dtype) if binomial else u[:, :components]
        delta = u[:, components] if random_delta else delta
    y = eager_linear(
        leaves["x"],
        leaves["inner"],
        leaves["V"],
        leaves["U"],
        leaves["lower"],
        r,
        delta,
        t["weight"],
        leaves["bias"],
        routing,
    )
    used = {n: v for n, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(y, list(used.values()), t["grad_y"], allow_unused=True)
    grads = {
        n: torch.zeros_like(used[n]) if g is None else g for n, g in zip(used, grads, strict=True)
    }
    return y.detach(), grads


def cast(t, dtype):
    return {k: None if v is None else v.to(dtype) for k, v in t.items()}


def test_the_gradient_of_a_bias_is_precise_where_it_cancels(isa):
    t, key, routing = linear_case(256, 3, 2, 512, "lower", "none", False, True, True)
    half = random(9, 128, 512)
    t["grad_y"] = torch.cat([half, -half])
    t = cast(t, torch.float32)
    got = run_linear(t, key, routing, False, False, True)[1]["bias"]
    assert_close("grad_bias", got, t["grad_y"].sum(0), t["grad_y"].double().sum(0))


def check_linear(t, key, routing, binomial, random_delta, dtype):
    rounded = cast(t, dtype)
    oracle = run_linear(cast(rounded, torch.float64), key, routing, binomial, random_delta, False)
    eager = run_linear(rounded, key, routing, binomial, random_delta, False)
    before = cast(rounded, dtype)
    fused = run_linear(rounded, key, routing, binomial, random_delta, True)
    assert_close("y", fused[0], eager[0], oracle[0])
    for name, truth in oracle[1].items():
        assert_close(f"grad_{name}", fused[1][name], eager[1][name], truth)
    for name in NAMES:
        if name not in oracle[1]:
            assert fused[1][name] is None, name
    for name, old in before.items():
        assert old is None or torch.equal(old, rounded[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_inner", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("mask", MASKS)
def test_component_linear(mask, delta, routed, with_inner, dtype, path):
    if delta == "random" and "source" in mask:
        pytest.skip("a key takes the place of a source")
    if delta == "random" and mask in ("ones", "lower"):
        pytest.skip("a key makes the mask random too")
    t, key, routing = linear_case(517, 13, 38, 11, mask, delta, routed, with_inner, True)
    check_linear(t, key, routing, "binomial" in mask, delta == "random", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["lower_key", "lower_source"])
def test_component_linear_shapes(shape, mask, dtype, path, isa):
    rows, d_in, components, d_out = shape
    for delta, routed, with_inner in (("none", False, True), ("given", True, False)):
        t, key, routing = linear_case(
            rows, d_in, components, d_out, mask, delta, routed, with_inner, routed
        )
        check_linear(t, key, routing, False, False, dtype)


def test_tied_parameters_and_other_layouts(path):
    rows, d_in, components, d_out = 130, 6, 10, 4
    t, key, _ = linear_case(
        rows, d_in, components, d_out, "lower_key", "random", False, False, True
    )
    expected = run_linear(t, key, None, False, True, True)
    strided = dict(t)
    for name in ("x", "V", "U", "weight", "lower", "grad_y"):
        wide = torch.zeros(t[name].shape[1], 2 * t[name].shape[0], dtype=torch.float64)
        wide[:, ::2] = t[name].t()
        strided[name] = wide[:, ::2].t()
        assert not strided[name].is_contiguous()
    y, grads = run_linear(strided, key, None, False, True, True)
    assert torch.equal(y, expected[0]) or torch.allclose(y, expected[0], rtol=1e-13)
    for name, grad in grads.items():
        assert grad is None or torch.allclose(grad, expected[1][name], rtol=1e-12, atol=1e-12), name


def test_expanded_gradient():
    t, key, _ = linear_case(130, 6, 10, 4, "lower_key", "none", False, True, False)
    t["grad_y"] = torch.ones((), dtype=torch.float64).expand(130, 4)
    check_linear(t, key, None, False, False, torch.float64)


# ---- faithfulness


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 20, 2), (40, 200, 10), (300, 33, 5000)])
def test_faithfulness(shape, dtype):
    d_in, components, d_out = shape
    exact = [random(1, d_in, components), random(2, components, d_out), random(3, d_out, d_in)]
    V, U, W = (t.to(dtype) for t in exact)

    def eager(V, U, W):
        V, U = V.clone().requires_grad_(), U.clone().requires_grad_()
        loss = ((W - (V @ U).T) ** 2).sum()
        return loss.detach(), *torch.autograd.grad(3 * loss, [V, U])

    fused = (
        _C.faithfulness_forward(V, U, W),
        *_C.faithfulness_backward(torch.tensor(3.0, dtype=dtype), V, U, W),
    )
    oracle = eager(V.double(), U.double(), W.double())
    for name, got, other, truth in zip("LVU", fused, eager(V, U, W), oracle, strict=True):
        assert_close(name, got, other, truth)


# ---- determinism


def everything(dtype):
    tensors = {k: v.to(dtype) for k, v in gate_tensors(2100, 10, 50, 16).items()}
    grads = [random(7, 2100, 50).to(dtype), random(8, 2100, 50).to(dtype), random(9, 50).to(dtype)]
    results = [
        t for part in run_gate(tensors, grads, ("paper", "lp", 2.0, 1e-12), True) for t in part
    ]
    t, key, routing = linear_case(2100, 10, 50, 12, "lower_key", "random", True, False, True)
    y, out = run_linear(cast(t, dtype), key, routing, False, True, True)
    return [*results, y, *(g for g in out.values() if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_threads(dtype, isa, monkeypatch):
    monkeypatch.setenv("SPD_FAST_CPU_PATH", "small")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(dtype)
        torch.set_num_threads(2)
        two = everything(dtype)
        again = everything(dtype)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_masks_agree_across_instruction_sets(monkeypatch):
    """With U the identity and h one, y is the mask itself: bit-equal to the eager formula."""
    rows, components = 300, 9
    ones = torch.ones(rows, components)
    lower = random(1, rows, components).float().clamp(0, 1)
    key = torch.tensor([5, 6])
    u = _C.uniform(key, rows, components, 1, 2, 3, torch.float32)
    expected = lower + (1 - lower) * u
    for name in ("baseline", "avx2", "avx512"):
        with monkeypatch.context() as m:
            m.setenv("SPD_FAST_CPU_ISA", name)
            try:
                _C.instruction_set()
            except RuntimeError:
                continue
            y = _C.component_linear_forward(
                ones,
                ones,
                None,
                torch.eye(components),
                lower,
                None,
                key,
                1,
                2,
                3,
                False,
                None,
                False,
                None,
                None,
                None,
            )
            assert torch.equal(y, expected), name


def test_nan_and_infinity_are_kept():
    tensors = {k: v.float() for k, v in gate_tensors(20, 1, 3, 4).items()}
    tensors["x"][3] = float("nan")
    tensors["x"][4] = float("inf")
    options = ("paper", "lp", 2.0, 1e-12)
    got = _C.gate_forward(*tensors.values(), *options)
    truth = eager_gate(*tensors.values(), *options)
    assert torch.equal(got[0].isnan(), truth[0].isnan())
    assert got[1][3].isnan().all()
    assert got[2].isnan().all()


# ---- errors


def test_errors_name_the_argument():
    t, _, _ = linear_case(8, 3, 5, 2, "lower", "none", False, True, False)

    def call(**changes):
        recipe = {
            "x": t["x"],
            "inner": t["inner"],
            "V": None,
            "U": t["U"],
            "lower": t["lower"],
            "source": None,
            "key": None,
            "draw": 0,
            "site": 0,
            "row_offset": 0,
            "binomial": False,
            "delta": None,
            "random_delta": False,
            "weight": None,
            "bias": None,
            "routing": None,
        }
        return _C.component_linear_forward(**{**recipe, **changes})

    call()
    with pytest.raises(ValueError, match=r"lower has shape \[8, 4\]; expected \[8, 5\]"):
        call(lower=t["lower"][:, :4])
    with pytest.raises(ValueError, match="U has dtype"):
        call(U=t["U"].float())
    with pytest.raises(ValueError, match="weight is needed"):
        call(routing=torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match="random_delta needs a key"):
        call(random_delta=True, weight=t["weight"])
    with pytest.raises(ValueError, match="d_in 4 but x has 3"):
        _C.gate_forward(
            t["x"],
            torch.ones(4, 5).double(),
            *(torch.ones(5, 1).double() for _ in range(3)),
            torch.ones(5).double(),
            "paper",
            "lp",
            1.0,
            0.0,
        )
