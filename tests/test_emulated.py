"""The GPU backends' compiled kernels against the contract's own tests, run by a PTX emulator.

The launchers run on CPU tensors; what they launch is compiled for sm_80 and run thread for thread,
with accesses checked for bounds and alignment, and shared memory for races and for reads of what
was never written. ptxemu is a PTX emulator beside the repository in some checkouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import test_backend_functions as contract
import torch
from cases import DTYPE_NAMES, Case, Target
from torch import Tensor

from bench.modelled import EMULATED, TritonLaunch, triton_launches
from resnext_kernels.backends import reference, triton

pytest.importorskip("ptxemu", reason="the PTX emulator is not beside this checkout")
pytestmark = pytest.mark.usefixtures("poisoned")


@dataclasses.dataclass(frozen=True)
class EmulatedTarget(Target):
    """A GPU backend in the emulator, on CPU tensors."""

    @property
    def device(self) -> str:
        return "cpu"

    def require(self, case: Case) -> None:
        pass


EMULATED_ONLY = pytest.mark.emulated
CHECKS = ("race", "init")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ALL: list[tuple[Case, torch.dtype]] = [
    # one row for each configuration, and the odd sizes
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
FUNCTIONS: list[Callable[..., None]] = [
    contract.test_conv_affine_relu,
    contract.test_conv_stats,
    contract.test_conv_backward,
]
POINTWISE: list[Callable[..., None]] = [
    contract.test_batch_stats,
    contract.test_normalize_relu,
    contract.test_bn_relu_backward,
    contract.test_bn_relu_input_gradient,
    contract.test_nan_passes_the_relu,
]


# Plain pytest runs these; the marker `emulated` runs them all.
FEW = [ALL[0], ALL[2]]


def marked(cases: list[tuple[Case, torch.dtype]]) -> list[Any]:
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{DTYPE_NAMES[dtype]}",
            marks=[] if (case, dtype) in FEW else [pytest.mark.emulated],
        )
        for case, dtype in cases
    ]


def names(values: list[Callable[..., None]]) -> list[str]:
    return [value.__name__.removeprefix("test_") for value in values]


@pytest.fixture(params=EMULATED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with EMULATED[request.param](check=CHECKS) as kernels:
        yield request.param
    assert kernels, "no kernel ran"


@pytest.mark.parametrize("function", FUNCTIONS, ids=names(FUNCTIONS))
@pytest.mark.parametrize(("case", "dtype"), marked(ALL))
def test_convolutions(
    case: Case, dtype: torch.dtype, function: Callable[..., None], backend: str
) -> None:
    function(case, EmulatedTarget(backend, dtype))


@pytest.mark.parametrize("function", POINTWISE, ids=names(POINTWISE))
@pytest.mark.parametrize(("case", "dtype"), marked([ALL[0], ALL[6], ALL[15]]))
def test_pointwise(
    case: Case, dtype: torch.dtype, function: Callable[..., None], backend: str
) -> None:
    function(case, EmulatedTarget(backend, dtype))


@EMULATED_ONLY
def test_ieee_float32(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for case in (Case(2, 32, 5, 6, groups=8), Case(1, 64, 5, 4, groups=4)):
        contract.test_conv_stats(case, EmulatedTarget(backend, F32))
        contract.test_conv_backward(case, EmulatedTarget(backend, F32))


@EMULATED_ONLY
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_of_a_large_mean(stride: int, backend: str) -> None:
    contract.test_statistics_of_a_large_mean(
        Case(2, 64, 8, 7, groups=8, stride=stride), 1e4, EmulatedTarget(backend, F32)
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=EMULATED_ONLY)])
def test_odd_values_stay_in_their_group(stride: int, value: float, backend: str) -> None:
    """Groups that share a matrix instruction do not see each other's NaN and Inf."""
    case = Case(2, 32, 6, 5, groups=8, stride=stride)
    contract.test_odd_values_stay_in_their_group(case, value, EmulatedTarget(backend, F16))


TURNS = 8


