"""The three equivalent forms of the ResNeXt block, Fig. 3 of the paper, in plain PyTorch.

    y = relu(x + bn3(F(x))),    F(x) = sum_i T_i(x)

with C paths T_i (the cardinality), each a bottleneck d channels wide. ReLU follows bn1 and bn2.

    (a) SummedPaths        each path conv1 (1x1, d) -> bn1 -> conv2 (3x3, d) -> bn2 -> conv3 (1x1);
                           the paths are summed
    (b) ConcatenatedPaths  each path conv1 -> bn1 -> conv2 -> bn2; the paths are concatenated;
                           one conv3 (1x1) over all C*d channels
    (c) GroupedBottleneck  conv1 (1x1, C*d) -> bn1 -> conv2 (3x3, C*d, C groups) -> bn2 -> conv3

BatchNorm acts on each channel alone, so it splits with the channels it normalises; in (a) the last
one comes after the sum (footnote on Sec. 4). `convert` rewrites the tensors of one form as those of
another. These modules are the specification that is read and tested against; the block that
networks are built from is `FusedGroupedBottleneck`, whose tensors are named as those of form (c).

Source: Xie, Girshick, Dollar, Tu, He, "Aggregated Residual Transformations for Deep Neural
Networks", CVPR 2017, https://arxiv.org/abs/1611.05431.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["ConcatenatedPaths", "GroupedBottleneck", "SummedPaths", "convert"]

# The layers of each form that exist once per path, and the dimension in which the C*d channels of
# form (c) lie: output channels, but input channels for the last 1x1 convolution.
_PATH_LAYERS: dict[str, tuple[str, ...]] = {
    "a": ("conv1", "bn1", "conv2", "bn2", "conv3"),
    "b": ("conv1", "bn1", "conv2", "bn2"),
    "c": (),
}
_PATH_DIM = {"conv1": 0, "bn1": 0, "conv2": 0, "bn2": 0, "conv3": 1}


class _Block(nn.Module):
    """What the forms share: y = relu(shortcut(x) + bn3(F(x))), F the aggregated transformation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def aggregate(self, x: Tensor) -> Tensor:
        """F(x) = sum_i T_i(x), Eqn. (2)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(shortcut + self.bn3(self.aggregate(x)))


def _embedding(in_channels: int, width: int, stride: int) -> OrderedDict[str, nn.Module]:
    """1x1 -> BatchNorm -> ReLU -> 3x3 -> BatchNorm -> ReLU."""
    return OrderedDict(
        conv1=nn.Conv2d(in_channels, width, 1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
        bn2=nn.BatchNorm2d(width),
        relu2=nn.ReLU(),
    )


class SummedPaths(_Block):
    """Form (a): C paths 1x1 -> 3x3 -> 1x1, summed.

    Args:
        in_channels: Channels of x.
        out_channels: Channels of y.
        cardinality: C, the number of paths.
        width: d, the channels within a path.
        stride: Of the 3x3 convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, cardinality: int, width: int, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.paths = nn.ModuleList()
        for _ in range(cardinality):
            path = _embedding(in_channels, width, stride)
            path["conv3"] = nn.Conv2d(width, out_channels, 1, bias=False)
            self.paths.append(nn.Sequential(path))

    def aggregate(self, x: Tensor) -> Tensor:
        return torch.stack([path(x) for path in self.paths]).sum(0)


class ConcatenatedPaths(_Block):
    """Form (b): C paths 1x1 -> 3x3, concatenated ahead of one 1x1 convolution.

    Args: As of `SummedPaths`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, cardinality: int, width: int, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.paths = nn.ModuleList(
            nn.Sequential(_embedding(in_channels, width, stride)) for _ in range(cardinality)
        )
        self.conv3 = nn.Conv2d(cardinality * width, out_channels, 1, bias=False)

    def aggregate(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat([path(x) for path in self.paths], dim=1))


class GroupedBottleneck(_Block):
    """Form (c): a bottleneck block whose 3x3 convolution has C groups.

    Args: As of `SummedPaths`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, cardinality: int, width: int, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        channels = cardinality * width
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(
            channels, channels, 3, stride, padding=1, groups=cardinality, bias=False
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)

    def aggregate(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.conv3(x)


def convert(
    tensors: Mapping[str, Tensor], form: Literal["a", "b", "c"], cardinality: int
) -> dict[str, Tensor]:
    """Rewrite the tensors of a block, in any of the three forms, as those of another form.

        conv1, bn1, conv2, bn2: rows [i*d, (i+1)*d) of form (c) belong to path i
        conv3:                  columns [i*d, (i+1)*d) do; form (b) keeps it whole, as (c) does
        bn3, downsample:        the same in all forms

    Linear in the tensors, so it serves for a state dict and for gradients alike.

    Args:
        tensors: By name, as in `state_dict()`; which form they come from is seen from the names.
        form: The form wanted: "a", "b" or "c" of Fig. 3.
        cardinality: C, the number of paths.

    Returns:
        A state dict for the form; tensors may share memory with the ones given.

    Raises:
        ValueError: If `form` is not one of the three, or the tensors do not make up `cardinality`
            paths of equal width.

    Source: Sec. 3.3 and Fig. 3 of the paper.
    """
    if form not in _PATH_LAYERS:
        raise ValueError(f"form must be one of {sorted(_PATH_LAYERS)}, got {form!r}")
    if cardinality < 1:
        raise ValueError(f"cardinality must be at least 1, got {cardinality}")
    return _split(_join(tensors, cardinality), _PATH_LAYERS[form], cardinality)


def _join(tensors: Mapping[str, Tensor], cardinality: int) -> dict[str, Tensor]:
    """The tensors of form (c)."""
    joined: dict[str, Tensor] = {}
    paths: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("paths."):
            _, path, name = name.split(".", 2)
            paths.setdefault(name, {})[int(path)] = tensor
        else:
            joined[name] = tensor
    for name, pieces in paths.items():
        if sorted(pieces) != list(range(cardinality)):
            raise ValueError(
                f"cardinality is {cardinality}, but tensors has {name} for paths {sorted(pieces)}"
            )
        parts = [pieces[path] for path in range(cardinality)]
        # num_batches_tracked is one number, the same in every path
        joined[name] = torch.cat(parts, _PATH_DIM[_layer(name)]) if parts[0].dim() else parts[0]
    return joined


def _split(
    tensors: Mapping[str, Tensor], layers: tuple[str, ...], cardinality: int
) -> dict[str, Tensor]:
    """The tensors of form (c) with those of `layers` cut into paths."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _layer(name) not in layers:
            split[name] = tensor
            continue
        dim = _PATH_DIM[_layer(name)]
        if tensor.dim() and tensor.shape[dim] % cardinality:
            raise ValueError(
                f"cardinality must divide the {tensor.shape[dim]} channels of {name}, "
                f"got {cardinality}"
            )
        parts = tensor.chunk(cardinality, dim) if tensor.dim() else [tensor] * cardinality
        split.update((f"paths.{path}.{name}", part) for path, part in enumerate(parts))
    return split


def _layer(name: str) -> str:
    return name.split(".", 1)[0]
