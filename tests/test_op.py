"""grouped_conv_bn_relu against float64, in every pass, layout and dtype, on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    FEW,
    TARGETS,
    Case,
    Inputs,
    Plain,
    Target,
    assert_as_exact_as_torch,
    conv2d,
    cross,
    floor,
    gradient_floors,
    largest,
    make_inputs,
    passed_relu,
    plain,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resnext_kernels.functional import grouped_conv_bn_relu

pytestmark = pytest.mark.usefixtures("poisoned")

each_case, few_cases = cross(CASES), cross(FEW)
MODES = pytest.mark.parametrize("mode", ["eval", "train"])
# The deviation of fewer pixels can be any part of their mean, to which roundings are relative.
WELL_CONDITIONED = 16


def check(
    case: Case,
    target: Target,
    inputs: Inputs,
    *,
    training: bool,
    residual: bool = False,
    gradients: bool = True,
    momentum: float = 0.1,
    conditioned: bool = False,
) -> None:
    """Run the op once on `inputs` as they lie in memory; hold everything it gives to the truth.

    With `conditioned` a result may also be off by as much as roundings of the inputs move it.
    """
    tested = inputs.map(lambda t: t.detach())
    tested.running_mean, tested.running_var = (
        inputs.running_mean.clone(),
        inputs.running_var.clone(),
    )
    names = ["x", "weight", "gamma", "beta"] + ["residual"] * residual
    leaves = [getattr(tested, name).requires_grad_(gradients) for name in names]
    y = grouped_conv_bn_relu(
        tested.x,
        tested.weight,
        tested.gamma,
        tested.beta,
        tested.running_mean,
        tested.running_var,
        training=training,
        momentum=momentum,
        residual=tested.residual if residual else None,
        backend=target.backend,
        **case.conv,
    )
    passed = passed_relu(y)
    args = {
        "training": training,
        "residual": residual,
        "momentum": momentum,
        "passed": passed,
        "gradients": gradients,
    }
    truth, peer = plain(inputs.double(), case.conv, **args), plain(inputs, case.conv, **args)
    moved = moved_by_rounding(case, inputs, truth, args) if conditioned else dict.fromkeys(MOVED, 0)
    one_rounding = floor(target.dtype, largest(truth.y))
    assert_as_exact_as_torch("y", y, truth.y, peer.y, one_rounding + moved["y"])
    for name in ("running_mean", "running_var"):
        running = getattr(tested, name)
        if not training or not case.n:
            assert torch.equal(running, getattr(inputs, name))
            continue
        # z is rounded to its dtype: a mean of M such terms is off by 1 / sqrt(M) of a rounding
        scale = momentum * largest(truth.z) ** (1 if name == "running_mean" else 2)
        rounding = floor(target.dtype, scale) / case.reduced**0.5 + floor(running.dtype, scale)
        rounding += moved[name]
        assert_as_exact_as_torch(name, running, getattr(truth, name), getattr(peer, name), rounding)
    if not gradients:
        return
    floors = gradient_floors(case, inputs, truth, training=training, passed=passed)
    found = torch.autograd.grad(y, leaves, inputs.dy)
    for name, gradient in zip(names, found, strict=True):
        assert_as_exact_as_torch(
            f"gradient of {name}",
            gradient,
            truth.gradients[name],
            peer.gradients[name],
            floors[name] + moved[name],
        )


MOVED = ("y", "running_mean", "running_var", "x", "weight", "gamma", "beta", "residual")


def moved_by_rounding(
    case: Case, inputs: Inputs, truth: Plain, args: dict[str, Any]
) -> dict[str, float]:
    """How far the exact results move when each input moves by roundings, the most of four draws.

    One rounding of its dtype for x and dy; for the weight, at least the sqrt(n) float32 roundings
    that a sum of n products is equivalent to (Higham, Accuracy and Stability, 2002, section 3.1).
    Torch's own error on one input can be smaller by luck.
    """
    dtype = inputs.x.dtype
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    products = (9 * case.c / case.groups) ** 0.5
    units = {"x": torch.finfo(dtype).eps, "dy": torch.finfo(dtype).eps}
    units["weight"] = max(units["x"], products * unit)
    moved = dict.fromkeys(MOVED, 0.0)
    for _ in range(4):
        t = inputs.double()
        for name, size in units.items():
            value = getattr(t, name)
            setattr(t, name, value * (1 + size * (2 * torch.rand_like(value) - 1)))
        other = plain(t, case.conv, **args)
        pairs = {name: (getattr(other, name), getattr(truth, name)) for name in MOVED[:3]}
        pairs |= {name: (other.gradients[name], truth.gradients[name]) for name in truth.gradients}
        for name, (a, b) in pairs.items():
            moved[name] = max(moved[name], largest(a - b))
    return moved


@each_case
def test_inference(case: Case, target: Target) -> None:
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    with torch.no_grad():
        check(case, target, inputs, training=False, gradients=False)
        check(case, target, inputs, training=False, gradients=False, residual=True)


@each_case
def test_frozen_statistics(case: Case, target: Target) -> None:
    target.require(case)
    check(case, target, make_inputs(case, target.dtype, target.device), training=False)


@each_case
def test_training(case: Case, target: Target) -> None:
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    check(case, target, inputs, training=True, conditioned=case.reduced < WELL_CONDITIONED)


@few_cases
@MODES
def test_residual(case: Case, mode: str, target: Target) -> None:
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    check(case, target, inputs, training=mode == "train", residual=True)


# Memory layouts ------------------------------------------------------------------------------


def nchw(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous()


def every_other_column(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2]


def channels_of_wider(t: torch.Tensor) -> torch.Tensor:
    wider = torch.cat([t + 1, t, t - 1], dim=1).contiguous(memory_format=torch.channels_last)
    return wider[:, t.shape[1] : 2 * t.shape[1]]


def off_by_one_element(t: torch.Tensor) -> torch.Tensor:
    """channels_last, with a first address that no vector load finds aligned."""
    base = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    n, c, h, w = t.shape
    return base[1:].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def transposed_map(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def flipped_batch_stride(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = [
    nchw,
    every_other_column,
    channels_of_wider,
    off_by_one_element,
    transposed_map,
    flipped_batch_stride,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@MODES
def test_layouts_of_every_image(layout, mode: str, target: Target) -> None:
    case = Case(2, 64, 6, 7, groups=16)
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    for name in ("x", "residual", "dy"):
        moved = layout(getattr(inputs, name))
        assert torch.equal(moved, getattr(inputs, name))
        setattr(inputs, name, moved)
    check(case, target, inputs, training=mode == "train", residual=True)


@MODES
def test_expanded_images(mode: str, target: Target) -> None:
    """Stride 0 in the batch, and over the whole map."""
    case = Case(2, 64, 6, 7, groups=16)
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    inputs.x = inputs.x[:1].expand(2, -1, -1, -1)
    inputs.residual = inputs.residual[:, :, :1, :1].expand(case.out_shape)
    inputs.dy = inputs.dy[:, :, :, :1].expand(case.out_shape)
    check(case, target, inputs, training=mode == "train", residual=True, conditioned=True)


@MODES
def test_gradient_of_a_sum(mode: str, target: Target) -> None:
    """y.sum().backward() hands the op one expanded element."""
    case = Case(2, 64, 6, 7, groups=16)
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    inputs.dy = torch.ones((), dtype=target.dtype, device=target.device).expand(case.out_shape)
    check(case, target, inputs, training=mode == "train")


@MODES
def test_layouts_of_weight_and_vectors(mode: str, target: Target) -> None:
    case = Case(2, 64, 6, 7, groups=16)
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    inputs.weight = inputs.weight.contiguous(memory_format=torch.channels_last)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        vector = getattr(inputs, name)
        setattr(inputs, name, torch.stack([vector, vector], dim=-1)[:, 0])
    check(case, target, inputs, training=mode == "train")
    inputs.weight = inputs.weight.transpose(2, 3).contiguous().transpose(2, 3)
    inputs.gamma = inputs.gamma[:1].expand(case.k)
    check(case, target, inputs, training=mode == "train")


@MODES
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_of_the_result(
    weight_format: torch.memory_format, mode: str, target: Target
) -> None:
    """As nn.Conv2d gives, on maps of one pixel too."""
    for size, layout in itertools.product([(5, 6), (1, 1)], [lambda t: t, *LAYOUTS]):
        case = Case(2, 32, *size, groups=8)
        target.require(case)
        inputs = make_inputs(case, target.dtype, target.device)
        x = layout(inputs.x)
        weight = inputs.weight.contiguous(memory_format=weight_format)
        z = F.conv2d(x, weight, padding=1, groups=8)
        y = grouped_conv_bn_relu(
            x,
            weight,
            inputs.gamma,
            inputs.beta,
            inputs.running_mean,
            inputs.running_var,
            groups=8,
            training=mode == "train",
            backend=target.backend,
        )
        for memory_format in (torch.contiguous_format, torch.channels_last):  # one pixel is both
            assert y.is_contiguous(memory_format=memory_format) == z.is_contiguous(
                memory_format=memory_format
            )
        assert y.stride() == z.stride() or size == (1, 1)


# Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "stride", "size"), [(32, 1, 161), (32, 1, 184), (4, 1, 161), (4, 2, 161)]
)
@pytest.mark.parametrize(
    "target",
    [t for t in TARGETS if t.backend == "cpu" and t.dtype == torch.float32],
    ids=str,
    indirect=True,
)
def test_results_larger_than_the_cache(groups: int, stride: int, size: int, target: Target) -> None:
    """Large results are written past the cache, which is particular about addresses.

    With its statistics z of groups of four is written there from 16 MB on only.
    """
    c = 128 if groups == 32 else 96
    case = Case(1, c, size * stride, size * stride, groups=groups, stride=stride)
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    assert inputs.dy.nbytes > 2**23
    check(case, target, inputs, training=True)
    check(case, target, inputs, training=False, residual=True, gradients=False)


@few_cases
@MODES
@pytest.mark.parametrize("gamma", [-1.0, 0.0], ids=["negative", "zero"])
def test_gamma_of_one_sign(case: Case, gamma: float, mode: str, target: Target) -> None:
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    inputs.gamma = gamma * inputs.gamma.abs()
    check(case, target, inputs, training=mode == "train")


@few_cases
@MODES
def test_exact_zeros_at_the_relu(case: Case, mode: str, target: Target) -> None:
    """Where relu's argument is exactly 0, torch lets no gradient pass."""
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    inputs.weight[: case.k // 2] = 0
    inputs.running_mean.zero_()
    inputs.beta.zero_()
    check(case, target, inputs, training=mode == "train")
    check(case, target, inputs, training=mode == "train", residual=True)


@few_cases
def test_weight_of_zeros_and_beta_zero_gives_no_gradient(case: Case, target: Target) -> None:
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    x = inputs.x.requires_grad_()
    y = grouped_conv_bn_relu(
        x,
        torch.zeros_like(inputs.weight),
        inputs.gamma,
        torch.zeros_like(inputs.beta),
        None,
        None,
        training=True,
        backend=target.backend,
        **case.conv,
    )
    assert not y.any()
    assert not torch.autograd.grad(y, x, inputs.dy)[0].any()


@few_cases
@MODES
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "weight", "residual"])
def test_nan_and_inf_propagate(
    case: Case, where: str, value: float, mode: str, target: Target
) -> None:
    """One odd element: NaN and Inf appear exactly where torch's operators put them.

    Torch's float32 operators on the CPU: where the processor multiplies pairs of bfloat16, and in
    cuDNN, torch's convolution lets a NaN into the next group.
    """
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    odd = getattr(inputs, where)
    odd[tuple(size // 2 for size in odd.shape)] = value
    names = ["x", "weight", "gamma", "beta", "residual"]
    for name in names:
        getattr(inputs, name).requires_grad_()
    args = {"training": mode == "train", "residual": True}
    y = grouped_conv_bn_relu(
        inputs.x,
        inputs.weight,
        inputs.gamma,
        inputs.beta,
        inputs.running_mean.clone(),
        inputs.running_var.clone(),
        training=mode == "train",
        residual=inputs.residual,
        backend=target.backend,
        **case.conv,
    )
    found = torch.autograd.grad(y, [getattr(inputs, name) for name in names], inputs.dy)
    wide = torch.promote_types(target.dtype, torch.float32)
    on_cpu = inputs.map(lambda t: t.detach().to("cpu", wide))
    peer = plain(on_cpu, case.conv, gradients=True, **args)
    assert torch.equal(y.isnan().cpu(), peer.y.isnan())
    assert torch.equal(y.isposinf().cpu(), peer.y.isposinf())
    for name, gradient in zip(names, found, strict=True):
        expected = peer.gradients[name]
        assert torch.equal(gradient.isfinite().cpu(), expected.isfinite()), f"gradient of {name}"


@few_cases
@pytest.mark.parametrize("offset", [1e2, 1e4], ids=["mean1e2", "mean1e4"])
def test_mean_large_against_deviation(case: Case, offset: float, target: Target) -> None:
    """A variance formed as E[z^2] - E[z]^2 would be all rounding here."""
    if target.dtype == torch.float64:
        pytest.skip("no truth finer than float64")
    if target.dtype != torch.float32:
        offset /= 100  # z itself keeps only 8 or 11 bits
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    # the centre tap alone, so that padding adds no deviation of the offset's size
    inputs.weight[:] = 0
    inputs.weight[:, 0, 1, 1] = 1
    inputs.x += offset
    # z is stored with a rounding of the offset's size, which a sum over one tap happens to avoid
    check(case, target, inputs, training=True, conditioned=True)


@pytest.mark.parametrize("seed", range(3))
def test_one_group_far_larger_than_the_rest(seed: int, target: Target) -> None:
    """Groups keep apart: nothing of a large one leaks into its neighbours, not a bit."""
    case = Case(2, 32, 6, 7, groups=8)
    target.require(case)
    torch.manual_seed(seed)
    inputs = make_inputs(case, target.dtype, target.device)
    quiet = inputs.clone()
    quiet.x[:, :4] = 0
    inputs.x[:, :4] *= 1000
    y = [
        grouped_conv_bn_relu(
            t.x,
            t.weight,
            t.gamma,
            t.beta,
            None,
            None,
            groups=8,
            training=True,
            backend=target.backend,
        )
        for t in (inputs, quiet)
    ]
    assert torch.equal(y[0][:, 4:], y[1][:, 4:])


# BatchNorm's own options ---------------------------------------------------------------------


@few_cases
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_momentum(case: Case, momentum: float, target: Target) -> None:
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    check(case, target, inputs, training=True, gradients=False, momentum=momentum)


def test_running_statistics_change_in_place(target: Target) -> None:
    """As by ATen: autograd knows, as do views, and a leaf that requires a gradient is refused."""
    case = FEW[0]
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)

    def op(mean: torch.Tensor, var: torch.Tensor) -> None:
        operands = inputs.x, inputs.weight, inputs.gamma, inputs.beta, mean, var
        grouped_conv_bn_relu(*operands, training=True, backend=target.backend, **case.conv)

    mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
    rows = torch.stack((mean, var))
    factor = torch.ones_like(mean).requires_grad_()
    stale = [(factor * t).sum() for t in (mean, var)]
    version = mean._version, var._version, rows._version
    op(mean, var)
    op(*rows)
    assert torch.equal(rows, torch.stack((mean, var)))
    assert not torch.equal(mean, inputs.running_mean)
    assert not torch.equal(var, inputs.running_var)
    assert all(t._version > v for t, v in zip((mean, var, rows), version, strict=True))
    for result in stale:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()

    with torch.inference_mode():
        of_inference = inputs.running_mean.clone(), inputs.running_var.clone()
        op(*of_inference)
        torch.testing.assert_close(torch.stack(of_inference), rows)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        op(*of_inference)

    leaf = inputs.running_mean.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        op(leaf, var)


@MODES
def test_without_affine_or_running_statistics(mode: str, target: Target) -> None:
    case = FEW[0]
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    training = mode == "train"
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    statistics = (None, None) if training else (inputs.running_mean, inputs.running_var)
    y = grouped_conv_bn_relu(
        x, weight, None, None, *statistics, training=training, backend=target.backend, **case.conv
    )
    found = dict(zip(["x", "weight"], torch.autograd.grad(y, [x, weight], inputs.dy), strict=True))
    passed = passed_relu(y)
    args = {"training": training, "running": not training, "affine": False, "gradients": True}
    truth = plain(inputs.double(), case.conv, passed=passed, **args)
    peer = plain(inputs, case.conv, passed=passed, **args)
    inputs.gamma = torch.ones_like(inputs.gamma)
    floors = gradient_floors(case, inputs, truth, training=training, passed=passed)
    for name, gradient in found.items():
        assert_as_exact_as_torch(
            name, gradient, truth.gradients[name], peer.gradients[name], floors[name]
        )


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
@MODES
def test_eps(eps: float, mode: str, target: Target) -> None:
    case = FEW[0]
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    args = {"training": mode == "train", "eps": eps}
    try:
        peer = plain(inputs, case.conv, **args)
    except ValueError as error:  # eps = 0: in training, some releases of torch in eval too
        assert eps == 0, error  # noqa: PT017
        pytest.skip(str(error))
    truth = plain(inputs.double(), case.conv, **args)
    y = grouped_conv_bn_relu(
        inputs.x,
        inputs.weight,
        inputs.gamma,
        inputs.beta,
        inputs.running_mean.clone(),
        inputs.running_var.clone(),
        backend=target.backend,
        **args,
        **case.conv,
    )
    assert_as_exact_as_torch("y", y, truth.y, peer.y, floor(target.dtype, largest(truth.y)))


def test_vectors_of_the_images_dtype(target: Target) -> None:
    """`.half()` and `.bfloat16()` turn gamma, beta and the running statistics too."""
    case = FEW[0]
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device).map(lambda t: t.to(target.dtype))
    inputs.running_var = inputs.running_var.abs() + 0.25
    for training in (False, True):
        check_vectors(case, target, inputs, training)


