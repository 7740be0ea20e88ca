"""Which backend runs: the table's order, the argument, `use`, the environment; never a fallback."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from resnext_kernels import GroupedConvBNReLU, backends, functional
from resnext_kernels.backends import cpu, reference
from resnext_kernels.functional import grouped_conv_bn_relu
from resnext_kernels.problem import ConvProblem

FUNCTIONS = [
    "conv_affine_relu",
    "conv_bn_relu",
    "conv_stats",
    "batch_stats",
    "normalize_relu",
    "bn_relu_backward",
    "bn_relu_input_gradient",
    "conv_backward",
    "bn_affine",
    "bn_vectors",
]
PROBLEM = ConvProblem(2, 7, 7, 64, groups=16)
DOUBLE = ConvProblem(2, 7, 7, 64, groups=16, dtype=torch.float64)

needs_cpu = pytest.mark.skipif(cpu.why_not(PROBLEM) is not None, reason=str(cpu.why_not(PROBLEM)))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends whose functions run, as they run."""
    names: list[str] = []

    def recording(name, function):
        def record(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        return record

    for module in (cpu, reference):
        for function in FUNCTIONS:
            original = getattr(module, function)
            monkeypatch.setattr(module, function, recording(module.NAME, original))
    return names


def run(backend: str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 64, 7, 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, 4, 3, 3, dtype=dtype)
    return grouped_conv_bn_relu(
        x, weight, None, None, None, None, groups=16, training=True, backend=backend
    )


def test_the_table_ends_with_the_reference() -> None:
    assert backends.NAMES[-1] == "reference"
    assert list(backends.NAMES) == [
        n for n in ("cuda", "triton", "cpu", "reference") if n in backends.NAMES
    ]


@pytest.mark.parametrize("name", backends.NAMES)
def test_every_backend_offers_the_contract(name: str) -> None:
    import importlib
    import inspect

    module = importlib.import_module(f"resnext_kernels.backends.{name}")
    assert name == module.NAME
    for function in FUNCTIONS:
        parameters = inspect.signature(getattr(module, function)).parameters
        assert list(parameters) == list(inspect.signature(getattr(reference, function)).parameters)
    reason = module.why_not(DOUBLE)
    assert reason is None or (isinstance(reason, str) and reason)


def test_available_and_compatible() -> None:
    assert backends.available()[-1] == "reference"
    assert set(backends.available()) <= set(backends.NAMES)
    assert backends.compatible(DOUBLE) == ["reference"]
    assert backends.select(DOUBLE) is reference


@needs_cpu
def test_first_that_serves_is_used(called: list[str]) -> None:
    assert backends.compatible(PROBLEM) == ["cpu", "reference"]
    assert backends.select(PROBLEM) is cpu
    run().sum().backward()
    assert set(called) == {"cpu"}
    called.clear()
    run(dtype=torch.float64).sum().backward()
    assert set(called) == {"reference"}


def test_explicit_backend_runs_forward_and_backward(called: list[str]) -> None:
    run("reference").sum().backward()
    assert set(called) == {"reference"}


def test_explicit_choice_never_falls_back(called: list[str]) -> None:
    reason = cpu.why_not(DOUBLE)
    assert reason is not None
    with pytest.raises(RuntimeError) as raised:
        run("cpu", torch.float64)
    assert reason in str(raised.value)
    assert "cpu" in str(raised.value)
    with backends.use("cpu"), pytest.raises(RuntimeError, match="does not serve"):
        run(dtype=torch.float64)
    assert not called


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv1x1_keeps_to_the_backend_asked_for(memory_format: torch.memory_format) -> None:
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(4, 8, 1, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="does not serve"):
        functional.conv1x1(x, weight, backend="cpu")
    with backends.use("cpu"), pytest.raises(RuntimeError, match="does not serve"):
        functional.conv1x1(x, weight)
    assert torch.equal(functional.conv1x1(x, weight), torch.conv2d(x, weight))


def test_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """Installed without a compiler: the reference serves, and `cpu` says what is missing."""
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_MISSING", "the compiled library is missing", raising=False)
    backends._select.cache_clear()
    try:
        run().sum().backward()
        assert set(called) == {"reference"}
        with pytest.raises(RuntimeError, match="compiled library is missing"):
            run("cpu")
    finally:
        backends._select.cache_clear()


def test_use(called: list[str]) -> None:
    with backends.use("reference"):
        assert backends.requested() == "reference"
        y = run()
        with backends.use("cpu"):
            assert backends.requested() == "cpu"
        assert backends.requested() == "reference"
    assert backends.requested() is None
    y.sum().backward()  # outside: by the backend of the forward pass
    assert set(called) == {"reference"}


def test_use_is_left_by_an_exception() -> None:
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.requested() is None


def test_argument_goes_before_use(called: list[str]) -> None:
    with backends.use("cpu"):
        run("reference")
    assert set(called) == {"reference"}


def test_use_is_for_this_thread_alone() -> None:
    seen: list[str | None] = []
    with backends.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_module_keeps_its_backend(called: list[str]) -> None:
    module = GroupedConvBNReLU(64, 64, 16, backend="reference").train()
    module(torch.randn(2, 64, 7, 7)).sum().backward()
    assert set(called) == {"reference"}


@pytest.mark.parametrize("name", ["", "CPU", "gpu"])
def test_unknown_names(name: str) -> None:
    allowed = "'reference'"
    with pytest.raises(ValueError, match=allowed), backends.use(name):
        pass
    if name:  # "" asks for none
        with pytest.raises(ValueError, match=allowed):
            backends.select(PROBLEM, name)
        with pytest.raises(ValueError, match=allowed):
            run(name)


def test_environment(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    monkeypatch.setenv("RESNEXT_KERNELS_BACKEND", "reference")
    assert backends.requested() == "reference"
    run()
    assert set(called) == {"reference"}
    with backends.use("cpu"):
        assert backends.requested() == "cpu"
    monkeypatch.setenv("RESNEXT_KERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="does not serve"):
        run(dtype=torch.float64)
    monkeypatch.setenv("RESNEXT_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"RESNEXT_KERNELS_BACKEND.*'reference'.*'gpu'"):
        run()
    monkeypatch.setenv("RESNEXT_KERNELS_BACKEND", "")
    assert backends.requested() is None


def test_environment_of_a_new_process() -> None:
    code = "from resnext_kernels import backends; print(backends.requested())"
    environment = os.environ | {"RESNEXT_KERNELS_BACKEND": "reference"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["reference"]


@needs_cpu
def test_instruction_sets() -> None:
    from resnext_kernels import _C

    isas, before = _C.cpu_isas(), _C.cpu_isa()
    assert isas[-1] == "baseline"
    assert before in isas
    with pytest.raises(ValueError, match="baseline"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == before
    for isa in isas:
        _C.set_cpu_isa(isa)
        assert _C.cpu_isa() == isa
    _C.set_cpu_isa(before)
