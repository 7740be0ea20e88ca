"""The GPU backends' compiled kernels against the contract's own tests, run by a PTX emulator.

The launchers run on CPU tensors; what they launch is compiled for sm_80 and run thread for thread,
with accesses checked for bounds and alignment, and shared memory for races and for reads of what
was never written. ptxemu is a PTX emulator beside the repository in some checkouts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import test_backend_functions as contract
import test_op
import torch
from cases import CASES, DTYPE_NAMES, FEW, Case, Target, conv2d
from torch import Tensor

from bench.emulator import EMULATORS, CudaEmulator
from resnext_kernels import backends
from resnext_kernels.backends import cuda

pytestmark = pytest.mark.usefixtures("poisoned")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True)
class EmulatedTarget(Target):
    """A GPU backend in the emulator, on CPU tensors; `device` is what the kernels run on."""

    @property
    def device(self) -> str:
        return "cpu"

    def require(self, case: Case) -> None:
        """Every problem here is one that the backend serves: an error is no reason to skip."""


class Run(NamedTuple):
    """A problem, the backend that gets it, and the GPU that the backend cuts its work for."""

    backend: str
    case: Case
    dtype: torch.dtype
    gpu: str = "A100"
    slow: bool = False  # only with -m emulated


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[EmulatedTarget]:
    """With (backend, dtype, gpu) as parameter."""
    backend, dtype, gpu = request.param
    emulator = EMULATORS[backend]
    if (reason := emulator.why_not()) is not None:
        pytest.skip(reason)
    emulation = emulator(gpu, check=("race", "init"))
    with emulation.active():
        yield EmulatedTarget(backend, dtype)
    assert emulation.launched, "no kernel ran"


@pytest.fixture
def selectable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators take the CUDA backend for tensors on the CPU."""
    backends._select.cache_clear()
    monkeypatch.setattr(cuda, "why_not", cuda._why_not_served)
    yield
    backends._select.cache_clear()


def each(runs: list[Run]) -> pytest.MarkDecorator:
    params = [
        pytest.param(
            run.case,
            (run.backend, run.dtype, run.gpu),
            id=f"{run.case}-{DTYPE_NAMES[run.dtype]}-{run.backend}-{run.gpu}",
            marks=[pytest.mark.emulated] if run.slow else [],
        )
        for run in runs
    ]
    return pytest.mark.parametrize(("case", "emulated"), params, indirect=["emulated"])


# Problems ----------------------------------------------------------------------------------------


def served(case: Case) -> bool:
    """By the CUDA backend; without the compiled library all, to be skipped with the reason."""
    return (
        not hasattr(cuda, "_C") or cuda._why_not_served(Target("cuda", F16).problem(case)) is None
    )


SERVED = [case for case in CASES if served(case)]
# Strips of columns, blocks of channels that are not full, odd widths, more images than streams.
WIDE = [
    Case(3, 72, 5, 70, groups=18),
    Case(3, 72, 5, 70, groups=18, stride=2),
    Case(9, 96, 5, 7, groups=24),
    Case(5, 112, 4, 9, groups=8, stride=2),
]
# For Triton a problem for each configuration, and the odd sizes.
TRITON: list[tuple[Case, torch.dtype]] = [
    (Case(2, 128, 9, 7, groups=32), F16),
    (Case(1, 128, 3, 30, groups=32), BF16),
    (Case(1, 256, 8, 7, groups=32, stride=2), F16),
    (Case(2, 64, 8, 8, groups=4), F16),
    (Case(1, 64, 7, 7, groups=2), BF16),
    (Case(1, 112, 6, 7, groups=8), F16),
    (Case(1, 15, 7, 7, groups=3, stride=2), F16),
    (Case(1, 80, 7, 5, groups=2), F16),
    (Case(1, 256, 5, 5, groups=2), F16),
    (Case(2, 24, 7, 9, groups=24), F16),
    (Case(1, 12, 6, 6, groups=4, k=20), F16),
    (Case(1, 32, 9, 9, groups=8, dilation=2), F16),
    (Case(1, 128, 13, 12, groups=32, stride=2, dilation=2), BF16),
    (Case(1, 32, 10, 11, groups=8, stride=3), F16),
    (Case(2, 128, 1, 1, groups=32), F16),
    (Case(2, 128, 9, 7, groups=32), F32),
    (Case(1, 112, 7, 7, groups=8, stride=2), F32),
]


