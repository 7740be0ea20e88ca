"""conv1x1 and bottleneck of `functional` against torch.nn.functional, on every backend.

In eval every number here is a small integer, a half or a quarter, and BatchNorm's deviation is 1:
float32 and float64 must give the float64 truth bit for bit, forward and backward.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Target, assert_as_exact_as_torch, floor, largest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from resnext_kernels.functional import (
    BatchNormState,
    bn_relu,
    bottleneck,
    conv1x1,
    conv_bn_relu,
)

pytestmark = pytest.mark.usefixtures("poisoned")

BOTH = (False, True)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def integers(bound: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-bound, bound + 1, shape).to(dtype)


def assert_equal(name: str, actual: Tensor, truth: Tensor) -> None:
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}"
    wrong = (actual.detach().cpu().double() != truth.detach().cpu()).nonzero()
    assert not len(wrong), f"{name}: {len(wrong)} of {truth.numel()} wrong, at {wrong[0].tolist()}"


def exact(target: Target) -> bool:
    """Whether sums of the tests' numbers are exact: not those that are stored in 16 bits."""
    return target.dtype in (torch.float32, torch.float64)


# conv1x1 ---------------------------------------------------------------------------------------


def nchw(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_of_wider(t: Tensor) -> Tensor:
    return channels_last(torch.cat([t + 1, t, t - 1], dim=1))[:, t.shape[1] : 2 * t.shape[1]]


def every_other_column(t: Tensor) -> Tensor:
    return channels_last(torch.stack([t, t + 1], dim=-1).flatten(-2))[..., ::2]


def off_by_one_element(t: Tensor) -> Tensor:
    n, c, h, w = t.shape
    base = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return base[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:, :, :1, :1].expand(t.shape)


LAYOUTS = [channels_last, nchw, channels_of_wider, every_other_column, off_by_one_element, expanded]
SIZES = [
    Case(2, 64, 7, 6, groups=1, k=96),
    Case(2, 32, 6, 5, groups=1, k=64, stride=2),
    Case(1, 20, 5, 5, groups=1, k=12, stride=3),
    Case(2, 32, 1, 1, groups=1, k=16),
    Case(0, 32, 4, 4, groups=1, k=16),
]


def require(target: Target, case: Case) -> None:
    target.require(Case(case.n, case.c, case.h, case.w, groups=case.c))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_conv1x1(case: Case, layout: Any, target: Target) -> None:
    """Result, memory format and gradients, as F.conv2d has them."""
    require(target, case)
    for weight_format in (torch.contiguous_format, torch.channels_last):
        dtype, device = target.dtype, target.device
        x = layout(integers(3, case.n, case.c, case.h, case.w, dtype=dtype).to(device))
        dz = layout(integers(3, *case.out_shape, dtype=dtype).to(device))
        weight = integers(2, case.k, case.c, 1, 1, dtype=dtype).to(
            device, memory_format=weight_format
        )
        leaves, torchs, exacts = (
            [t.detach().to(d).requires_grad_() for t in (x, weight)]
            for d in (dtype, dtype, torch.float64)
        )
        leaves[0] = x.detach().requires_grad_()
        z = conv1x1(*leaves, stride=case.stride, backend=target.backend)
        peer = F.conv2d(x, weight.requires_grad_(), None, case.stride)
        if case.h > 1 and case.n:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                contiguous = peer.is_contiguous(memory_format=memory_format)
                assert z.is_contiguous(memory_format=memory_format) == contiguous
        assert z.dtype == dtype
        truth = torch.einsum(
            "kc,nchw->nkhw", exacts[1][..., 0, 0], exacts[0][:, :, :: case.stride, :: case.stride]
        )
        assert_equal("z", z, truth.to(dtype).double())
        found = torch.autograd.grad(z, leaves, dz)
        truths = torch.autograd.grad(truth, exacts, dz.double())
        peers = torch.autograd.grad(F.conv2d(*torchs, None, case.stride), torchs, dz)
        for name, gradient, t, p in zip(("x", "weight"), found, truths, peers, strict=True):
            assert gradient.dtype == dtype
            if exact(target):
                assert_equal(name, gradient, t)
            else:
                assert_as_exact_as_torch(name, gradient, t, p, floor(dtype, largest(t)))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv1x1_differentiates_twice(stride: int) -> None:
    x = channels_last(torch.randn(2, 3, 3, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor, weight: Tensor) -> Tensor:
        return conv1x1(channels_last(x), weight, stride=stride, backend="reference")

    assert torch.autograd.gradcheck(op, (x, weight))
    assert torch.autograd.gradgradcheck(op, (x, weight))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "weight"])
