"""The choice of tiles: shipped defaults, the tuner and its file, deterministic mode, launches."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tests.checks import error, normal
from tests.kernels import every_kernel

pytest.importorskip("triton")
pytestmark = [pytest.mark.usefixtures("triton_ops"), pytest.mark.without_kernels]

LIKE = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """The tuner on a device that is not there; every trial is listed and its tile is its time."""
    from spd_fast.kernels import configs

    tried = []
    configs._remembered.cache_clear()
    configs._architecture.cache_clear()
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("SPD_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("SPD_FAST_TUNE", "1")

    def do_bench(run, warmup, rep):
        run()
        return -tried[-1].blocks["BLOCK_N"]  # the largest tile is the fastest

    monkeypatch.setattr(configs.triton.testing, "do_bench", do_bench)

    def pick(shape=(1000, 64, 64), like=LIKE):
        return configs.pick("mask_forward", "mma", like, shape, tried.append)

    yield SimpleNamespace(
        pick=pick, tried=tried, file=tmp_path / "spd_fast" / "tuning.json", configs=configs,
        options=configs.CONFIGS["mask_forward"]["mma"],
    )  # fmt: skip
    configs._remembered.cache_clear()
    configs._architecture.cache_clear()


def test_a_first_call_takes_the_shipped_default_without_tuning(tuner, monkeypatch):
    monkeypatch.delenv("SPD_FAST_TUNE")
    assert tuner.pick() is tuner.options[0]
    assert tuner.tried == []
    assert not tuner.file.exists()


def test_the_tuner_tries_each_candidate_once_and_remembers_the_fastest(tuner):
    assert tuner.pick() is tuner.options[1]
    assert tuner.tried == list(tuner.options)
    assert tuner.pick() is tuner.options[1]
    assert len(tuner.tried) == len(tuner.options)
    (key,) = json.loads(tuner.file.read_text())
    assert "Some GPU-sm90" in key
    assert "mask_forward/mma/bfloat16/1024x64x64" in key


def test_another_process_reads_what_was_tuned_even_if_it_does_not_tune(tuner, monkeypatch):
    tuner.pick()
    tuner.configs._remembered.cache_clear()
    monkeypatch.delenv("SPD_FAST_TUNE")
    assert tuner.pick() is tuner.options[1]


def test_sizes_of_one_power_of_two_share_an_entry_and_others_do_not(tuner):
    tuner.pick((1000, 64, 64))
    tuner.pick((600, 50, 33))
    assert len(tuner.tried) == len(tuner.options)
    tuner.pick((500, 64, 64))
    assert len(tuner.tried) == 2 * len(tuner.options)


def test_deterministic_mode_pins_the_default(tuner):
    tuner.pick()
    torch.use_deterministic_algorithms(True)
    try:
        assert tuner.pick() is tuner.options[0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_tuned_while_a_graph_is_captured(tuner, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuner.pick() is tuner.options[0]
    assert tuner.tried == []


@pytest.mark.parametrize("content", ["not json", "[1, 2]", '{"a": 1}'])
def test_a_damaged_file_is_tuned_over(content, tuner):
    tuner.file.parent.mkdir(parents=True)
    tuner.file.write_text(content)
    assert tuner.pick() is tuner.options[1]
    assert list(json.loads(tuner.file.read_text()).values()) == [str(tuner.options[1])]


def test_a_winner_is_remembered_by_its_tile(tuner):
    tuner.pick()
    (key,) = json.loads(tuner.file.read_text())
    # One that is no candidate (any more) is tuned over.
    for entry, expected in ((str(tuner.options[0]), 0), ("8x8x8 w1 s1", 1), (0, 1)):
        tuner.file.write_text(json.dumps({key: entry}))
        tuner.configs._remembered.cache_clear()
        assert tuner.pick() is tuner.options[expected]


def test_a_file_that_cannot_be_written_costs_nothing_but_the_memory(tuner, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPD_FAST_CACHE", str(tmp_path / "file"))
    assert tuner.pick() is tuner.options[1]


@pytest.mark.parametrize(("setting", "operands"), [("tf32", "mma"), ("ieee", "ieee")])
def test_tf32_only_where_torch_is_asked_for_it(setting, operands, monkeypatch):
    from spd_fast.kernels import configs, product

    matmul = SimpleNamespace(fp32_precision=setting)  # reading allow_tf32 would be an error
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    fp32 = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    assert configs.operand_class(fp32) == operands
    assert product.precision(fp32) == setting
    assert product.precision(SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)) == "ieee"
    monkeypatch.setattr(
        torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=setting == "tf32")
    )
    assert configs.operand_class(fp32) == operands


def test_a_launch_is_ragged_where_anything_it_knows_does_not_divide_by_16():
    from spd_fast.kernels.configs import CONFIGS, by_divisibility

    def of(*facts):
        return by_divisibility("gate_forward", "mma", *facts)

    matrix = torch.zeros(5, 64)
    assert of(4096, 0, matrix, None, matrix.data_ptr(), matrix[:, 16:40]) == "mma"
    assert of(4096, 769) == of(1) == "mma ragged"
    for view in (matrix.t(), matrix[:, ::2], matrix[:, 1:], torch.zeros(5, 60),
                 matrix[:, :1].expand(5, 64)):  # fmt: skip
        assert of(4096, view) == "mma ragged"
    assert of(4096, matrix[0, 1:].data_ptr()) == "mma ragged"
    assert by_divisibility("gate_forward", "any", 4097) == "any"
    for options in CONFIGS.values():
        assert {name.removesuffix(" ragged") for name in options} <= options.keys()


def unused(constants):
    """Parameters of the product and masking kernels that a launch's constants compile out."""
    of_h = {"x", "x_row", "x_col", "V", "v_row", "v_col", "d_in"}
    of_a = {"grad", "y_row", "y_col", "U", "u_row", "u_col", "d_out"}
    product_h = constants.get("PRODUCT", constants.get("PRODUCT_H"))
    names = {"inner", "i_row", "i_col"} if product_h else of_h
    if "PRODUCT_A" in constants:
        names |= {"a_bar", "ab_row"} if constants["PRODUCT_A"] else of_a
    if not constants.get("LOWER"):
        names |= {"lower", "l_row", "l_col"}
    if constants.get("SOURCE") != 1:
        names |= {"source", "s_row", "s_col"}
    return names