@EMULATED_ONLY
@pytest.mark.parametrize("turn", range(TURNS))
@pytest.mark.parametrize(
    ("case", "dtype"), [(ALL[0], F16), (ALL[2], F16), (ALL[4], BF16), (ALL[15], F32)]
)
def test_what_autotuning_tries(case: Case, dtype: torch.dtype, turn: int) -> None:
    """One neighbour of each configuration that the functions meet; all of them in TURNS turns."""
    original = triton._conv_config

    def changed(*args: Any) -> triton.Config:
        others = triton._alternatives(original(*args), args[3], dtype, args[-1])
        assert 1 < len(others) <= TURNS
        return others[turn % len(others)]

    with mock.patch.object(triton, "_conv_config", changed), EMULATED["triton"](check=CHECKS):
        contract.test_conv_stats(case, EmulatedTarget("triton", dtype))
        contract.test_conv_backward(case, EmulatedTarget("triton", dtype))


# More than 2^31 elements -------------------------------------------------------------------------


class Far:
    """Runs the last programs of each launch on tensors of which only the end is in memory.

    Tensors of images are on "meta". A kernel gets the address of their end less all that comes
    before it, so that an offset that wraps at 2^31 leaves the memory that is there, and raises.
    """

    def __init__(self, images: int) -> None:
        import ptxemu

        self.kept = images
        self.memory = ptxemu.GlobalMemory()
        self.ends: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, its end
        self.ran: list[str] = []

    def images(self, n: int, end: Tensor) -> Tensor:
        """(n, C, H, W) on "meta" that ends in `end`."""
        t = torch.empty(n, *end.shape[1:], dtype=end.dtype, device="meta")
        t = t.to(memory_format=torch.channels_last)
        self.ends[id(t)] = (t, end.contiguous(memory_format=torch.channels_last))
        return t

    def end(self, t: Tensor) -> Tensor:
        """What is in memory of t: its last images; of partial sums the last program's."""
        if id(t) not in self.ends:
            images = t.dim() == 4 and t.stride(1) == 1
            end = torch.zeros(self.kept if images else 1, *t.shape[1:], dtype=t.dtype)
            formats = {True: torch.channels_last, False: torch.contiguous_format}
            self.ends[id(t)] = (t, end.contiguous(memory_format=formats[images]))
        return self.ends[id(t)][1]

    def address(self, t: Tensor) -> int:
        end = self.end(t)
        return self.memory.ptr(end) - (t.numel() - end.numel()) * t.element_size()

    def run(self, launch: TritonLaunch) -> None:
        import ptxemu

        name = launch.kernel.__name__
        if name in ("_merge_statistics_kernel", "_sum_kernel"):
            return  # they read what the programs left out would have written
        self.ran.append(name)
        size = [*launch.grid, 1, 1][:3]
        axes = [range(n) for n in size]
        of_pixels = size.index(max(size))
        axes[of_pixels] = range(size[of_pixels] - 1, size[of_pixels])
        x, y, z = axes
        programs = [i + size[0] * (j + size[1] * k) for k in z for j in y for i in x]
        args = [
            self.address(a) if isinstance(a, Tensor) and a.is_meta else a
            for a in launch.runtime_args()
        ]
        ptxemu.run_triton(
            launch.compiled(), launch.grid, *args, check=CHECKS, mem=self.memory, ctas=programs
        )


def integers(bound: int, *shape: int) -> Tensor:
    """Small enough for every sum to be exact."""
    return torch.randint(-bound, bound + 1, shape).to(F16)


