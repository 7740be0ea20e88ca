"""The compiled CPU kernels (csrc/cpu), behind the contract of `reference`.

One group (a dense convolution) is what torch's own convolution, oneDNN, is made for: it is used for
groups == 1, with BatchNorm and ReLU around it from the compiled kernels, where those do not compute
with fewer multiplications, or oneDNN is faster even so (`_is_dense`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..problem import ConvProblem
from . import reference
from .reference import (
    Affine,
    BatchNorm,
    BNGradient,
    TrainingBatchNorm,
    dense_batch_norm,
    dense_training_batch_norm,
)

try:
    from .. import _C
except ImportError as error:
    _MISSING: str | None = f"the compiled library resnext_kernels._C is missing ({error})"
else:
    _MISSING = None

NAME = "cpu"

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(problem: ConvProblem) -> str | None:
    """None where the compiled CPU kernels serve `problem`, else the reason."""
    if _MISSING is not None:
        return _MISSING
    if problem.device_type != "cpu":
        return f"tensors must be on the CPU, not on {problem.device_type!r}"
    if problem.dtype not in _DTYPE_CODES:
        return f"dtype must be float32, bfloat16 or float16, not {problem.dtype}"
    return None


@lru_cache(maxsize=4096)
def _problem(
    shape: torch.Size,
    k: int,
    groups: int,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    weight_channels_last: bool,
) -> tuple[_C.ConvProblem, tuple[int, ...], tuple[int, ...]]:
    """The compiled library's problem, and shape and strides of the convolution's output."""
    n, c, h, w = shape
    code = _DTYPE_CODES[dtype]
    problem = _C.ConvProblem(n, h, w, c, k, groups, stride, dilation, code, weight_channels_last)
    out_h, out_w = (h - 1) // stride + 1, (w - 1) // stride + 1
    return problem, (n, k, out_h, out_w), (out_h * out_w * k, 1, out_w * k, k)


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _ptrs(affine: Affine | None) -> tuple[int, int]:
    return (0, 0) if affine is None else (affine[0].data_ptr(), affine[1].data_ptr())


def _vector(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.float32)


def _vectors(channels: int) -> Tensor:
    return torch.empty((5, channels), dtype=torch.float32)


def _row(t: Tensor | None, row: int) -> int:
    """Where this row of (R, C) begins; 0 without one."""
    return 0 if t is None else t.data_ptr() + 4 * t.shape[1] * row


def _m_and_c(z: Tensor) -> tuple[int, int]:
    n, c, h, w = z.shape
    return n * h * w, c


# groups == 1: oneDNN's convolution -----------------------------------------------------------

# C * K from which on oneDNN is faster than the compiled kernels' F(2, 3), where it ever is.
_DENSE_LIMIT = 256 * 256


def _is_dense(
    x: Tensor, weight: Tensor, stride: int, dilation: int, backward: bool = False
) -> bool:
    """Whether this convolution of one group is one for oneDNN."""
    fewer_multiplications = (
        stride == 1 and dilation == 1 and x.shape[3] >= 4 and _C.cpu_isa().startswith("avx512")
    )
    # Forward the compiled kernels are faster at 64 (56x56) to 2048 (7x7) channels, but in bfloat16,
    # where it depends on the map; in float16 oneDNN takes many times as long, backward too.
    limited = x.dtype == torch.bfloat16 or (backward and x.dtype == torch.float32)
    return not fewer_multiplications or (limited and weight.numel() > 9 * _DENSE_LIMIT)


def _dense_conv(
    x: Tensor, weight: Tensor, prologue: Affine | None, stride: int, dilation: int
) -> Tensor:
    if prologue is not None:
        x = normalize_relu(x, *prologue)
    z = torch.conv2d(x, weight, None, stride, dilation, dilation)
    return z.contiguous(memory_format=torch.channels_last)


# The contract --------------------------------------------------------------------------------


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
    k = weight.shape[0]
    if groups == 1 and _is_dense(x, weight, stride, dilation):
        z = _dense_conv(x, weight, prologue, stride, dilation)
        _normalize_relu(z, scale, shift, residual, None, z)
        return z
    problem, shape, strides = _problem(
        x.shape, k, groups, stride, dilation, x.dtype, not weight.is_contiguous()
    )
    y = x.new_empty_strided(shape, strides)
    _C.conv_affine_relu(
        problem,
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _ptr(residual),
        *_ptrs(prologue),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


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
    if groups == 1 and _is_dense(x, weight, stride, dilation):
        affine = None if prologue is None else bn_affine(*prologue)
        return conv_affine_relu(
            x,
            weight,
            *bn_affine(*bn),
            residual=residual,
            prologue=affine,
            stride=stride,
            dilation=dilation,
        )
    problem, shape, strides = _problem(
        x.shape, weight.shape[0], groups, stride, dilation, x.dtype, not weight.is_contiguous()
    )
    bn = dense_batch_norm(bn)
    prologue = None if prologue is None else dense_batch_norm(prologue)
    y = x.new_empty_strided(shape, strides)
    _C.conv_bn_relu(
        problem,
        x.data_ptr(),
        weight.data_ptr(),
        *_bn_ptrs(bn),
        _ptr(residual),
        *((0, 0, 0, 0, 0.0) if prologue is None else _bn_ptrs(prologue)),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


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
    """z = conv(x), and with a BatchNorm the vectors of z's statistics."""
    k = weight.shape[0]
    if groups == 1 and _is_dense(x, weight, stride, dilation):
        z = _dense_conv(x, weight, prologue, stride, dilation)
        return z, None if bn is None else batch_stats(z, bn)
    problem, shape, strides = _problem(
        x.shape, k, groups, stride, dilation, x.dtype, not weight.is_contiguous()
    )
    z = x.new_empty_strided(shape, strides)
    vectors = None if bn is None else _vectors(k)
    _C.conv_stats(
        problem,
        x.data_ptr(),
        weight.data_ptr(),
        *_ptrs(prologue),
        z.data_ptr(),
        _row(vectors, 0),
        _row(vectors, 1),
        torch.get_num_threads(),
    )
    return z, None if bn is None or vectors is None else _finished(vectors, bn, z)


