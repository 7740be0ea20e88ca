"""Bad input raises before any kernel runs, and says which argument, what was given, what may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Target
from torch import Tensor, nn

from resnext_kernels import FusedGroupedBottleneck, GroupedConvBNReLU
from resnext_kernels.functional import (
    BatchNormState,
    bn_relu,
    bn_relu_max_pool,
    bottleneck,
    conv1x1,
    conv_bn_relu,
    grouped_conv_bn_relu,
)
from resnext_kernels.problem import ConvProblem


def arguments() -> dict[str, Any]:
    """A good call: 16 to 24 channels in 8 groups."""
    return {
        "x": torch.randn(2, 16, 5, 6),
        "weight": torch.randn(24, 2, 3, 3),
        "gamma": torch.rand(24),
        "beta": torch.rand(24),
        "running_mean": torch.zeros(24),
        "running_var": torch.ones(24),
        "groups": 8,
        "residual": torch.randn(2, 24, 5, 6),
    }


def call(**changes: Any) -> Tensor:
    kwargs = arguments() | changes
    names = ("x", "weight", "gamma", "beta", "running_mean", "running_var")
    return grouped_conv_bn_relu(*[kwargs.pop(name) for name in names], **kwargs)


# what is changed; the error; words of its text: the argument, what was given, what is allowed
BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "x of rank 3": ({"x": torch.randn(16, 5, 6)}, ValueError, ["x ", "(16, 5, 6)", "4 dim"]),
    "x of rank 5": ({"x": torch.randn(1, 2, 16, 5, 6)}, ValueError, ["x ", "4 dim"]),
    "x of integers": (
        {"x": torch.ones(2, 16, 5, 6, dtype=torch.int32)},
        TypeError,
        ["x ", "int32", "float32", "bfloat16"],
    ),
    "x complex": (
        {"x": torch.ones(2, 16, 5, 6, dtype=torch.complex64)},
        TypeError,
        ["x ", "complex64"],
    ),
    "x without height": ({"x": torch.randn(2, 16, 0, 6)}, ValueError, ["x ", "(2, 16, 0, 6)"]),
    "x without channels": ({"x": torch.randn(2, 0, 5, 6)}, ValueError, ["x ", "(2, 0, 5, 6)"]),
    "groups that do not divide C": ({"groups": 5}, ValueError, ["groups", "5", "16"]),
    "groups that do not divide K": (
        {"weight": torch.randn(23, 2, 3, 3)},
        ValueError,
        ["groups", "8", "23"],
    ),
    "groups 0": ({"groups": 0}, ValueError, ["groups", "0", "at least 1"]),
    "groups negative": ({"groups": -8}, ValueError, ["groups", "-8", "at least 1"]),
    "groups a float": ({"groups": 8.0}, TypeError, ["groups", "8.0", "int"]),
    "stride 0": ({"stride": 0}, ValueError, ["stride", "0", "at least 1"]),
    "stride a pair": ({"stride": (1, 1)}, TypeError, ["stride", "(1, 1)", "int"]),
    "dilation 0": ({"dilation": 0}, ValueError, ["dilation", "0", "at least 1"]),
    "dilation a float": ({"dilation": 1.5}, TypeError, ["dilation", "1.5", "int"]),
    "weight of rank 3": ({"weight": torch.randn(24, 2, 9)}, ValueError, ["weight", "(24, 2, 9)"]),
    "weight of another width": (
        {"weight": torch.randn(24, 4, 3, 3)},
        ValueError,
        ["weight", "(24, 4, 3, 3)", "(K, 2, 3, 3)"],
    ),
    "weight of 5x5": (
        {"weight": torch.randn(24, 2, 5, 5)},
        ValueError,
        ["weight", "(24, 2, 5, 5)", "3, 3"],
    ),
    "weight without channels": ({"weight": torch.randn(0, 2, 3, 3)}, ValueError, ["weight"]),
    "weight of another dtype": (
        {"weight": torch.randn(24, 2, 3, 3, dtype=torch.float64)},
        TypeError,
        ["weight", "float64", "float32"],
    ),
    "weight on another device": (
        {"weight": torch.randn(24, 2, 3, 3, device="meta")},
        ValueError,
        ["weight", "meta", "cpu"],
    ),
    "residual of another shape": (
        {"residual": torch.randn(2, 24, 5, 5)},
        ValueError,
        ["residual", "(2, 24, 5, 5)", "(2, 24, 5, 6)"],
    ),
    "residual that would broadcast": (
        {"residual": torch.randn(2, 24, 1, 1)},
        ValueError,
        ["residual", "(2, 24, 1, 1)", "(2, 24, 5, 6)"],
    ),
    "residual at full size with stride 2": (
        {"stride": 2},
        ValueError,
        ["residual", "(2, 24, 3, 3)"],
    ),
    "residual of another dtype": (
        {"residual": torch.randn(2, 24, 5, 6).bfloat16()},
        TypeError,
        ["residual", "bfloat16", "float32"],
    ),
    "residual on another device": (
        {"residual": torch.randn(2, 24, 5, 6, device="meta")},
        ValueError,
        ["residual", "meta", "cpu"],
    ),
    "eps negative": ({"eps": -1e-5}, ValueError, ["eps", "-1e-05", "at least 0"]),
    "eps NaN": ({"eps": float("nan")}, ValueError, ["eps", "nan"]),
    "unknown backend": (
        {"backend": "gpu"},
        ValueError,
        ["backend", "'gpu'", "'cpu'", "'reference'"],
    ),
    "no running statistics in eval": (
        {"running_mean": None, "running_var": None},
        ValueError,
        ["running_mean", "None"],
    ),
    "running mean alone": (
        {"running_var": None, "training": True},
        ValueError,
        ["running_mean", "running_var"],
    ),
    "one value per channel": (
        {
            "x": torch.randn(1, 16, 1, 1),
            "residual": torch.randn(1, 24, 1, 1),
            "training": True,
        },
        ValueError,
        ["Expected more than 1 value per channel when training", "1, 24, 1, 1"],
    ),
}
for vector in ("gamma", "beta", "running_mean", "running_var"):
    BAD |= {
        f"{vector} of another length": ({vector: torch.ones(16)}, ValueError, [vector, "16", "24"]),
        f"{vector} of rank 2": ({vector: torch.ones(24, 1)}, ValueError, [vector, "(24, 1)", "24"]),
        f"{vector} of integers": (
            {vector: torch.ones(24, dtype=torch.int64)},
            TypeError,
            [vector, "int64", "floating"],
        ),
        f"{vector} on another device": (
            {vector: torch.ones(24, device="meta")},
            ValueError,
            [vector, "meta", "cpu"],
        ),
    }


FUNCTIONS = ("conv_affine_relu", "conv_stats", "normalize_relu", "batch_stats", "conv1x1")
FUNCTIONS += ("conv_bn_relu", "conv1x1_stats", "conv1x1_affine_relu", "bn_affine", "bn_vectors")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No function of any backend may be reached."""
    from resnext_kernels import backends

    def unreachable(*_: Any, **__: Any) -> None:
        pytest.fail("a kernel ran")

    for name in backends.NAMES:
        module = Target(name, torch.float32).module
        for function in FUNCTIONS:
            monkeypatch.setattr(module, function, unreachable)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    changes, error, words = BAD[name]
    running = arguments()["running_mean"]
    with pytest.raises(error) as raised:
        call(**({"running_mean": running} | changes))
    assert type(raised.value) is error
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{raised.value} lacks {missing}"
    assert not running.any(), "running statistics changed before the error"


