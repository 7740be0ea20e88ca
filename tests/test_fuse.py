"""fuse and unfuse on models of torchvision and timm, against the same models as they were."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import timm
import torch
import torchvision
from timm.layers import BlurPool2d, ConvNormAct
from timm.models import regnet as timm_regnet
from timm.models import resnet as timm_resnet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from resnext_kernels import FusedGroupedBottleneck
from resnext_kernels.fuse import FusionReport, fuse, unfuse

torch.backends.mkldnn.deterministic = True

SMALL = {"num_classes": 10}
GROUPED = {"groups": 8, "width_per_group": 4}
torchvision_resnet = partial(resnet.ResNet, resnet.Bottleneck, [1, 2, 1, 1], **SMALL)
timm_bottlenecks = partial(
    timm_resnet.ResNet,
    timm_resnet.Bottleneck,
    (1, 2, 1, 1),
    channels=(32, 64, 96, 128),
    cardinality=8,
    base_width=8,
    **SMALL,
)


def sequential() -> nn.Sequential:
    """Runs of both kinds, one of them dilated, beside layers that stay."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 7, 2, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(24, 48, 3, 1, 1, groups=4, bias=False),
        nn.BatchNorm2d(48, eps=1e-3),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, 2, 2, dilation=2, groups=6, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(inplace=True),
        nn.Conv2d(48, 16, 3, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision-resnext": partial(torchvision_resnet, **GROUPED),
    "torchvision-resnet": partial(torchvision_resnet, width_per_group=16),
    "torchvision-dilated": partial(
        torchvision_resnet, replace_stride_with_dilation=[False, False, True], **GROUPED
    ),
    "torchvision-frozen": partial(torchvision_resnet, norm_layer=FrozenBatchNorm2d, **GROUPED),
    "torchvision-regnet": lambda: RegNet(
        BlockParams.from_init_params(
            depth=5, w_0=24, w_a=24.0, w_m=2.5, group_width=8, se_ratio=0.25
        ),
        num_classes=10,
    ),
    "timm-resnext": timm_bottlenecks,
    "timm-se-deep-stem": partial(
        timm_bottlenecks,
        block_args={"attn_layer": "se"},
        stem_type="deep",
        stem_width=16,
        avg_down=True,
    ),
    "timm-anti-aliased-eca-drop-path": partial(
        timm_bottlenecks, aa_layer=BlurPool2d, block_args={"attn_layer": "eca"}, drop_path_rate=0.4
    ),
    "timm-regnet": lambda: timm_regnet.RegNet(
        timm_regnet.RegNetCfg(depth=6, w0=24, wa=40.0, wm=2.0, group_size=8), **SMALL
    ),
    "sequential": sequential,
}
each_model = pytest.mark.parametrize("name", MODELS)


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "running_mean")]


@torch.no_grad()
def trained(model: nn.Module, size: int = 64) -> nn.Module:
    """Affine parameters away from 1 and 0, some gamma negative, and the statistics of images."""
    model.to(memory_format=torch.channels_last)
    for bn in norms(model):
        bn.weight.uniform_(0.5, 1.5)
        bn.weight[::7].neg_()
        bn.bias.normal_(0, 0.25)
        bn.running_mean.normal_(0, 0.25)
        bn.running_var.uniform_(0.5, 1.5)
        bn.momentum = 1.0
    model.train()(images(4, size))
    for bn in norms(model):
        bn.momentum = 0.1
    return model


def step(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Output and gradients of one training step; drop paths are the same for every model."""
    x = x.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        y = model.train()(x)
    model.zero_grad()
    y.square().mean().backward()
    return {"y": [y.detach()], "gradients": [x.grad, *(p.grad for p in model.parameters())]}


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    training = model.training
    with torch.no_grad():
        y = model.eval()(x)
    model.train(training)
    return y


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers() if b.is_floating_point()]


def error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Root mean square over the tensors of |actual - truth| / |truth|."""
    errors = [
        ((a.double() - t).norm() / t.norm().clamp_min(1e-30)).item()
        for a, t in zip(actual, truth, strict=True)
    ]
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


def fused_and_not(name: str) -> tuple[nn.Module, nn.Module]:
    model = trained(MODELS[name]())
    return fuse(copy.deepcopy(model))[0], model


# The same results -----------------------------------------------------------------------------


@each_model
def test_training_in_float64(name: str) -> None:
    """Three steps of SGD: every output, gradient, parameter and buffer, to rounding."""
    fused, plain = (model.double() for model in fused_and_not(name))
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (fused, plain)]
    for _ in range(3):
        x = images().double()
        found, expected = step(fused, x), step(plain, x)
        for key, tensors in expected.items():
            assert error(found[key], tensors) < 1e-9, key
        for optimizer in optimizers:
            optimizer.step()
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for key, t in theirs.items():
        torch.testing.assert_close(ours[key], t, rtol=1e-8, atol=1e-10)
    x = images().double()
    torch.testing.assert_close(evaluate(fused, x), evaluate(plain, x), rtol=1e-8, atol=1e-8)