@pytest.mark.parametrize(
    ("groups", "stride"), [(32, 1), (4, 1), (32, 2)], ids=["d4", "d32", "d4-stride2"]
)
def test_convolutions_past_int32(groups: int, stride: int) -> None:
    """Every image tensor has more than 2^31 elements; the last images come out right."""
    c, h, kept, compared = 128, 4, 64, 2
    n = (2**31 // (c * (h // stride) ** 2)) + kept
    far = Far(kept)
    x, dy = integers(2, kept, c, h, h), integers(2, kept, c, h // stride, h // stride)
    dy[:-compared] = 0  # the sums of the last programs are then those of the last images
    z = integers(2, *dy.shape)
    weight = integers(1, c, c // groups, 3, 3)
    scale, shift, a = (torch.randint(-1, 2, (c,)).float() for _ in range(3))
    conv = {"stride": stride, "groups": groups}
    far_x, far_dy, far_z = (far.images(n, t) for t in (x, dy, z))
    assert min(far_x.numel(), far_dy.numel()) > 2**31

    with triton_launches(far.run):
        y = triton.conv_affine_relu(far_x, weight, scale, shift, residual=far_z, **conv)
        ours = triton.conv_stats(far_x, weight, prologue=(scale, shift), **conv)[0]
        partial: list[Tensor] = []
        with mock.patch.object(triton, "_sum", lambda t, *_, **__: partial.append(t)):
            bn = (far_z, scale, shift, a, None, None)
            dx, _ = triton.conv_backward(far_dy, far_x, weight, bn=bn, **conv)

    last = slice(-compared, None)
    x, dy, z, weight = x[last].float(), dy[last].float(), z[last].float(), weight.float()
    want_y = reference.conv_affine_relu(x, weight, scale, shift, residual=z, **conv)
    want_z = reference.conv_stats(x, weight, prologue=(scale, shift), **conv)[0]
    want_dx, want_dweight = reference.conv_backward(
        dy, x, weight, bn=(z, scale, shift, a, None, None), **conv
    )
    for found, want in ((y, want_y), (ours, want_z), (dx, want_dx)):
        assert want.abs().max() > 0
        assert torch.equal(far.end(found)[last].float(), want)
    dweight = far.end(partial[-1])[0]  # (9, K, D)
    assert torch.equal(dweight.permute(1, 2, 0).reshape(want_dweight.shape), want_dweight)


def test_pointwise_past_int32() -> None:
    c, h, kept = 128, 4, 4096
    n = 2**31 // (c * h * h) + 32
    m = n * h * h
    far = Far(kept)
    z, dy = integers(2, kept, c, h, h), integers(2, kept, c, h, h)
    scale, shift, a = (torch.randint(-1, 2, (c,)).float() for _ in range(3))
    mean, rstd = torch.zeros(c), torch.ones(c)
    far_z, far_dy = far.images(n, z), far.images(n, dy)
    partial: list[Tensor] = []
    with (
        triton_launches(far.run),
        mock.patch.object(triton, "_sum", lambda t, *_, **__: partial.append(t)),
        mock.patch.object(triton, "_merged", lambda t: partial.append(t)),
    ):
        y = triton.normalize_relu(far_z, scale, shift, residual=far_dy)
        dz = triton.bn_relu_input_gradient(far_dy, far_z, scale, shift, a, scale, shift)
        triton.batch_stats(far_z)
        triton.bn_relu_backward(far_dy, far_z, scale, shift, mean, rstd)
    want_y = reference.normalize_relu(z.float(), scale, shift, residual=dy.float())
    want_dz = reference.bn_relu_input_gradient(dy.float(), z.float(), scale, shift, a, scale, shift)
    for found, want in ((y, want_y), (dz, want_dz)):
        assert torch.equal(far.end(found)[-1].float(), want[-1])
    count, pivot, off, m2 = far.end(partial[0])[0]
    pixels = int(count[0])
    assert 10000 < pixels < kept * h * h < m
    rows = z.permute(0, 2, 3, 1).reshape(-1, c)[-pixels:].double()
    torch.testing.assert_close((pivot + off).double(), rows.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(m2.double() / pixels, rows.var(0, correction=0), rtol=1e-5, atol=0)
    sums = far.end(partial[1])[0]
    g = reference.bn_relu_backward(
        *(t.permute(0, 2, 3, 1).reshape(-1, c)[-pixels:, :, None, None].float() for t in (dy, z)),
        scale, shift, mean, rstd,
    )  # fmt: skip
    assert torch.equal(sums, torch.stack(g))
    assert len(far.ran) == 4
