"""The GPU backends' compiled kernels against the contract's own tests, run by a PTX emulator.

The launchers run on CPU tensors; what they launch is compiled for sm_80 and run thread for thread,
with accesses checked for bounds and alignment, and shared memory for races and for reads of what
was never written. ptxemu is a PTX emulator beside the repository in some checkouts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import test_backend_functions as contract
import test_op
import torch
from cases import CASES, DTYPE_NAMES, FEW, Case, Target, conv2d
from torch import Tensor

from bench.emulator import EMULATORS, CudaEmulator, TritonEmulator, TritonLaunch, triton_launches
from resnext_kernels import backends
from resnext_kernels.backends import cuda, reference, triton

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
def emulated_triton() -> None:
    """Skips where nothing that Triton compiles can be run."""
    if (reason := TritonEmulator.why_not()) is not None:
        pytest.skip(reason)


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
    (Case(1, 64, 7, 9, groups=4, stride=2), BF16),
    (Case(2, 64, 9, 6, groups=2, stride=2), F16),
    (Case(2, 8, 6, 5, groups=2), F16),
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
    contract.test_bn_residual_relu_backward,
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


on_both = pytest.mark.parametrize(
    "emulated",
    [("cuda", F16, "A100"), ("triton", F16, "A100")],
    indirect=True,
    ids=["f16-cuda-A100", "f16-triton-A100"],
)


@pytest.mark.parametrize("affine", ["gamma beta", "gamma", "beta", ""])
@pytest.mark.parametrize("channels", [1, 24, 2048])
@on_both
def test_vectors_of_a_batch_norm(channels: int, affine: str, emulated: EmulatedTarget) -> None:
    contract.test_vectors_of_a_batch_norm(channels, affine, emulated)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@on_both
def test_odd_values_in_the_vectors_of_a_batch_norm(value: float, emulated: EmulatedTarget) -> None:
    contract.test_odd_values_in_the_vectors_of_a_batch_norm(value, emulated)


@each(on_cuda(SERVED_FEW, (F16, "A100")))
def test_conv_bn_relu(case: Case, emulated: EmulatedTarget) -> None:
    contract.test_conv_bn_relu(case, emulated)


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


@each(on_triton([(Case(2, 64, 6, 5, groups=16), F32)], quick=(0,)))
def test_float32_products_of_16_channels(
    case: Case, emulated: EmulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of an older Triton."""
    monkeypatch.setattr(triton, "_NARROW_FLOAT32", 16)
    for function in OF_CONVOLUTIONS:
        function(case, emulated)


