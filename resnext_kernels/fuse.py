"""Swap the blocks of an existing model for fused ones, and back.

`fuse` recognises blocks of torchvision and timm and runs of layers in nn.Sequential. It gives each
of them a class derived from its own, whose forward calls the fused operations on the layers that it
already holds. Modules, parameters, buffers and names all stay, so an optimizer built before goes on
working, checkpoints load both ways, and `unfuse` has only to put the class back.

    torchvision  Bottleneck of ResNet and ResNeXt; the stem of ResNet; Conv2dNormActivation (RegNet)
    timm         Bottleneck of the ResNet family; the stem of ResNet; ConvNormAct (RegNet)
    torch        Sequential(..., Conv2d 3x3, BatchNorm2d, ReLU, ...)
                 Sequential(..., BatchNorm2d, ReLU, MaxPool2d, ...)

A fused forward looks at its layers first: one that was changed since (a hook, a pruned weight,
another activation) makes its module run the original forward until the change is undone. torch.fx
traces the original forward too.

Neither torchvision nor timm is imported here: their classes are known by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .modules import (
    FusedGroupedBottleneck,
    GroupedConvBNReLU,
    batch_norm_relu,
    batch_norm_relu_max_pool,
    conv1x1,
    conv_bn_relu,
    why_not_bypass,
    why_not_conv,
    why_not_norm,
)

__all__ = ["FusionReport", "fuse", "unfuse"]

M = TypeVar("M", bound=nn.Module)


@dataclass
class FusionReport:
    """What became of a model's modules, by their paths ("" is the model itself).

    Attributes:
        fused: For each module or run of layers that is fused, what is fused in it. A run goes by
            the path of its first layer.
        left: For each 3x3 convolution, block or stem that stays as it was, the reason.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("fused", *row) for row in self.fused.items()]
        rows += [("left", *row) for row in self.left.items()]
        width = max((len(path) for _, path, _ in rows), default=0)
        return "\n".join(
            [
                f"{len(self.fused)} fused, {len(self.left)} left",
                *(f"  {fate:5}  {path or '.':{width}}  {text}" for fate, path, text in rows),
            ]
        )


# Why a layer cannot be bypassed ---------------------------------------------------------------


def _name(module: nn.Module | None) -> str:
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _type(module: nn.Module | None) -> str:
    return "nothing" if module is None else type(module).__name__


def _why_not_conv(conv: nn.Module | None) -> str | None:
    """For a 3x3 convolution, and for a 1x1 one as far as its weight goes."""
    if type(conv) is not nn.Conv2d:
        if isinstance(conv, nn.Conv2d) and "parametrizations" in conv._modules:
            return "its weight is parametrized"
        return f"{_type(conv)} is not Conv2d"
    if "weight" not in conv._parameters:
        return "its weight is computed by a hook (pruning, weight norm, spectral norm)"
    return why_not_bypass(conv)


def _why_not_conv3x3(conv: nn.Module | None) -> str | None:
    return _why_not_conv(conv) or why_not_conv(conv)  # type: ignore[arg-type]


def _why_not_bn(bn: nn.Module | None) -> str | None:
    if (
        type(bn) is nn.BatchNorm2d
        or type(bn) is nn.SyncBatchNorm
        or _name(bn) == "torchvision.ops.misc.FrozenBatchNorm2d"
    ):
        return why_not_bypass(bn)  # type: ignore[arg-type]
    return f"{_type(bn)} is not BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d"


def _why_not_relu(act: nn.Module | None) -> str | None:
    if type(act) is not nn.ReLU:
        return f"{_type(act)} is not ReLU"
    return why_not_bypass(act)


def _why_not_max_pool(pool: nn.Module | None) -> str | None:
    if type(pool) is not nn.MaxPool2d:
        return f"{_type(pool)} is not MaxPool2d"
    if pool.return_indices:
        return "it returns indices"
    return why_not_bypass(pool)


def _why_not_shortcut(downsample: nn.Module | None) -> str | None:
    """FusedGroupedBottleneck bypasses a BatchNorm at the end of this branch."""
    if type(downsample) is nn.Sequential and len(downsample._modules) == 2:
        _, bn = downsample._modules.values()
        if why_not_norm(bn) is None:
            return why_not_bypass(downsample) or _why_not_bn(bn)
    return None


def _is_absent(module: nn.Module | None) -> bool:
    return module is None or (type(module) is nn.Identity and why_not_bypass(module) is None)


def _why_not_absent(module: nn.Module | None) -> str | None:
    return None if _is_absent(module) else f"{_type(module)} is between BatchNorm and ReLU"