def check_vectors(case: Case, target: Target, inputs: Inputs, training: bool) -> None:
    tested = inputs.clone()
    leaves = [tested.gamma.requires_grad_(), tested.beta.requires_grad_()]
    y = grouped_conv_bn_relu(
        tested.x,
        tested.weight,
        tested.gamma,
        tested.beta,
        tested.running_mean,
        tested.running_var,
        training=training,
        backend=target.backend,
        **case.conv,
    )
    passed = passed_relu(y)
    args = {"training": training, "passed": passed, "gradients": True}
    truth, peer = plain(inputs.double(), case.conv, **args), plain(inputs, case.conv, **args)
    assert_as_exact_as_torch(
        "y", y, truth.y * passed, peer.y, floor(target.dtype, largest(truth.y))
    )
    for name in ("running_mean", "running_var"):
        actual, exact = getattr(tested, name), getattr(truth, name)
        assert actual.dtype == target.dtype
        assert_as_exact_as_torch(
            name, actual, exact, getattr(peer, name), floor(target.dtype, largest(exact))
        )
    found = torch.autograd.grad(y, leaves, inputs.dy)
    for name, gradient in zip(["gamma", "beta"], found, strict=True):
        exact = truth.gradients[name]
        assert_as_exact_as_torch(
            name,
            gradient,
            exact,
            peer.gradients[name],
            floor(target.dtype, largest(exact)),  # the sum itself is rounded to the dtype
        )