def test_conv1x1_double_backward(needs: tuple[bool, bool], target: Target) -> None:
    """A gradient penalty, where one of the two inputs or both need gradients."""
    if not exact(target):
        pytest.skip("exact sums alone")
    case = SIZES[1]
    require(target, case)
    x, dz = (
        channels_last(integers(2, *s)) for s in ((case.n, case.c, case.h, case.w), case.out_shape)
    )
    weight = integers(1, case.k, case.c, 1, 1)

    def penalty(dtype: torch.dtype, op: Any) -> tuple[Tensor | None, ...]:
        t = [
            v.to(target.device, dtype).requires_grad_(need)
            for v, need in zip((x, weight), needs, strict=True)
        ]
        g = dz.to(target.device, dtype).requires_grad_()
        (first,) = torch.autograd.grad(
            op(*t), [v for v in t if v.requires_grad], g, create_graph=True
        )
        leaves = [v for v in (*t, g) if v.requires_grad]
        return torch.autograd.grad(first.square().sum(), leaves, allow_unused=True)

    found = penalty(target.dtype, lambda *t: conv1x1(*t, stride=2, backend=target.backend))
    truth = penalty(torch.float64, lambda *t: F.conv2d(*t, None, 2))
    for i, (ours, exactly) in enumerate(zip(found, truth, strict=True)):
        assert (ours is None) == (exactly is None), i
        if ours is not None:
            assert_equal(str(i), ours, exactly)


