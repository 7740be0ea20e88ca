"""Each function of the backend contract by itself.

Two kinds of input. Small integers and halves, for which every product, sum and stored value is
exact in any order of summation: the result must equal the float64 truth after one rounding, bit for
bit, so not one tap, border or channel can be wrong unseen. And statistics of random numbers, which
are rounded: these are held to twice torch's own error.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, FEW, Case, Target, assert_as_exact_as_torch, conv2d, cross, largest
from torch import Tensor

from resnext_kernels.backends import reference
from resnext_kernels.problem import weight_format

pytestmark = pytest.mark.usefixtures("poisoned")

each_case, few_cases = cross(CASES), cross(FEW)
BOTH = (False, True)


class Exact:
    """Tensors of small integers and halves, and the same in float64."""

    def __init__(self, case: Case, target: Target) -> None:
        self.case, self.target = case, target
        d = case.c // case.groups
        self.x = self.images(3, case.n, case.c, case.h, case.w)
        # the contract allows two memory formats of the weight: each case has one of them
        self.weight = self.integers(2, case.k, d, 3, 3).to(target.dtype)
        if (case.c + case.w) % 2:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.z = self.images(4, *case.out_shape)
        self.dy = self.images(3, *case.out_shape)
        self.residual = self.images(4, *case.out_shape)
        self.scale = self.one_of([-1.0, 0.0, 0.5, 1.0, 2.0], case.k)
        self.shift = self.one_of([-1.0, 0.0, 0.5, 1.0], case.k)
        self.in_scale = self.one_of([-1.0, 0.5, 1.0], case.c)
        self.in_shift = self.one_of([-1.0, 0.0, 0.5], case.c)
        self.res_scale = self.one_of([-1.0, 0.5, 1.0], case.k)
        self.res_shift = self.one_of([-0.5, 0.0, 1.0], case.k)
        self.coefficients = torch.stack(
            (self.one_of([-0.5, 0.0, 1.0], case.k), self.one_of([-1.0, 0.0, 0.5], case.k))
        )
        self.mean = self.one_of([-0.5, 0.0, 1.0], case.k)
        self.rstd = self.one_of([0.5, 1.0, 2.0], case.k)
        nothing = torch.full_like(self.mean, float("nan"))  # the variance is not read
        self.vectors = torch.stack((self.mean, nothing, self.rstd, self.scale, self.shift))

    @property
    def bn(self) -> tuple[Tensor, Tensor, float]:
        return self.scale, self.shift, 1e-3

    def integers(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(-bound, bound + 1, shape).double().to(self.target.device)

    def images(self, bound: int, *shape: int) -> Tensor:
        t = self.integers(bound, *shape).to(self.target.dtype)
        return t.contiguous(memory_format=torch.channels_last)

    def one_of(self, values: list[float], size: int) -> Tensor:
        dtype = torch.float64 if self.target.dtype == torch.float64 else torch.float32
        chosen = torch.tensor(values, dtype=dtype)[torch.randint(len(values), (size,))]
        return chosen.to(self.target.device)

    def activation(self, prologue: bool) -> Tensor:
        x = self.x.double()
        return F.relu(affine(x, self.in_scale, self.in_shift)) if prologue else x

    def prologue(self, prologue: bool) -> tuple[Tensor, Tensor] | None:
        return (self.in_scale, self.in_shift) if prologue else None

    def conv(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight.double(), **self.case.conv)

    def y(self, from_y: bool) -> Tensor | None:
        """The forward result with a residual, where the mask cannot be recomputed from z."""
        if not from_y:
            return None
        pre = affine(self.z.double(), self.scale, self.shift) + self.residual.double()
        return F.relu(pre).to(self.target.dtype)

    def masked_dy(self, from_y: bool, relu: bool = True) -> Tensor:
        if not relu:
            return self.dy.double()
        y = self.y(from_y)
        pre = affine(self.z.double(), self.scale, self.shift) if y is None else y
        return torch.where(pre <= 0, 0.0, self.dy.double())

    def dz(self, from_y: bool, relu: bool = True, frozen: bool = False) -> Tensor:
        dz = affine(self.masked_dy(from_y, relu), self.scale, 0 * self.scale)
        return dz if frozen else dz + affine(self.z.double(), *self.coefficients)


def affine(t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale.double()[:, None, None] * t + shift.double()[:, None, None]


def by_torch(
    case: Case, target: Target, a: Tensor, weight: Tensor, dz: Tensor
) -> tuple[Tensor, ...] | None:
    """dx and dweight where the backend has torch's own convolution for them, and it may round."""
    if not (torch_rounds(target) and uses_torch(case, target)):
        return None
    leaves = [t.detach().to(target.dtype).requires_grad_() for t in (a, weight)]
    z = F.conv2d(*leaves, padding=case.dilation, **case.conv)
    return torch.autograd.grad(z, leaves, dz.to(target.dtype))