@each(on_triton([(Case(2, 64, 6, 5, groups=16), F16)], quick=(0,)))
def test_more_pixels_than_a_second_axis_has_programs(
    case: Case, emulated: EmulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stood for by a second axis that ends sooner."""
    monkeypatch.setattr(triton, "_MOST_SECOND", 1)
    for function in OF_CONVOLUTIONS:
        function(case, emulated)


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

    z, (mean, var, *_) = cuda.conv_stats(t.x, t.weight, bn=t.bn, prologue=None, **case.conv)
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


TURNS = 8


@pytest.mark.parametrize("turn", range(TURNS))
@each(on_triton([TRITON[i] for i in (0, 2, 4, 15)]))
def test_what_autotuning_tries(
    case: Case, emulated: EmulatedTarget, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One neighbour of each configuration that the functions meet; all of them in TURNS turns."""
    original = triton._conv_config

    def changed(*args: Any) -> triton.Config:
        others = triton._alternatives(original(*args), args[3], emulated.dtype, args[-1])
        assert 1 < len(others) <= TURNS
        return others[turn % len(others)]

    monkeypatch.setattr(triton, "_conv_config", changed)
    contract.test_conv_stats(case, emulated)
    contract.test_conv_backward(case, emulated)


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
        if name in ("_merge_statistics_kernel", "_add_sums_kernel", "_sum_kernel"):
            return  # they read what the programs left out would have written
        self.ran.append(name)
        size = [*launch.grid, 1, 1][:3]
        axes = [range(n) for n in size]
        of_pixels = size.index(max(size))
        last = 1  # program of the last pixels; several, where those of a block are neighbours
        of = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
        if name == "_dweight_kernel":
            last = 3 * of["SRC_CHUNKS"] * of["DST_CHUNKS"]
        elif of.get("FLAT"):
            groups = of["DST_C"] // (of["DIN"] if of["TRANSPOSED"] else of["DOUT"])
            last = -(-groups // (of["PACK"] * of["TILES"])) * of["DST_CHUNKS"]
        axes[of_pixels] = range(size[of_pixels] - last, size[of_pixels])
        x, y, z = axes
        programs = [i + size[0] * (j + size[1] * k) for k in z for j in y for i in x]
        args = [
            self.address(a) if isinstance(a, Tensor) and a.is_meta else a
            for a in launch.runtime_args()
        ]
        ptxemu.run_triton(
            launch.compiled(),
            launch.grid,
            *args,
            check=("race", "init"),
            mem=self.memory,
            ctas=programs,
        )


def integers(bound: int, *shape: int) -> Tensor:
    """Small enough for every sum to be exact."""
    return torch.randint(-bound, bound + 1, shape).to(F16)


@pytest.mark.parametrize(
    ("groups", "stride"), [(32, 1), (4, 1), (32, 2)], ids=["d4", "d32", "d4-stride2"]
)
@pytest.mark.usefixtures("emulated_triton")
def test_convolutions_past_int32(groups: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image tensor has more than 2^31 elements; the last images come out right."""
    # programs of the fused backward that walk no more images than are in memory
    monkeypatch.setattr(triton, "_MOST_PROGRAMS", 2**20)
    c, h, kept, compared = 128, 4, 128, 2
    n = (2**31 // (c * (h // stride) ** 2)) + kept
    far = Far(kept)
    x, dy = integers(2, kept, c, h, h), integers(2, kept, c, h // stride, h // stride)
    dy[:-compared] = 0  # the sums of the last programs are then those of the last images
    z = integers(2, *dy.shape)
    weight = integers(1, c, c // groups, 3, 3)
    vectors = torch.randint(-1, 2, (5, c)).float()
    scale, shift = vectors[3], vectors[4]
    conv = {"stride": stride, "groups": groups}
    far_x, far_dy, far_z = (far.images(n, t) for t in (x, dy, z))
    assert min(far_x.numel(), far_dy.numel()) > 2**31

    with triton_launches(far.run):
        y = triton.conv_affine_relu(far_x, weight, scale, shift, residual=far_z, **conv)
        statistics = {"bn": (None, None, 1e-5), "prologue": (scale, shift)}
        ours = triton.conv_stats(far_x, weight, **statistics, **conv)[0]
        partial: list[Tensor] = []
        monkeypatch.setattr(triton, "_sum", lambda t, *_, **__: partial.append(t))
        bn = (far_z, vectors, None)
        gradients = [
            triton.conv_backward(far_dy, far_x, weight, bn=bn, **conv, **needs)
            for needs in ({}, {"need_dweight": False}, {"need_dx": False})
        ]

    last = slice(-compared, None)
    x, dy, z, weight = x[last].float(), dy[last].float(), z[last].float(), weight.float()
    want_y = reference.conv_affine_relu(x, weight, scale, shift, residual=z, **conv)
    want_z = reference.conv_stats(x, weight, prologue=(scale, shift), **conv)[0]
    want_dx, want_dweight = reference.conv_backward(dy, x, weight, bn=(z, vectors, None), **conv)
    images = [(y, want_y), (ours, want_z), *((dx, want_dx) for dx, _ in gradients[:2])]
    for found, want in images:
        assert want.abs().max() > 0
        assert torch.equal(far.end(found)[last].float(), want)
    assert len(partial) == 2
    for sums in partial:
        dweight = far.end(sums)[0]  # (9, K, D)
        assert torch.equal(dweight.permute(1, 2, 0).reshape(want_dweight.shape), want_dweight)


@pytest.mark.usefixtures("emulated_triton")
def test_pointwise_past_int32() -> None:
    c, h, kept = 128, 4, 4096
    n = 2**31 // (c * h * h) + 32
    m = n * h * h
    far = Far(kept)
    z, dy = integers(2, kept, c, h, h), integers(2, kept, c, h, h)
    vectors = torch.randint(-1, 2, (5, c)).float()
    coefficients = torch.randint(-1, 2, (2, c)).float()
    scale, shift = vectors[3], vectors[4]
    far_z, far_dy = far.images(n, z), far.images(n, dy)
    partial: list[Tensor] = []
    with (
        triton_launches(far.run),
        mock.patch.object(triton, "_of_parts", lambda _, t, *__: partial.append(t)),
    ):
        y = triton.normalize_relu(far_z, scale, shift, residual=far_dy)
        dz = triton.bn_relu_input_gradient(far_dy, far_z, vectors, coefficients)
        triton.batch_stats(far_z, (None, None, 1e-5))
        triton.bn_relu_backward(far_dy, far_z, vectors)
    want_y = reference.normalize_relu(z.float(), scale, shift, residual=dy.float())
    want_dz = reference.bn_relu_input_gradient(dy.float(), z.float(), vectors, coefficients)
    for found, want in ((y, want_y), (dz, want_dz)):
        assert torch.equal(far.end(found)[-1].float(), want[-1])
    count, pivot, off, m2 = far.end(partial[0])[0]
    pixels = int(count[0])
    assert 10000 < pixels < kept * h * h < m
    rows = z.permute(0, 2, 3, 1).reshape(-1, c)[-pixels:].double()
    torch.testing.assert_close((pivot + off).double(), rows.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(m2.double() / pixels, rows.var(0, correction=0), rtol=1e-5, atol=0)
    sums = far.end(partial[1])[0]
    *g, _ = reference.bn_relu_backward(
        *(t.permute(0, 2, 3, 1).reshape(-1, c)[-pixels:, :, None, None].float() for t in (dy, z)),
        vectors,
    )
    assert torch.equal(sums, torch.stack(g))
    assert len(far.ran) == 4
