"""The CUDA kernels without a GPU: their plans and their machine code.

`tests/test_emulated.py` runs their PTX.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from test_emulated import SERVED, WIDE
from torch.utils._python_dispatch import TorchDispatchMode

from bench.emulator import DEVICES
from bench.modelled import LAYERS
from resnext_kernels import backends, functional, ops
from resnext_kernels.backends import cuda, reference
from resnext_kernels.problem import ConvProblem

_C = pytest.importorskip("resnext_kernels._C", reason="installed without the compiled library")

F16, BF16 = torch.float16, torch.bfloat16

# Plans ---------------------------------------------------------------------------------------


def device_of(name: str) -> _C.CudaDevice:
    return _C.CudaDevice(DEVICES[name].multiprocessors, DEVICES[name].shared_bytes)


def problem_of(case: Case, dtype: torch.dtype = F16) -> _C.ConvProblem:
    shape = (case.n, case.c, case.h, case.w)
    return cuda._problem(shape, case.k, case.groups, case.stride, case.dilation, dtype)


def plans_of(case: Case, device: _C.CudaDevice, dtype: torch.dtype) -> list[_C.CudaPlan]:
    """With every option in turn; the addresses are never used."""
    p, at = problem_of(case, dtype), 1 << 12
    bn = (case.k, at, at, at, at, 1e-5)
    plans = [
        _C.cuda_plan_conv_bn_relu(p, device, at, at, False, bn, residual, at, at, at)
        for residual in (0, at)
    ]
    plans += [_C.cuda_plan_conv_stats(p, device, at, at, False, 0, 0, at, bn, v) for v in (0, at)]
    for y, dx, dweight, last in itertools.product((0, at), repeat=4):
        rest = (at, at, at, at, bool(last), dx, dweight)
        plans.append(_C.cuda_plan_conv_backward(p, device, at, at, at, at, y, True, *rest))
    return plans


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("case", SERVED + WIDE, ids=str)
def test_plans_fit_the_device(case: Case, dtype: torch.dtype, name: str) -> None:
    device, shared_bytes = device_of(name), DEVICES[name].shared_bytes
    for plan in plans_of(case, device, dtype):
        for launch in plan.launches:
            assert launch.kernel in KERNELS
            assert 0 < launch.shared_bytes <= shared_bytes or not launch.kernel.startswith("conv_")
            assert launch.block in range(32, 1025, 32)
            x, y, z = launch.grid
            assert 0 < x < 2**31
            assert 0 < y < 2**16
            assert 0 < z < 2**16
            assert (launch.workspace_at >= 0) <= (plan.workspace_floats > 0)


def test_a_plan_fills_the_device() -> None:
    """ResNeXt-50's layers at batch 32: at least 80 of the A100's 108 multiprocessors at work."""
    device = device_of("A100")
    for c, size, stride in LAYERS:
        for plan in plans_of(Case(32, c, size, size, groups=32, stride=stride), device, F16):
            for launch in plan.launches:
                if launch.kernel.startswith("conv_"):
                    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
                    assert blocks / (-(-blocks // 108) * 108) > 80 / 108, launch.kernel


@pytest.mark.parametrize("channels", [8, 128, 1000, 2048])
@pytest.mark.parametrize("rows", [1, 33, 200704])
def test_a_pass_over_a_matrix_is_one_wave(rows: int, channels: int) -> None:
    """All blocks of a grid are at work at once, as many as the registers of a thread allow."""
    multiprocessors, at = DEVICES["A100"].multiprocessors, 1 << 12
    matrix = (2, rows, channels, device_of("A100"))
    bn = (channels, at, at, at, at, 1e-5)
    plans = [
        (3, _C.cuda_plan_batch_stats(*matrix, at, bn, at)),
        (3, _C.cuda_plan_normalize_relu(*matrix, *[at] * 7)),
        (3, _C.cuda_plan_bn_relu_backward(*matrix, *[at] * 4, True, *[at] * 4)),
        (2, _C.cuda_plan_bn_relu_input_gradient(*matrix, *[at] * 5, True, at)),
    ]
    columns = -(-channels // 64)
    for held, plan in plans:
        x, y, _ = plan.launches[0].grid
        assert x == columns
        assert y == max(1, min(-(-rows // 32), held * multiprocessors // columns))


class Recorder(TorchDispatchMode):
    """The names of kernels that are launched: ours, and what ATen does beside views and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def run(self, plan: _C.CudaPlan, on: torch.Tensor) -> None:
        """`backends.cuda._run`, without a GPU."""
        self.launched += [launch.kernel for launch in plan.launches]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not function.is_view and "empty" not in function.name():
            self.launched.append(function.name())
        return function(*args, **kwargs or {})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Inside it, operators on CPU tensors go to the CUDA backend, which launches nothing."""
    recorder = Recorder()
    backends._select.cache_clear()
    monkeypatch.setattr(ops, "_is_ordinary", lambda _: True)  # not as one opaque call
    monkeypatch.setattr(ops, "update_running", lambda *_: False)  # as for vectors on a GPU
    monkeypatch.setattr(cuda, "why_not", cuda._why_not_served)
    monkeypatch.setattr(cuda, "_device", lambda _: device_of("A100"))
    monkeypatch.setattr(cuda, "_run", recorder.run)
    yield recorder
    backends._select.cache_clear()


CONV = "conv_f16_s1_q1"
OF_A_FORWARD = [f"{CONV}_forward", "finish_moments", "normalize_relu_f16"]
OF_A_BACKWARD = ["bn_relu_sums_f16", "add_sums", f"{CONV}_backward", "add_dweight_f16"]


def operation(
    recorder: Recorder, *, training: bool, prologue: bool = False, residual: bool = False
) -> list[str]:
    """What an operation and, in training, its gradients launch."""
    x, dy, other = (
        torch.zeros(8, 64, 9, 9, dtype=F16).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    weight = torch.zeros(64, 4, 3, 3, dtype=F16)
    gamma, beta, mean, var = (torch.ones(64) for _ in range(4))
    inputs = [x, weight, gamma, beta, *([other] if residual else [])]
    leaves = [t.requires_grad_(training) for t in inputs]
    bn = functional.BatchNormState(gamma, beta, mean, var, training)
    with recorder:
        y = functional.conv_bn_relu(
            x,
            weight,
            bn,
            input_bn=bn if prologue else None,
            residual=other if residual else None,
            groups=16,
            backend="cuda",
        )
        if training:
            torch.autograd.grad(y, leaves, dy)
    return recorder.launched


@pytest.mark.parametrize("prologue", [False, True])
def test_launches_of_an_operation_in_evaluation(recorder: Recorder, prologue: bool) -> None:
    launched = operation(recorder, training=False, prologue=prologue)
    assert launched == ["bn_vectors"] * prologue + [f"{CONV}_eval"]


@pytest.mark.parametrize("residual", [False, True])
def test_launches_of_an_operation_in_training(recorder: Recorder, residual: bool) -> None:
    launched = operation(recorder, training=True, residual=residual)
    running = ["aten::_foreach_mul_.Scalar", "aten::_foreach_add_.List"]
    assert launched == [*OF_A_FORWARD, *running, *OF_A_BACKWARD]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"stride": 3}, "stride"),
        ({"dilation": 2}, "dilation"),
        ({"k": 256}, "as many"),
        ({"c": 36, "k": 36, "groups": 9}, "multiple of 8"),
        ({"groups": 1}, "at most 64"),
        ({"c": 144, "k": 144, "groups": 16}, "common multiple"),
        ({"n": 0}, "empty"),
        ({"w": 2**17 + 1}, "wide"),
    ],
    ids=lambda v: str(v),
)
def test_why_not_names_what_is_not_served(change: dict[str, object], text: str) -> None:
    args: dict[str, object] = {"n": 2, "h": 8, "w": 8, "c": 128, "k": 128, "groups": 32}
    args |= {"dtype": F16, "device_type": "cuda"} | change
    assert text in str(cuda._why_not_served(ConvProblem(**args)))


def test_why_not_without_a_device() -> None:
    problem = ConvProblem(2, 8, 8, 128, groups=32, dtype=F16, device_type="cuda")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert cuda.why_not(problem) in (
        "torch sees no CUDA device",
        "the compiled library was built without CUDA",
    )


def test_a_plan_refuses_what_is_not_served() -> None:
    device = device_of("A100")
    with pytest.raises(ValueError, match="stride must be 1 or 2, not 3"):
        _C.cuda_plan_conv_stats(
            problem_of(Case(1, 64, 8, 8, groups=16, stride=3)),
            device,
            *(16, 16, False, 16, 16, 16, (64, 0, 0, 0, 0, 1e-5), 16),
        )


@pytest.mark.skipif(not _C.cuda_compiled(), reason="the compiled library was built without CUDA")
def test_statistics_of_a_pointwise_convolution_to_any_channels() -> None:
    """The kernels of statistics take multiples of 8; the dense convolution gives what is asked."""
    x, weight = torch.randn(2, 16, 3, 3).half(), torch.randn(12, 16, 1, 1).half()
    bn = (torch.randn(12), None, 1e-5)
    for actual, expected in zip(
        cuda.conv1x1_stats(x, weight, bn), reference.conv1x1_stats(x, weight, bn), strict=True
    ):
        assert torch.equal(actual, expected)


def test_errors_of_the_runtime_name_the_kernel() -> None:
    """Device 63 exists nowhere; without a driver no device does."""
    device = device_of("A100")
    plan = _C.cuda_plan_batch_stats(2, 64, 64, device, 0, (64, 0, 0, 0, 0, 1e-5), 0)
    with pytest.raises(RuntimeError, match=r"CUDA kernel moments_f16: .+"):
        _C.cuda_run(plan, 0, 63, 0)


# Machine code --------------------------------------------------------------------------------

ARCHITECTURES = {f"sm_{n}" for n in (80, 86, 89, 90, 100, 120)}
KERNELS = {
    f"conv_{dtype}_{geometry}_q{q}_{name}"
    for dtype in ("f16", "bf16")
    for q in (1, 2, 4, 8)
    for geometry, names in (
        ("s1", ("eval", "forward")),
        ("s2", ("eval", "forward")),
        *((g, ("backward",) if q < 8 else ("dx", "dweight")) for g in ("s1", "t2")),
    )
    for name in names
}
POINTWISE = {
    f"{name}_{dtype}"
    for name in ("normalize_relu", "bn_relu_dz", "bn_relu_sums", "moments", "add_dweight")
    for dtype in ("f16", "bf16")
}
KERNELS |= POINTWISE | {"add_sums", "finish_moments", "bn_vectors"}


def cuobjdump(*args: str) -> str:
    """Of the compiled library, with the toolkit's or Triton's cuobjdump."""
    if not _C.cuda_compiled():
        pytest.skip("the compiled library was built without CUDA")
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump")
        found = list(Path(triton.__file__).parent.rglob("cuobjdump"))
        if not found:
            pytest.skip("no cuobjdump")
        tool = str(found[0])
    command = [tool, *args, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_kernel_of_every_architecture_keeps_to_registers() -> None:
    """No stack and no local memory: nothing is spilled."""
    found: dict[str, set[str]] = defaultdict(set)
    arch = kernel = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = match[1]
            found[arch].add(kernel)
        elif "REG:" in line:
            assert " STACK:0 " in line, f"{kernel} for {arch}: {line}"
            assert " LOCAL:0 " in line, f"{kernel} for {arch}: {line}"
    assert set(found) == ARCHITECTURES or len(found) == 1  # 1: built for one of them only
    assert all(kernels == KERNELS for kernels in found.values())


@lru_cache
def instructions(arch: str) -> dict[str, str]:
    """Machine code of every kernel."""
    parts = re.split(r"\s+Function : (\w+)\n", cuobjdump("-sass", "-arch", arch))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_machine_code_has_the_instructions_meant() -> None:
    for kernel, code in instructions("sm_80").items():
        opcodes = set(re.findall(r"\b(?:HMMA|LDSM|LDGSTS|LDG|STG)[.\w]*", code))
        if kernel.startswith("conv_"):
            assert any(o.startswith("HMMA.16816.F32") for o in opcodes), kernel
            assert any(o.startswith("LDSM.16.M88.4") or "LDSM.16.MT88.4" in o for o in opcodes)
            copies = {o for o in opcodes if o.startswith("LDGSTS")}
            assert copies, kernel
            assert all(".128" in o for o in copies), (kernel, copies)
            assert any(o.startswith("STG") and o.endswith(".128") for o in opcodes), kernel
            transposed = any("MT88" in o for o in opcodes)
            assert transposed == kernel.endswith(("backward", "dweight")), kernel
        elif kernel in POINTWISE and not kernel.startswith("add_"):
            loads = re.findall(r"\bLDG[.\w]*", code)
            narrow = [o for o in loads if ".128" not in o]
            assert len(narrow) < len(loads), kernel
            assert len(narrow) == kernel.startswith("bn_relu_sums"), (kernel, narrow)  # rstd, last
