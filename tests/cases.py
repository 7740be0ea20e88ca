"""The problems that the tests run, and the float64 truth that every result is held to.

The bound is the same everywhere: an error of at most twice the one that torch's own operators of
the same dtype make on the same input, plus `floor`, one rounding of that dtype on the scale of the
terms that were summed (torch may be exact by luck, and another order of summation is as good).
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnext_kernels import backends
from resnext_kernels.problem import ConvProblem

try:
    from resnext_kernels import _C

    CPU_ISAS: list[str | None] = [*_C.cpu_isas()]
except ImportError:  # installed without the compiled library: `cpu` then says so in why_not
    CPU_ISAS = [None]

DTYPE_NAMES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float64: "f64",
}


@dataclass(frozen=True)
class Case:
    """One grouped 3x3 convolution, C to K channels, padding == dilation."""

    n: int
    c: int
    h: int
    w: int
    groups: int
    k: int = 0  # 0: as many as c
    stride: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", self.k or self.c)

    def __str__(self) -> str:
        k = f"-k{self.k}" if self.k != self.c else ""
        dilation = f"-d{self.dilation}" if self.dilation != 1 else ""
        return f"n{self.n}-c{self.c}{k}-h{self.h}w{self.w}-g{self.groups}-s{self.stride}{dilation}"

    @property
    def conv(self) -> dict[str, int]:
        return {"stride": self.stride, "groups": self.groups, "dilation": self.dilation}

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (
            self.n,
            self.k,
            (self.h - 1) // self.stride + 1,
            (self.w - 1) // self.stride + 1,
        )

    @property
    def reduced(self) -> int:
        """M = N*H*W of the output: what BatchNorm reduces over."""
        n, _, h, w = self.out_shape
        return n * h * w


CASES = [
    # ResNeXt's own layers, maps cut down: 32x4d, 32x8d, 64x4d, and the stride-2 ones
    Case(2, 128, 9, 7, groups=32),
    Case(2, 128, 9, 8, groups=32, stride=2),
    Case(1, 128, 28, 28, groups=32),
    Case(1, 128, 17, 33, groups=32, stride=2),
    Case(2, 256, 7, 7, groups=32),
    Case(1, 256, 8, 7, groups=32, stride=2),
    Case(1, 256, 5, 6, groups=64),
    Case(1, 512, 5, 5, groups=32),
    # every number of channels per group: 1 (depthwise), 2, 3, 5, 14, 16, 24, 32, 40, 64
    Case(2, 24, 7, 9, groups=24),
    Case(1, 24, 8, 8, groups=24, stride=2),
    Case(1, 3, 5, 5, groups=3),
    Case(2, 64, 6, 7, groups=32),
    Case(1, 9, 8, 5, groups=3),
    Case(1, 15, 7, 7, groups=3, stride=2),
    Case(1, 24, 9, 11, groups=3),
    Case(1, 112, 6, 7, groups=8),
    Case(1, 112, 7, 7, groups=8, stride=2),
    Case(2, 64, 8, 8, groups=4),
    Case(1, 96, 7, 7, groups=4),
    Case(1, 96, 7, 6, groups=4, stride=2),
    Case(1, 128, 6, 6, groups=4),
    Case(1, 80, 7, 5, groups=2),
    Case(1, 80, 5, 9, groups=2, stride=2),
    Case(1, 128, 5, 5, groups=2),
    # one group, one channel
    Case(2, 64, 7, 7, groups=1),
    Case(1, 64, 9, 9, groups=1, stride=2),
    Case(2, 1, 5, 5, groups=1),
    # in and out channels per group differ: 4 to 8, 8 to 4, 3 to 5, 4 to 1, 1 to 4, 3 to 64
    Case(2, 32, 7, 7, groups=8, k=64),
    Case(2, 64, 7, 7, groups=8, k=32, stride=2),
    Case(1, 12, 6, 6, groups=4, k=20),
    Case(1, 64, 7, 7, groups=16, k=16),
    Case(1, 16, 7, 7, groups=16, k=64),
    Case(1, 3, 9, 9, groups=1, k=64, stride=2),
    # stride 3, dilation 2 and 3 (wider than the map too), both at once
    Case(1, 32, 10, 11, groups=8, stride=3),
    Case(1, 32, 9, 9, groups=8, dilation=2),
    Case(1, 64, 11, 7, groups=16, dilation=3),
    Case(1, 32, 2, 3, groups=8, dilation=3),
    Case(1, 128, 13, 12, groups=32, stride=2, dilation=2),
    # one pixel, one row, one column, two pixels, rows longer than any register tile
    Case(2, 128, 1, 1, groups=32),
    Case(3, 64, 1, 1, groups=8, stride=2),
    Case(3, 32, 1, 17, groups=8),
    Case(3, 32, 17, 1, groups=8),
    Case(2, 64, 1, 9, groups=8, stride=2),
    Case(1, 32, 2, 2, groups=8),
    Case(1, 16, 3, 61, groups=4),
    Case(1, 128, 3, 30, groups=32),
    # batch 0 and 3
    Case(0, 128, 7, 7, groups=32),
    Case(3, 64, 5, 4, groups=16),
]

# One of each kind, where the whole list would say no more.
FEW = [
    Case(2, 128, 9, 7, groups=32),
    Case(2, 64, 8, 7, groups=8, stride=2),
    Case(1, 112, 6, 7, groups=8),
    Case(2, 48, 5, 6, groups=16, k=32),
]


@dataclass(frozen=True)
class Target:
    """A backend, for `cpu` one of its instruction sets, and a dtype."""

    backend: str
    dtype: torch.dtype
    isa: str | None = None

    def __str__(self) -> str:
        isa = f"-{self.isa}" if self.isa else ""
        return f"{DTYPE_NAMES[self.dtype]}-{self.backend}{isa}"

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"resnext_kernels.backends.{self.backend}")

    @property
    def device(self) -> str:
        interpreted = self.backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return "cuda" if self.backend in ("triton", "cuda") and not interpreted else "cpu"

    def problem(self, case: Case) -> ConvProblem:
        return ConvProblem(
            n=case.n,
            h=case.h,
            w=case.w,
            c=case.c,
            k=case.k,
            dtype=self.dtype,
            device_type=self.device,
            **case.conv,
        )

    def require(self, case: Case) -> None:
        """Skip the test with the backend's own reason where it does not serve `case`."""
        reason = self.module.why_not(self.problem(case))
        if reason is not None:
            pytest.skip(f"{self}: {reason}")