def on_cuda(cases: list[Case], *on: tuple[torch.dtype, str]) -> list[Run]:
    return [Run("cuda", case, dtype, gpu) for case in cases for dtype, gpu in on]


def on_triton(problems: list[tuple[Case, torch.dtype]], quick: tuple[int, ...] = ()) -> list[Run]:
    """Those at `quick` in plain pytest, the others with -m emulated."""
    return [Run("triton", *p, slow=i not in quick) for i, p in enumerate(problems)]


# On a single multiprocessor a block walks through all images, with less shared memory.
BOTH = ((F16, "A100"), (BF16, "single"))
CONVOLUTIONS = [
    *on_cuda(SERVED, (F16, "A100")),
    *on_cuda(SERVED[1::4], (BF16, "single")),
    *on_cuda(WIDE, (F16, "single"), (BF16, "A100")),
    *on_triton(TRITON, quick=(0, 2)),
]
POINTWISE = [
    *on_cuda(SERVED[::5], *BOTH),
    *on_triton([TRITON[0], TRITON[6], TRITON[15]], quick=(0,)),
]
SERVED_FEW = [case for case in FEW if served(case)]
LARGE_MEAN = [(Case(2, 64, 8, 7, groups=8, stride=stride), F32) for stride in (1, 2)]
ODD_VALUES = [
    (Case(2, c, 6, 5, groups=groups, stride=stride), F16)
    for c, groups in ((32, 8), (64, 2))
    for stride in (1, 2)
]
# Groups that share a product of the tensor cores, of 4 and 14 channels, and groups that do not.
ODD_ON_CUDA = [
    Case(2, 32, 5, 4, groups=8),
    Case(1, 56, 5, 6, groups=4, stride=2),
    Case(1, 32, 3, 3, groups=2),
]


# Tests -------------------------------------------------------------------------------------------


def names(values: list[Callable[..., None]]) -> list[str]:
    return [value.__name__.removeprefix("test_") for value in values]


OF_CONVOLUTIONS: list[Callable[..., None]] = [
    contract.test_conv_affine_relu,
    contract.test_conv_stats,
    contract.test_conv_backward,
]
OF_MATRICES: list[Callable[..., None]] = [
    contract.test_batch_stats,
    contract.test_normalize_relu,
    contract.test_bn_relu_backward,
    contract.test_bn_relu_input_gradient,
    contract.test_nan_passes_the_relu,
]


@pytest.mark.parametrize("function", OF_CONVOLUTIONS, ids=names(OF_CONVOLUTIONS))
@each(CONVOLUTIONS)
def test_convolutions(case: Case, emulated: EmulatedTarget, function: Callable[..., None]) -> None:
    function(case, emulated)


@pytest.mark.parametrize("function", OF_MATRICES, ids=names(OF_MATRICES))
@each(POINTWISE)
def test_pointwise(case: Case, emulated: EmulatedTarget, function: Callable[..., None]) -> None:
    function(case, emulated)


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5], ids=lambda v: f"mean{v:g}")
@each([*on_cuda(SERVED_FEW, *BOTH), *on_triton(LARGE_MEAN)])
def test_statistics_of_a_large_mean(case: Case, emulated: EmulatedTarget, offset: float) -> None:
    contract.test_statistics_of_a_large_mean(case, offset, emulated)


@each(on_cuda([Case(1, 128, 28, 28, groups=32)], *BOTH))
def test_statistics_of_odd_maps(case: Case, emulated: EmulatedTarget) -> None:
    contract.test_statistics_with_one_hot_pixel(300, emulated)
    contract.test_statistics_of_many_images(emulated)


@each([*on_cuda(SERVED_FEW, *BOTH), *on_triton([TRITON[0]])])
def test_inputs_are_left_alone(case: Case, emulated: EmulatedTarget) -> None:
    contract.test_inputs_are_left_alone(case, emulated)


