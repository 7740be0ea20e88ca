"""Print the complexity tables of the paper, counted on the models: `python -m resnext_kernels`.

Parameters and multiply-adds come from the networks themselves (built and run on the meta device, so
nothing is computed); what stands under "published" comes from the paper and was not measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .models import (
    ResNeXt,
    resnet50,
    resnet101,
    resnet200,
    resnext,
    resnext29_8x64d,
    resnext29_16x64d,
    resnext50_32x4d,
    resnext101_32x4d,
    resnext101_64x4d,
)


class Row(NamedTuple):
    """A network and what the paper says of it."""

    name: str
    network: Callable[[], ResNeXt]
    error: str
    parameters: str = "-"
    multiply_adds: str = "-"


class Table(NamedTuple):
    title: str
    image_size: int
    error: str
    rows: list[Row]


TABLES = [
    Table(
        "ResNet-50 at preserved complexity (Tables 1, 2, 3)",
        224,
        "top-1 %",
        [
            Row("ResNet-50", resnet50, "23.9", "25.5M", "4.1G"),
            Row("ResNeXt-50", partial(resnext, 50, 2, 40), "23.0"),
            Row("ResNeXt-50", partial(resnext, 50, 4, 24), "22.6"),
            Row("ResNeXt-50", partial(resnext, 50, 8, 14), "22.3"),
            Row("ResNeXt-50", resnext50_32x4d, "22.2", "25.0M", "4.2G"),
        ],
    ),
    Table(
        "ResNet-101 at preserved complexity (Table 3)",
        224,
        "top-1 %",
        [
            Row("ResNet-101", resnet101, "22.0", "~44M", "~7.8G"),
            Row("ResNeXt-101", partial(resnext, 101, 2, 40), "21.7"),
            Row("ResNeXt-101", partial(resnext, 101, 4, 24), "21.4"),
            Row("ResNeXt-101", partial(resnext, 101, 8, 14), "21.3"),
            Row("ResNeXt-101", resnext101_32x4d, "21.2", "~44M", "~7.8G"),
        ],
    ),
    Table(
        "Twice the complexity: deeper, wider, more cardinality (Table 4)",
        224,
        "top-1 %",
        [
            Row("ResNet-200", resnet200, "21.7", "-", "~15G"),
            Row("ResNet-101, wider", partial(resnext, 101, 1, 100), "21.3", "-", "~15G"),
            Row("ResNeXt-101", partial(resnext, 101, 2, 64), "20.7", "-", "~15G"),
            Row("ResNeXt-101", resnext101_64x4d, "20.4", "-", "~15G"),
        ],
    ),
    Table(
        "CIFAR-10 (Table 7)",
        32,
        "test %",
        [
            Row("ResNeXt-29", resnext29_8x64d, "3.65", "34.4M"),
            Row("ResNeXt-29", resnext29_16x64d, "3.58", "68.1M"),
        ],
    ),
]


def complexity(network: Callable[[], ResNeXt], image_size: int) -> tuple[ResNeXt, int, int]:
    """The model on the meta device, its parameters and its multiply-adds for one image."""
    with torch.device("meta"), torch.no_grad():
        model = network().eval()
        image = torch.empty(1, model.conv1.in_channels, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
    parameters = sum(p.numel() for p in model.parameters())
    return model, parameters, counter.get_total_flops() // 2


def main() -> None:
    layout = "{:<18} {:>7} {:>12} {:>11} {:>14}   {:>10} {:>14} {:>8}"
    for table in TABLES:
        print(f"{table.title}, {table.image_size}x{table.image_size} images")
        print(layout.format("", "", "", "counted", "", "published", "", "").rstrip())
        print(
            layout.format(
                "network",
                "C x d",
                "group width",
                "parameters",
                "multiply-adds",
                "parameters",
                "multiply-adds",
                table.error,
            )
        )
        for row in table.rows:
            model, parameters, multiply_adds = complexity(row.network, table.image_size)
            conv = model.get_submodule("layer1.0.conv2")
            assert isinstance(conv, nn.Conv2d)
            cardinality, group_width = conv.groups, conv.out_channels
            print(
                layout.format(
                    row.name,
                    f"{cardinality}x{group_width // cardinality}d",
                    group_width,
                    f"{parameters / 1e6:.2f}M",
                    f"{multiply_adds / 1e9:.2f}G",
                    row.parameters,
                    row.multiply_adds,
                    row.error,
                )
            )
        print()
    print(
        "counted: on the models of this package. published: from Xie et al., CVPR 2017, "
        "arXiv:1611.05431;\nthe errors are the paper's and were not measured here."
    )


if __name__ == "__main__":
    main()