@each_model
def test_float32_is_as_exact_as_unfused(name: str) -> None:
    """Medians over five batches: the gradient of ReLU jumps where rounding decides on a sign."""
    fused, plain = fused_and_not(name)
    exact = copy.deepcopy(plain).double()
    ours: dict[str, list[float]] = {}
    torchs: dict[str, list[float]] = {}
    for _ in range(5):
        x = images()
        truth = step(exact, x.double()) | {"statistics": statistics(exact)}
        truth["eval"] = [evaluate(exact, x.double())]
        for errors, model in ((ours, fused), (torchs, plain)):
            found = step(model, x) | {"statistics": statistics(model)}
            found["eval"] = [evaluate(model, x)]
            for key, tensors in truth.items():
                errors.setdefault(key, []).append(error(found[key], tensors))
        for model in (fused, plain):  # go on from one state
            model.load_state_dict(exact.state_dict())
    floor = torch.finfo(torch.float32).eps
    for key, errors in ours.items():
        assert median(errors) <= 2 * median(torchs[key]) + floor, key


@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.resnext50_32x4d,
        torchvision.models.wide_resnet50_2,
        torchvision.models.regnet_y_400mf,
        partial(timm.create_model, "resnext50_32x4d"),
        partial(timm.create_model, "seresnext26d_32x4d"),
        partial(timm.create_model, "resnetaa50"),
    ],
    ids=["resnext50", "wide_resnet50_2", "regnet_y_400mf", "timm-resnext50", "se26d", "aa50"],
)
def test_published_models(make: Callable[[], nn.Module]) -> None:
    """Outputs in training and evaluation, and running statistics, in float32."""
    plain = trained(make())
    fused, report = fuse(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()
    assert len(report.fused) > 10
    x = images()
    results = []
    for model in (fused, plain, exact):
        with torch.no_grad():
            y = model.train()(x.to(next(model.parameters()).dtype))
        y_eval = evaluate(model, x.to(y.dtype))
        results.append([[y], statistics(model), [y_eval]])
    floor = torch.finfo(torch.float32).eps
    for ours, torchs, truth in zip(*results, strict=True):
        assert error(ours, truth) <= 2 * error(torchs, truth) + floor


def test_frozen_statistics_inside_a_training_model() -> None:
    """Each BatchNorm goes by its own training flag, as fine-tuning recipes need."""
    fused, plain = (model.double() for model in fused_and_not("torchvision-resnext"))
    x = images().double()
    results = []
    for model in (fused, plain):
        model.train()
        for bn in norms(model)[::2]:
            bn.eval()
        y = model(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *statistics(model)])
    assert error(*results) < 1e-9


@pytest.mark.parametrize("name", ["torchvision-resnext", "timm-se-deep-stem", "timm-regnet"])
def test_memory_formats(name: str) -> None:
    fused, plain = fused_and_not(name)
    x = images()
    expected = evaluate(plain, x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        fused.to(memory_format=memory_format)
        for given in (x, x.contiguous()):
            torch.testing.assert_close(evaluate(fused, given), expected, rtol=1e-4, atol=1e-4)


# What stays the same ---------------------------------------------------------------------------


@each_model
def test_unfuse_gives_the_model_back(name: str) -> None:
    model = trained(MODELS[name]())
    x = images()
    before = evaluate(model, x)
    types = [type(m) for m in model.modules()]
    modules, parameters = list(model.modules()), list(model.parameters())
    checkpoint = {key: t.clone() for key, t in model.state_dict().items()}

    fused, report = fuse(model)
    assert fused is model
    assert report.fused
    assert [type(m) for m in model.modules()] != types
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == checkpoint.keys()
    model.load_state_dict(checkpoint, strict=True)
    MODELS[name]().load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(evaluate(model, x), before, rtol=1e-4, atol=1e-4)
    assert fuse(model)[1] == report

    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == types
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(evaluate(model, x), before)


def test_an_optimizer_goes_on() -> None:
    """Steps before, during and after fusion give what the model gives that was never fused."""
    model = trained(MODELS["timm-resnext"]()).double()
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, plain)]
    for change in (lambda m: m, lambda m: fuse(m)[0], unfuse):
        change(model)
        x = images().double()
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            step(m, x)
            optimizer.step()
    assert error(list(model.parameters()), list(plain.parameters())) < 1e-8