# Which gradients ------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("name", ["x", "weight", "gamma", "beta", "residual"])
def test_only_the_gradient_that_is_needed(
    name: str, mode: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FEW[0]
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    asked: list[tuple[bool, bool]] = []
    conv_backward = target.module.conv_backward

    def recording(*args, need_dx=True, need_dweight=True, **kwargs):
        asked.append((need_dx, need_dweight))
        return conv_backward(*args, need_dx=need_dx, need_dweight=need_dweight, **kwargs)

    def gradients(names: list[str]) -> list[torch.Tensor]:
        tested = inputs.clone()
        leaves = [getattr(tested, n).requires_grad_() for n in names]
        y = grouped_conv_bn_relu(
            tested.x,
            tested.weight,
            tested.gamma,
            tested.beta,
            tested.running_mean,
            tested.running_var,
            training=mode == "train",
            residual=tested.residual,
            backend=target.backend,
            **case.conv,
        )
        return list(torch.autograd.grad(y, leaves, inputs.dy))

    names = ["x", "weight", "gamma", "beta", "residual"]
    everything = dict(zip(names, gradients(names), strict=True))
    monkeypatch.setattr(target.module, "conv_backward", recording)
    assert torch.equal(gradients([name])[0], everything[name])
    wanted = {"x": [(True, False)], "weight": [(False, True)]}.get(name, [])
    assert [a for a in asked if any(a)] == wanted


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradcheck_of_the_reference(training: bool) -> None:
    """First and second derivatives, by finite differences in float64."""
    case = Case(2, 4, 2, 3, groups=2)
    inputs = make_inputs(case, torch.float64)
    inputs.beta += 0.3
    leaves = [
        t.requires_grad_()
        for t in (inputs.x, inputs.weight, inputs.gamma, inputs.beta, inputs.residual)
    ]

    def op(x, weight, gamma, beta, residual):
        return grouped_conv_bn_relu(
            x,
            weight,
            gamma,
            beta,
            inputs.running_mean.clone(),
            inputs.running_var.clone(),
            training=training,
            residual=residual,
            backend="reference",
            **case.conv,
        )

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@MODES
@few_cases
def test_double_backward(case: Case, mode: str, target: Target) -> None:
    """A gradient penalty: d/d(x, weight, gamma, beta) of |dy/dx|^2."""
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    names = ["x", "weight", "gamma", "beta"]

    def penalty_gradients(t: Inputs, backend: str | None, passed=None):
        t = t.clone()
        leaves = [getattr(t, name).requires_grad_() for name in names]
        if backend is None:
            if t.x.dtype == torch.float64:
                z = conv2d(t.x, t.weight, **case.conv)
            else:
                z = F.conv2d(t.x, t.weight, padding=case.dilation, **case.conv)
            statistics = t.running_mean, t.running_var
            pre = F.batch_norm(z, *statistics, t.gamma, t.beta, mode == "train")
            y = torch.where(passed, pre, torch.zeros_like(pre))
        else:
            y = grouped_conv_bn_relu(
                *leaves,
                t.running_mean,
                t.running_var,
                training=mode == "train",
                backend=backend,
                **case.conv,
            )
        (dx,) = torch.autograd.grad(y, t.x, t.dy, create_graph=True)
        grads = torch.autograd.grad(dx.square().sum(), leaves, allow_unused=True)
        return y, [None if g is None else g.detach() for g in grads]

    y, found = penalty_gradients(inputs, target.backend)
    passed = passed_relu(y)
    _, truth = penalty_gradients(inputs.double(), None, passed)
    _, peer = penalty_gradients(inputs, None, passed)
    for name, actual, exact, torchs in zip(names, found, truth, peer, strict=True):
        if exact is None or not exact.any():
            assert actual is None or not actual.any(), name
            continue
        # dx is itself a sum of 9*D rounded terms, and these are sums of its products over the map
        scale = largest(exact) * (9 * case.k / case.groups) ** 0.5
        assert_as_exact_as_torch(name, actual, exact, torchs, floor(target.dtype, scale))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_result_changed_in_place(residual: bool, target: Target) -> None:
    """y.mul_(2) after the op: autograd objects where y was saved, and is right where it was not."""
    case = FEW[0]
    target.require(case)
    inputs = make_inputs(case, target.dtype, target.device)
    inputs.x.requires_grad_()

    def op() -> torch.Tensor:
        return grouped_conv_bn_relu(
            inputs.x,
            inputs.weight,
            inputs.gamma,
            inputs.beta,
            None,
            None,
            training=True,
            residual=inputs.residual if residual else None,
            backend=target.backend,
            **case.conv,
        )

    changed = op().mul_(2)
    if residual:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(changed, inputs.x, inputs.dy)
    else:
        (expected,) = torch.autograd.grad(op() * 2, inputs.x, inputs.dy)
        assert torch.equal(torch.autograd.grad(changed, inputs.x, inputs.dy)[0], expected)


# Anything at all -----------------------------------------------------------------------------


@st.composite
def any_case(draw: st.DrawFn, backend: str) -> Case:
    """What `cuda` refuses is left out of its draw: all but a few per cent would be."""
    narrow = backend == "cuda"
    groups = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17, 32]))
    din = draw(st.integers(1, 8 if narrow else 9))
    if narrow:
        din *= 8 // math.gcd(groups * din, 8)
    return Case(
        n=draw(st.integers(1, 3)),
        c=groups * din,
        h=draw(st.integers(1, 12)),
        w=draw(st.integers(2, 12)),
        groups=groups,
        k=groups * (din if narrow else draw(st.integers(1, 9))),
        stride=draw(st.sampled_from([1, 1, 2] if narrow else [1, 1, 2, 3])),
        dilation=draw(st.sampled_from([1] if narrow else [1, 1, 2, 3])),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    data=st.data(),
    layout=st.sampled_from([lambda t: t, *LAYOUTS]),
    training=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def hold_anything(target, data, layout, training, residual, seed) -> None:
    case = data.draw(any_case(target.backend))
    assume(case.reduced >= WELL_CONDITIONED)
    assume(target.module.why_not(target.problem(case)) is None)
    torch.manual_seed(seed)
    inputs = make_inputs(case, target.dtype, target.device)
    for name in ("x", "residual", "dy"):
        setattr(inputs, name, layout(getattr(inputs, name)))
    check(case, target, inputs, training=training, residual=residual, conditioned=True)


def test_anything(target: Target) -> None:
    target.require(FEW[0])
    hold_anything(target)