def wrong(case, arguments):
    """What ``case`` assumes of these arguments and is not so; Triton would not find it either."""
    for name, value in arguments.items():
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        assumed = case.assumption(name)
        if (assumed == 16 and number % 16) or (assumed == 0 and number != 1):
            yield name, number


@pytest.fixture
def launches(monkeypatch):
    """Every launch so far: the kernel, its configuration, element type and arguments in use."""
    seen = []

    def look(kernel, like, grid, *args, config=None, **constants):
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        for name in unused(constants):
            arguments.pop(name, None)
        tiles = constants if config is None else config.blocks
        blocks = {k: v for k, v in tiles.items() if k.startswith("BLOCK")}
        warps = (4, 1) if config is None else (config.num_warps, config.num_stages)
        element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[like.dtype]
        seen.append((kernel, (blocks, *warps), element, arguments))

    every_kernel.watch(monkeypatch, look)
    return seen


def assert_compiled(launches):
    """The gate has a case of each launch that assumes nothing which is not so."""
    from spd_fast.kernels.registry import cases

    default = [c for c in cases() if c.default]
    assert launches
    for kernel, configuration, element, arguments in launches:
        of_tile = [
            case for case in default
            if case.kernel is kernel and case.element == element
            and (case.config.blocks, case.config.num_warps, case.config.num_stages) == configuration
        ]  # fmt: skip
        found = [list(wrong(case, arguments)) for case in of_tile]
        assert [] in found, (getattr(kernel, "fn", kernel).__name__, configuration, element, found)


@pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [
        ("large", torch.bfloat16, (5, 16, 48, 32, 16)),
        ("large", torch.bfloat16, (3, 16, 35, 32, 7)),
        ("large", torch.bfloat16, (3, 5, 48, 32, 7)),
        ("large", torch.bfloat16, (3, 16, 48, 6, 7)),
        ("library", torch.bfloat16, (5, 16, 35, 32, 7)),
        ("library", torch.float32, (5, 16, 48, 32, 16)),
        ("default", torch.bfloat16, (5, 16, 35, 6, 7)),
        ("default", torch.float32, (3, 5, 35, 6, 7)),
    ],
    ids=str,
)
def test_every_launch_is_of_a_case_that_the_gate_compiles(
    name, dtype, sizes, launches, monkeypatch
):
    from spd_fast.kernels import regimes

    for setting, value in every_kernel.REGIMES[name].items():
        monkeypatch.setattr(regimes, setting, value)
    assert every_kernel.run("cpu", dtype, sizes).isfinite()
    assert_compiled(launches)


