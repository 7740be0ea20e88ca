"""The CUDA kernels without a GPU: their plans, their machine code, and their PTX run on the CPU.

The emulated tests are those of every backend (`test_backend_functions`), on the backend's own
functions and plans; each launch is the compiled PTX run by ptxemu, which checks every access.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import test_backend_functions as contract
import test_op
import torch
from cases import CASES, FEW, Case, Target, conv2d
from torch import Tensor

from bench import emulator, modelled_cuda
from resnext_kernels import backends
from resnext_kernels.backends import cuda
from resnext_kernels.problem import ConvProblem

_C = pytest.importorskip("resnext_kernels._C", reason="installed without the compiled library")

F16, BF16 = torch.float16, torch.bfloat16
# Strips of columns, blocks of channels that are not full, odd widths, more images than streams.
WIDE = [
    Case(3, 72, 5, 70, groups=18),
    Case(3, 72, 5, 70, groups=18, stride=2),
    Case(9, 96, 5, 7, groups=24),
    Case(5, 112, 4, 9, groups=8, stride=2),
]


# Groups that share a product of the tensor cores, and those that do not.
ODD = [
    Case(2, 32, 5, 4, groups=8),
    Case(1, 56, 5, 6, groups=4, stride=2),
    Case(1, 32, 3, 3, groups=2),
]


class Emulated(Target):
    """The CUDA backend on CPU tensors."""

    @property
    def module(self) -> ModuleType:
        return cuda

    @property
    def device(self) -> str:
        return "cpu"

    def require(self, case: Case) -> None:
        reason = cuda._why_not_served(self.problem(case))
        if reason is not None:
            pytest.skip(reason)


def served(case: Case, dtype: torch.dtype = F16) -> bool:
    return cuda._why_not_served(Emulated("cuda", dtype).problem(case)) is None


SERVED = [case for case in CASES if served(case)]


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    """With (dtype, device) as parameter; bounds, alignment, races and initialisation checked."""
    reason = emulator.why_not()
    if reason is not None:
        pytest.skip(reason)
    dtype, device = request.param
    emulation = emulator.Emulator(device, check=("race", "init"))
    with emulation.active():
        yield Emulated("cuda", dtype)
    assert emulation.launched, "no kernel ran"


@pytest.fixture
def selectable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators take the CUDA backend for tensors on the CPU."""
    backends._select.cache_clear()
    monkeypatch.setattr(cuda, "why_not", cuda._why_not_served)
    yield
    backends._select.cache_clear()


def each(cases: list[Case], *on: tuple[torch.dtype, str]) -> Callable:
    pairs = list(itertools.product(cases, on))
    names = {F16: "f16", BF16: "bf16"}
    ids = [f"{case}-{names[dtype]}-{device}" for case, (dtype, device) in pairs]
    return pytest.mark.parametrize(("case", "emulated"), pairs, ids=ids, indirect=["emulated"])


# One multiprocessor makes a block walk through all images; two block sizes of shared memory.
many = each(SERVED, (F16, "A100"))
some = each(SERVED[1::4], (BF16, "single"))
wide = each(WIDE, (F16, "single"), (BF16, "A100"))