def targets() -> list[Target]:
    found = []
    for backend in backends.NAMES:
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        if backend == "reference":  # to which bfloat16 and float16 are all the same
            dtypes = [torch.float32, torch.bfloat16, torch.float64]
        for isa in CPU_ISAS if backend == "cpu" else [None]:
            found += [Target(backend, dtype, isa) for dtype in dtypes]
    return found


TARGETS = targets()


def cross(cases: list[Case]) -> pytest.MarkDecorator:
    """Every case on every target in float32, on kernels every third in the narrower dtypes.

    Dtypes differ where elements are loaded and stored; the rest of a kernel is one template, and
    the CUDA backend, which has no float32, is run in float16. The reference is plain ATen: every
    sixth case.
    """

    def step(target: Target) -> int:
        main = torch.float16 if target.backend == "cuda" else torch.float32
        return 6 if target.backend == "reference" else 1 if target.dtype == main else 3

    pairs = [(case, target) for target in TARGETS for case in cases[:: step(target)]]
    ids = [f"{case}-{target}" for case, target in pairs]
    return pytest.mark.parametrize(("case", "target"), pairs, ids=ids, indirect=["target"])


@dataclass
class Inputs:
    """Tensors of one call; x, weight, residual and dy have the case's dtype, vectors float32."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor
    dy: Tensor

    def map(self, f) -> Inputs:
        return Inputs(*(f(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def double(self) -> Inputs:
        return self.map(lambda t: t.detach().double())

    def clone(self) -> Inputs:
        return self.map(lambda t: t.detach().clone())


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random inputs, channels_last, about a third of gamma negative; the same on every device."""
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    d = case.c // case.groups

    def images(*shape: int) -> Tensor:
        t = torch.randn(*shape).to(device, dtype)
        return t.contiguous(memory_format=torch.channels_last)

    def vector(t: Tensor) -> Tensor:
        return t.to(device, vector_dtype)

    return Inputs(
        x=(images(case.n, case.c, case.h, case.w) + 0.5),
        weight=(torch.randn(case.k, d, 3, 3) / (9 * d) ** 0.5).to(device, dtype),
        gamma=vector((torch.rand(case.k) + 0.5) * (torch.rand(case.k) - 0.3).sign()),
        beta=vector(torch.randn(case.k) / 2),
        running_mean=vector(torch.randn(case.k) / 2),
        running_var=vector(torch.rand(case.k) + 0.5),
        residual=images(*case.out_shape),
        dy=images(*case.out_shape),
    )


