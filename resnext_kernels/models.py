"""ResNeXt networks on the fused block: the paper's ImageNet and CIFAR families.

A network is a template repeated: its depth, the cardinality C and the bottleneck width d, written
C x d as in the paper (32x4d). C = 1, d = 64 is ResNet. Parameters are named as torchvision names
them, so its checkpoints, and timm's of the same architectures, load strictly, both ways:

    model = resnext50_32x4d()
    model.load_state_dict(torchvision.models.resnext50_32x4d(weights="DEFAULT").state_dict())

Sources: Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural
Networks", CVPR 2017, https://arxiv.org/abs/1611.05431 (Table 1: ImageNet, Sec. 5.3: CIFAR).
He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016 (200 layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .modules import FusedGroupedBottleneck, batch_norm_relu, batch_norm_relu_max_pool

__all__ = [
    "ResNeXt",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "resnext",
    "resnext29_8x64d",
    "resnext29_16x64d",
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext152_32x4d",
    "resnext_cifar",
]

NormLayer = Callable[[int], nn.Module]

# Blocks in conv2, conv3, conv4, conv5; three layers each, and the stem and the classifier make up
# the depth.
_IMAGENET_LAYERS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class ResNeXt(nn.Module):
    """A ResNeXt (or, with cardinality 1, a ResNet) for image classification.

        stem -> stages of FusedGroupedBottleneck -> global average -> linear

    Stage s works at 64 * 2**s * 4 channels, its 3x3 convolutions at cardinality * width * 2**s
    channels in `cardinality` groups; every stage but the first halves the resolution, in the 3x3
    convolution of its first block.

    Equivalent to `torchvision.models.ResNet(Bottleneck, layers, groups=cardinality,
    width_per_group=width)`, in parameters (names, and initial values for the same
    seed) and results.

    Args:
        layers: Blocks in each stage.
        cardinality: C, the groups of the 3x3 convolutions.
        width: d, the channels of a group in the first stage.
        num_classes: Classes to tell apart.
        in_channels: Channels of the images.
        stem: "imagenet": 7x7 convolution with stride 2 and 3x3 max pooling with stride 2, so a
            quarter of the resolution; "cifar": 3x3 convolution at full resolution.
        zero_init_residual: Start the last BatchNorm of every block at gamma = 0, so that blocks
            start as the identity.
        replace_stride_with_dilation: For each stage but the first, whether dilation takes the
            place of its stride.
        norm_layer: Makes a BatchNorm from a number of channels: `nn.BatchNorm2d` (None),
            `nn.SyncBatchNorm` or a frozen batch norm.

    Input:
        x: (N, in_channels, H, W). `torch.channels_last` is the layout the kernels work in:
            `model.to(memory_format=torch.channels_last)` and the same for x.

    Returns:
        Logits, (N, num_classes).

    Raises:
        ValueError: If `layers` is empty or holds less than 1, if `cardinality`, `width`,
            `num_classes` or `in_channels` is less than 1, if `stem` is unknown, or if
            `replace_stride_with_dilation` has not one entry for each stage but the first.
        TypeError: If `norm_layer` makes another kind of module.

    Source: Sec. 3 and Table 1 of the paper.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        cardinality: int = 32,
        width: int = 4,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        zero_init_residual: bool = False,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 1:
            raise ValueError(f"layers must hold at least one block a stage, got {layers}")
        for name, value in (
            ("cardinality", cardinality),
            ("width", width),
            ("num_classes", num_classes),
            ("in_channels", in_channels),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False] * (len(layers) - 1)
        if len(replace_stride_with_dilation) != len(layers) - 1:
            raise ValueError(
                f"replace_stride_with_dilation must have {len(layers) - 1} entries, one for each "
                f"stage but the first, got {replace_stride_with_dilation}"
            )
        norm_layer = norm_layer or nn.BatchNorm2d

        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()

        channels, dilation = 64, 1
        for stage, blocks in enumerate(layers):
            stride, previous_dilation = (2 if stage else 1), dilation
            if stage and replace_stride_with_dilation[stage - 1]:
                stride, dilation = 1, dilation * stride
            template = partial(
                FusedGroupedBottleneck,
                planes=64 * 2**stage,
                groups=cardinality,
                base_width=width,
                norm_layer=norm_layer,
            )
            out_channels = 64 * 2**stage * FusedGroupedBottleneck.expansion
            shortcut = None
            if stride != 1 or channels != out_channels:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, out_channels, 1, stride, bias=False),
                    norm_layer(out_channels),
                )
            self.add_module(
                f"layer{stage + 1}",
                nn.Sequential(
                    template(
                        channels, stride=stride, downsample=shortcut, dilation=previous_dilation
                    ),
                    *(template(out_channels, dilation=dilation) for _ in range(blocks - 1)),
                ),
            )
            channels = out_channels
        self.num_stages = len(layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, FusedGroupedBottleneck) and zero_init_residual:
                gamma = module.bn3.weight
                if isinstance(gamma, Tensor):  # None without affine
                    nn.init.zeros_(gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if isinstance(self.maxpool, nn.MaxPool2d):
            x = batch_norm_relu_max_pool(self.bn1, x, self.maxpool)
        else:
            x = batch_norm_relu(self.bn1, x)
        for stage in range(self.num_stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnext(
    depth: int,
    cardinality: int,
    width: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    zero_init_residual: bool = False,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    norm_layer: NormLayer | None = None,
) -> ResNeXt:
    """A ResNeXt for ImageNet-sized images from its template.

    The family of equal complexity of the paper's Table 2 is (cardinality, width) = (1, 64),
    (2, 40), (4, 24), (8, 14), (32, 4), at any depth.

    Args:
        depth: Layers with weights: 14, 26, 50, 101, 152 or 200.
        cardinality: C, the groups of the 3x3 convolutions.
        width: d, the channels of a group in the first stage.
        num_classes, in_channels, zero_init_residual, replace_stride_with_dilation, norm_layer: As
            of `ResNeXt`.

    Raises:
        ValueError: If `depth` is none of those listed, or from `ResNeXt`.

    Source: Tables 1 and 2 of the paper.
    """
    if depth not in _IMAGENET_LAYERS:
        raise ValueError(f"depth must be one of {sorted(_IMAGENET_LAYERS)}, got {depth}")
    return ResNeXt(
        _IMAGENET_LAYERS[depth],
        cardinality=cardinality,
        width=width,
        num_classes=num_classes,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        replace_stride_with_dilation=replace_stride_with_dilation,
        norm_layer=norm_layer,
    )


def resnext_cifar(
    depth: int,
    cardinality: int,
    width: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    zero_init_residual: bool = False,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    norm_layer: NormLayer | None = None,
) -> ResNeXt:
    """A ResNeXt for images of about 32x32: three stages, at 1, 1/2 and 1/4 of the resolution.

    Args:
        depth: Layers with weights: 9*n + 2, for n blocks a stage (29 in the paper).
        cardinality: C, the groups of the 3x3 convolutions.
        width: d, the channels of a group in the first stage.
        num_classes, in_channels, zero_init_residual, replace_stride_with_dilation, norm_layer: As
            of `ResNeXt`.

    Raises:
        ValueError: If `depth` is not 9*n + 2 with n >= 1, or from `ResNeXt`.

    Source: Sec. 5.3 of the paper.
    """
    blocks, rest = divmod(depth - 2, 9)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be 9*n + 2 with n >= 1 (11, 20, 29, ...), got {depth}")
    return ResNeXt(
        (blocks, blocks, blocks),
        cardinality=cardinality,
        width=width,
        num_classes=num_classes,
        in_channels=in_channels,
        stem="cifar",
        zero_init_residual=zero_init_residual,
        replace_stride_with_dilation=replace_stride_with_dilation,
        norm_layer=norm_layer,
    )


class _Network(Protocol):
    """A network of the paper; arguments as of `ResNeXt`."""

    def __call__(
        self,
        *,
        num_classes: int = ...,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> ResNeXt: ...


def _network(
    name: str, depth: int, cardinality: int, width: int, *, cifar: bool = False
) -> _Network:
    """The function `name`, which makes a network of one template."""
    family, default_classes = (resnext_cifar, 10) if cifar else (resnext, 1000)

    def network(
        *,
        num_classes: int = default_classes,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> ResNeXt:
        return family(
            depth,
            cardinality,
            width,
            num_classes=num_classes,
            in_channels=in_channels,
            zero_init_residual=zero_init_residual,
            replace_stride_with_dilation=replace_stride_with_dilation,
            norm_layer=norm_layer,
        )

    network.__name__ = network.__qualname__ = name
    network.__doc__ = (
        f"{'ResNet' if cardinality == 1 else 'ResNeXt'}-{depth} ({cardinality}x{width}d): "
        f"`{family.__name__}({depth}, {cardinality}, {width})`; arguments as of `ResNeXt`."
    )
    return network


resnet50 = _network("resnet50", 50, 1, 64)
resnet101 = _network("resnet101", 101, 1, 64)
resnet152 = _network("resnet152", 152, 1, 64)
resnet200 = _network("resnet200", 200, 1, 64)
resnext50_32x4d = _network("resnext50_32x4d", 50, 32, 4)
resnext101_32x4d = _network("resnext101_32x4d", 101, 32, 4)
resnext101_32x8d = _network("resnext101_32x8d", 101, 32, 8)
resnext101_64x4d = _network("resnext101_64x4d", 101, 64, 4)
resnext152_32x4d = _network("resnext152_32x4d", 152, 32, 4)
resnext29_8x64d = _network("resnext29_8x64d", 29, 8, 64, cifar=True)
resnext29_16x64d = _network("resnext29_16x64d", 29, 16, 64, cifar=True)
