"""A plain grouped Triton convolution, as `bench.modelled` holds the fused one against.

What general-purpose libraries do: a program is one group and BLOCK_P output pixels, its channels
padded to 16 for the matrix instructions, nine shifted loads; BatchNorm and ReLU are kernels of
their own. Only eval, only what the comparison needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnext_kernels.backends import triton as backend


@triton.jit
def _plain_conv_kernel(
    x_ptr, w_ptr, z_ptr, N, X_H, X_W, H, W, C, K, stride,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Programs: (N*H*W / BLOCK_P, groups)."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    group = tl.program_id(1)
    n, h, w = p // (H * W), p // W % H, p % W
    i = tl.arange(0, WIDTH)
    ok = p < N * H * W
    acc = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    for tap in range(9):
        x_h = h * stride + tap // 3 - 1
        x_w = w * stride + tap % 3 - 1
        inside = ok & (x_h >= 0) & (x_h < X_H) & (x_w >= 0) & (x_w < X_W)
        pixel = (n * X_H + x_h) * X_W + x_w
        mask = inside[:, None] & (i < D)[None, :]
        x = tl.load(x_ptr + pixel[:, None] * C + (group * D + i)[None, :], mask=mask, other=0.0)
        # weight[k, d, tap]: rows d, columns k
        offset = ((group * D + i)[None, :] * D + i[:, None]) * 9 + tap
        weight = tl.load(w_ptr + offset, mask=(i < D)[None, :] & (i < D)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc)
    out = z_ptr + p[:, None] * K + (group * D + i)[None, :]
    tl.store(out, acc.to(z_ptr.dtype.element_ty), mask=ok[:, None] & (i < D)[None, :])


@triton.jit
def _batch_norm_kernel(x_ptr, scale_ptr, shift_ptr, y_ptr, size, C, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + e % C)
    shift = tl.load(shift_ptr + e % C)
    x = tl.load(x_ptr + e, mask=e < size).to(tl.float32)
    tl.store(y_ptr + e, (x * scale + shift).to(y_ptr.dtype.element_ty), mask=e < size)


@triton.jit
def _relu_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + e, mask=e < size)
    tl.store(y_ptr + e, tl.where(x < 0, 0.0, x), mask=e < size)


def conv_affine_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> Tensor:
    """y = relu(scale * conv(x) + shift) in three kernels; dilation 1."""
    n, c, x_h, x_w = x.shape
    k, d = weight.shape[:2]
    h, w = (x_h - 1) // stride + 1, (x_w - 1) // stride + 1
    z = torch.empty((n, k, h, w), dtype=x.dtype).to(memory_format=torch.channels_last)
    y = torch.empty_like(z)
    width = max(16, triton.next_power_of_2(d))
    launch: Any = backend._launch
    launch(
        _plain_conv_kernel,
        (triton.cdiv(n * h * w, 64), groups),
        *(x, weight, z, n, x_h, x_w, h, w, c, k, stride),
        D=d,
        WIDTH=width,
        BLOCK_P=64,
        warps=4,
        stages=2,
    )
    grid = (triton.cdiv(z.numel(), 1024),)
    launch(
        _batch_norm_kernel, grid, z, scale, shift, y, z.numel(), k, BLOCK=1024, warps=4, stages=1
    )
    launch(_relu_kernel, grid, y, y, z.numel(), BLOCK=1024, warps=4, stages=1)
    return y