@each_model
def test_copies(name: str) -> None:
    fused, _ = fused_and_not(name)
    x = images()
    expected = evaluate(fused, x)
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    for model in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(evaluate(model, x), expected)
        assert [type(m) for m in model.modules()] == [type(m) for m in fused.modules()]
        assert not {id(m) for m in model.modules()} & {id(m) for m in fused.modules()}
        plain = evaluate(unfuse(model), x)
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


def test_neither_torchvision_nor_timm_is_imported() -> None:
    code = "import sys, resnext_kernels.fuse; print({'torchvision', 'timm'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_classes_and_their_methods_hold() -> None:
    model, _ = fuse(timm_bottlenecks())
    assert isinstance(model, timm_resnet.ResNet)
    block = model.layer1[0]
    assert isinstance(block, timm_resnet.Bottleneck)
    assert isinstance(block, FusedGroupedBottleneck)
    model.reset_classifier(3)
    assert evaluate(model, images()).shape == (2, 3)
    block.zero_init_last()
    assert not block.bn3.weight.any()


def test_sync_batch_norm_can_be_converted_later() -> None:
    fused, _ = fused_and_not("torchvision-resnext")
    x = images()
    before = evaluate(fused, x)
    nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert torch.equal(evaluate(fused, x), before)
    assert len(fuse(fused)[1].fused) == 6


# Activations -----------------------------------------------------------------------------------