def torch_rounds(target: Target) -> bool:
    """Whether exactness is not to be had of the gradients of torch's own convolution.

    oneDNN rounds partial sums to half precision; cuDNN takes whichever algorithm it finds best.
    """
    return target.dtype in (torch.bfloat16, torch.float16) or target.device == "cuda"


def uses_torch(case: Case, target: Target) -> bool:
    return target.backend == "reference" or case.groups == 1


def assert_exactly(
    name: str, actual: Tensor, truth: Tensor, dtype: torch.dtype, peer: Tensor | None = None
) -> None:
    """`actual` is `truth` rounded once to `dtype`, or as near to it as `peer`."""
    if peer is not None:
        assert_as_exact_as_torch(name, actual, truth, peer, 0.0)
        return
    assert actual.dtype == dtype, f"{name}: {actual.dtype}"
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)}"
    wrong = (actual != truth.to(dtype)).nonzero()
    assert not len(wrong), (
        f"{name}: {len(wrong)} of {truth.numel()} elements wrong, at {wrong[0].tolist()}: "
        f"{actual[tuple(wrong[0])].item()} for {truth[tuple(wrong[0])].item()}"
    )


def assert_channels_last(name: str, t: Tensor) -> None:
    assert t.is_contiguous(memory_format=torch.channels_last), f"{name}: strides {t.stride()}"


@each_case
def test_conv_affine_relu(case: Case, target: Target) -> None:
    target.require(case)
    t = Exact(case, target)
    for residual, prologue in itertools.product(BOTH, BOTH):
        y = target.module.conv_affine_relu(
            t.x,
            t.weight,
            t.scale,
            t.shift,
            residual=t.residual if residual else None,
            prologue=t.prologue(prologue),
            **case.conv,
        )
        pre = affine(t.conv(t.activation(prologue)), t.scale, t.shift)
        truth = F.relu(pre + t.residual.double() if residual else pre)
        if uses_torch(case, target):
            truth = affine(
                t.conv(t.activation(prologue)).to(target.dtype).double(), t.scale, t.shift
            )
            truth = F.relu(truth + t.residual.double() if residual else truth)
        assert_exactly(f"y, {residual=}, {prologue=}", y, truth, target.dtype)
        assert_channels_last("y", y)


@each_case
def test_conv_stats(case: Case, target: Target) -> None:
    target.require(case)
    t = Exact(case, target)
    for prologue in BOTH:
        args = {"prologue": t.prologue(prologue), **case.conv}
        z, vectors = target.module.conv_stats(t.x, t.weight, bn=t.bn, **args)
        truth = t.conv(t.activation(prologue))
        assert_exactly(f"z, {prologue=}", z, truth, target.dtype)
        assert_channels_last("z", z)
        if case.n:
            assert_statistics(target, truth, t.bn, vectors)
        z, vectors = target.module.conv_stats(t.x, t.weight, **args)
        assert_exactly(f"z without statistics, {prologue=}", z, truth, target.dtype)
        assert vectors is None


