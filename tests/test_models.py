"""The networks against torchvision's and timm's, and against the numbers of the paper."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cases import floor, rms
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from resnext_kernels import backends, models
from resnext_kernels.__main__ import TABLES, complexity
from resnext_kernels.models import ResNeXt, resnext, resnext_cifar
from resnext_kernels.problem import ConvProblem

NAMED = {  # depth, cardinality, width, parameters
    "resnet50": (50, 1, 64, 25_557_032),
    "resnet101": (101, 1, 64, 44_549_160),
    "resnet152": (152, 1, 64, 60_192_808),
    "resnet200": (200, 1, 64, 64_673_832),
    "resnext50_32x4d": (50, 32, 4, 25_028_904),
    "resnext101_32x4d": (101, 32, 4, 44_177_704),
    "resnext101_32x8d": (101, 32, 8, 88_791_336),
    "resnext101_64x4d": (101, 64, 4, 83_455_272),
    "resnext152_32x4d": (152, 32, 4, 59_951_400),
    "resnext29_8x64d": (29, 8, 64, 34_426_698),
    "resnext29_16x64d": (29, 16, 64, 68_155_210),
}
LAYERS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3], 200: [3, 24, 36, 3]}
TORCHVISION = [
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]
TIMM = [*TORCHVISION, "resnext101_32x4d", "resnet200"]


def on_meta(network: Callable[[], nn.Module]) -> nn.Module:
    """Names and shapes alone, without the time that initial values take."""
    with torch.device("meta"):
        return network()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Names, shapes, counts ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_parameter_count(name: str) -> None:
    *_, expected = NAMED[name]
    assert parameters(on_meta(getattr(models, name))) == expected


@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name][0] in LAYERS])
def test_shapes_are_those_of_torchvisions_resnet(name: str) -> None:
    depth, cardinality, width, _ = NAMED[name]
    network = partial(
        torchvision.models.ResNet,
        Bottleneck,
        LAYERS[depth],
        groups=cardinality,
        width_per_group=width,
    )
    ours, theirs = on_meta(getattr(models, name)), on_meta(network)
    assert [(n, t.shape) for n, t in ours.state_dict().items()] == [
        (n, t.shape) for n, t in theirs.state_dict().items()
    ]


@pytest.mark.parametrize(
    "theirs",
    [getattr(torchvision.models, name) for name in TORCHVISION]
    + [partial(timm.create_model, name) for name in TIMM],
    ids=[f"torchvision-{name}" for name in TORCHVISION] + [f"timm-{name}" for name in TIMM],
)
def test_checkpoints_load_strictly_both_ways(
    theirs: Callable[[], nn.Module], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.split("-")[1]
    ours, peer = on_meta(getattr(models, name)), on_meta(theirs)
    ours.load_state_dict(peer.state_dict(), strict=True, assign=True)
    peer.load_state_dict(ours.state_dict(), strict=True, assign=True)


def test_same_seed_gives_torchvisions_initial_values() -> None:
    torch.manual_seed(0)
    ours = ResNeXt([1, 1, 1, 1], cardinality=8, width=8, zero_init_residual=True).state_dict()
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(
        Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=8, zero_init_residual=True
    ).state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# Results --------------------------------------------------------------------------------------


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    """Parameters and statistics as after training: none of BatchNorm's zeros and ones is left.

    Five deviations of bias keep what goes into a ReLU away from zero, where one rounding decides
    whether a gradient passes and a comparison of whole networks compares luck. A quarter of the
    channels is off, the others on; masks by the element are compared on the operation and block.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # a block's last BatchNorm: small, so the sum over the blocks grows slowly; on
            last = name.endswith("bn3")
            nn.init.uniform_(module.weight, 0.5, 1.5).mul_(0.3 if last else 1.0)
            on = torch.ones_like(module.bias) if last else (torch.rand_like(module.bias) > 0.25)
            module.bias.copy_(5 * module.weight * (2 * on.float() - 1))
            module.weight.mul_(torch.randn_like(module.weight).sign())
            module.momentum = 1.0
    model.train()(images())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
            module.num_batches_tracked.zero_()
    return model


def observe(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Logits, input gradient, parameter gradients and buffers of one step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits, labels).backward()
    return {
        "logits": {"": logits.detach()},
        "input gradient": {"": x.grad},
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "statistics": {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()},
    }