# Instruction sets on which the compiled 1x1 convolution is faster than oneDNN's.
_CONV1X1_ISAS = ("avx512_bf16", "avx512", "avx2")


def _is_compiled_conv1x1(x: Tensor, weight: Tensor) -> bool:
    k, c = weight.shape[:2]
    return (
        x.dtype == torch.float32 and c % 16 == 0 and k % 16 == 0 and _C.cpu_isa() in _CONV1X1_ISAS
    )


def _strided(x: Tensor, stride: int) -> Tensor:
    """The pixels of x that a 1x1 convolution of this stride reads."""
    if stride == 1:
        return x
    return x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)


def _conv1x1(
    x: Tensor,
    weight: Tensor,
    prologue: Affine | None,
    affine: Affine | None,
    residual: Tensor | None,
    vectors: Tensor | None = None,
) -> Tensor:
    n, _, h, w = x.shape
    k = weight.shape[0]
    y = torch.empty((n, k, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    _C.conv1x1(
        *_m_and_c(x),
        k,
        x.data_ptr(),
        *_ptrs(prologue),
        weight.data_ptr(),
        *_ptrs(affine),
        _ptr(residual),
        y.data_ptr(),
        _row(vectors, 0),
        _row(vectors, 1),
        torch.get_num_threads(),
    )
    return y


def conv1x1(
    x: Tensor, weight: Tensor, *, prologue: Affine | None = None, stride: int = 1
) -> Tensor:
    """z = the dense convolution of x and a weight of (K, C, 1, 1)."""
    if _is_compiled_conv1x1(x, weight):
        return _conv1x1(_strided(x, stride), weight, prologue, None, None)
    return _by_torch.conv1x1(x, weight, prologue=prologue, stride=stride)


def conv1x1_stats(
    x: Tensor,
    weight: Tensor,
    bn: TrainingBatchNorm,
    *,
    prologue: Affine | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """z = conv1x1(x), and the vectors of its statistics."""
    if not _is_compiled_conv1x1(x, weight):
        return _by_torch.conv1x1_stats(x, weight, bn, prologue=prologue, stride=stride)
    vectors = _vectors(weight.shape[0])
    z = _conv1x1(_strided(x, stride), weight, prologue, None, None, vectors)
    return z, _finished(vectors, bn, z)


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
    if residual_affine is None and _is_compiled_conv1x1(x, weight):
        return _conv1x1(x, weight, None, (scale, shift), residual)
    z = conv1x1(x, weight)
    _normalize_relu(z, scale, shift, residual, residual_affine, z)
    return z


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
    if not _is_compiled_conv1x1(x, weight):
        return _by_torch.conv1x1_backward(
            dz,
            x,
            weight,
            prologue=prologue,
            stride=stride,
            need_dx=need_dx,
            need_dweight=need_dweight,
            dx=dx,
        )
    n, k, h, w = dz.shape
    c = x.shape[1]
    da = dweight = None
    adds = dx is not None and stride == 1
    if need_dx:
        da = dx
        if not adds:
            da = torch.empty((n, c, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    if need_dweight:
        dweight = torch.empty(weight.shape, dtype=weight.dtype)
    read = _strided(x, stride) if need_dweight else None
    _C.conv1x1_backward(
        n * h * w,
        c,
        k,
        dz.data_ptr(),
        _ptr(read),
        *_ptrs(prologue),
        weight.data_ptr(),
        _ptr(da),
        adds,
        _ptr(dweight),
        torch.get_num_threads(),
    )
    if da is None or stride == 1:
        return da, dweight
    if dx is None:
        dx = torch.zeros_like(x, memory_format=torch.channels_last)
    dx[:, :, ::stride, ::stride] += da
    return dx, dweight


def batch_stats(z: Tensor, bn: TrainingBatchNorm) -> Tensor:
    """The vectors of the mean and variance of every channel over N, H and W."""
    m, c = _m_and_c(z)
    vectors = _vectors(c)
    _C.batch_stats(
        _DTYPE_CODES[z.dtype],
        m,
        c,
        z.data_ptr(),
        _row(vectors, 0),
        _row(vectors, 1),
        torch.get_num_threads(),
    )
    return _finished(vectors, bn, z)


def _finished(vectors: Tensor, bn: TrainingBatchNorm, z: Tensor) -> Tensor:
    """`vectors`, of which mean and biased variance of z stand in the first two rows."""
    gamma, beta, eps = dense_training_batch_norm(bn)
    m, c = _m_and_c(z)
    at = vectors.data_ptr()
    _C.bn_vectors(c, _ptr(gamma), _ptr(beta), at, at + 4 * c, eps, m / max(m - 1, 1), at)
    return vectors


def _normalize_relu(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_affine: Affine | None,
    y: Tensor,
) -> None:
    m, c = _m_and_c(z)
    _C.normalize_relu(
        _DTYPE_CODES[z.dtype],
        m,
        c,
        z.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _ptr(residual),
        *_ptrs(residual_affine),
        y.data_ptr(),
        torch.get_num_threads(),
    )


def normalize_relu(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
) -> Tensor:
    """y = relu(scale * z + shift [+ residual | + rs * residual + rh]), residual_affine=(rs, rh)."""
    y = torch.empty_like(z, memory_format=torch.channels_last)
    _normalize_relu(z, scale, shift, residual, residual_affine, y)
    return y


_by_torch = reference.with_torch_convolution(normalize_relu, batch_stats)


def _sums(
    dy: Tensor, z: Tensor, vectors: Tensor, y: Tensor | None, relu: bool, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    m, c = _m_and_c(z)
    sum_g, sum_g_xhat = _vector(c), _vector(c)
    coefficients = torch.empty((2, c), dtype=torch.float32)
    _C.bn_relu_backward(
        _DTYPE_CODES[z.dtype],
        m,
        c,
        dy.data_ptr(),
        z.data_ptr(),
        *_mask(vectors, relu),
        _ptr(y),
        _row(vectors, 0),
        _row(vectors, 2),
        sum_g.data_ptr(),
        sum_g_xhat.data_ptr(),
        _ptr(g),
        torch.get_num_threads(),
    )
    _C.bn_gradient_vectors(
        c,
        sum_g.data_ptr(),
        sum_g_xhat.data_ptr(),
        vectors.data_ptr(),
        max(m, 1),
        _row(coefficients, 0),
        _row(coefficients, 1),
    )
    return sum_g, sum_g_xhat, coefficients


bn_relu_backward, bn_residual_relu_backward = reference.with_sums(_sums)


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
    """dz = scale*g [+ b*z + c]; with inplace, in dy's memory."""
    m, channels = _m_and_c(z)
    dz = dy if inplace else torch.empty_like(z, memory_format=torch.channels_last)
    _C.bn_relu_input_gradient(
        _DTYPE_CODES[z.dtype],
        m,
        channels,
        dy.data_ptr(),
        z.data_ptr(),
        *_mask(vectors, relu),
        _ptr(y),
        _row(vectors, 3),
        _row(coefficients, 0),
        _row(coefficients, 1),
        dz.data_ptr(),
        torch.get_num_threads(),
    )
    return dz


def _mask(vectors: Tensor | None, relu: bool) -> tuple[int, int]:
    """scale and shift; without a ReLU neither."""
    return (_row(vectors, 3), _row(vectors, 4)) if relu else (0, 0)


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
    """Gradients of the convolution's input and weight, None where not needed."""
    if groups == 1 and _is_dense(x, weight, stride, dilation, backward=True):
        dz = dy if bn is None else bn_relu_input_gradient(dy, *bn, y=y, relu=relu)
        if prologue is not None and need_dweight:
            x = normalize_relu(x, *prologue)
        return reference.conv_backward(
            dz,
            x,
            weight,
            stride=stride,
            dilation=dilation,
            need_dx=need_dx,
            need_dweight=need_dweight,
        )
    dx = torch.empty_like(x, memory_format=torch.channels_last) if need_dx else None
    dweight = torch.empty_like(weight) if need_dweight else None
    z, vectors, coefficients = bn or (None, None, None)
    problem, _, _ = _problem(
        x.shape, weight.shape[0], groups, stride, dilation, x.dtype, not weight.is_contiguous()
    )
    _C.conv_backward(
        problem,
        dy.data_ptr(),
        _ptr(z),
        *_mask(vectors, relu),
        _ptr(y),
        _row(vectors, 3),
        _row(coefficients, 0),
        _row(coefficients, 1),
        x.data_ptr(),
        *_ptrs(prologue),
        weight.data_ptr(),
        _ptr(dx),
        _ptr(dweight),
        torch.get_num_threads(),
    )
    return dx, dweight


def _bn_ptrs(bn: BatchNorm) -> tuple[int, int, int, int, float]:
    gamma, beta, mean, var, eps = bn
    return _ptr(gamma), _ptr(beta), mean.data_ptr(), var.data_ptr(), eps


def bn_affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Affine:
    """scale = gamma / sqrt(var + eps), shift = beta - mean * scale."""
    bn = dense_batch_norm((gamma, beta, mean, var, eps))
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    _C.bn_affine(
        mean.shape[0],
        *_bn_ptrs(bn),
        scale.data_ptr(),
        shift.data_ptr(),
    )
    return scale, shift


def bn_vectors(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float, unbias: float
) -> Tensor:
    """(5, C): mean, unbias * var, rstd, scale, shift."""
    bn = dense_batch_norm((gamma, beta, mean, var, eps))
    channels = mean.shape[0]
    vectors = _vectors(channels)
    _C.bn_vectors(
        channels,
        *_bn_ptrs(bn),
        unbias,
        vectors.data_ptr(),
    )
    return vectors


def update_running(vectors: Tensor, mean: Tensor, var: Tensor, momentum: float) -> bool:
    """running = (1 - momentum) * running + momentum * batch, in place, as autograd is told.

    False, with nothing done, for tensors that are not for the compiled library, or are for ATen to
    refuse.
    """
    if _MISSING is not None or not vectors.is_cpu:
        return False
    for t in (vectors, mean, var):
        if t.dtype is not torch.float32 or not t.is_contiguous():
            return False
        if t.requires_grad or t.is_inference():
            return False
    _C.update_running(mean.shape[0], vectors.data_ptr(), momentum, mean.data_ptr(), var.data_ptr())
    increment_version(mean)
    increment_version(var)
    return True