@each(on_triton([(Case(2, 32, 5, 6, groups=8), F32), (Case(1, 64, 5, 4, groups=4), F32)]))
def test_ieee_float32(
    case: Case, emulated: EmulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    contract.test_conv_stats(case, emulated)
    contract.test_conv_backward(case, emulated)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@each([*on_cuda(ODD_ON_CUDA, (F16, "A100")), *on_triton(ODD_VALUES, quick=(0, 1))])
def test_odd_values_stay_in_their_group(case: Case, emulated: EmulatedTarget, value: float) -> None:
    """Groups, and pixels, that share a matrix instruction do not see each other's NaN and Inf."""
    contract.test_odd_values_stay_in_their_group(case, value, emulated)


@each(on_cuda(ODD_ON_CUDA, (BF16, "single")))
def test_odd_values_at_the_border(case: Case, emulated: EmulatedTarget) -> None:
    """Padding is no zero to multiply with: taps that lie outside the image are left out."""
    t = contract.Exact(case, emulated)
    t.x[0, 5, 0, 0] = t.dy[0, 2, -1, -1] = t.weight[9, 1, 0, 2] = float("inf")
    odd_x, odd_weight, odd_dy = ((~v.isfinite()).double() for v in (t.x, t.weight, t.dy))
    some_x, some_weight, some_dy = map(torch.ones_like, (odd_x, odd_weight, odd_dy))

    def z_of(x: Tensor, weight: Tensor) -> Tensor:
        return conv2d(x, weight, **case.conv)

    def gradient(z_of_leaf: Callable[[Tensor], Tensor], leaf: Tensor, dy: Tensor) -> Tensor:
        leaf = leaf.clone().requires_grad_()
        return torch.autograd.grad(z_of_leaf(leaf), leaf, dy)[0]

    z, mean, var = cuda.conv_stats(t.x, t.weight, prologue=None, **case.conv)
    reached = z_of(odd_x, some_weight) + z_of(some_x, odd_weight) > 0
    assert torch.equal(z.isfinite(), ~reached)
    for statistic in (mean, var):
        assert torch.equal(statistic.isfinite(), ~reached.any((0, 2, 3)))
    dx, dweight = cuda.conv_backward(t.dy, t.x, t.weight, prologue=None, **case.conv)
    reached = gradient(lambda x: z_of(x, some_weight), some_x, odd_dy)
    reached += gradient(lambda x: z_of(x, odd_weight), some_x, some_dy)
    assert torch.equal(dx.isfinite(), reached == 0)
    reached = gradient(lambda w: z_of(some_x, w), some_weight, odd_dy)
    reached += gradient(lambda w: z_of(odd_x, w), some_weight, some_dy)
    assert torch.equal(dweight.isfinite(), reached == 0)


# All of test_op's combinations with -m emulated, a few of them always.
FEW_ODD = [("x", "nan", "train"), ("x", "inf", "eval"), ("weight", "inf", "train")]
ALL_ODD = list(itertools.product(("x", "weight", "residual"), ("nan", "inf"), ("eval", "train")))
PROPAGATING = [(ODD_ON_CUDA[0], *odd, False) for odd in FEW_ODD]
PROPAGATING += [(case, *odd, True) for case in SERVED_FEW for odd in ALL_ODD]


@pytest.mark.parametrize(
    ("case", "where", "value", "mode", "emulated"),
    [
        pytest.param(
            *run[:4],
            ("cuda", F16, "A100"),
            id=f"{run[0]}-f16-cuda-A100-{'-'.join(run[1:4])}",
            marks=[pytest.mark.emulated] if run[4] else [],
        )
        for run in PROPAGATING
    ],
    indirect=["emulated"],
)
@pytest.mark.usefixtures("selectable")
def test_nan_and_inf_propagate(
    case: Case, where: str, value: str, mode: str, emulated: EmulatedTarget
) -> None:
    test_op.test_nan_and_inf_propagate(case, where, float(value), mode, emulated)


def test_an_access_out_of_bounds_is_seen() -> None:
    """One row of the image less than the plan was told."""
    if (reason := CudaEmulator.why_not()) is not None:
        pytest.skip(reason)
    import ptxemu

    x = torch.randn(1, 64, 8, 8, dtype=F16).contiguous(memory_format=torch.channels_last)
    weight, vector = torch.randn(64, 4, 3, 3, dtype=F16), torch.ones(64)
    emulation = CudaEmulator()
    real = emulation.ptr
    emulation.ptr = lambda t: real(t[:, :, :-1] if t is x else t)
    with emulation.active(), pytest.raises(ptxemu.PTXError, match="out of bounds"):
        cuda.conv_affine_relu(x, weight, vector, vector, groups=16)