def test_conv1x1_saves_its_inputs_alone() -> None:
    for case in SIZES[:2]:
        x = channels_last(torch.randn(case.n, case.c, case.h, case.w)).requires_grad_()
        weight = torch.randn(case.k, case.c, 1, 1, requires_grad=True)
        saved: list[Tensor] = []

        def pack(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            conv1x1(x, weight, stride=case.stride)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv1x1_under_autocast(dtype: torch.dtype) -> None:
    x, weight = channels_last(integers(2, 2, 32, 5, 6).float()), integers(1, 48, 32, 1, 1).float()
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        z = conv1x1(x, weight)
        peer = F.conv2d(x, weight)
        kept = conv1x1(x.double(), weight.double())
    assert z.dtype == peer.dtype == dtype
    assert kept.dtype == torch.float64
    assert torch.equal(z, peer)
    found = torch.autograd.grad(z.float().sum(), [x, weight])
    assert [g.dtype for g in found] == [torch.float32] * 2
    truth = torch.autograd.grad(F.conv2d(x, weight).sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_conv1x1_sees_a_changed_weight(target: Target) -> None:
    require(target, SIZES[0])
    x = channels_last(integers(2, 1, 64, 3, 3, dtype=target.dtype)).to(target.device)
    weight = integers(1, 32, 64, 1, 1, dtype=target.dtype).to(target.device)
    for _ in range(3):
        z = conv1x1(x, weight, backend=target.backend)
        assert_equal("z", z, F.conv2d(x.double(), weight.double()))
        weight.data.mul_(-2)  # no version counter sees it


# bottleneck ------------------------------------------------------------------------------------


@dataclass
class Block:
    """The tensors of a bottleneck."""

    x: Tensor
    first: Tensor
    weight: Tensor
    pointwise: Tensor
    residual: Tensor
    residual_weight: Tensor
    dy: Tensor
    bns: list[Tensor]  # gamma, beta, running_mean, running_var; of bn1, bn2, bn3, residual_bn

    def to(self, *args: Any) -> Block:
        """Copies, images in the dtype and vectors in float32 or float64."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)[:-1]]
        images = [v.detach().clone(memory_format=torch.preserve_format).to(*args) for v in values]
        wide = torch.promote_types(images[0].dtype, torch.float32)
        return Block(*images, [v.detach().clone().to(images[0].device, wide) for v in self.bns])

    def leaves(self, shortcut: str) -> list[Tensor]:
        count = 12 if shortcut in ("x", "residual") else 16
        affine = [v for i, v in enumerate(self.bns[:count]) if i % 4 < 2]
        leaves = [self.x, self.first, self.weight, self.pointwise, *affine]
        if shortcut == "conv":
            return [*leaves, self.residual_weight]
        return leaves if shortcut in ("x", "x-bn") else [*leaves, self.residual]


CONV = {"stride": 1, "groups": 8}
STRIDED = {"stride": 2, "groups": 8}
EPS = 2.0**-8  # with variances of 1 - 2**-8: a standard deviation of 1


def make_block(conv: dict[str, int]) -> Block:
    n, b, c, k, h, w = 2, 64, 32, 64, 6, 7
    out = n, k, (h - 1) // conv["stride"] + 1, (w - 1) // conv["stride"] + 1

    def one_of(values: list[float], size: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (size,))]

    def sums_of_two(k: int) -> Tensor:  # of channels: what follows stays small
        weight = torch.zeros(k, b, 1, 1, dtype=torch.float64)
        for row in weight:
            row[torch.randperm(b)[:2]] = 2.0 * torch.randint(2, (2, 1, 1)).double() - 1
        return weight

    vectors: list[Tensor] = []
    # In training a channel may have a pixel that is its mean: without a shift, a ReLU of about 0.
    for size, shifts in ((c, [-0.5, 0.5, 1.0]), *((size, [-0.5, 0.0, 1.0]) for size in (c, k, k))):
        vectors += [one_of([-1.0, 0.5, 1.0], size), one_of(shifts, size)]
        vectors += [one_of([-0.5, 0.0, 1.0], size), torch.full((size,), 1 - EPS).double()]
    return Block(
        channels_last(integers(2, n, b, h, w)),
        sums_of_two(c),
        integers(1, c, c // conv["groups"], 3, 3),
        integers(1, k, c, 1, 1),
        channels_last(integers(3, *out)),
        sums_of_two(k),
        channels_last(integers(2, *out)),
        vectors,
    )


def states(t: Block, training: bool) -> list[BatchNormState]:
    return [BatchNormState(*t.bns[4 * i : 4 * i + 4], training=training, eps=EPS) for i in range(4)]


def ours(t: Block, conv: dict[str, int], training: bool, shortcut: str, backend: Any) -> Tensor:
    bn1, bn2, bn3, bn4 = states(t, training)
    return bottleneck(
        *(t.x, t.first, bn1, t.weight, bn2, t.pointwise, bn3),
        residual=t.residual if shortcut.startswith("residual") else None,
        residual_weight=t.residual_weight if shortcut == "conv" else None,
        residual_bn=bn4 if shortcut in WITH_BN else None,
        residual_stride=conv["stride"],
        backend=backend,
        **conv,
    )


def torchs(t: Block, conv: dict[str, int], training: bool, shortcut: str) -> Tensor:
    def batch_norm(z: Tensor, i: int) -> Tensor:
        gamma, beta, mean, var = t.bns[4 * i : 4 * i + 4]
        return F.batch_norm(z, mean, var, gamma, beta, training, 0.1, EPS)

    z = F.conv2d(F.relu(batch_norm(F.conv2d(t.x, t.first), 0)), t.weight, padding=1, **conv)
    z = F.conv2d(F.relu(batch_norm(z, 1)), t.pointwise)
    residual = t.x if shortcut in ("x", "x-bn") else t.residual
    if shortcut == "conv":
        residual = F.conv2d(t.x, t.residual_weight, None, conv["stride"])
    if shortcut in WITH_BN:
        residual = batch_norm(residual, 3)
    return F.relu(batch_norm(z, 2) + residual)


SHORTCUTS = ("x", "x-bn", "residual", "residual-bn", "conv")
WITH_BN = ("x-bn", "residual-bn", "conv")
each_block = pytest.mark.parametrize(
    ("conv", "shortcut"),
    [*((CONV, s) for s in SHORTCUTS), *((STRIDED, s) for s in SHORTCUTS[2:])],
    ids=[*SHORTCUTS, *(f"{s}-stride2" for s in SHORTCUTS[2:])],
)


def require_block(target: Target, conv: dict[str, int]) -> None:
    for case in (Case(2, 32, 6, 7, **conv), Case(2, 64, 6, 7, groups=64)):
        target.require(case)


@each_block
def test_bottleneck_in_eval(conv: dict[str, int], shortcut: str, target: Target) -> None:
    """With and without gradients."""
    require_block(target, conv)
    block = make_block(conv)
    t, truth_t = block.to(target.device, target.dtype), block.to(torch.float64)
    before = [v.clone() for v in t.bns]
    with torch.no_grad():
        y = ours(t, conv, False, shortcut, target.backend)
    truth = torchs(truth_t, conv, False, shortcut)
    assert y.dtype == target.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if not exact(target):
        peer = torchs(t, conv, False, shortcut)
        assert_as_exact_as_torch("y", y, truth, peer, floor(target.dtype, largest(truth)))
        return
    assert_equal("y without gradients", y, truth)
    leaves, truth_leaves = ([v.requires_grad_() for v in b.leaves(shortcut)] for b in (t, truth_t))
    y = ours(t, conv, False, shortcut, target.backend)
    assert_equal("y with gradients", y, truth)
    truth = torchs(truth_t, conv, False, shortcut)
    found = torch.autograd.grad(y, leaves, t.dy)
    for i, (gradient, t_g) in enumerate(
        zip(found, torch.autograd.grad(truth, truth_leaves, truth_t.dy), strict=True)
    ):
        assert_equal(f"gradient {i}", gradient, t_g)
    assert all(torch.equal(v, b) for v, b in zip(t.bns, before, strict=True))


@each_block
def test_bottleneck_in_training(conv: dict[str, int], shortcut: str, target: Target) -> None:
    """As exact as conv1x1, conv_bn_relu and bn_relu, which are held to float64 by themselves.

    Their very bits, but that a backend may take statistics while it computes what they are of.
    """
    require_block(target, conv)
    block = make_block(conv)
    one, two = (block.to(target.device, target.dtype) for _ in range(2))
    three = block.to(torch.float64)
    exacts = [v.requires_grad_() for v in three.leaves(shortcut)]
    truth = torchs(three, conv, True, shortcut)
    truths = torch.autograd.grad(truth, exacts, three.dy)
    leaves = [[v.requires_grad_() for v in t.leaves(shortcut)] for t in (one, two)]
    y = ours(one, conv, True, shortcut, target.backend)
    bn1, bn2, bn3, bn4 = states(two, True)
    backend = {"backend": target.backend}
    z = conv1x1(two.x, two.first, **backend)
    args = {"input_bn": bn1, "pointwise_weight": two.pointwise}
    z = conv_bn_relu(z, two.weight, bn2, **args, **backend, **conv)
    residual = two.x if shortcut in ("x", "x-bn") else two.residual
    if shortcut == "conv":
        residual = conv1x1(two.x, two.residual_weight, stride=conv["stride"], **backend)
    residual_bn = bn4 if shortcut in WITH_BN else None
    expected = bn_relu(z, bn3, residual=residual, residual_bn=residual_bn, **backend)
    found = [y, *torch.autograd.grad(y, leaves[0], one.dy), *one.bns]
    peers = [expected, *torch.autograd.grad(expected, leaves[1], two.dy), *two.bns]
    for i, (actual, t, peer) in enumerate(
        zip(found, [truth, *truths, *three.bns], peers, strict=True)
    ):
        assert_as_exact_as_torch(f"{i}", actual, t, peer, floor(actual.dtype, largest(t)))


@each_block
def test_bottleneck_trains_as_torch(conv: dict[str, int], shortcut: str) -> None:
    """In float64: outputs, gradients, running statistics, to the roundings of float64 alone."""
    block = make_block(conv)
    one, two = block.to(torch.float64), block.to(torch.float64)
    results = []
    for t in (one, two):
        leaves = [v.requires_grad_() for v in t.leaves(shortcut)]
        if t is one:
            y = ours(t, conv, True, shortcut, "reference")
        else:
            y = torchs(t, conv, True, shortcut)
        results.append([y, *torch.autograd.grad(y, leaves, t.dy), *t.bns])
    for actual, expected in zip(*results, strict=True):
        tolerance = floor(torch.float64, largest(expected))
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_bottleneck_is_twice_differentiable(shortcut: str) -> None:
    conv = {"stride": 1, "groups": 2}
    n, b, c = 2, 3, 2
    images = [torch.randn(n, b, 2, 2).double(), torch.randn(c, b, 1, 1).double()]
    images += [torch.randn(c, 1, 3, 3).double(), torch.randn(b, c, 1, 1).double()]
    if shortcut not in ("x", "x-bn"):
        images.append(torch.randn(*((b, b, 1, 1) if shortcut == "conv" else (n, b, 2, 2))).double())
    for t in images:
        t.requires_grad_()

    def op(x: Tensor, first: Tensor, weight: Tensor, pointwise: Tensor, *last: Tensor) -> Tensor:
        bn1, bn2, bn3, bn4 = (BatchNormState(None, None, None, None, training=True),) * 4
        return bottleneck(
            *(x, first, bn1, weight, bn2, pointwise, bn3),
            residual=last[0] if shortcut.startswith("residual") else None,
            residual_weight=last[0] if shortcut == "conv" else None,
            residual_bn=bn4 if shortcut in WITH_BN else None,
            backend="reference",
            **conv,
        )

    assert torch.autograd.gradgradcheck(op, images)


@pytest.mark.parametrize("training", BOTH, ids=["eval", "train"])
@pytest.mark.parametrize("formats", list(itertools.product(BOTH, BOTH, BOTH, BOTH)), ids=str)
def test_memory_format_of_the_bottleneck(formats: tuple[bool, ...], training: bool) -> None:
    """As the convolutions give it, whichever of x and the weights are channels_last."""
    t = make_block(CONV).to(torch.float32)
    for name, nhwc in zip(("x", "first", "weight", "pointwise"), formats, strict=True):
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        setattr(t, name, getattr(t, name).clone(memory_format=memory_format))
    y, expected = ours(t, CONV, training, "x", None), torchs(t, CONV, training, "x")
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("training", BOTH, ids=["eval", "train"])
def test_bottleneck_under_autocast(training: bool) -> None:
    t = make_block(CONV).to(torch.float32)
    leaves = [v.requires_grad_() for v in t.leaves("residual")]
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(t, CONV, training, "residual", None)
        with torch.no_grad():
            again = ours(t, CONV, training, "residual", None)
        peer = torchs(t, CONV, training, "residual").to(torch.bfloat16)  # float32: the residual's
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), leaves)] == [torch.float32] * 11
    truth = torchs(t.to(torch.float64), CONV, training, "residual")
    for result in (y, again):
        assert_as_exact_as_torch("y", result, truth, peer, floor(torch.bfloat16, largest(truth)))


@pytest.mark.parametrize("training", BOTH, ids=["eval", "train"])
def test_bottleneck_of_no_images(training: bool) -> None:
    t = make_block(CONV).to(torch.float32)
    t.x, t.dy = t.x[:0], t.dy[:0]
    leaves = [v.requires_grad_() for v in t.leaves("conv")]
    with torch.no_grad():
        assert ours(t, CONV, False, "conv", None).shape == (0, 64, 6, 7)
    y = ours(t, CONV, training, "conv", None)
    assert y.shape == (0, 64, 6, 7)
    assert not any(g.any() for g in torch.autograd.grad(y, leaves, t.dy))


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_are_torchs(stride: int) -> None:
    """Without gradients, with them, and backward; one group, as torch counts its dweight so."""
    conv = {"stride": stride, "groups": 1}

    def count(op: Any, *, backward: bool, grad: bool) -> int:
        t = make_block(conv).to(torch.float32)
        weights = [t.first, t.weight, t.pointwise, t.residual_weight]
        if grad:
            for v in weights:
                v.requires_grad_()
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            y = op(t)
            if backward:
                torch.autograd.grad(y.sum(), weights)
        return counter.get_total_flops()

    def fused(t: Block) -> Tensor:
        return ours(t, conv, False, "conv", None)

    def plain(t: Block) -> Tensor:
        return torchs(t, conv, False, "conv")

    for grad, backward in ((False, False), (True, False), (True, True)):
        assert count(fused, grad=grad, backward=backward) == count(
            plain, grad=grad, backward=backward
        )


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_conv1x1_are_torchs(stride: int) -> None:
    x, weight = torch.randn(2, 32, 6, 7), torch.randn(16, 32, 1, 1, requires_grad=True)
    counts = []
    for op in (conv1x1, lambda x, weight, stride: F.conv2d(x, weight, None, stride)):
        with FlopCounterMode(display=False) as counter:
            op(channels_last(x), weight, stride=stride).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