@pytest.mark.usefixtures("poisoned")
class TestEmulated:
    @many
    def test_conv_affine_relu(self, case: Case, emulated: Emulated) -> None:
        contract.test_conv_affine_relu(case, emulated)

    @many
    def test_conv_stats(self, case: Case, emulated: Emulated) -> None:
        contract.test_conv_stats(case, emulated)

    @many
    def test_conv_backward(self, case: Case, emulated: Emulated) -> None:
        contract.test_conv_backward(case, emulated)

    @some
    def test_all_convolutions(self, case: Case, emulated: Emulated) -> None:
        self.all_convolutions(case, emulated)

    @wide
    def test_large_maps(self, case: Case, emulated: Emulated) -> None:
        self.all_convolutions(case, emulated)

    @staticmethod
    def all_convolutions(case: Case, emulated: Emulated) -> None:
        contract.test_conv_affine_relu(case, emulated)
        contract.test_conv_stats(case, emulated)
        contract.test_conv_backward(case, emulated)

    @each(SERVED[::5], (F16, "A100"), (BF16, "single"))
    def test_pointwise(self, case: Case, emulated: Emulated) -> None:
        contract.test_batch_stats(case, emulated)
        contract.test_normalize_relu(case, emulated)
        contract.test_bn_relu_backward(case, emulated)
        contract.test_bn_relu_input_gradient(case, emulated)
        contract.test_nan_passes_the_relu(case, emulated)

    @each([case for case in FEW if served(case)], (F16, "A100"), (BF16, "single"))
    def test_statistics_and_inputs(self, case: Case, emulated: Emulated) -> None:
        for offset in (0.0, 1e4, -3e5):
            contract.test_statistics_of_a_large_mean(case, offset, emulated)
        contract.test_inputs_are_left_alone(case, emulated)

    @each([Case(1, 128, 28, 28, groups=32)], (F16, "A100"), (BF16, "single"))
    def test_statistics_of_odd_maps(self, case: Case, emulated: Emulated) -> None:
        contract.test_statistics_with_one_hot_pixel(300, emulated)
        contract.test_statistics_of_many_images(emulated)

    @each(ODD, (F16, "A100"))
    def test_odd_values_stay_in_their_group(self, case: Case, emulated: Emulated) -> None:
        for value in (float("nan"), float("inf")):
            contract.test_odd_values_stay_in_their_group(case, value, emulated)

    @each(ODD, (BF16, "single"))
    def test_odd_values_at_the_border(self, case: Case, emulated: Emulated) -> None:
        """Padding is no zero to multiply with: taps that lie outside the image are left out."""
        t = contract.Exact(case, emulated)
        t.x[0, 5, 0, 0] = t.dy[0, 2, -1, -1] = t.weight[9, 1, 0, 2] = float("inf")
        odd_x, odd_weight, odd_dy = ((~v.isfinite()).double() for v in (t.x, t.weight, t.dy))
        some_x, some_weight, some_dy = map(torch.ones_like, (odd_x, odd_weight, odd_dy))

        def z_of(x: Tensor, weight: Tensor) -> Tensor:
            return conv2d(x, weight, **case.conv)

        def gradient(leaf: Tensor, z_of_leaf: Callable[[Tensor], Tensor], dy: Tensor) -> Tensor:
            leaf.requires_grad_()
            return torch.autograd.grad(z_of_leaf(leaf), leaf, dy)[0]

        z, mean, var = cuda.conv_stats(t.x, t.weight, prologue=None, **case.conv)
        reached = z_of(odd_x, some_weight) + z_of(some_x, odd_weight) > 0
        assert torch.equal(z.isfinite(), ~reached)
        for statistic in (mean, var):
            assert torch.equal(statistic.isfinite(), ~reached.any((0, 2, 3)))
        dx, dweight = cuda.conv_backward(t.dy, t.x, t.weight, prologue=None, **case.conv)
        reached = gradient(some_x.clone(), lambda x: z_of(x, some_weight), odd_dy)
        reached += gradient(some_x.clone(), lambda x: z_of(x, odd_weight), some_dy)
        assert torch.equal(dx.isfinite(), reached == 0)
        reached = gradient(some_weight.clone(), lambda w: z_of(some_x, w), odd_dy)
        reached += gradient(some_weight.clone(), lambda w: z_of(odd_x, w), some_dy)
        assert torch.equal(dweight.isfinite(), reached == 0)

    @each(ODD[:1], (F16, "A100"))
    @pytest.mark.parametrize(
        ("where", "value", "mode"),
        [("x", "nan", "train"), ("x", "inf", "eval"), ("weight", "inf", "train")],
    )
    def test_nan_and_inf_propagate(
        self, case: Case, where: str, value: str, mode: str, emulated: Emulated, selectable: None
    ) -> None:
        test_op.test_nan_and_inf_propagate(case, where, float(value), mode, emulated)

    @pytest.mark.emulated
    @each([case for case in FEW if served(case)], (F16, "A100"))
    @pytest.mark.parametrize("value", ["nan", "inf"])
    @pytest.mark.parametrize("mode", ["eval", "train"])
    @pytest.mark.parametrize("where", ["x", "weight", "residual"])
    def test_nan_and_inf_propagate_in_every_case(
        self, case: Case, where: str, value: str, mode: str, emulated: Emulated, selectable: None
    ) -> None:
        test_op.test_nan_and_inf_propagate(case, where, float(value), mode, emulated)

    def test_the_emulator_sees_an_access_out_of_bounds(self) -> None:
        """One row of the image less than the plan was told."""
        ptxemu = pytest.importorskip("ptxemu")
        if (reason := emulator.why_not()) is not None:
            pytest.skip(reason)
        x = torch.randn(1, 64, 8, 8, dtype=F16).contiguous(memory_format=torch.channels_last)
        weight, vector = torch.randn(64, 4, 3, 3, dtype=F16), torch.ones(64)
        emulation = emulator.Emulator()
        real = emulation.ptr
        emulation.ptr = lambda t: real(t[:, :, :-1] if t is x else t)
        with emulation.active(), pytest.raises(ptxemu.PTXError, match="out of bounds"):
            cuda.conv_affine_relu(x, weight, vector, vector, groups=16)