def worst(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a tensor, in root mean square, and its name."""
    assert actual.keys() == truth.keys()

    def error(name: str) -> float:
        # a mean may be small by cancellation: its errors are those of the values it is taken over
        scale = truth[name.replace("running_mean", "running_var")]
        scale = scale.sqrt() if name.endswith("running_mean") else scale
        return rms(actual[name] - truth[name]) / max(rms(truth[name]), rms(scale), 1e-30)

    return max((error(name), name) for name in truth)


def hold(networks: dict[str, nn.Module], theirs: nn.Module, x: Tensor, labels: Tensor) -> None:
    """One step of each: ours are as near to their network in float64 as it is in float32.

    Rounding errors spread over a whole network, so the yardstick is the worst tensor of a kind.
    """
    truth = observe(copy.deepcopy(theirs).double(), x.double(), labels)
    peer = observe(theirs, x, labels)
    for backend, ours in networks.items():
        with backends.use(backend):
            actual = observe(ours, x, labels)
        for kind in truth:
            error, where = worst(actual[kind], truth[kind])
            peer_error, _ = worst(peer[kind], truth[kind])
            assert error <= 2 * peer_error + floor(torch.float32, 1.0), (
                f"{backend}: {kind} {where}: error {error:.3g}, torch's own {peer_error:.3g}"
            )


def on_every_backend(ours: nn.Module) -> dict[str, nn.Module]:
    problem = ConvProblem(1, 56, 56, 128, groups=32, training=True)  # float32, on the CPU
    return {name: copy.deepcopy(ours) for name in backends.compatible(problem)}


def test_training_is_torchvisions() -> None:
    """Three steps of SGD from one state each, then inference with the statistics they left."""
    theirs = trained(torchvision.models.resnext50_32x4d()).to(memory_format=torch.channels_last)
    networks = on_every_backend(models.resnext50_32x4d().to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        x, labels = images(), torch.randint(1000, (2,))
        for ours in networks.values():
            ours.load_state_dict(theirs.state_dict(), strict=True)
        hold(networks, theirs, x, labels)
        optimizer.step()
    for ours in networks.values():
        assert ours.bn1.num_batches_tracked == 3
        ours.load_state_dict(theirs.state_dict(), strict=True)
        ours.eval()
    hold(networks, theirs.eval(), x, labels)


def test_results_are_timms() -> None:
    theirs = trained(
        timm.models.resnet.ResNet(
            timm.models.resnet.Bottleneck, (1, 1, 1, 1), cardinality=32, base_width=4
        )
    )
    ours = ResNeXt([1, 1, 1, 1])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, labels = images(), torch.randint(1000, (2,))
    networks = on_every_backend(ours)
    hold(networks, theirs, x, labels)
    for network in networks.values():
        network.load_state_dict(theirs.state_dict(), strict=True)
        network.eval()
    hold(networks, theirs.eval(), x, labels)


@pytest.mark.parametrize("options", ["dilation", "frozen", "zero_init_residual"])
def test_options_are_torchvisions(options: str) -> None:
    kwargs = {
        "dilation": {"replace_stride_with_dilation": [False, True, True]},
        "frozen": {"norm_layer": FrozenBatchNorm2d},
        "zero_init_residual": {"zero_init_residual": True},
    }[options]
    theirs = torchvision.models.ResNet(
        Bottleneck, [1, 2, 1, 2], 10, groups=8, width_per_group=4, **kwargs
    )
    if options == "dilation":
        theirs = trained(theirs)
    ours = ResNeXt([1, 2, 1, 2], cardinality=8, width=4, num_classes=10, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    hold(on_every_backend(ours), theirs, images(), torch.randint(10, (2,)))


def test_cifar_network() -> None:
    """Three stages at 1, 1/2 and 1/4 of the resolution, of 256, 512 and 1024 channels."""
    model = resnext_cifar(11, 8, 4, in_channels=1).eval()
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape)))
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert shapes == [(2, 256, 28, 28), (2, 512, 14, 14), (2, 1024, 7, 7)]
    assert [stage[0].conv2.out_channels for stage in (model.layer1, model.layer2)] == [32, 64]


def test_compile_pickle_and_deepcopy() -> None:
    model = ResNeXt([1, 1], cardinality=4, width=4, num_classes=10, stem="cifar").eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
    ):
        torch.testing.assert_close(twin(x), expected)


def test_named_networks_show_their_signature() -> None:
    expected = {
        "num_classes": 1000,
        "in_channels": 3,
        "zero_init_residual": False,
        "replace_stride_with_dilation": None,
        "norm_layer": None,
    }
    for name, (depth, cardinality, width, _) in NAMED.items():
        network = getattr(models, name)
        found = {n: p.default for n, p in inspect.signature(network).parameters.items()}
        assert found == (expected | {"num_classes": 10} if depth == 29 else expected), name
        assert network.__name__ == name
        assert f"-{depth} ({cardinality}x{width}d)" in network.__doc__
        assert name in models.__all__


# Bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: resnext(51, 32, 4),
            ValueError,
            "depth must be one of [14, 26, 50, 101, 152, 200], got 51",
        ),
        (
            lambda: resnext_cifar(28, 8, 64),
            ValueError,
            "depth must be 9*n + 2 with n >= 1 (11, 20, 29, ...), got 28",
        ),
        (lambda: resnext_cifar(2, 8, 64), ValueError, "n >= 1 (11, 20, 29, ...), got 2"),
        (lambda: resnext(50, 0, 4), ValueError, "cardinality must be at least 1, got 0"),
        (lambda: resnext(50, 32, -4), ValueError, "width must be at least 1, got -4"),
        (lambda: ResNeXt([1], num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: ResNeXt([1], in_channels=0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: ResNeXt([]), ValueError, "layers must hold at least one block a stage, got []"),
        (lambda: ResNeXt([3, 0]), ValueError, "at least one block a stage, got [3, 0]"),
        (
            lambda: ResNeXt([1], stem="tiny"),
            ValueError,
            "stem must be 'imagenet' or 'cifar', got 'tiny'",
        ),
        (
            lambda: ResNeXt([1, 1, 1], replace_stride_with_dilation=[True]),
            ValueError,
            "replace_stride_with_dilation must have 2 entries, one for each stage but the first, "
            "got [True]",
        ),
        (
            lambda: ResNeXt([1], norm_layer=partial(nn.GroupNorm, 4)),
            TypeError,
            "norm_layer must make nn.BatchNorm2d, nn.SyncBatchNorm or a frozen batch norm",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], ResNeXt], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


# Complexity -----------------------------------------------------------------------------------


def published(text: str) -> float:
    return float(text.strip("~MG")) * (1e6 if text.endswith("M") else 1e9)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title.split(" (")[0])
def test_complexity_is_the_papers(table) -> None:
    """Within the last digit that the paper gives; where it says "about", within 4 %."""
    for row in table.rows:
        _, *counted = complexity(row.network, table.image_size)
        for count, text in zip(counted, (row.parameters, row.multiply_adds), strict=True):
            if text.startswith("~"):
                assert count == pytest.approx(published(text), rel=0.04), row
            elif text != "-":
                digit = 1e5 if text.endswith("M") else 1e8
                assert abs(count - published(text)) < digit, row


@pytest.mark.parametrize("depth", [50, 101])
def test_family_of_equal_complexity(depth: int) -> None:
    """Table 2: widths of the template, and 70k weights in a block of conv2."""
    _, parameters_1x64d, multiply_adds_1x64d = complexity(partial(resnext, depth, 1, 64), 224)
    for cardinality, width, group_width in zip(
        (1, 2, 4, 8, 32), (64, 40, 24, 14, 4), (64, 80, 96, 112, 128), strict=True
    ):
        network = partial(resnext, depth, cardinality, width)
        model, count, multiply_adds = complexity(network, 224)
        block = model.layer1[1]
        assert (block.conv2.groups, block.conv2.out_channels) == (cardinality, group_width)
        convs = (block.conv1, block.conv2, block.conv3)
        assert sum(c.weight.numel() for c in convs) == pytest.approx(70e3, rel=0.04)
        assert count == pytest.approx(parameters_1x64d, rel=0.03)
        assert multiply_adds == pytest.approx(multiply_adds_1x64d, rel=0.05)


def test_command_prints_the_tables() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resnext_kernels"], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    for row in (
        "ResNet-50 1x64d 64 25.56M 4.09G 25.5M 4.1G 23.9",
        "ResNeXt-50 8x14d 112 25.60M 4.27G - - 22.3",
        "ResNeXt-50 32x4d 128 25.03M 4.23G 25.0M 4.2G 22.2",
        "ResNeXt-101 64x4d 256 83.46M 15.46G - ~15G 20.4",
        "ResNeXt-29 16x64d 1024 68.16M 10.69G 68.1M - 3.58",
    ):
        assert row.split() in lines
    assert "were not measured here" in done.stdout