def _first(*reasons: tuple[str, str | None]) -> str | None:
    """The first reason there is, with the name of its layer."""
    for name, reason in reasons:
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _is_conv3x3(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv2d) and tuple(module.kernel_size) == (3, 3)


# Fused classes --------------------------------------------------------------------------------


class _Fused:
    """What a class made by `_fused_class` puts before `unfused_type`, the class of the module."""

    unfused_type: ClassVar[type[Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is found by what it was made from, not by a name
        found: Any = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[1], self.unfused_type), *found[2:]


@functools.cache
def _fused_class(mixin: Any, base: Any) -> Any:
    return type(f"Fused{base.__name__}", (mixin, base), {"unfused_type": base})


def _new(mixin: Any, base: Any) -> Any:
    cls = _fused_class(mixin, base)
    return cls.__new__(cls)


class _FusedBlock(_Fused):
    """A block that is known by the name of its class.

    Attributes:
        method: What is replaced.
        uses: The names in that method's code in the versions of the library that are known.
    """

    method: ClassVar[str] = "forward"
    uses: ClassVar[str]

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why the layers of this module cannot be fused; None: they can."""
        raise NotImplementedError

    @classmethod
    def concerns(cls, module: Any) -> bool:
        """Whether the report should have a word on this module."""
        return True

    @classmethod
    def convs(cls, module: Any) -> tuple[nn.Module | None, ...]:
        """The 3x3 convolutions that this word covers."""
        raise NotImplementedError

    @classmethod
    def what(cls, module: Any) -> str:
        """What is fused in this module."""
        raise NotImplementedError


def _runs_unfused(module: Any, x: Any) -> bool:
    return isinstance(x, torch.fx.Proxy) or module.why_not(module) is not None


class _TorchvisionBottleneck(_FusedBlock, FusedGroupedBottleneck):
    uses = "conv1 bn1 conv2 bn2 conv3 bn3 relu downsample"

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        layers = module._modules
        return _first(
            ("bn1", _why_not_bn(layers.get("bn1"))),
            ("conv2", _why_not_conv3x3(layers.get("conv2"))),
            ("bn2", _why_not_bn(layers.get("bn2"))),
            ("bn2", "it is bn1 too" if layers.get("bn2") is layers.get("bn1") else None),
            ("conv3", _why_not_conv(layers.get("conv3"))),
            ("bn3", _why_not_bn(layers.get("bn3"))),
            ("relu", _why_not_relu(layers.get("relu"))),
            ("downsample", _why_not_shortcut(layers.get("downsample"))),
        )

    @classmethod
    def what(cls, module: Any) -> str:
        return "bottleneck"

    @classmethod
    def convs(cls, module: Any) -> tuple[nn.Module | None, ...]:
        return (module.conv2,)

    def forward(self, x: Tensor) -> Tensor:
        if _runs_unfused(self, x):
            return self.unfused_type.forward(self, x)
        return FusedGroupedBottleneck.forward(self, x)


class _TimmBottleneck(_FusedBlock, FusedGroupedBottleneck):
    uses = "conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path downsample act3"
    bn1: nn.Module
    aa: nn.Module | None
    se: nn.Module | None
    drop_path: nn.Module | None
    act3: nn.Module

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        layers = module._modules
        return _first(
            ("bn1", _why_not_bn(layers.get("bn1"))),
            ("act1", _why_not_relu(layers.get("act1"))),
            ("conv2", _why_not_conv3x3(layers.get("conv2"))),
            ("bn2", _why_not_bn(layers.get("bn2"))),
            ("bn2", "it is bn1 too" if layers.get("bn2") is layers.get("bn1") else None),
            ("drop_block", _why_not_absent(layers.get("drop_block"))),
            ("act2", _why_not_relu(layers.get("act2"))),
            ("conv3", _why_not_conv(layers.get("conv3"))),
            ("bn3", _why_not_bn(layers.get("bn3"))),
            ("act3", _why_not_relu(layers.get("act3"))),
            ("downsample", _why_not_shortcut(layers.get("downsample"))),
        )

    @classmethod
    def what(cls, module: Any) -> str:
        kept = [name for name in ("aa", "se", "drop_path") if not _is_absent(getattr(module, name))]
        return f"bottleneck but for {', '.join(kept)}" if kept else "bottleneck"

    @classmethod
    def convs(cls, module: Any) -> tuple[nn.Module | None, ...]:
        return (module.conv2,)

    def forward(self, x: Tensor) -> Tensor:
        if _runs_unfused(self, x):
            return self.unfused_type.forward(self, x)
        if all(map(_is_absent, (self.aa, self.se, self.drop_path))):
            return FusedGroupedBottleneck.forward(self, x)
        if _is_absent(self.aa):
            z = self._branch(x)
        else:
            y = batch_norm_relu(self.bn1, conv1x1(self.conv1, x))
            z = conv1x1(self.conv3, self.aa(conv_bn_relu(self.conv2, self.bn2, y)))  # type: ignore[misc]
        if _is_absent(self.se) and _is_absent(self.drop_path):
            return self._join(z, x)
        y = self.bn3(z)
        if self.se is not None:
            y = self.se(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        y += x if self.downsample is None else self.downsample(x)
        return self.act3(y)


class _TimmConvNormAct(_FusedBlock):
    uses = "conv bn getattr aa"
    conv: nn.Conv2d
    bn: nn.Module

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return _is_conv3x3(module.conv)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        layers = module._modules
        bn = layers.get("bn")
        if _name(bn) not in (
            "timm.layers.norm_act.BatchNormAct2d",
            "timm.layers.norm_act.SyncBatchNormAct",
            "timm.layers.norm_act.FrozenBatchNormAct2d",
        ):
            return f"bn: {_type(bn)} is not a BatchNormAct2d"
        return _first(
            ("conv", _why_not_conv3x3(layers.get("conv"))),
            ("bn", why_not_bypass(bn)),
            ("bn.drop", _why_not_absent(bn._modules.get("drop"))),
            ("bn.act", _why_not_relu(bn._modules.get("act"))),
        )

    @classmethod
    def what(cls, module: Any) -> str:
        return "conv-bn-relu"

    @classmethod
    def convs(cls, module: Any) -> tuple[nn.Module | None, ...]:
        return (module.conv,)

    def forward(self, x: Tensor) -> Tensor:
        if _runs_unfused(self, x):
            return self.unfused_type.forward(self, x)
        y = conv_bn_relu(self.conv, self.bn, x)
        aa = getattr(self, "aa", None)
        return y if aa is None else aa(y)


class _Stem(_FusedBlock):
    """conv1, then bn1, ReLU and pooling as one operation, in a method that runs the whole model."""

    relu_name: ClassVar[str]
    conv1: nn.Module
    bn1: nn.Module
    maxpool: nn.MaxPool2d

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        layers = module._modules
        return _first(
            ("bn1", _why_not_bn(layers.get("bn1"))),
            (cls.relu_name, _why_not_relu(layers.get(cls.relu_name))),
            ("maxpool", _why_not_max_pool(layers.get("maxpool"))),
        )

    @classmethod
    def what(cls, module: Any) -> str:
        return "bn-relu-maxpool of the stem"

    @classmethod
    def convs(cls, module: Any) -> tuple[nn.Module | None, ...]:
        return ()

    def _stem(self, x: Tensor) -> Tensor:
        return batch_norm_relu_max_pool(self.bn1, self.conv1(x), self.maxpool)


class _TorchvisionStem(_Stem):
    method = "_forward_impl"
    uses = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool torch flatten fc"
    relu_name = "relu"
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        if _runs_unfused(self, x):
            return self.unfused_type._forward_impl(self, x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(self._stem(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _TimmStem(_Stem):
    method = "forward_features"
    uses = (
        "conv1 bn1 act1 maxpool grad_checkpointing torch jit is_scripting checkpoint_seq "
        "layer1 layer2 layer3 layer4"
    )
    relu_name = "act1"
    grad_checkpointing: bool
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing or _runs_unfused(self, x):
            return self.unfused_type.forward_features(self, x)
        return self.layer4(self.layer3(self.layer2(self.layer1(self._stem(x)))))


_BLOCKS: dict[str, type[_FusedBlock]] = {
    "torchvision.models.resnet.Bottleneck": _TorchvisionBottleneck,
    "torchvision.models.resnet.ResNet": _TorchvisionStem,
    "timm.models.resnet.Bottleneck": _TimmBottleneck,
    "timm.models.resnet.ResNet": _TimmStem,
    "timm.layers.conv_bn_act.ConvNormAct": _TimmConvNormAct,
}


class _FusedSequential(_Fused):
    """nn.Sequential that looks for runs of layers whenever it is called, as it can be edited."""

    _modules: dict[str, nn.Module]

    def forward(self, input: Any) -> Any:
        if isinstance(input, torch.fx.Proxy):
            return self.unfused_type.forward(self, input)
        layers = list(self._modules.values())
        i = 0
        while i < len(layers):
            if _is_conv_bn_relu(layers, i):
                conv, bn, _ = layers[i : i + 3]
                input = conv_bn_relu(conv, bn, input)  # type: ignore[arg-type]
                i += 3
            elif _is_bn_relu_max_pool(layers, i):
                bn, _, pool = layers[i : i + 3]
                input = batch_norm_relu_max_pool(bn, input, pool)  # type: ignore[arg-type]
                i += 3
            else:
                input = layers[i](input)
                i += 1
        return input


def _why_not_conv_bn_relu(layers: list[nn.Module], i: int) -> str | None:
    conv, bn, act = (*layers[i : i + 3], None, None)[:3]
    return _first(
        ("convolution", _why_not_conv3x3(conv)),
        ("next layer", _why_not_bn(bn)),
        ("activation", _why_not_relu(act)),
    )


def _is_conv_bn_relu(layers: list[nn.Module], i: int) -> bool:
    return type(layers[i]) is nn.Conv2d and _why_not_conv_bn_relu(layers, i) is None


def _is_bn_relu_max_pool(layers: list[nn.Module], i: int) -> bool:
    if i + 2 >= len(layers) or type(layers[i + 2]) is not nn.MaxPool2d:
        return False
    bn, act, pool = layers[i : i + 3]
    reasons = (_why_not_bn(bn), _why_not_relu(act), _why_not_max_pool(pool))
    return all(reason is None for reason in reasons)


# The two functions ----------------------------------------------------------------------------


def _why_not_block(
    mixin: type[_FusedBlock], base: type[nn.Module], module: nn.Module
) -> str | None:
    for name in {"forward", mixin.method}:
        if name in module.__dict__:
            return f"its {name} was replaced"
    code = getattr(getattr(base, mixin.method), "__code__", None)
    if code is None or set(code.co_names) != set(mixin.uses.split()):
        return f"{base.__name__}.{mixin.method} is not the one of the versions that are known"
    return mixin.why_not(module)


def _fuse_sequential(path: str, module: nn.Sequential, report: FusionReport) -> bool:
    """Reports the runs of layers in `module`, and whether there are any."""
    layers = list(module)
    paths = [f"{path}.{name}".lstrip(".") for name in module._modules]
    found = False
    i = 0
    while i < len(layers):
        if _is_conv_bn_relu(layers, i):
            report.fused[paths[i]] = "conv-bn-relu"
        elif _is_bn_relu_max_pool(layers, i):
            report.fused[paths[i]] = "bn-relu-maxpool"
        else:
            if _is_conv3x3(layers[i]):
                report.left[paths[i]] = str(_why_not_conv_bn_relu(layers, i))
            i += 1
            continue
        found = True
        i += 3
    return found


def fuse(model: M) -> tuple[M, FusionReport]:
    """Make the blocks of a model run on the fused operations, in place.

    Equivalent, in outputs, gradients and running statistics, to the model as it was. Parameters,
    buffers and the state dict's keys stay the same objects and names. Forward hooks that are put
    later on a layer inside a fused block make that block run as it was.

    Args:
        model: Any module. torch.channels_last (`model.to(memory_format=torch.channels_last)`) is
            the layout that the kernels work in.

    Returns:
        `model`, and a report of what was fused and of what was not and why.

    Raises:
        TypeError: If `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = FusionReport()
    done: set[nn.Module | None] = set()
    for path, module in list(model.named_modules()):
        base: Any = module.unfused_type if isinstance(module, _Fused) else type(module)
        mixin: Any = _BLOCKS.get(f"{base.__module__}.{base.__qualname__}")
        if mixin is not None:
            if not mixin.concerns(module):
                continue
            done.update(mixin.convs(module))
            reason = _why_not_block(mixin, base, module)
            if reason is None:
                module.__class__ = _fused_class(mixin, base)
                report.fused[path] = mixin.what(module)
            else:
                report.left[path] = reason
        elif isinstance(module, nn.Sequential) and base.forward is nn.Sequential.forward:
            done.update(module)
            if _fuse_sequential(path, module, report) and "forward" not in module.__dict__:
                module.__class__ = _fused_class(_FusedSequential, base)
        elif isinstance(module, FusedGroupedBottleneck):
            done.add(module.conv2)
        elif isinstance(module, GroupedConvBNReLU):
            done.add(module.conv)
        elif _is_conv3x3(module) and module not in done:
            parent = type(model.get_submodule(path.rpartition(".")[0])).__name__ if path else None
            report.left[path] = f"{parent} is not a block that is known" if parent else "alone"
    return model, report


def unfuse(model: M) -> M:
    """Undo `fuse`, in place: every module is of its own class again.

    Args:
        model: A module that `fuse` was applied to, or a copy of one, or a module that holds one.

    Returns:
        `model`.

    Raises:
        TypeError: If `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = module.unfused_type
    return model