def assert_statistics(target: Target, z: Tensor, bn: Any, vectors: Tensor) -> None:
    """Statistics of z as stored or before its rounding, either is right, and what they make."""
    gamma, beta, eps = bn
    m = z.numel() / z.shape[1]
    unbias = m / max(m - 1, 1)
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), unbiased=False)
    vector = torch.float64 if target.dtype == torch.float64 else torch.float32
    peer_var, peer_mean = torch.var_mean(z.to(target.dtype).to(vector), (0, 2, 3), unbiased=False)
    # a sum of M float32 terms is off by about sqrt(M) roundings of one term
    rounding = torch.finfo(vector).eps * m**0.5
    assert vectors.shape == (5, z.shape[1])
    assert vectors.is_contiguous()
    mean, var, *_ = vectors
    assert_as_exact_as_torch("mean", mean, exact_mean, peer_mean, rounding * largest(z) / m**0.5)
    # deviations are of the order of 1 where there are any; of none the square of a rounding is left
    floor = unbias * rounding * largest(exact_var) + torch.finfo(vector).eps ** 2
    assert_as_exact_as_torch("var", var, unbias * exact_var, unbias * peer_var, floor)
    made = reference.bn_vectors(gamma, beta, mean, var / unbias, eps, unbias)
    torch.testing.assert_close(vectors[2:4], made[2:4], rtol=1e-5, atol=0)
    torch.testing.assert_close(vectors[4], made[4], rtol=1e-5, atol=1e-5 * largest(mean * made[3]))


@each_case
def test_batch_stats(case: Case, target: Target) -> None:
    target.require(case)
    if not case.n:
        pytest.skip("statistics of nothing: torch's own are NaN")
    t = Exact(case, target)
    for bn in (t.bn, (None, None, 0.5)):
        assert_statistics(target, t.z.double(), bn, target.module.batch_stats(t.z, bn))


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5], ids=lambda v: f"mean{v:g}")
@few_cases
def test_statistics_of_a_large_mean(case: Case, offset: float, target: Target) -> None:
    """Channels with different offsets, one of them constant; deviation 1."""
    if target.dtype == torch.float16:
        offset /= 100  # 3e5 would be infinite
    target.require(case)
    z = torch.randn(case.out_shape, dtype=torch.float64) + offset
    z *= torch.linspace(0.5, 2, case.k, dtype=torch.float64)[:, None, None]
    z[:, 1] = offset
    z = z.to(target.device, target.dtype).contiguous(memory_format=torch.channels_last)
    assert_statistics_of_both(target, case.groups, z)