# Matrices of even sizes of which something else does not divide by 16.
VIEWS = {
    "columns apart": lambda rows, cols: normal(1, cols, rows).bfloat16().t(),
    "every other column": lambda rows, cols: normal(2, rows, 2 * cols).bfloat16()[:, ::2],
    "odd address": lambda rows, cols: normal(3, rows, cols + 16).bfloat16()[:, 1 : cols + 1],
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_launches_on_views_are_of_cases_that_the_gate_compiles(view, small, launches, monkeypatch):
    from spd_fast.kernels import regimes
    from spd_fast.ops import MaskRecipe, component_linear, gate

    monkeypatch.setattr(regimes, "small", lambda *_: small)
    N, C, d = 16, 32, 48
    shapes = (N, d), (d, C), (C, d), (N, C), (N, C), (N, C), (N, d)
    x, V, U, lower, source, grad_lower, grad = (VIEWS[view](*shape) for shape in shapes)
    for t in (x, V, U):
        t.requires_grad_()
    w, b, o, c = (normal(4, *shape).bfloat16() for shape in ((C, 1, 2), (C, 2), (C, 2, 1), (C, 1)))
    g = gate(x, V, [w, o], [b, c], sigmoid="paper").lower
    y = component_linear(x, V, U, MaskRecipe(lower, source))
    torch.autograd.grad([g, y], [x, V, U], [grad_lower, grad])
    assert_compiled(launches)


@pytest.fixture
def found(monkeypatch):
    """A torch whose products take ``out_dtype`` as said; lists the calls that did."""
    from spd_fast.kernels import product

    widened = []

    def known(name, works):
        plain = getattr(torch, name)

        def call(*args, out_dtype=None):
            if out_dtype is None:
                return plain(*args)
            if not works:
                raise NotImplementedError(f"aten::{name}.dtype")
            widened.append(name)
            return plain(*(t.to(out_dtype) for t in args))

        monkeypatch.setattr(torch, name, call)

    def version(mm, addmm):
        known("mm", mm), known("addmm", addmm)
        found = product.probe(torch.device("cpu"), torch.bfloat16)
        monkeypatch.setattr(product, "widening", lambda _: found)
        widened.clear()
        return found

    return SimpleNamespace(version=version, widened=widened)


@pytest.mark.parametrize(
    ("mm", "addmm", "widened"),
    [(True, True, ["mm", "addmm"]), (True, False, ["mm", "mm"]), (False, False, [])],
)  # fmt: skip
def test_a_sum_in_fp32_is_made_with_what_torch_has(mm, addmm, widened, found):
    from spd_fast.kernels import product

    assert found.version(mm, addmm) == (mm, addmm)
    a, b = normal(1, 9, 33).bfloat16(), normal(2, 33, 7).bfloat16()
    exact = a.double() @ b.double()
    first = product.mm(a, b, torch.float32)
    total = product.addmm(first.clone(), a, b, torch.float32)
    assert (first.dtype, total.dtype, found.widened) == (torch.float32, torch.float32, widened)
    # Where a product passes through bf16 it is half of a step of that off.
    allowed = 1e-6 if mm else 2**-9
    assert error(first, exact) <= allowed
    assert error(total, 2 * exact) <= allowed


@pytest.fixture
def device(monkeypatch):
    """A device that widens all products, and a stream on it; lists what was probed."""
    from spd_fast.kernels import product

    stream = SimpleNamespace(capturing=False, probed=[])

    def probe(*at):
        assert not stream.capturing
        stream.probed.append(at)
        return product.Widening(True, True)

    monkeypatch.setattr(product, "_FOUND", {})
    monkeypatch.setattr(product, "probe", probe)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.capturing)
    return stream


def test_what_was_found_before_a_recording_holds_in_it(device):
    from spd_fast.kernels import product

    assert product.widening(LIKE) == (True, True)
    device.capturing = True
    assert product.widening(LIKE) == (True, True)
    assert device.probed == [(LIKE.device, LIKE.dtype)]


def test_nothing_is_tried_in_a_recording_nor_remembered_of_it(device):
    from spd_fast.kernels import product

    device.capturing = True
    assert product.widening(LIKE) == (False, False)
    device.capturing = False
    assert product.widening(LIKE) == (True, True)


def test_a_product_that_is_wrong_in_fp32_is_not_used(monkeypatch):
    from spd_fast.kernels import product

    def wrong(*args, out_dtype):
        return torch.zeros(16, 16, dtype=out_dtype)

    monkeypatch.setattr(torch, "mm", wrong)
    monkeypatch.setattr(torch, "addmm", wrong)
    assert product.probe(torch.device("cpu"), torch.bfloat16) == (False, False)


def test_this_torch_is_probed_without_an_error():
    from spd_fast.kernels import product

    assert product.probe(torch.device("cpu"), torch.bfloat16) == (False, False)


def test_every_launch_turns_fp_fusion_off_and_passes_its_configuration(triton_ops):
    from spd_fast.kernels.configs import Config, launch

    seen = {}

    class Kernel:
        arg_names = ("a", "size")

        def __getitem__(self, grid):
            return lambda *args, **options: seen.update(grid=grid, args=args, **options)

    a = torch.zeros(3)
    launch(Kernel(), a, (2,), a, 3, FLAG=True, config=Config({"BLOCK_N": 64}, 8, 3))
    assert seen == {
        "grid": (2,), "args": (a, 3), "FLAG": True, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3,
        "enable_fp_fusion": False,
    }  # fmt: skip


def test_a_tensor_on_another_device_is_named():
    from spd_fast.kernels import importances

    with pytest.raises(ValueError, match=r"grad_lower \(4, 3\) is on meta, need cpu"):
        importances.importances_backward(
            torch.zeros(4, 3, device="meta"), None, torch.zeros(4, 3), "paper", "none", 1.0, 0.0
        )


def test_recipes_of_the_wrong_dtype_are_named():
    from spd_fast.ops import MaskRecipe, RandomSource, component_linear

    x, V, U = torch.ones(4, 3), torch.ones(3, 5), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"the key is torch.float32 \(2,\), need int64 \(2,\)"):
        component_linear(x, V, U, MaskRecipe(source=RandomSource(torch.zeros(2))))
    routing = MaskRecipe(routing=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask.routing is torch.int64, need bool"):
        component_linear(x, V, U, routing, weight=torch.ones(2, 3))