def saved_megabytes(model: nn.Module, x: Tensor) -> float:
    """Memory that a forward pass keeps for the backward pass, for an image; not what it owns."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / x.shape[0] / 1e6


def test_activations_saved_for_backward() -> None:
    x = images(1, 224)
    model = torchvision.models.resnext50_32x4d().to(memory_format=torch.channels_last)
    assert saved_megabytes(model, x) > 110
    assert saved_megabytes(fuse(model)[0], x) <= 85


# Compilers -------------------------------------------------------------------------------------


def test_compile_a_network() -> None:
    fused, _ = fused_and_not("torchvision-resnext")
    x = images()
    results = []
    for model in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        found = step(model, x)
        results.append(found["y"] + found["gradients"])
    assert error(*results) < 1e-5


@pytest.mark.parametrize(
    ("name", "stage", "layer"),
    [("timm-anti-aliased-eca-drop-path", "layer2", "0.bn3"), ("timm-regnet", "s2", "b1.conv2.bn")],
)
def test_compile_sees_changes(name: str, stage: str, layer: str) -> None:
    """A fusion, and a hook on a layer, after the first run."""
    fused, plain = (model.get_submodule(stage) for model in fused_and_not(name))
    x = torch.randn(2, 128 if stage == "layer2" else 24, 8, 8)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    expected = evaluate(compiled, x)
    fuse(plain)
    assert torch.equal(evaluate(compiled, x), evaluate(fused, x))
    plain.get_submodule(layer).register_forward_hook(halve)
    assert not torch.allclose(evaluate(compiled, x), expected, rtol=1e-2)


def test_fx_traces_the_original_layers() -> None:
    fused, _ = fused_and_not("torchvision-resnext")
    nodes = ["relu", "layer1.0.relu_2", "layer4"]
    features = create_feature_extractor(fused.eval(), nodes)(images())
    assert list(features) == nodes
    assert features["relu"].shape == (2, 64, 32, 32)


def test_timm_features_of_the_stem() -> None:
    """forward_intermediates wants the stem before its pooling."""
    fused, plain = fused_and_not("timm-resnext")
    x = images()
    with torch.no_grad():
        found = fused.eval().forward_intermediates(x, intermediates_only=True)
        expected = plain.eval().forward_intermediates(x, intermediates_only=True)
    assert [t.shape for t in found] == [t.shape for t in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_timm_checkpointing() -> None:
    fused, plain = (model.double() for model in fused_and_not("timm-resnext"))
    fused.set_grad_checkpointing()
    x = images().double()
    found, expected = step(fused, x), step(plain, x)
    assert error(found["gradients"], expected["gradients"]) < 1e-9


# The report ------------------------------------------------------------------------------------


def test_report() -> None:
    report = fuse(timm_bottlenecks(aa_layer=BlurPool2d, block_args={"attn_layer": "se"}))[1]
    assert report.fused == {
        "layer1.0": "bottleneck but for se",
        "layer2.0": "bottleneck but for aa, se",
        "layer2.1": "bottleneck but for se",
        "layer3.0": "bottleneck but for aa, se",
        "layer4.0": "bottleneck but for aa, se",
    }
    assert report.left == {"": "maxpool: Sequential is not MaxPool2d"}
    assert str(report).splitlines() == [
        "5 fused, 1 left",
        "  fused  layer1.0  bottleneck but for se",
        "  fused  layer2.0  bottleneck but for aa, se",
        "  fused  layer2.1  bottleneck but for se",
        "  fused  layer3.0  bottleneck but for aa, se",
        "  fused  layer4.0  bottleneck but for aa, se",
        "  left   .         maxpool: Sequential is not MaxPool2d",
    ]


def test_report_of_runs() -> None:
    assert fuse(sequential())[1] == FusionReport(
        fused={"1": "bn-relu-maxpool", "4": "conv-bn-relu", "7": "conv-bn-relu"},
        left={"10": "convolution: it has a bias"},
    )
    assert fuse(ConvNormAct(8, 8, 3))[1].fused == {"": "conv-bn-relu"}
    assert fuse(nn.Linear(1, 1))[1] == FusionReport()
    assert str(fuse(nn.Linear(1, 1))[1]) == "0 fused, 0 left"


def edit(**layers: nn.Module) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for name, layer in layers.items():
            setattr(block, name, layer)

    return change


def conv(**kwargs) -> nn.Conv2d:
    given = {"kernel_size": 3, "padding": 1, "groups": 8, "bias": False} | kwargs
    return nn.Conv2d(32, 32, **given)


class DoubledConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledBatchNorm2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hook(module: nn.Module, *_: object) -> None:
    module.calls = getattr(module, "calls", 0) + 1


def replace_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: 2 * original(x)


def halve(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output / 2


# name of the edit: (the edit, the reason)
EDITS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "activation": (edit(relu=nn.SiLU()), "relu: SiLU is not ReLU"),
    "bias": (edit(conv2=conv(bias=True)), "conv2: it has a bias"),
    "kernel": (
        edit(conv2=conv(kernel_size=5, padding=2)),
        "conv2: its kernel is (5, 5), not (3, 3)",
    ),
    "padding mode": (
        edit(conv2=conv(padding_mode="reflect")),
        "conv2: its padding mode is 'reflect', not 'zeros'",
    ),
    "convolution class": (
        edit(conv2=DoubledConv2d(32, 32, 3, padding=1, groups=8, bias=False)),
        "conv2: DoubledConv2d is not Conv2d",
    ),
    "norm class": (
        edit(bn2=DoubledBatchNorm2d(32)),
        "bn2: DoubledBatchNorm2d is not BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d",
    ),
    "group norm": (
        edit(bn1=nn.GroupNorm(4, 32)),
        "bn1: GroupNorm is not BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d",
    ),
    "hook": (
        lambda block: block.conv2.register_forward_hook(halve),
        "conv2: it has hooks, which would not be called",
    ),
    "pre-hook": (
        lambda block: block.bn3.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        "bn3: it has hooks, which would not be called",
    ),
    "hook on the activation": (
        lambda block: block.relu.register_forward_hook(halve),
        "relu: it has hooks, which would not be called",
    ),
    "hook on the shortcut": (
        lambda block: block.downsample.register_forward_hook(halve),
        "downsample: it has hooks, which would not be called",
    ),
    "spectral norm": (
        lambda block: parametrizations.spectral_norm(block.conv2),
        "conv2: its weight is parametrized",
    ),
    "old spectral norm": (
        lambda block: nn.utils.spectral_norm(block.conv2),
        "conv2: its weight is computed by a hook (pruning, weight norm, spectral norm)",
    ),
    "pruning": (
        lambda block: prune.l1_unstructured(block.conv3, "weight", 0.5),
        "conv3: its weight is computed by a hook (pruning, weight norm, spectral norm)",
    ),
    "forward of a layer": (
        lambda block: replace_forward(block.bn2),
        "bn2: its forward was replaced",
    ),
}


@pytest.mark.parametrize("first", ["edit", "fuse"])
@pytest.mark.parametrize("name", EDITS)
def test_what_is_not_recognised_stays(name: str, first: str) -> None:
    """Edited before `fuse` or after it: the block runs as it was."""
    change, reason = EDITS[name]
    shortcut = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
    block = resnet.Bottleneck(64, 64, 1, shortcut, groups=8, base_width=4)
    plain = trained(nn.Sequential(nn.Conv2d(3, 64, 1), block), 16)
    fused = copy.deepcopy(plain)
    if first == "fuse":
        fuse(fused)
    for model in (fused, plain):
        torch.manual_seed(2)
        change(model[1])
    _, report = fuse(fused)
    assert report.left == {"1": reason}
    x = images(2, 16)
    assert torch.equal(evaluate(fused, x), evaluate(plain, x))


def test_a_shortcut_of_another_kind_is_called() -> None:
    norm = DoubledBatchNorm2d(256)
    shortcut = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), norm)
    block = resnet.Bottleneck(64, 64, 1, shortcut, groups=8, base_width=4)
    plain = trained(nn.Sequential(nn.Conv2d(3, 64, 1), block), 16)
    fused, report = fuse(copy.deepcopy(plain))
    assert report.fused == {"1": "bottleneck"}
    x = images(2, 16)
    torch.testing.assert_close(evaluate(fused, x), evaluate(plain, x), rtol=1e-4, atol=1e-4)


def test_a_hook_put_on_later_is_called_until_it_is_removed() -> None:
    fused, _ = fused_and_not("torchvision-resnext")
    x = images()
    before = evaluate(fused, x)
    layer = fused.layer2[1].bn2
    handle = layer.register_forward_hook(hook)
    torch.testing.assert_close(evaluate(fused, x), before, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert torch.equal(evaluate(fused, x), before)
    assert layer.calls == 1


def test_other_reasons() -> None:
    def reasons(model: nn.Module) -> dict[str, str]:
        return fuse(model)[1].left

    class Bottleneck(resnet.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    not_known = {"conv2": "Bottleneck is not a block that is known"}
    assert reasons(Bottleneck(64, 16)) == not_known
    assert reasons(nn.Conv2d(4, 4, 3)) == {"": "alone"}

    block = resnet.Bottleneck(64, 16)
    replace_forward(block)
    assert reasons(block) == {"": "its forward was replaced"}

    drop = timm_bottlenecks(drop_block_rate=0.1)
    left = reasons(drop)
    assert left.keys() == {"layer3.0", "layer4.0"}
    assert left["layer4.0"] == "drop_block: DropBlock2d is between BatchNorm and ReLU"

    swish = Conv2dNormActivation(8, 8, groups=2, activation_layer=nn.SiLU)
    assert reasons(swish) == {"0": "activation: SiLU is not ReLU"}
    assert reasons(ConvNormAct(8, 8, 3, act_layer="silu")) == {"": "bn.act: SiLU is not ReLU"}
    assert reasons(ConvNormAct(8, 8, 1, act_layer="silu")) == {}


def test_the_forward_of_another_version_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + x)

    monkeypatch.setattr(resnet.Bottleneck, "forward", forward)
    block = resnet.Bottleneck(64, 16, groups=4)
    _, report = fuse(block)
    assert type(block) is resnet.Bottleneck
    assert report.left == {"": "Bottleneck.forward is not the one of the versions that are known"}


def test_shared_layers() -> None:
    """One block and one run in several places."""
    block = resnet.Bottleneck(64, 16, groups=4, base_width=16)
    block.bn2 = block.bn1
    run = [nn.Conv2d(64, 64, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    plain = nn.Sequential(nn.Conv2d(3, 64, 1), block, nn.Sequential(*run), block, *run)
    assert fuse(copy.deepcopy(plain))[1].left == {"1": "bn2: it is bn1 too"}
    block.bn2 = nn.BatchNorm2d(16)
    plain = trained(plain, 16).double()
    fused, report = fuse(copy.deepcopy(plain))
    assert report.fused == {"1": "bottleneck", "2.0": "conv-bn-relu", "4": "conv-bn-relu"}
    x = images(2, 16).double()
    found, expected = step(fused, x), step(plain, x)
    gradients_off = error(found["gradients"], expected["gradients"])
    statistics_off = error(statistics(fused), statistics(plain))
    assert max(gradients_off, statistics_off) < 1e-9


def test_a_sequential_can_be_edited() -> None:
    plain = trained(sequential())
    fused, _ = fuse(copy.deepcopy(plain))
    x = images()
    for model in (fused, plain):
        model[5] = nn.Identity()
        model.insert(0, nn.BatchNorm2d(3))
    expected = evaluate(plain, x)
    torch.testing.assert_close(evaluate(fused, x), expected, rtol=1e-4, atol=1e-4)
    expected = evaluate(plain[:6], x)
    torch.testing.assert_close(evaluate(fused[:6], x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_model_must_be_a_module(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        function(3)
