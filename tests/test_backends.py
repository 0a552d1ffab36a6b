"""Who computes: the choice of a backend, its errors and what ``auto`` says when it falls back."""

from __future__ import annotations

import warnings

import pytest
import torch

from spd_fast import UserError, backends
from tests.conftest import needs_extension

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def supported(_: str) -> None:
    return None


def unsupported(backend: str) -> str:
    return f"{backend} lacks this case"


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    backends._say_once.cache_clear()
    yield
    backends._say_once.cache_clear()


@pytest.fixture
def usable(monkeypatch):
    """Every backend, as if this machine had them all."""
    monkeypatch.setattr(backends, "unavailable_reason", supported)


@pytest.fixture
def unusable(monkeypatch):
    """No backend but the reference."""
    monkeypatch.setattr(
        backends,
        "unavailable_reason",
        lambda name: None if name in ("auto", "reference") else "it is not built",
    )


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta")])
def test_the_reference_takes_every_device(device):
    assert backends.resolve("reference", device, "op", unsupported) == "reference"


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_auto_and_reference_are_always_available(name):
    assert backends.unavailable_reason(name) is None


@pytest.mark.parametrize(("device", "fastest"), [(CPU, "cpu"), (CUDA, "cuda")])
@pytest.mark.usefixtures("usable")
def test_auto_takes_the_fastest_of_the_device(device, fastest):
    assert backends.resolve(None, device, "op", supported) == fastest


@pytest.mark.usefixtures("usable")
def test_auto_goes_on_to_the_next_that_supports_the_case():
    def not_cuda(backend):
        return "it lacks this case" if backend == "cuda" else None

    assert backends.resolve("auto", CUDA, "op", not_cuda) == "triton"


@pytest.mark.usefixtures("usable")
def test_auto_falls_back_with_the_reason():
    with pytest.warns(UserWarning, match=r"op runs on the reference backend \(cpu: cpu lacks this"):
        assert backends.resolve("auto", CPU, "op", unsupported) == "reference"


@pytest.mark.usefixtures("unusable")
def test_auto_falls_back_where_nothing_is_available():
    with pytest.warns(UserWarning, match=r"reference backend \(cpu: it is not built\)"):
        assert backends.resolve("auto", CPU, "op", supported) == "reference"


@pytest.mark.usefixtures("usable")
def test_auto_says_so_once_for_each_operation():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for operation in ("gate", "gate", "faithfulness", "gate"):
            backends.resolve("auto", CPU, operation, unsupported)
    assert [str(w.message).split()[0] for w in said] == ["gate", "faithfulness"]


def test_auto_on_another_device_is_the_reference_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", torch.device("meta"), "op", unsupported) == "reference"


@pytest.mark.usefixtures("usable")
def test_an_explicit_choice_does_not_fall_back():
    with pytest.raises(UserError, match="'cpu' does not support this op: cpu lacks this case"):
        backends.resolve("cpu", CPU, "op", unsupported)


@pytest.mark.usefixtures("unusable")
def test_an_unavailable_choice_is_an_error_with_the_reason():
    with pytest.raises(UserError, match="'cpu' cannot run here: it is not built; use backend"):
        backends.resolve("cpu", CPU, "op", supported)


@pytest.mark.parametrize(
    ("backend", "device"), [("cpu", CUDA), ("triton", CPU), ("cuda", CPU)], ids=str
)
@pytest.mark.usefixtures("usable")
def test_a_backend_of_another_device_is_an_error(backend, device):
    with pytest.raises(UserError, match=f"'{backend}' computes on .* tensors, got {device.type}"):
        backends.resolve(backend, device, "op", supported)


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(UserError, match="unknown backend 'tritn'; nearest: 'triton'"):
        backends.resolve("tritn", CPU, "op", supported)


def test_the_reason_of_an_unknown_name_is_an_error():
    with pytest.raises(UserError, match="unknown backend 'tpu'; known: auto, reference"):
        backends.unavailable_reason("tpu")


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("SPD_FAST_BACKEND", "reference")
    assert backends.resolve(None, CPU, "op", supported) == "reference"


@pytest.mark.usefixtures("usable")
def test_the_call_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SPD_FAST_BACKEND", "reference")
    assert backends.resolve("cpu", CPU, "op", supported) == "cpu"


def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("SPD_FAST_BACKEND", "gpu")
    with pytest.raises(UserError, match="unknown backend 'gpu'"):
        backends.resolve(None, CPU, "op", supported)


@pytest.mark.usefixtures("usable")
def test_an_empty_environment_variable_is_none_at_all(monkeypatch):
    monkeypatch.setenv("SPD_FAST_BACKEND", "")
    assert backends.resolve(None, CPU, "op", supported) == "cpu"


@pytest.mark.parametrize(("backend", "name"), [("reference", "reference"), (None, "cpu")])
@pytest.mark.usefixtures("usable")
def test_name_for_is_the_backend_of_an_ordinary_call(backend, name):
    assert backends.name_for(backend, CPU) == name


@needs_extension
def test_the_extension_makes_the_cpu_backend_available():
    assert backends.unavailable_reason("cpu") is None
    assert backends.resolve("auto", CPU, "op", supported) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_without_a_cuda_device_the_gpu_backends_say_why_they_cannot_run(backend):
    assert backends.unavailable_reason(backend)
    with pytest.raises(UserError, match=f"backend '{backend}' cannot run here"):
        backends.resolve(backend, CUDA, "op", supported)