@pytest.mark.parametrize("pixel", [0, 300, 783])
def test_statistics_with_one_hot_pixel(pixel: int, target: Target) -> None:
    """A value far off the others is no origin to take the others relative to."""
    case = Case(1, 128, 28, 28, groups=32)
    target.require(case)
    z = torch.randn(case.out_shape, dtype=torch.float64)
    z[..., pixel // 28, pixel % 28] = 1000
    z = z.to(target.device, target.dtype).contiguous(memory_format=torch.channels_last)
    assert_statistics_of_both(target, case.groups, z)


def test_statistics_of_many_images(target: Target) -> None:
    """More images than threads take at a time, each with a mean of its own."""
    case = Case(40, 64, 3, 5, groups=16)
    target.require(case)
    z = torch.randn(case.out_shape, dtype=torch.float64)
    z += torch.arange(-20.0, 20.0, dtype=torch.float64)[:, None, None, None]
    z = z.to(target.device, target.dtype).contiguous(memory_format=torch.channels_last)
    assert_statistics_of_both(target, case.groups, z)


def assert_statistics_of_both(target: Target, groups: int, z: Tensor) -> None:
    """z by itself, and the same through a convolution's epilogue: one tap, one channel each.

    The one tap gives z back up to rounding: F(2, 3) sums neighbours before it tells them apart. The
    1x1 convolution gives z itself.
    """
    bn = (None, None, 1e-5)
    assert_statistics(target, z.double(), bn, target.module.batch_stats(z, bn))
    n, k, h, w = z.shape
    target.require(Case(n, k, h, w, groups=groups))
    weight = torch.zeros(k, k // groups, 3, 3).to(z)
    weight[torch.arange(k), torch.arange(k) % (k // groups), 1, 1] = 1
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        copied, vectors = target.module.conv_stats(z, weight, bn=bn, groups=groups)
    rounding = 3 * torch.finfo(torch.float32).eps + torch.finfo(z.dtype).eps
    assert ((copied.double() - z.double()).abs() <= rounding * z.double().abs().max()).all()
    assert_statistics(target, copied.double(), bn, vectors)
    same, vectors = target.module.conv1x1_stats(z, torch.eye(k)[:, :, None, None].to(z), bn)
    assert torch.equal(same, z)
    assert_statistics(target, z.double(), bn, vectors)


@each_case
def test_normalize_relu(case: Case, target: Target) -> None:
    target.require(case)
    t = Exact(case, target)
    alone = affine(t.z.double(), t.scale, t.shift)
    residual = t.residual.double()
    res_affine = (t.res_scale, t.res_shift)
    for kwargs, pre in (
        ({}, alone),
        ({"residual": t.residual}, alone + residual),
        (
            {"residual": t.residual, "residual_affine": res_affine},
            alone + affine(residual, *res_affine),
        ),
    ):
        y = target.module.normalize_relu(t.z, t.scale, t.shift, **kwargs)
        assert_exactly(f"y of {list(kwargs)}", y, F.relu(pre), target.dtype)
        assert_channels_last("y", y)


MASKS = {"recomputed": {}, "from y": {}, "none": {"relu": False}}


def assert_sums(t: Exact, name: str, found: tuple[Tensor, ...], g: Tensor) -> None:
    """The sums over g, and what is made of them for the gradient of z."""
    sum_g, sum_g_xhat, coefficients = found
    xhat = affine(t.z.double(), t.rstd, -t.mean * t.rstd)
    exact = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    assert_exactly(f"sum_g {name}", sum_g, exact[0], t.scale.dtype)
    assert_exactly(f"sum_g_xhat {name}", sum_g_xhat, exact[1], t.scale.dtype)
    m = max(t.z.numel() // t.z.shape[1], 1)
    truth = reference.bn_gradient_vectors(*exact, t.vectors.double(), m)
    peer = reference.bn_gradient_vectors(sum_g, sum_g_xhat, t.vectors, m)
    floor = torch.finfo(coefficients.dtype).eps * largest(truth)
    assert coefficients.is_contiguous()
    assert_as_exact_as_torch(f"coefficients {name}", coefficients, truth, peer, floor)


@each_case
def test_bn_relu_backward(case: Case, target: Target) -> None:
    target.require(case)
    t = Exact(case, target)
    for name, relu in MASKS.items():
        from_y = name == "from y"
        found = target.module.bn_relu_backward(t.dy, t.z, t.vectors, y=t.y(from_y), **relu)
        assert_sums(t, f"with mask {name}", found, t.masked_dy(from_y, **relu))


@each_case
def test_bn_residual_relu_backward(case: Case, target: Target) -> None:
    target.require(case)
    t = Exact(case, target)
    g, *sums = target.module.bn_residual_relu_backward(t.dy, t.z, t.y(True), t.vectors)
    assert_exactly("g", g, t.masked_dy(True), target.dtype)
    assert_channels_last("g", g)
    assert_sums(t, "behind a residual", tuple(sums), t.masked_dy(True))


@each_case
def test_bn_relu_input_gradient(case: Case, target: Target) -> None:
    target.require(case)
    t = Exact(case, target)
    for (name, relu), inplace, frozen in itertools.product(MASKS.items(), BOTH, BOTH):
        from_y = name == "from y"
        dy, truth = t.dy.clone(), t.dz(from_y, **relu, frozen=frozen)
        coefficients = None if frozen else t.coefficients
        args = {"y": t.y(from_y), "inplace": inplace, **relu}
        dz = target.module.bn_relu_input_gradient(dy, t.z, t.vectors, coefficients, **args)
        assert_exactly(f"dz, mask {name}, {inplace=}, {frozen=}", dz, truth, target.dtype)
        assert_channels_last("dz", dz)
        assert inplace or torch.equal(t.dy, dy)


@each_case
def test_conv_backward(case: Case, target: Target) -> None:
    """dx and dweight, together and each alone, with and without BatchNorm's gradient on load."""
    target.require(case)
    t = Exact(case, target)
    for bn, prologue in (
        ("dy", False),
        ("recomputed", True),
        ("from y", False),
        ("no relu", False),
        ("frozen", True),
    ):
        kwargs: dict[str, Any] = {"prologue": t.prologue(prologue), **case.conv}
        if bn != "dy":
            coefficients = None if bn == "frozen" else t.coefficients
            kwargs |= {"bn": (t.z, t.vectors, coefficients), "y": t.y(bn == "from y")}
            kwargs |= {"relu": bn != "no relu"}
        a = t.activation(prologue).requires_grad_()
        weight = t.weight.double().requires_grad_()
        z = conv2d(a, weight, **case.conv)
        dz = t.dy.double()
        if bn != "dy":
            dz = t.dz(bn == "from y", bn != "no relu", frozen=bn == "frozen")
        truth = torch.autograd.grad(z, [a, weight], dz)
        peer = by_torch(case, target, a, weight, dz) or (None, None)
        for need_dx, need_dweight in ((True, True), (True, False), (False, True)):
            dx, dweight = target.module.conv_backward(
                t.dy, t.x, t.weight, need_dx=need_dx, need_dweight=need_dweight, **kwargs
            )
            name = f"{bn=}, {prologue=}, {need_dx=}, {need_dweight=}"
            assert (dx is None, dweight is None) == (not need_dx, not need_dweight)
            if need_dx:
                assert_exactly(f"dx, {name}", dx, truth[0], target.dtype, peer[0])
                assert_channels_last("dx", dx)
            if need_dweight:
                assert weight_format(dweight) == weight_format(t.weight)
                assert_exactly(f"dweight, {name}", dweight, truth[1], target.dtype, peer[1])


def vectors_of(target: Target, channels: int) -> tuple[Tensor, ...]:
    """gamma, beta, mean and var; no two neighbours in memory, as a column of a table."""
    dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
    table = torch.randn(channels, 4, dtype=dtype)
    table[:, 3].square_()
    return table.to(target.device).unbind(1)


@pytest.mark.parametrize("affine", ["gamma beta", "gamma", "beta", ""])
@pytest.mark.parametrize("channels", [1, 7, 64, 130])
def test_vectors_of_a_batch_norm(channels: int, affine: str, target: Target) -> None:
    """bn_affine and bn_vectors; float64 is the truth, the reference's roundings the measure."""
    target.require(Case(1, channels, 1, 1, groups=channels))
    gamma, beta, mean, var = vectors_of(target, channels)
    bn = (gamma if "gamma" in affine else None, beta if "beta" in affine else None, mean, var)
    exact = [None if t is None else t.double() for t in bn]
    eps, unbias = 1e-3, 9 / 8
    names = ("mean", "unbiased variance", "rstd", "scale", "shift")
    of = target.module, reference
    found, peer = (torch.stack(f.bn_affine(*bn, eps)) for f in of)
    truth = torch.stack(reference.bn_affine(*exact, eps))
    for name, rows in zip(names[3:], zip(found, truth, peer, strict=True), strict=True):
        floor = torch.finfo(found.dtype).eps * largest(rows[1])
        assert_as_exact_as_torch(name, *rows, floor)
    found, peer = (f.bn_vectors(*bn, eps, unbias) for f in of)
    assert found.is_contiguous()
    truth = reference.bn_vectors(*exact, eps, unbias)
    for name, rows in zip(names, zip(found, truth, peer, strict=True), strict=True):
        floor = torch.finfo(found.dtype).eps * largest(rows[1])
        assert_as_exact_as_torch(name, *rows, floor)


@few_cases
def test_conv_bn_relu(case: Case, target: Target) -> None:
    """conv_affine_relu of what bn_affine makes of the BatchNorms, bit for bit."""
    target.require(case)
    t, f = Exact(case, target), target.module
    bn, in_bn = (*vectors_of(target, case.k), 1e-3), (*vectors_of(target, case.c), 1e-5)
    no_affine = (None, None, *bn[2:])
    for own, prologue, residual in itertools.product((bn, no_affine), (None, in_bn), BOTH):
        args = {"residual": t.residual if residual else None, **case.conv}
        y = f.conv_bn_relu(t.x, t.weight, own, prologue=prologue, **args)
        affine = None if prologue is None else f.bn_affine(*prologue)
        expected = f.conv_affine_relu(t.x, t.weight, *f.bn_affine(*own), prologue=affine, **args)
        assert torch.equal(y, expected)
        assert_channels_last("y", y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_odd_values_in_the_vectors_of_a_batch_norm(value: float, target: Target) -> None:
    """NaN and Inf give what the reference gives, in their own channel alone."""
    channels = 20
    target.require(Case(1, channels, 1, 1, groups=channels))
    bn = [t.contiguous() for t in vectors_of(target, channels)]
    for i, vector in enumerate(bn):
        vector[3 + 4 * i] = value
    bn[3][0] = -1.0  # no variance: the square root of a negative number is NaN
    found, peer = (f.bn_vectors(*bn, 1e-3, 1.0) for f in (target.module, reference))
    torch.testing.assert_close(found, peer, equal_nan=True)


@each_case
def test_nan_passes_the_relu(case: Case, target: Target) -> None:
    """relu(NaN) is NaN, and the gradient passes where relu's argument is NaN."""
    target.require(case)
    if not case.n:
        pytest.skip("no element to be NaN")
    t = Exact(case, target)
    at = tuple(size // 2 for size in case.out_shape)
    t.z[at] = float("nan")
    y = target.module.normalize_relu(t.z, t.scale, t.shift)
    assert torch.equal(y.isnan(), t.z.isnan())
    assert_exactly(
        "y",
        y.nan_to_num(-7),
        F.relu(affine(t.z.double(), t.scale, t.shift)).nan_to_num(-7),
        target.dtype,
    )
    t.dy[at] = 3
    sum_g, *_ = target.module.bn_relu_backward(t.dy, t.z, t.vectors)
    pre = affine(t.z.double(), t.scale, t.shift)
    g = torch.where(pre <= 0, 0.0, t.dy.double())
    assert g[at] == 3
    assert_exactly("sum_g", sum_g, g.sum((0, 2, 3)), t.scale.dtype)
    sum_g, *_ = target.module.bn_relu_backward(t.dy, t.z, t.vectors, y=y)
    assert_exactly("sum_g with y", sum_g, g.sum((0, 2, 3)), t.scale.dtype)
    sum_g, *_ = target.module.bn_relu_backward(t.dy, t.z, t.vectors, relu=False)
    assert_exactly("sum_g without relu", sum_g, t.dy.double().sum((0, 2, 3)), t.scale.dtype)


@few_cases
def test_inputs_are_left_alone(case: Case, target: Target) -> None:
    target.require(case)
    t, f = Exact(case, target), target.module
    tensors = [v for v in vars(t).values() if isinstance(v, Tensor)]
    before = [v.clone() for v in tensors]
    bn = (t.z, t.vectors, t.coefficients)
    prologue = (t.in_scale, t.in_shift)
    f.conv_affine_relu(
        t.x, t.weight, t.scale, t.shift, residual=t.residual, prologue=prologue, **case.conv
    )
    f.conv_stats(t.x, t.weight, bn=t.bn, prologue=prologue, **case.conv)
    f.normalize_relu(t.z, t.scale, t.shift, residual=t.residual)
    f.bn_relu_backward(t.dy, t.z, t.vectors)
    f.bn_relu_input_gradient(t.dy, *bn)
    f.conv_backward(t.dy, t.x, t.weight, bn=bn, prologue=prologue, **case.conv)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@few_cases
def test_odd_values_stay_in_their_group(case: Case, value: float, target: Target) -> None:
    """A NaN or Inf in one channel reaches the channels and pixels that depend on it, no others."""
    target.require(case)
    t = Exact(case, target)
    t.x[0, 1, 2, 2] = t.dy[0, 1, 1, 1] = value
    args = {"prologue": None, **case.conv}
    z, (mean, *_) = target.module.conv_stats(t.x, t.weight, bn=t.bn, **args)
    depends = conv2d(
        (~t.x.isfinite()).double(), torch.ones_like(t.weight).double(), **case.conv
    ).bool()
    assert torch.equal(z.isfinite(), ~depends)
    assert torch.equal(mean.isfinite(), ~depends.any((0, 2, 3)).to(mean.device))
    dx, dweight = target.module.conv_backward(t.dy, t.x, t.weight, **args)
    a, weight = t.x.double(), t.weight.double()
    a.requires_grad_()
    z = conv2d(a, torch.ones_like(weight), **case.conv)
    (reached,) = torch.autograd.grad(z, a, (~t.dy.isfinite()).double())
    assert torch.equal(dx.isfinite(), reached == 0)
    assert dweight.shape == t.weight.shape


# the dense 1x1 convolution ---------------------------------------------------------------------

# (K, C, 1, 1), written as the dense 3x3 convolution between the same shapes. On `cpu` float32 with
# C and K multiples of 16 is compiled: around 32-wide panels, parts of 256 columns, 128 pixels.
CASES_1X1 = [
    Case(2, 64, 7, 9, groups=1, k=256),
    Case(1, 256, 6, 7, groups=1, k=64, stride=2),
    Case(1, 48, 5, 5, groups=1, k=80, stride=2),
    Case(3, 272, 4, 3, groups=1, k=528),
    Case(1, 16, 12, 13, groups=1, k=48),
    Case(2, 32, 9, 10, groups=1, k=48, stride=3),
    # channels that are no multiples of 16
    Case(1, 20, 5, 6, groups=1, k=36),
    Case(2, 32, 7, 8, groups=1, k=17, stride=2),
    Case(1, 17, 3, 3, groups=1, k=32),
    Case(2, 1, 4, 5, groups=1, k=16),
    Case(2, 16, 4, 5, groups=1, k=1),
    # one pixel, two pixels, no image, a result that is written past the cache
    Case(2, 64, 1, 1, groups=1, k=32),
    Case(2, 64, 2, 2, groups=1, k=32, stride=2),
    Case(0, 64, 5, 5, groups=1, k=32),
    Case(0, 32, 5, 5, groups=1, k=64, stride=2),
    Case(1, 16, 96, 96, groups=1, k=256),
    Case(1, 256, 96, 96, groups=1, k=16),
]
each_1x1 = cross(CASES_1X1)


class Exact1x1(Exact):
    """The same with a weight of (K, C, 1, 1), strided for either memory format."""

    def __init__(self, case: Case, target: Target) -> None:
        depthwise = Case(case.n, case.c, case.h, case.w, groups=case.c)
        target.require(depthwise)  # as the operators choose a backend
        super().__init__(case, target)
        self.weight = self.integers(2, case.k, case.c, 1, 1).to(target.dtype)
        if (case.c + case.w) % 2:
            strides = (case.c, 1, case.c, case.c)
            self.weight = self.weight.as_strided(self.weight.shape, strides)

    def conv(self, x: Tensor) -> Tensor:
        return conv1x1(x, self.weight.double(), self.case.stride)

    def stored(self, z: Tensor) -> Tensor:
        """z as it is between two steps: only float32 and float64 hold it exactly."""
        return z.to(self.target.dtype).double()


def conv1x1(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return torch.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], x[:, :, ::stride, ::stride])


@each_1x1
def test_conv1x1(case: Case, target: Target) -> None:
    t = Exact1x1(case, target)
    for prologue in BOTH:
        z = target.module.conv1x1(t.x, t.weight, prologue=t.prologue(prologue), stride=case.stride)
        assert_exactly(f"z, {prologue=}", z, t.conv(t.activation(prologue)), target.dtype)
        assert_channels_last("z", z)


@each_1x1
def test_conv1x1_stats(case: Case, target: Target) -> None:
    t = Exact1x1(case, target)
    for prologue in BOTH:
        args = {"prologue": t.prologue(prologue), "stride": case.stride}
        z, vectors = target.module.conv1x1_stats(t.x, t.weight, t.bn, **args)
        assert torch.equal(z, target.module.conv1x1(t.x, t.weight, **args))
        assert vectors.shape == (5, case.k)
        if case.n:
            assert_statistics(target, z.double(), t.bn, vectors)


@each_1x1
def test_conv1x1_affine_relu(case: Case, target: Target) -> None:
    if case.stride != 1:
        pytest.skip("the contract has stride 1 alone")
    t = Exact1x1(case, target)
    alone = affine(t.stored(t.conv(t.x.double())), t.scale, t.shift)
    residual, res_affine = t.residual.double(), (t.res_scale, t.res_shift)
    for kwargs, pre in (
        ({}, alone),
        ({"residual": t.residual}, alone + residual),
        (
            {"residual": t.residual, "residual_affine": res_affine},
            alone + affine(residual, *res_affine),
        ),
    ):
        y = target.module.conv1x1_affine_relu(t.x, t.weight, t.scale, t.shift, **kwargs)
        assert_exactly(f"y of {list(kwargs)}", y, F.relu(pre), target.dtype)
        assert_channels_last("y", y)


@each_1x1
def test_conv1x1_backward(case: Case, target: Target) -> None:
    """dx and dweight, together and each alone; exact zeros where the stride steps over x."""
    t = Exact1x1(case, target)
    for prologue in BOTH:
        a, weight = t.activation(prologue).requires_grad_(), t.weight.double().requires_grad_()
        truth = torch.autograd.grad(conv1x1(a, weight, case.stride), [a, weight], t.dy.double())
        peer: tuple[Tensor | None, ...] = (None, None)
        if torch_rounds(target):
            leaves = [v.detach().to(target.dtype).requires_grad_() for v in (a, weight)]
            z = F.conv2d(*leaves, None, case.stride)
            peer = torch.autograd.grad(z, leaves, t.dy)
        for need_dx, need_dweight in ((True, True), (True, False), (False, True), (False, False)):
            dx, dweight = target.module.conv1x1_backward(
                t.dy,
                t.x,
                t.weight,
                prologue=t.prologue(prologue),
                stride=case.stride,
                need_dx=need_dx,
                need_dweight=need_dweight,
            )
            name = f"{prologue=}, {need_dx=}, {need_dweight=}"
            assert (dx is None, dweight is None) == (not need_dx, not need_dweight)
            if need_dx:
                assert_exactly(f"dx, {name}", dx, truth[0], target.dtype, peer[0])
                assert_channels_last("dx", dx)
            if need_dweight:
                assert weight_format(dweight) is not None
                assert_exactly(f"dweight, {name}", dweight, truth[1], target.dtype, peer[1])


@each_1x1
def test_conv1x1_backward_adds(case: Case, target: Target) -> None:
    """dx in place to a gradient that is there, the sum of the two rounded or not before."""
    t = Exact1x1(case, target)
    before = (
        t.integers(2, *t.x.shape).to(target.dtype).contiguous(memory_format=torch.channels_last)
    )
    alone, _ = target.module.conv1x1_backward(
        t.dy, t.x, t.weight, stride=case.stride, need_dweight=False
    )
    dx = before.clone(memory_format=torch.preserve_format)
    found, dweight = target.module.conv1x1_backward(
        t.dy, t.x, t.weight, stride=case.stride, need_dweight=False, dx=dx
    )
    assert dweight is None
    assert found is dx
    assert torch.equal(dx, before + alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@cross(CASES_1X1[:3])
def test_conv1x1_odd_values(case: Case, value: float, target: Target) -> None:
    """NaN and Inf reach what they are multiplied into, and no other pixel or channel."""
    if target.device == "cuda":
        pytest.skip("torch's own convolution: whatever cuDNN multiplies NaN and Inf into")
    t = Exact1x1(case, target)
    f, s = target.module, case.stride
    k, c = case.k // 2, case.c // 3
    x, dy, weight = t.x.clone(), t.dy.clone(), t.weight.clone()
    x[0, c, s, s] = dy[0, k, 1, 1] = weight[k, c, 0, 0] = value
    pixel = torch.zeros(case.out_shape, dtype=torch.bool, device=x.device)
    pixel[0, :, 1, 1] = True
    assert torch.equal(~f.conv1x1(x, t.weight, stride=s).isfinite(), pixel)
    z = f.conv1x1(t.x, weight, stride=s)
    assert torch.equal(~z.isfinite().all((0, 2, 3)), torch.arange(case.k, device=x.device) == k)
    dx, dweight = f.conv1x1_backward(dy, t.x, t.weight, stride=s)
    pixel = torch.zeros_like(x, dtype=torch.bool)
    pixel[0, :, s, s] = True
    assert torch.equal(~dx.isfinite(), pixel)
    row = torch.arange(case.k, device=x.device)[:, None, None, None] == k
    assert torch.equal(~dweight.isfinite(), row.expand_as(dweight))


@cross(CASES_1X1[:1])
def test_conv1x1_leaves_inputs_alone(case: Case, target: Target) -> None:
    t, f = Exact1x1(case, target), target.module
    tensors = [v for v in vars(t).values() if isinstance(v, Tensor)]
    before = [v.clone() for v in tensors]
    prologue, res_affine = (t.in_scale, t.in_shift), (t.res_scale, t.res_shift)
    f.conv1x1(t.x, t.weight, prologue=prologue)
    f.conv1x1_affine_relu(
        t.x, t.weight, t.scale, t.shift, residual=t.residual, residual_affine=res_affine
    )
    f.conv1x1_backward(t.dy, t.x, t.weight, prologue=prologue)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)
