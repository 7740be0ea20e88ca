"""The modules against torchvision's and timm's, in results, state and all that is done to them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import assert_as_exact_as_torch, floor, largest, rms
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from resnext_kernels import FusedGroupedBottleneck, GroupedConvBNReLU

BLOCKS = {
    "identity": {"inplanes": 64, "planes": 16, "groups": 8, "base_width": 32},
    "stride2": {"inplanes": 64, "planes": 32, "stride": 2, "groups": 8, "base_width": 16},
    "dilated": {"inplanes": 64, "planes": 16, "groups": 4, "base_width": 56, "dilation": 2},
    "plain": {"inplanes": 64, "planes": 16},
    "widened": {"inplanes": 32, "planes": 16, "groups": 16, "base_width": 64},
}
each_block = pytest.mark.parametrize("name", BLOCKS)


def make(cls: type[nn.Module], name: str, norm_layer=nn.BatchNorm2d) -> nn.Module:
    """A block with the downsample path that ResNet would give it."""
    kwargs = BLOCKS[name]
    outplanes, stride = 4 * kwargs["planes"], kwargs.get("stride", 1)
    downsample = None
    if stride != 1 or kwargs["inplanes"] != outplanes:
        conv = nn.Conv2d(kwargs["inplanes"], outplanes, 1, stride, bias=False)
        downsample = nn.Sequential(conv, norm_layer(outplanes))
    return cls(downsample=downsample, norm_layer=norm_layer, **kwargs)


def randomize(block: nn.Module) -> nn.Module:
    """Trained-looking statistics and affine parameters, some gamma negative."""
    for module in block.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
            for name, t in (("weight", module.weight), ("bias", module.bias)):
                if t is not None:
                    t.data.copy_(torch.randn_like(t) / 2 + (name == "weight"))
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn_like(module.running_mean) / 4)
                module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
    return block


def trio(name: str, norm_layer=nn.BatchNorm2d) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(ours, torchvision's, torchvision's in float64) with one state."""
    theirs = randomize(make(Bottleneck, name, norm_layer))
    ours = make(FusedGroupedBottleneck, name, norm_layer)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, copy.deepcopy(theirs).double()


def images(channels: int, n: int = 2, size: int = 6) -> Tensor:
    return torch.randn(n, channels, size, size).contiguous(memory_format=torch.channels_last)


