"""Fused grouped convolution, batch norm and ReLU for ResNeXt."""

from . import backends, functional, models
from .fuse import FusionReport, fuse, unfuse
from .modules import FusedGroupedBottleneck, GroupedConvBNReLU

__version__ = "0.1.0"

__all__ = [
    "FusedGroupedBottleneck",
    "FusionReport",
    "GroupedConvBNReLU",
    "backends",
    "functional",
    "fuse",
    "models",
    "unfuse",
]