def test_the_good_call_is_good() -> None:
    assert call().shape == (2, 24, 5, 6)


def bn(channels: int, **changes: Any) -> BatchNormState:
    vectors = [torch.ones(channels) for _ in range(4)]
    return BatchNormState(*vectors)._replace(**changes)


# the same of the operations around it: the call; words of its ValueError
BAD_AROUND: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "input_bn of another length": (
        lambda z: conv_bn_relu(z, torch.randn(16, 2, 3, 3), bn(16), input_bn=bn(8), groups=8),
        ["input_bn.gamma", "(8,)", "(16,)"],
    ),
    "pointwise_weight of another width": (
        lambda z: conv_bn_relu(
            z, torch.randn(16, 2, 3, 3), bn(16), pointwise_weight=torch.randn(4, 8, 1, 1), groups=8
        ),
        ["pointwise_weight", "(4, 8, 1, 1)", "(K, 16, 1, 1)"],
    ),
    "pointwise_weight and residual": (
        lambda z: conv_bn_relu(
            *(z, torch.randn(16, 2, 3, 3), bn(16)),
            pointwise_weight=torch.randn(4, 16, 1, 1),
            residual=torch.randn(2, 16, 5, 6),
            groups=8,
        ),
        ["pointwise_weight", "residual", "together"],
    ),
    "z of rank 3": (lambda z: bn_relu(z[0], bn(16)), ["z ", "(16, 5, 6)", "4 dim"]),
    "bn of another length": (lambda z: bn_relu(z, bn(8)), ["gamma", "(8,)", "(16,)"]),
    "residual of another shape": (
        lambda z: bn_relu(z, bn(16), residual=z[:, :8]),
        ["residual", "(2, 8, 5, 6)", "(2, 16, 5, 6)"],
    ),
    "residual_bn alone": (
        lambda z: bn_relu(z, bn(16), residual_bn=bn(16)),
        ["residual_bn", "residual"],
    ),
    "residual_bn of another length": (
        lambda z: bn_relu(z, bn(16), residual=z, residual_bn=bn(8)),
        ["residual_bn.gamma", "(8,)", "(16,)"],
    ),
    "one value per channel": (
        lambda z: bn_relu(z[:1, :, :1, :1], bn(16, training=True)),
        ["more than 1 value per channel", "(1, 16, 1, 1)"],
    ),
    "max pool without running statistics": (
        lambda z: bn_relu_max_pool(
            z, bn(16, running_mean=None, running_var=None), kernel_size=(3, 3), stride=(2, 2)
        ),
        ["running_mean", "None"],
    ),
    "max pool on no backend": (
        lambda z: bn_relu_max_pool(z, bn(16), kernel_size=(3, 3), stride=(2, 2), backend="gpu"),
        ["backend", "'gpu'", "'reference'"],
    ),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", BAD_AROUND)
