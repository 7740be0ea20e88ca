"""The contract of every backend, in plain ATen: the executable specification.

x, z, y, dy and the like are (N, C, H, W), dense in torch.channels_last; weight and dweight are
(K, C/G, 3, 3), dense, both contiguous or both in torch.channels_last. Vectors (scale, shift, mean,
...) have one element a channel, in float32 (float64 for float64 tensors). `vectors`, (5, C), is
what is made of one BatchNorm: mean, unbiased variance, rstd, scale, shift. With
`prologue=(in_scale, in_shift)` the convolution reads relu(in_scale * x + in_shift) in place of x.
M = N*H*W.

Arithmetic on vectors and images is in the vectors' dtype; the convolution accumulates as ATen does.
Any device, any floating-point dtype that torch's convolution has there, any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import ConvProblem, in_format_of

NAME = "reference"

Affine = tuple[Tensor, Tensor]
# gamma, beta, mean, var, eps: see bn_affine
BatchNorm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]
# gamma, beta, eps of a BatchNorm with the statistics of the batch
TrainingBatchNorm = tuple[Tensor | None, Tensor | None, float]
# z, vectors, coefficients: see bn_relu_input_gradient
BNGradient = tuple[Tensor, Tensor, Tensor | None]


def why_not(problem: ConvProblem) -> str | None:
    """None: the reference serves every problem."""
    return None


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _count(z: Tensor) -> int:
    return z.numel() // z.shape[1]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x.to(scale.dtype) * _per_channel(scale) + _per_channel(shift)


def aligned(t: Tensor) -> Tensor:
    """Kernels move 16 bytes at a time, cuDNN's too; a view may begin anywhere."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _conv(x: Tensor, weight: Tensor, stride: int, groups: int, dilation: int) -> Tensor:
    """A 1x1 or 3x3 convolution."""
    padding = weight.shape[2] // 2 * dilation
    z = torch.conv2d(aligned(x), aligned(weight), None, stride, padding, dilation, groups)
    return _nhwc(z)


def _conv_gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    groups: int,
    dilation: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight of a 1x1 or 3x3 convolution, None where not needed."""
    padding = weight.shape[2] // 2 * dilation
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(
        aligned(dz),
        aligned(x),
        aligned(weight),
        None,
        [stride, stride],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        groups,
        [need_dx, need_dweight, False],
    )
    return _nhwc(dx) if need_dx else None, in_format_of(weight, dweight) if need_dweight else None


def _activated(x: Tensor, prologue: Affine | None) -> Tensor:
    return x if prologue is None else normalize_relu(x, *prologue)


def conv_affine_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    prologue: Affine | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> Tensor:
    """y = relu(scale * conv(x) + shift [+ residual])."""
    z = _conv(_activated(x, prologue), weight, stride, groups, dilation)
    return normalize_relu(z, scale, shift, residual=residual)


def dense_batch_norm(bn: BatchNorm) -> BatchNorm:
    """With its vectors as kernels read them: without gaps."""
    gamma, beta, mean, var, eps = bn
    return _dense(gamma), _dense(beta), mean.contiguous(), var.contiguous(), eps


def dense_training_batch_norm(bn: TrainingBatchNorm) -> TrainingBatchNorm:
    gamma, beta, eps = bn
    return _dense(gamma), _dense(beta), eps


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def with_batch_norms(
    conv_affine_relu: Callable[..., Tensor], bn_affine: Callable[..., Affine]
) -> Callable[..., Tensor]:
    """A backend's conv_bn_relu: its conv_affine_relu of what bn_affine makes of the BatchNorms."""

    def conv_bn_relu(
        x: Tensor,
        weight: Tensor,
        bn: BatchNorm,
        *,
        residual: Tensor | None = None,
        prologue: BatchNorm | None = None,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
    ) -> Tensor:
        """y = relu(bn(conv(x)) [+ residual]); the convolution reads x, or relu(prologue(x))."""
        return conv_affine_relu(
            x,
            weight,
            *bn_affine(*bn),
            residual=residual,
            prologue=None if prologue is None else bn_affine(*prologue),
            stride=stride,
            groups=groups,
            dilation=dilation,
        )

    return conv_bn_relu