def conv2d(x: Tensor, weight: Tensor, *, stride: int, groups: int, dilation: int) -> Tensor:
    """The convolution as one matrix product: the truth uses none of torch's convolutions."""
    n, _, h, w = x.shape
    columns = F.unfold(x, 3, dilation, dilation, stride)  # (N, C*9, H'*W')
    columns = columns.reshape(n, groups, weight[0].numel(), columns.shape[-1])
    z = weight.reshape(groups, -1, weight[0].numel()) @ columns  # (N, G, K/G, H'*W')
    return z.reshape(n, len(weight), (h - 1) // stride + 1, (w - 1) // stride + 1)


def passed_relu(y: Tensor) -> Tensor:
    """Where the ReLU let `y` through.

    Within one rounding of zero either side of the ReLU is right, so gradients are compared on the
    side that the forward result under test shows.
    """
    return (y != 0).detach()


@dataclass
class Plain:
    """The op in plain torch lines: in float64 the truth, in the tested dtype the peer."""

    y: Tensor
    z: Tensor
    gradients: dict[str, Tensor]
    running_mean: Tensor | None
    running_var: Tensor | None


def plain(
    inputs: Inputs,
    conv: dict[str, int],
    *,
    training: bool,
    residual: bool = False,
    passed: Tensor | None = None,
    gradients: bool = False,
    running: bool = True,
    affine: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Plain:
    """relu(batch_norm(conv(x)) [+ residual]) and, if asked for, its gradients for `inputs.dy`.

    With `passed` the gradients are those of the ReLU that lets through what `passed` says.
    """
    t = inputs.map(lambda t: t.detach().clone())
    names = ["x", "weight"] + ["gamma", "beta"] * affine + ["residual"] * residual
    leaves = [getattr(t, name).requires_grad_(gradients) for name in names]
    if t.x.dtype == torch.float64:
        z = conv2d(t.x, t.weight, **conv)
    else:
        z = F.conv2d(t.x, t.weight, padding=conv["dilation"], **conv)
    pre = F.batch_norm(
        z,
        t.running_mean if running else None,
        t.running_var if running else None,
        t.gamma if affine else None,
        t.beta if affine else None,
        training,
        momentum,
        eps,
    )
    if residual:
        pre = pre + t.residual
    y = F.relu(pre)
    found: dict[str, Tensor] = {}
    if gradients:
        result = y if passed is None else torch.where(passed, pre, torch.zeros_like(pre))
        found = dict(zip(names, torch.autograd.grad(result, leaves, t.dy), strict=True))
    return Plain(
        y.detach(),
        z.detach(),
        found,
        t.running_mean if running else None,
        t.running_var if running else None,
    )


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def floor(dtype: torch.dtype, scale: float) -> float:
    """One rounding of `dtype` on the scale of the summed terms.

    Of float64, in which the truth itself is computed, only that no step went through float32.
    """
    eps = torch.finfo(torch.float32).eps / 2**16
    return (eps if dtype == torch.float64 else torch.finfo(dtype).eps) * scale


def assert_as_exact_as_torch(
    name: str, actual: Tensor, truth: Tensor, peer: Tensor, floor: float
) -> None:
    """|actual - truth| <= 2 max|peer - truth| + floor; NaN and Inf exactly where torch has them.

    They may be on different devices.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}"
    assert actual.dtype == peer.dtype, f"{name}: dtype {actual.dtype}, torch gives {peer.dtype}"
    actual, truth, peer = (t.detach().cpu().double() for t in (actual, truth, peer))
    odd = ~peer.isfinite()
    assert torch.equal(~actual.isfinite(), odd), f"{name}: NaN or Inf where torch has none or none"
    torch.testing.assert_close(actual[odd], peer[odd], rtol=0, atol=0, equal_nan=True)
    if odd.all():
        return
    error = (actual - truth)[~odd].abs().max().item()
    peer_error = (peer - truth)[~odd].abs().max().item()
    assert error <= 2 * peer_error + floor, (
        f"{name}: error {error:.3g}, torch's own {peer_error:.3g}, floor {floor:.3g}"
    )


def gradient_floors(
    case: Case, inputs: Inputs, truth: Plain, *, training: bool, passed: Tensor, eps: float = 1e-5
) -> dict[str, float]:
    """`floor` of each gradient: a rounding of the result, and the rounding of its terms.

    Of the terms, the scale before BatchNorm's gradient cancels them counts; a sum of M = N*H*W
    terms, each rounded to storage, is off by sqrt(M) roundings of one term.
    """
    t, dtype = inputs.double(), inputs.x.dtype
    g = torch.where(passed, t.dy, torch.zeros_like(t.dy))
    var = truth.z.var((0, 2, 3), unbiased=False) if training else t.running_var
    a = (t.gamma * (var + eps).rsqrt())[:, None, None]
    m = case.reduced**0.5
    taps = (9 * case.k / case.groups) ** 0.5
    terms = {
        "x": taps * rms(t.weight) * largest(a * g),
        "weight": m * rms(a * g) * rms(t.x),
        "gamma": m * rms(g),
        "beta": m * rms(g),
    }
    floors = {
        n: floor(dtype, s + largest(truth.gradients[n]))
        for n, s in terms.items()
        if n in truth.gradients
    }
    return floors | {"residual": 0.0}  # dy or 0, never rounded