def observe(block: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """y, every gradient and every buffer after one call."""
    x = x.detach().clone().requires_grad_()
    for p in block.parameters():
        p.grad = None
    y = block(x)
    if dy is None:
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    y.backward(dy.to(y))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"grad {n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b.clone() for n, b in block.named_buffers()}


def hold(ours: nn.Module, theirs: nn.Module, exact: nn.Module, x: Tensor) -> None:
    """One call of each: ours is as near to the float64 block as torchvision's is."""
    before = copy.deepcopy(exact)
    actual, peer, truth = observe(ours, x), observe(theirs, x), observe(exact, x.double())
    assert actual.keys() == peer.keys() == truth.keys()
    moved = moved_by_rounding(before, x, truth)
    for key, value in actual.items():
        if not value.is_floating_point():
            assert torch.equal(value, peer[key]), key
            continue
        # terms that cancel: the gradients of a parameter before a BatchNorm sum to nearly nothing
        scale = max(largest(truth[key]), rms(truth[key]) * truth[key].numel() ** 0.5)
        bound = floor(value.dtype, scale) + moved[key]
        assert_as_exact_as_torch(key, value, truth[key], peer[key], bound)


def moved_by_rounding(block: nn.Module, x: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """How far the float64 block's results move when its inputs do by roundings of x's dtype.

    The most of two draws; a weight by the sqrt(n) roundings that a sum of n products is equivalent
    to. Torch's own error on one input can be smaller by luck, the more so of a few channels.
    """
    eps = torch.finfo(x.dtype).eps

    def move(t: Tensor, roundings: float) -> Tensor:
        return t * (1 + roundings * eps * (2 * torch.rand_like(t) - 1))

    moved = dict.fromkeys(truth, 0.0)
    for _ in range(2):
        other = copy.deepcopy(block)
        for p in other.parameters():
            p.data = move(p.data, p[0].numel() ** 0.5)
        for key, value in observe(other, move(x.double(), 1)).items():
            moved[key] = max(moved[key], largest(value - truth[key]))
    return moved


MODES = {
    "train": lambda block: block.train(),
    "eval": lambda block: block.eval(),
    "bn1 frozen": lambda block: block.train().bn1.eval(),
    "bn2 frozen": lambda block: block.train().bn2.eval(),
    "bn3 frozen": lambda block: block.train().bn3.eval(),
    "bn2 not learned": lambda block: block.train().bn2.requires_grad_(False),
    "conv2 not learned": lambda block: block.train().conv2.requires_grad_(False),
    "convs not learned": lambda block: [
        block.train().get_submodule(f"conv{i}").requires_grad_(False) for i in (1, 2, 3)
    ],
}


@each_block
@pytest.mark.parametrize("mode", MODES)
def test_block_is_torchvisions(name: str, mode: str) -> None:
    blocks = trio(name)
    for block in blocks:
        MODES[mode](block)
    hold(*blocks, images(BLOCKS[name]["inplanes"]))


@each_block
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_batch_norm(name: str, mode: str) -> None:
    blocks = trio(name, FrozenBatchNorm2d)
    for block in blocks:
        MODES[mode](block)
    hold(*blocks, images(BLOCKS[name]["inplanes"]))


@pytest.mark.parametrize("option", ["momentum", "eps", "affine", "track_running_stats"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_options(option: str, mode: str) -> None:
    value = {"momentum": None, "eps": 1e-2, "affine": False, "track_running_stats": False}[option]
    blocks = trio("stride2", partial(nn.BatchNorm2d, **{option: value}))
    for block in blocks:
        MODES[mode](block)
    for _ in range(3):  # momentum=None is a mean over the calls
        hold(*blocks, images(64))


@pytest.mark.parametrize("momenta", [(0.1, 0.1, 0.1), (0.1, 0.2, None), (None,) * 3], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "bn2 is bn1"])
def test_running_statistics(momenta: tuple[float | None, ...], shared: bool) -> None:
    """Each BatchNorm's by its own momentum; one of two layers takes one after the other."""
    blocks = trio("stride2")
    for block in blocks:
        if shared:
            block.bn2 = block.bn1
        for bn, momentum in zip((block.bn1, block.bn2, block.bn3), momenta, strict=True):
            bn.momentum = momentum
        block.train()
    for _ in range(3):
        hold(*blocks, images(64))


def test_several_training_steps() -> None:
    """SGD over three batches: outputs and state stay within twice torchvision's own drift."""
    blocks = trio("stride2")
    batches = [images(64) for _ in range(3)]
    targets = [images(128, size=3) for _ in range(3)]
    states = []
    for block, dtype in zip(blocks, (torch.float32, torch.float32, torch.float64), strict=True):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9)
        for x, target in zip(batches, targets, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(block(x.to(dtype)), target.to(dtype)).backward()
            optimizer.step()
        states.append(block.state_dict())
    ours, theirs, exact = states
    for key, value in ours.items():
        if value.is_floating_point():
            bound = floor(torch.float32, 3 * max(1.0, largest(exact[key])))
            assert_as_exact_as_torch(key, value, exact[key], theirs[key], bound)
        else:
            assert value == theirs[key] == 3


@each_block
def test_state_dict_both_ways(name: str) -> None:
    ours, theirs, _ = trio(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours = randomize(make(FusedGroupedBottleneck, name))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(BLOCKS[name]["inplanes"])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_block_is_timms(mode: str) -> None:
    theirs = randomize(timm.models.resnet.Bottleneck(64, 16, cardinality=8, base_width=32))
    ours = FusedGroupedBottleneck(64, 16, groups=8, base_width=32)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    blocks = ours, theirs, copy.deepcopy(theirs).double()
    for block in blocks:
        MODES[mode](block)
    hold(*blocks, images(64))


def test_signature_and_attributes() -> None:
    assert FusedGroupedBottleneck.expansion == Bottleneck.expansion == 4
    block = FusedGroupedBottleneck(64, 16, 1, None, 8, 32, 1, nn.BatchNorm2d)
    assert {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu"} <= dict(
        block.named_children()
    ).keys()
    assert block.downsample is None
    assert block.stride == 1


def test_torchvision_builds_its_resnet_from_the_block() -> None:
    from torchvision.models import ResNet, resnext50_32x4d

    theirs = resnext50_32x4d()
    ours = ResNet(
        FusedGroupedBottleneck,
        [3, 4, 6, 3],
        groups=32,
        width_per_group=4,
        zero_init_residual=True,
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


# The triple ----------------------------------------------------------------------------------


def triple(**kwargs) -> tuple[GroupedConvBNReLU, nn.Sequential]:
    """Ours and the same three modules of torch, sharing one state."""
    ours = randomize(GroupedConvBNReLU(32, 48, 8, **kwargs))
    stride, dilation = kwargs.get("stride", 1), kwargs.get("dilation", 1)
    conv = nn.Conv2d(32, 48, 3, stride, dilation, dilation, groups=8, bias=False)
    theirs = nn.Sequential(conv, nn.BatchNorm2d(48), nn.ReLU())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    return ours, theirs


@pytest.mark.parametrize("kwargs", [{}, {"stride": 2}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_triple_is_conv_bn_relu(kwargs: dict[str, int], mode: str) -> None:
    ours, theirs = triple(**kwargs)
    x = images(32)
    ours.train(mode == "train")
    theirs.train(mode == "train")
    exact = copy.deepcopy(theirs).double()
    actual = list(observe(ours, x).values())
    peer, truth = list(observe(theirs, x).values()), list(observe(exact, x.double()).values())
    for i, (a, p, t) in enumerate(zip(actual, peer, truth, strict=True)):
        if a.is_floating_point():
            scale = max(largest(t), rms(t) * t.numel() ** 0.5)
            assert_as_exact_as_torch(str(i), a, t, p, floor(torch.float32, scale))
        else:
            assert a == p == (mode == "train")


# Everything done to modules --------------------------------------------------------------------


def block_and_input() -> tuple[nn.Module, Tensor]:
    return randomize(make(FusedGroupedBottleneck, "stride2")).eval(), images(64)


def pickled(block: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(block))


def saved_and_loaded(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded, copy.copy])
def test_copies_compute_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    block, x = block_and_input()
    expected = block(x)
    other = copied(block)
    assert torch.equal(other(x), expected)
    if copied is not copy.copy:
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(2)
        assert torch.equal(block(x), expected)
        assert not torch.equal(other(x), expected)


CHANGES = {
    "data.copy_": lambda p, new: p.data.copy_(new),
    "data = ": lambda p, new: setattr(p, "data", new.clone()),
    "no_grad copy_": lambda p, new: p.detach().copy_(new),
    "one element": lambda p, new: p.data.view(-1)[:1].copy_(new.view(-1)[:1]),
    "numpy": lambda p, new: p.detach().numpy().__setitem__(..., new.numpy()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_changed_weight_is_seen(change: str, mode: str) -> None:
    """No packed weight outlives the weight it was packed from."""
    block, x = block_and_input()
    block.train(mode == "train")
    theirs = make(Bottleneck, "stride2").train(mode == "train")
    before = block(x)
    for p in block.parameters():
        CHANGES[change](p, torch.randn_like(p))
    theirs.load_state_dict(block.state_dict())
    after = block(x)
    assert not torch.equal(after, before)
    expected = theirs(x)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5 * largest(expected))


def test_a_changed_running_statistic_is_seen() -> None:
    block, x = block_and_input()
    before = block(x)
    block.bn2.running_var.data.mul_(4)
    theirs = make(Bottleneck, "stride2").eval()
    theirs.load_state_dict(block.state_dict())
    after = block(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, theirs(x), rtol=1e-4, atol=1e-5)


def test_functional_call() -> None:
    block, x = block_and_input()
    other, _ = block_and_input()
    expected = other(x)
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(block, state, x), expected)
    y = torch.func.functional_call(block, {n: p * 1 for n, p in block.named_parameters()}, x)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_exponential_moving_averages() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    block, x = block_and_input()
    theirs = make(Bottleneck, "stride2").eval()
    theirs.load_state_dict(block.state_dict())
    results = []
    for model in (block, theirs):
        averages = [
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
            timm.utils.ModelEmaV2(model, decay=0.9),
            timm.utils.ModelEmaV3(model, decay=0.9),
        ]
        for factor in (0.5, 1.5):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(factor)
            averages[0].update_parameters(model)
            averages[1].update(model)
            averages[2].update(model)
        results.append([average.module.eval()(x) for average in averages])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_half_precision_modules(dtype: torch.dtype, mode: str) -> None:
    """block.to(dtype): parameters and buffers of that dtype, as torchvision's block takes them."""
    ours, theirs, _ = trio("stride2")
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    exact = copy.deepcopy(theirs).double()
    for block in (ours, theirs, exact):
        MODES[mode](block)
    x = images(64).to(dtype)
    with torch.no_grad():
        actual, peer, truth = ours(x), theirs(x), exact(x.double())
    # four layers, each rounded to the dtype
    assert_as_exact_as_torch("y", actual, truth, peer, 4 * floor(dtype, largest(truth)))
    for (key, a), p, t in zip(
        ours.state_dict().items(),
        theirs.state_dict().values(),
        exact.state_dict().values(),
        strict=True,
    ):
        if a.is_floating_point():
            assert_as_exact_as_torch(key, a, t, p, 4 * floor(dtype, largest(t)))
        else:
            assert a == p
    ours.zero_grad()
    ours(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in ours.parameters())


def test_which_hooks_are_called() -> None:
    """Those that README and the docstring name, once each."""
    block, x = block_and_input()
    called: list[str] = []
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    block(x)
    assert sorted(called) == ["", "conv1", "downsample.0"]


@pytest.mark.parametrize("name", ["conv1", "downsample.0"])
def test_hooks_that_compute_a_weight_are_called(name: str) -> None:
    """Pruning and the older weight norm set `weight` in a hook before the layer is called."""
    x = images(64)
    ours, theirs = (make(cls, "stride2").eval() for cls in (FusedGroupedBottleneck, Bottleneck))
    theirs.load_state_dict(ours.state_dict())
    for block in (ours, theirs):
        prune.l1_unstructured(block.get_submodule(name), "weight", 0.5)
        with torch.no_grad():
            block.get_parameter(f"{name}.weight_orig").mul_(3)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_to_channels_last_and_back() -> None:
    block, x = block_and_input()
    expected = block(x)
    block.to(memory_format=torch.channels_last)
    y = block(x)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    theirs = make(Bottleneck, "stride2").eval()
    nchw = images(64).contiguous()
    assert make(FusedGroupedBottleneck, "stride2").eval()(nchw).stride() == theirs(nchw).stride()


def test_meta_device() -> None:
    with torch.device("meta"):
        block = make(FusedGroupedBottleneck, "stride2")
        assert block(torch.empty(2, 64, 6, 6)).shape == (2, 128, 3, 3)


def test_single_value_per_channel_is_torchs_error() -> None:
    block = make(FusedGroupedBottleneck, "identity").train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 64, 1, 1))


# SyncBatchNorm ---------------------------------------------------------------------------------

SYNC_SIZES = [1, 3]  # images of each process


def sync_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SYNC_SIZES)
    )
    given = torch.load(f"{folder}/given.pt")
    block = make(FusedGroupedBottleneck, "stride2")
    block.load_state_dict(given["state"])
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block).train()
    mine = slice(sum(SYNC_SIZES[:rank]), sum(SYNC_SIZES[: rank + 1]))
    x, dy = given["x"][mine], given["dy"][mine]
    found = observe(block, x, dy)
    for key, value in found.items():
        if key.startswith("grad "):
            dist.all_reduce(value)
    found["eval"] = block.eval()(x).detach()
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.destroy_process_group()


def test_sync_batch_norm_over_two_processes(tmp_path: Path) -> None:
    """Statistics over both processes' batches, of 1 and of 3 images: as one process with all 4."""
    theirs = randomize(make(Bottleneck, "stride2")).train()
    x, dy = images(64, n=sum(SYNC_SIZES)), images(128, n=sum(SYNC_SIZES), size=3)
    torch.save({"state": theirs.state_dict(), "x": x, "dy": dy}, tmp_path / "given.pt")
    exact = copy.deepcopy(theirs).double()
    peer, truth = observe(theirs, x, dy), observe(exact, x.double(), dy)
    peer["eval"], truth["eval"] = theirs.eval()(x).detach(), exact.eval()(x.double()).detach()
    mp.spawn(sync_worker, args=(str(tmp_path),), nprocs=len(SYNC_SIZES))
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(len(SYNC_SIZES))]
    for key, exact_value in truth.items():
        if key in ("y", "dx", "eval"):
            values = [torch.cat([f[key] for f in found])]
        else:
            values = [f[key] for f in found]  # each process has the statistics of all
        for value in values:
            if value.is_floating_point():
                scale = max(largest(exact_value), rms(exact_value) * exact_value.numel() ** 0.5)
                assert_as_exact_as_torch(
                    key, value, exact_value, peer[key], floor(value.dtype, scale)
                )
            else:
                assert torch.equal(value, peer[key]), key