# Plans ---------------------------------------------------------------------------------------


def problem_of(case: Case, dtype: torch.dtype = F16) -> _C.ConvProblem:
    shape = (case.n, case.c, case.h, case.w)
    return cuda._problem(shape, case.k, case.groups, case.stride, case.dilation, dtype)


def plans_of(case: Case, device: _C.CudaDevice, dtype: torch.dtype) -> list[_C.CudaPlan]:
    """With every option in turn; the addresses are never used."""
    p, at = problem_of(case, dtype), 1 << 12
    plans = [
        _C.cuda_plan_conv_affine_relu(p, device, at, at, at, at, residual, at, at, at)
        for residual in (0, at)
    ]
    plans += [_C.cuda_plan_conv_stats(p, device, at, at, 0, 0, at, v, v) for v in (0, at)]
    for y, dx, dweight in itertools.product((0, at), repeat=3):
        gradient = (at, at, at, at, y, at, at, at)
        plans.append(_C.cuda_plan_conv_backward(p, device, *gradient, at, at, at, at, dx, dweight))
    return plans


@pytest.mark.parametrize("name", emulator.DEVICES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("case", SERVED + WIDE, ids=str)
def test_plans_fit_the_device(case: Case, dtype: torch.dtype, name: str) -> None:
    multiprocessors, shared_bytes = emulator.DEVICES[name]
    device = _C.CudaDevice(multiprocessors, shared_bytes)
    for plan in plans_of(case, device, dtype):
        for launch in plan.launches:
            assert launch.kernel in KERNELS
            assert 0 < launch.shared_bytes <= shared_bytes or not launch.kernel.startswith("conv_")
            assert launch.block in (256, 1024)
            x, y, z = launch.grid
            assert 0 < x < 2**31
            assert 0 < y < 2**16
            assert 0 < z < 2**16
            assert (launch.workspace_at >= 0) <= (plan.workspace_floats > 0)


def test_a_plan_fills_the_device() -> None:
    """ResNeXt-50's layers at batch 32: at least 80 of the A100's 108 multiprocessors at work."""
    device = _C.CudaDevice(*emulator.DEVICES["A100"])
    for c, size, stride in ((128, 56, 1), (256, 56, 2), (256, 28, 1), (512, 14, 1), (1024, 7, 1)):
        for plan in plans_of(Case(32, c, size, size, groups=32, stride=stride), device, F16):
            for launch in plan.launches:
                if launch.kernel.startswith("conv_"):
                    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
                    assert blocks / (-(-blocks // 108) * 108) > 80 / 108, launch.kernel


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
    device = _C.CudaDevice(*emulator.DEVICES["A100"])
    with pytest.raises(ValueError, match="stride must be 1 or 2, not 3"):
        _C.cuda_plan_conv_stats(
            problem_of(Case(1, 64, 8, 8, groups=16, stride=3)), device, *[16] * 7
        )


@pytest.mark.skipif(not _C.cuda_compiled(), reason="the compiled library was built without CUDA")
def test_errors_of_the_runtime_name_the_kernel() -> None:
    """Device 63 exists nowhere; without a driver no device does."""
    device = _C.CudaDevice(*emulator.DEVICES["A100"])
    plan = _C.cuda_plan_batch_stats(2, 64, 64, device, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"CUDA kernel moments_f16: .+"):
        _C.cuda_run(plan, 0, 63, 0)


def test_readme_shows_the_modelled_figures() -> None:
    rows = json.loads(modelled_cuda.OUTPUT.read_text())["rows"]
    assert modelled_cuda.table(rows) in (modelled_cuda.ROOT / "README.md").read_text()


# Machine code --------------------------------------------------------------------------------

ARCHITECTURES = {f"sm_{n}" for n in (80, 86, 89, 90, 100, 120)}
KERNELS = {
    f"conv_{dtype}_{geometry}_q{q}_{name}"
    for dtype in ("f16", "bf16")
    for q in (1, 2, 4, 8)
    for geometry, names in (
        ("s1", ("forward",)),
        ("s2", ("forward",)),
        *((g, ("backward",) if q < 8 else ("dx", "dweight")) for g in ("s1", "t2")),
    )
    for name in names
}
POINTWISE = {
    f"{name}_{dtype}"
    for name in ("normalize_relu", "bn_relu_dz", "bn_relu_sums", "moments", "add_dweight")
    for dtype in ("f16", "bf16")
}
KERNELS |= POINTWISE | {"add_sums", "finish_moments"}


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
            wide = {o for o in opcodes if o.startswith("LDG")}
            assert wide, kernel
            assert all(".128" in o for o in wide), (kernel, wide)