def test_bad_argument_around_the_convolution(name: str) -> None:
    function, words = BAD_AROUND[name]
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        function(torch.randn(2, 16, 5, 6))
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{raised.value} lacks {missing}"


BAD_1X1: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "x of rank 3": ({"x": torch.randn(16, 5, 6)}, ValueError, ["x ", "(16, 5, 6)", "4 dim"]),
    "x of integers": (
        {"x": torch.ones(2, 16, 5, 6, dtype=torch.int64)},
        TypeError,
        ["x ", "int64", "float32"],
    ),
    "weight of rank 2": (
        {"weight": torch.randn(32, 16)},
        ValueError,
        ["weight", "(32, 16)", "(K, 16, 1, 1)"],
    ),
    "weight of other channels": (
        {"weight": torch.randn(32, 8, 1, 1)},
        ValueError,
        ["weight", "(32, 8, 1, 1)", "(K, 16, 1, 1)"],
    ),
    "weight of 3x3": ({"weight": torch.randn(32, 16, 3, 3)}, ValueError, ["weight", "3, 3"]),
    "weight without channels": (
        {"weight": torch.randn(0, 16, 1, 1)},
        ValueError,
        ["weight", "(0, 16, 1, 1)"],
    ),
    "weight of another dtype": (
        {"weight": torch.randn(32, 16, 1, 1).half()},
        TypeError,
        ["weight", "float16", "float32"],
    ),
    "weight on another device": (
        {"weight": torch.randn(32, 16, 1, 1, device="meta")},
        ValueError,
        ["weight", "meta", "cpu"],
    ),
    "stride 0": ({"stride": 0}, ValueError, ["stride", "0", "at least 1"]),
    "stride a pair": ({"stride": (2, 2)}, TypeError, ["stride", "(2, 2)", "int"]),
    "unknown backend": ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "'cpu'"]),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", BAD_1X1)