def conv_stats(
    x: Tensor,
    weight: Tensor,
    *,
    bn: TrainingBatchNorm | None = None,
    prologue: Affine | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """z = conv(x), and with a BatchNorm its `batch_stats`."""
    z = _conv(_activated(x, prologue), weight, stride, groups, dilation)
    return z, None if bn is None else batch_stats(z, bn)


def batch_stats(z: Tensor, bn: TrainingBatchNorm) -> Tensor:
    """`vectors` of the mean and variance of every channel over N, H and W; of 0 where M is 0."""
    gamma, beta, eps = bn
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    m = _count(z)
    if m == 0:
        mean = var = z.new_zeros(z.shape[1], dtype=dtype)
    else:
        var, mean = torch.var_mean(z.to(dtype), (0, 2, 3), correction=0)
    return bn_vectors(gamma, beta, mean, var, eps, m / max(m - 1, 1))


def normalize_relu(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
) -> Tensor:
    """y = relu(scale * z + shift [+ residual | + rs * residual + rh]), residual_affine=(rs, rh)."""
    y = _affine(z, scale, shift)
    if residual is not None:
        y = y + (residual if residual_affine is None else _affine(residual, *residual_affine))
    return _nhwc(y.relu_().to(z.dtype))


class DenseConvolution(NamedTuple):
    """A backend's functions of the 1x1 convolution."""

    conv1x1: Callable[..., Tensor]
    conv1x1_stats: Callable[..., tuple[Tensor, Tensor]]
    conv1x1_affine_relu: Callable[..., Tensor]
    conv1x1_backward: Callable[..., tuple[Tensor | None, Tensor | None]]


def with_torch_convolution(
    normalize_relu: Callable[..., Tensor],
    batch_stats: Callable[[Tensor, TrainingBatchNorm], Tensor],
) -> DenseConvolution:
    """A backend's 1x1 convolutions: torch's, with what the backend has to put around them."""

    def activated(x: Tensor, prologue: Affine | None) -> Tensor:
        return x if prologue is None else normalize_relu(x, *prologue)

    def conv1x1(
        x: Tensor, weight: Tensor, *, prologue: Affine | None = None, stride: int = 1
    ) -> Tensor:
        """z = the dense convolution of x and a weight of (K, C, 1, 1)."""
        return _conv(activated(x, prologue), weight, stride, 1, 1)

    def conv1x1_stats(
        x: Tensor,
        weight: Tensor,
        bn: TrainingBatchNorm,
        *,
        prologue: Affine | None = None,
        stride: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """z = conv1x1(x) and its `batch_stats`."""
        z = conv1x1(x, weight, prologue=prologue, stride=stride)
        return z, batch_stats(z, bn)

    def conv1x1_affine_relu(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        residual: Tensor | None = None,
        residual_affine: Affine | None = None,
    ) -> Tensor:
        """y = normalize_relu(conv1x1(x), ...)."""
        z = conv1x1(x, weight)
        return normalize_relu(z, scale, shift, residual=residual, residual_affine=residual_affine)

    def conv1x1_backward(
        dz: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        prologue: Affine | None = None,
        stride: int = 1,
        need_dx: bool = True,
        need_dweight: bool = True,
        dx: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of what conv1x1 convolves and of its weight, None where not needed.

        dx: a gradient from elsewhere, to which this one is added in place.
        """
        read = activated(x, prologue) if need_dweight else x
        found, dweight = _conv_gradients(dz, read, weight, stride, 1, 1, need_dx, need_dweight)
        return found if dx is None or found is None else dx.add_(found), dweight

    return DenseConvolution(conv1x1, conv1x1_stats, conv1x1_affine_relu, conv1x1_backward)


conv1x1, conv1x1_stats, conv1x1_affine_relu, conv1x1_backward = with_torch_convolution(
    normalize_relu, batch_stats
)


def _relu_gradient(dy: Tensor, z: Tensor, vectors: Tensor, y: Tensor | None, relu: bool) -> Tensor:
    """g: dy where the ReLU passed, else 0; a NaN passes."""
    dy = dy.to(vectors.dtype)
    if not relu:
        return dy
    before = _affine(z, vectors[3], vectors[4]) if y is None else y
    return torch.where(before <= 0, 0, dy)


def bn_relu_backward(
    dy: Tensor, z: Tensor, vectors: Tensor, *, y: Tensor | None = None, relu: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(g), sum(g * (z - mean) * rstd) over N, H and W, and their `bn_gradient_vectors`.

    The sums are the gradients of beta and gamma. g is dy where relu passed: where not
    scale*z + shift <= 0, or not y <= 0 if y is given; with relu=False it is dy.
    """
    g = _relu_gradient(dy, z, vectors, y, relu)
    xhat = (z.to(vectors.dtype) - _per_channel(vectors[0])) * _per_channel(vectors[2])
    sum_g, sum_g_xhat = g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))
    return sum_g, sum_g_xhat, bn_gradient_vectors(sum_g, sum_g_xhat, vectors, max(_count(z), 1))


def bn_residual_relu_backward(
    dy: Tensor,
    z: Tensor,
    y: Tensor,
    vectors: Tensor,
    *,
    sums: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, the gradient of the residual, and `bn_relu_backward` with the mask of y.

    `sums`: another backend's bn_relu_backward.
    """
    g = masked(dy, y)
    return g, *(sums or bn_relu_backward)(g, z, vectors, relu=False)


def with_sums(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[
    Callable[..., tuple[Tensor, Tensor, Tensor]],
    Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
]:
    """A backend's bn_relu_backward and bn_residual_relu_backward, by one kernel for both.

    kernel(dy, z, vectors, y, relu, g): what bn_relu_backward gives; g, where given, is filled.
    """

    def bn_relu_backward(
        dy: Tensor, z: Tensor, vectors: Tensor, *, y: Tensor | None = None, relu: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sum(g), sum(g * (z - mean) * rstd), and (2, C): b and c of dz = scale*g + b*z + c."""
        return kernel(dy, z, vectors, y, relu, None)

    def bn_residual_relu_backward(
        dy: Tensor, z: Tensor, y: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g, the gradient of the residual, and bn_relu_backward with the mask of y."""
        g = torch.empty_like(z, memory_format=torch.channels_last)
        return g, *kernel(dy, z, vectors, y, True, g)

    return bn_relu_backward, bn_residual_relu_backward


def masked(dy: Tensor, y: Tensor) -> Tensor:
    """g: dy where the ReLU passed, as its result y shows."""
    return _nhwc(torch.ops.aten.threshold_backward.default(dy, y, 0))


def bn_relu_input_gradient(
    dy: Tensor,
    z: Tensor,
    vectors: Tensor,
    coefficients: Tensor | None,
    *,
    y: Tensor | None = None,
    relu: bool = True,
    inplace: bool = False,
) -> Tensor:
    """dz = scale*g [+ b*z + c], (b, c) = coefficients; g as in `bn_relu_backward`.

    Without coefficients the statistics are frozen, and infinite z does not matter. `inplace` allows
    to overwrite and return dy.
    """
    dz = _relu_gradient(dy, z, vectors, y, relu) * _per_channel(vectors[3])
    if coefficients is not None:
        dz = dz + _affine(z, coefficients[0], coefficients[1])
    return _nhwc(dz.to(dy.dtype))


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    bn: BNGradient | None = None,
    y: Tensor | None = None,
    relu: bool = True,
    prologue: Affine | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the convolution's input and weight, None where not needed.

    bn=(z, vectors, coefficients): the gradient of the convolution's output is
    `bn_relu_input_gradient(dy, *bn, y=y, relu=relu)`; bn=None: it is dy. With a prologue the
    convolution's input is the activation that the prologue makes of x, and dx is its gradient.
    """
    dz = dy if bn is None else bn_relu_input_gradient(dy, *bn, y=y, relu=relu)
    read = _activated(x, prologue) if need_dweight else x
    return _conv_gradients(dz, read, weight, stride, groups, dilation, need_dx, need_dweight)


# Per-channel vectors ---------------------------------------------------------------------------


def bn_affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Affine:
    """scale = gamma / sqrt(var + eps), shift = beta - mean * scale; None stands for 1 and 0."""
    return _scale_and_shift(gamma, beta, mean, torch.rsqrt(var + eps))


conv_bn_relu = with_batch_norms(conv_affine_relu, bn_affine)


def _scale_and_shift(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, rstd: Tensor
) -> Affine:
    scale = rstd if gamma is None else gamma * rstd
    shift = mean * -scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
    return scale, shift


def bn_vectors(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float, unbias: float
) -> Tensor:
    """(5, C): mean, unbias * var, rstd = 1 / sqrt(var + eps), scale and shift of `bn_affine`."""
    rstd = torch.rsqrt(var + eps)
    scale, shift = _scale_and_shift(gamma, beta, mean, rstd)
    return torch.stack((mean, unbias * var, rstd, scale, shift))


def bn_gradient_vectors(sum_g: Tensor, sum_g_xhat: Tensor, vectors: Tensor, count: int) -> Tensor:
    """(2, C): b and c of dz = scale*g + b*z + c, from sums over `count` values.

    dz = scale * (g - sum_g / count - xhat * sum_g_xhat / count), with xhat = (z - mean) * rstd.
    """
    mean, _, rstd, scale, _ = vectors.unbind()
    of_mean = scale * (-1 / count)
    b = of_mean * rstd * sum_g_xhat
    return torch.stack((b, torch.addcmul(of_mean * sum_g, b, mean, value=-1)))
