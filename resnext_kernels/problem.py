"""The sizes of one grouped 3x3 convolution, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ConvProblem", "in_format_of", "weight_format"]

Phase = Literal["eval", "train", "backward"]


@dataclass(frozen=True)
class ConvProblem:
    """One grouped 3x3 convolution with padding == dilation, as a backend sees it.

    Args:
        n, h, w, c: Batch, height, width and channels of the input x.
        k: Output channels; None for as many as c.
        groups: Groups that c and k are divided into.
        stride, dilation: Of the convolution.
        dtype: Of x, weight and the result.
        device_type, device_index: "cpu", "cuda", ..., and which of them; None: the current one.
        training: Whether the backward pass will be needed too.

    Raises:
        ValueError: If a size is less than 1 (n: less than 0), or if `groups` does not divide both
            c and k.
    """

    n: int
    h: int
    w: int
    c: int
    k: int | None = None
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    training: bool = False
    device_index: int | None = None

    def __post_init__(self) -> None:
        if self.k is None:
            object.__setattr__(self, "k", self.c)
        if self.n < 0:
            raise ValueError(f"n must be at least 0, got {self.n}")
        for name in ("h", "w", "c", "k", "groups", "stride", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("c", "k"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"groups must divide {name} = {getattr(self, name)}, got {self.groups}"
                )

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        training: bool = False,
    ) -> ConvProblem:
        """The problem that these tensors pose."""
        n, c, h, w = x.shape
        k, on = weight.shape[0], x.device
        return cls(n, h, w, c, k, groups, stride, dilation, x.dtype, on.type, training, on.index)

    @property
    def out_channels(self) -> int:
        """`k`, never None."""
        assert self.k is not None
        return self.k

    @property
    def out_h(self) -> int:
        return (self.h - 1) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.w - 1) // self.stride + 1

    def flops(self, phase: Phase = "eval") -> int:
        """Floating-point operations of the convolution, a multiply-add counted as two.

        "eval" and "train" are the forward pass; "backward" is the gradients of x and weight.
        """
        forward = (
            2 * 9 * self.n * self.out_h * self.out_w * self.out_channels * (self.c // self.groups)
        )
        return 2 * forward if phase == "backward" else forward

    def bytes(self, phase: Phase = "eval", *, residual: bool = False) -> int:
        """Bytes that must move between memory and processor: every tensor of the phase, once.

            eval:      x, weight [, residual] -> y
            train:     x, weight [, residual] -> z, y
            backward:  x, weight, z, dy [, y] -> dx, dweight [, dresidual]

        Per-channel vectors are left out.
        """
        x = self.n * self.h * self.w * self.c
        y = self.n * self.out_h * self.out_w * self.out_channels
        weight = 9 * self.out_channels * (self.c // self.groups)
        elements = {
            "eval": x + weight + (1 + residual) * y,
            "train": x + weight + (2 + residual) * y,
            "backward": 2 * (x + weight) + (2 + 2 * residual) * y,
        }[phase]
        return elements * self.dtype.itemsize


def weight_format(weight: Tensor) -> torch.memory_format | None:
    """In which of the two dense memory formats of a contract's weight it lies; None for neither."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if weight.is_contiguous(memory_format=memory_format):
            return memory_format
    return None


def in_format_of(weight: Tensor, t: Tensor) -> Tensor:
    """`t`, of the weight's shape, in the weight's memory format."""
    return t.contiguous(memory_format=weight_format(weight) or torch.contiguous_format)