def test_bad_argument_of_conv1x1(name: str, memory_format: torch.memory_format) -> None:
    changes, error, words = BAD_1X1[name]
    x = torch.randn(2, 16, 5, 6).contiguous(memory_format=memory_format)
    kwargs: dict[str, Any] = {"x": x, "weight": torch.randn(32, 16, 1, 1)} | changes
    with pytest.raises(error) as raised:
        conv1x1(**kwargs)
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)


def bottleneck_arguments(training: bool) -> dict[str, Any]:
    """A good call: 40 to 16 to 24 channels in 8 groups, then 32."""

    def bn(channels: int) -> BatchNormState:
        vectors = [torch.zeros(channels), torch.ones(channels)]
        return BatchNormState(torch.rand(channels), torch.rand(channels), *vectors, training)

    return {
        "x": torch.randn(2, 40, 5, 6),
        "first_weight": torch.randn(16, 40, 1, 1),
        "bn1": bn(16),
        "weight": torch.randn(24, 2, 3, 3),
        "bn2": bn(24),
        "pointwise_weight": torch.randn(32, 24, 1, 1),
        "bn3": bn(32),
        "residual": torch.randn(2, 32, 5, 6),
        "residual_bn": bn(32),
        "groups": 8,
    }


BAD_BOTTLENECK: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "x of rank 3": ({"x": torch.randn(40, 5, 6)}, ValueError, ["x ", "(40, 5, 6)", "4 dim"]),
    "x of integers": (
        {"x": torch.ones(2, 40, 5, 6, dtype=torch.int64)},
        TypeError,
        ["x ", "int64", "float32"],
    ),
    "first_weight of other channels": (
        {"first_weight": torch.randn(16, 32, 1, 1)},
        ValueError,
        ["first_weight", "(16, 32, 1, 1)", "(K, 40, 1, 1)"],
    ),
    "groups that do not divide": (
        {"groups": 5},
        ValueError,
        ["groups", "16 channels of first_weight", "5"],
    ),
    "weight of 1x1": (
        {"weight": torch.randn(24, 2, 1, 1)},
        ValueError,
        ["weight", "3, 3", "of first_weight"],
    ),
    "weight of another dtype": (
        {"weight": torch.randn(24, 2, 3, 3).double()},
        TypeError,
        ["weight", "first_weight's", "float64"],
    ),
    "pointwise_weight of other channels": (
        {"pointwise_weight": torch.randn(32, 16, 1, 1)},
        ValueError,
        ["pointwise_weight", "(32, 16, 1, 1)", "(K, 24, 1, 1)"],
    ),
    "pointwise_weight of another dtype": (
        {"pointwise_weight": torch.randn(32, 24, 1, 1).double()},
        TypeError,
        ["pointwise_weight", "x's", "float64", "float32"],
    ),
    "residual at full size with stride 2": (
        {"stride": 2},
        ValueError,
        ["residual", "(2, 32, 3, 3)", "(2, 32, 5, 6)"],
    ),
    "residual and residual_weight": (
        {"residual_weight": torch.randn(32, 40, 1, 1)},
        ValueError,
        ["residual ", "residual_weight", "together"],
    ),
    "residual_weight of other channels": (
        {"residual": None, "residual_weight": torch.randn(32, 16, 1, 1)},
        ValueError,
        ["residual_weight", "(32, 16, 1, 1)", "(K, 40, 1, 1)"],
    ),
    "residual_weight to other channels": (
        {"residual": None, "residual_weight": torch.randn(16, 40, 1, 1)},
        ValueError,
        ["residual_weight", "(2, 16, 5, 6)", "(2, 32, 5, 6)"],
    ),
    "residual_stride alone": (
        {
            "residual": None,
            "residual_weight": torch.randn(32, 40, 1, 1),
            "residual_stride": 2,
        },
        ValueError,
        ["residual_weight", "(2, 32, 3, 3)", "(2, 32, 5, 6)"],
    ),
    "x as the residual of more channels": (
        {"residual": None},
        ValueError,
        ["x ", "residual", "(2, 40, 5, 6)", "(2, 32, 5, 6)"],
    ),
    "residual on another device": (
        {"residual": torch.randn(2, 32, 5, 6, device="meta")},
        ValueError,
        ["residual", "meta", "cpu"],
    ),
    "stride 0": ({"stride": 0}, ValueError, ["stride", "0", "at least 1"]),
    "unknown backend": ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "'cpu'"]),
}
for number, size in (("bn1", 16), ("bn2", 24), ("bn3", 32), ("residual_bn", 32)):
    bad_bn = BatchNormState(torch.rand(5), None, torch.zeros(size), torch.ones(size))
    BAD_BOTTLENECK[f"gamma of {number}"] = (
        {number: bad_bn},
        ValueError,
        [f"{number}.gamma", "(5,)", f"({size},)"],
    )


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BAD_BOTTLENECK)
def test_bad_argument_of_bottleneck(name: str, training: bool) -> None:
    changes, error, words = BAD_BOTTLENECK[name]
    kwargs = bottleneck_arguments(training) | changes
    with pytest.raises(error) as raised:
        bottleneck(**kwargs)
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert not kwargs["bn1"].running_mean.any(), "running statistics changed before the error"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_good_bottleneck_is_good(training: bool) -> None:
    assert bottleneck(**bottleneck_arguments(training)).shape == (2, 32, 5, 6)


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_requires_grad_does_not_hide_an_error(name: str) -> None:
    bad = {"x": (2, 15, 5, 6), "weight": (24, 3, 3, 3), "residual": (2, 24, 4, 6)}[name]
    with pytest.raises(ValueError, match=name):
        call(**{name: torch.randn(bad, requires_grad=True), "training": True})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": -1}, ["n ", "-1"]),
        ({"h": 0}, ["h ", "0"]),
        ({"w": 0}, ["w ", "0"]),
        ({"c": 0}, ["c ", "0"]),
        ({"k": 0}, ["k ", "0"]),
        ({"stride": 0}, ["stride", "0"]),
        ({"dilation": -1}, ["dilation", "-1"]),
        ({"groups": 0}, ["groups", "0"]),
        ({"groups": 3}, ["groups", "3", "16"]),
        ({"k": 20}, ["groups", "8", "20"]),
    ],
    ids=str,
)
def test_problem_of_impossible_size(changes: dict[str, int], words: list[str]) -> None:
    good = {"n": 1, "h": 5, "w": 5, "c": 16, "k": 24, "groups": 8}
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        ConvProblem(**(good | changes))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_modules_refuse_what_they_cannot_serve() -> None:
    with pytest.raises(ValueError, match="groups"):
        GroupedConvBNReLU(16, 24, 5)
    for norm_layer in (lambda c: nn.GroupNorm(1, c), nn.InstanceNorm2d, nn.Identity):
        with pytest.raises(TypeError, match="norm_layer"):
            FusedGroupedBottleneck(64, 16, groups=8, norm_layer=norm_layer)
    with pytest.raises(ValueError, match="16 channels"):
        GroupedConvBNReLU(24, 24, 8)(torch.randn(2, 16, 5, 5))
    with pytest.raises(ValueError, match="conv"):
        GroupedConvBNReLU.of(nn.Conv2d(16, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16))
    with pytest.raises(ValueError, match="bn"):
        GroupedConvBNReLU.of(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(1, 16))
