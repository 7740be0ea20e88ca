"""The compiled CUDA kernels (csrc/cuda), behind the contract of `reference`.

Each function asks the library for a plan, which is plain data (kernels, grids, parameters), and
hands it to the CUDA runtime on torch's current stream. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..problem import ConvProblem, weight_format
from . import reference
from .reference import (
    Affine,
    BatchNorm,
    BNGradient,
    TrainingBatchNorm,
    dense_batch_norm,
    dense_training_batch_norm,
)
from .reference import aligned as _aligned

try:
    from .. import _C
except ImportError as error:
    _MISSING: str | None = f"the compiled library resnext_kernels._C is missing ({error})"
else:
    _MISSING = None if _C.cuda_compiled() else "the compiled library was built without CUDA"

NAME = "cuda"


_DTYPE_CODES = {torch.bfloat16: 1, torch.float16: 2}
_BNPtrs = tuple[int, int, int, int, int, float]  # channels, gamma, beta, mean, var, eps


def why_not(problem: ConvProblem) -> str | None:
    """None where the compiled CUDA kernels serve `problem`, else the reason."""
    if _MISSING is not None:
        return _MISSING
    if problem.device_type != "cuda":
        return f"tensors must be on a CUDA device, not on {problem.device_type!r}"
    return _why_no_device(problem.device_index) or _why_not_served(problem)


def _why_no_device(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "this is a ROCm build of torch, the kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the device's compute capability must be at least 8.0, not {major}.{minor}"
    return None


def _why_not_served(problem: ConvProblem) -> str | None:
    """What the kernels do not take, whatever the device."""
    if problem.dtype not in _DTYPE_CODES:
        return f"dtype must be float16 or bfloat16, not {problem.dtype}"
    shape = (problem.n, problem.c, problem.h, problem.w)
    return (
        _C.cuda_why_not(
            _problem(
                shape,
                problem.out_channels,
                problem.groups,
                problem.stride,
                problem.dilation,
                problem.dtype,
            )
        )
        or None
    )


@lru_cache(maxsize=4096)
def _problem(
    shape: tuple[int, int, int, int],
    k: int,
    groups: int,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
) -> _C.ConvProblem:
    n, c, h, w = shape
    return _C.ConvProblem(n, h, w, c, k, groups, stride, dilation, _DTYPE_CODES[dtype])


@lru_cache(maxsize=64)
def _device(device: torch.device) -> _C.CudaDevice:
    return _C.cuda_device(device.index)


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _ptrs(affine: Affine | None) -> tuple[int, int]:
    return (0, 0) if affine is None else (_ptr(affine[0]), _ptr(affine[1]))


def _run(plan: _C.CudaPlan, on: Tensor) -> None:
    """Enqueue the plan on the current stream of the device that `on` is on."""
    workspace = _vector(on, plan.workspace_floats) if plan.workspace_floats else None
    index = on.device.index
    # a thirtieth of the time of torch.cuda.current_stream(index).cuda_stream
    stream = torch._C._cuda_getCurrentRawStream(index)
    _C.cuda_run(plan, _ptr(workspace), index, stream)


def _dense(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight, aligned, as (K, D, 3, 3), or True and as (K, 3, 3, D) in memory."""
    memory_format = weight_format(weight)
    weight = weight.contiguous() if memory_format is None else weight
    return _aligned(weight), memory_format is torch.channels_last


def _maybe_aligned(t: Tensor | None) -> Tensor | None:
    return None if t is None else _aligned(t)


def _aligned_pair(affine: Affine | None) -> Affine | None:
    return None if affine is None else (_aligned(affine[0]), _aligned(affine[1]))


def _vector(like: Tensor, length: int) -> Tensor:
    return torch.empty(length, dtype=torch.float32, device=like.device)


def _vectors(rows: int, channels: int, like: Tensor) -> Tensor:
    return torch.empty((rows, channels), dtype=torch.float32, device=like.device)


def _out(x: Tensor, k: int, stride: int) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _matrix(z: Tensor) -> tuple[int, int, int, _C.CudaDevice]:
    """dtype, M, C and the device: what every plan for z as an (M, C) matrix begins with."""
    n, c, h, w = z.shape
    return _DTYPE_CODES[z.dtype], n * h * w, c, _device(z.device)


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
    given = (scale.shape[0], _ptr(scale), _ptr(shift), 0, 0, 0.0)
    return _conv_bn_relu(x, weight, given, residual, prologue, stride, groups, dilation)


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
    bn = dense_batch_norm(bn)
    in_affine = None if prologue is None else bn_affine(*prologue)
    return _conv_bn_relu(x, weight, _bn_ptrs(bn), residual, in_affine, stride, groups, dilation)


def _conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn: _BNPtrs,
    residual: Tensor | None,
    prologue: Affine | None,
    stride: int,
    groups: int,
    dilation: int,
) -> Tensor:
    """Without a variance, the first two vectors of `bn` are scale and shift."""
    k = weight.shape[0]
    x, residual, prologue = _aligned(x), _maybe_aligned(residual), _aligned_pair(prologue)
    weight, channels_last = _dense(weight)
    y = _out(x, k, stride)
    plan = _C.cuda_plan_conv_bn_relu(
        _problem(tuple(x.shape), k, groups, stride, dilation, x.dtype),
        _device(x.device),
        _ptr(x),
        _ptr(weight),
        channels_last,
        bn,
        _ptr(residual),
        *_ptrs(prologue),
        _ptr(y),
    )
    _run(plan, x)
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
    x, prologue = _aligned(x), _aligned_pair(prologue)
    weight, channels_last = _dense(weight)
    z = _out(x, k, stride)
    vectors = None
    if bn is not None:
        bn, vectors = dense_training_batch_norm(bn), _vectors(5, k, z)
    plan = _C.cuda_plan_conv_stats(
        _problem(tuple(x.shape), k, groups, stride, dilation, x.dtype),
        _device(x.device),
        _ptr(x),
        _ptr(weight),
        channels_last,
        *_ptrs(prologue),
        _ptr(z),
        _training_ptrs(bn, k),
        _ptr(vectors),
    )
    _run(plan, x)
    return z, vectors


def batch_stats(z: Tensor, bn: TrainingBatchNorm) -> Tensor:
    """The vectors of the mean and variance of every channel over N, H and W."""
    z, c = _aligned(z), z.shape[1]
    bn, vectors = dense_training_batch_norm(bn), _vectors(5, c, z)
    _run(_C.cuda_plan_batch_stats(*_matrix(z), _ptr(z), _training_ptrs(bn, c), _ptr(vectors)), z)
    return vectors


def normalize_relu(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
) -> Tensor:
    """y = relu(scale * z + shift [+ residual | + rs * residual + rh]), residual_affine=(rs, rh)."""
    z, residual = _aligned(z), _maybe_aligned(residual)
    scale, shift, residual_affine = _aligned(scale), _aligned(shift), _aligned_pair(residual_affine)
    y = torch.empty_like(z, memory_format=torch.channels_last)
    plan = _C.cuda_plan_normalize_relu(
        *_matrix(z),
        _ptr(z),
        _ptr(scale),
        _ptr(shift),
        _ptr(residual),
        *_ptrs(residual_affine),
        _ptr(y),
    )
    _run(plan, z)
    return y


def _sums(
    dy: Tensor, z: Tensor, vectors: Tensor, y: Tensor | None, relu: bool, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dy, z, y, vectors = _aligned(dy), _aligned(z), _maybe_aligned(y), _aligned(vectors)
    c = z.shape[1]
    sum_g, sum_g_xhat, coefficients = _vector(z, c), _vector(z, c), _vectors(2, c, z)
    plan = _C.cuda_plan_bn_relu_backward(
        *_matrix(z),
        _ptr(dy),
        _ptr(z),
        _ptr(vectors),
        _ptr(y),
        relu,
        _ptr(sum_g),
        _ptr(sum_g_xhat),
        _ptr(coefficients),
        _ptr(g),
    )
    _run(plan, z)
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
    dy, z, y = _aligned(dy), _aligned(z), _maybe_aligned(y)
    vectors, coefficients = _aligned(vectors), _maybe_aligned(coefficients)
    dz = dy if inplace else torch.empty_like(z, memory_format=torch.channels_last)
    plan = _C.cuda_plan_bn_relu_input_gradient(
        *_matrix(z),
        _ptr(dy),
        _ptr(z),
        _ptr(vectors),
        _ptr(coefficients),
        _ptr(y),
        relu,
        _ptr(dz),
    )
    _run(plan, z)
    return dz


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
    dy, x, y = _aligned(dy), _aligned(x), _maybe_aligned(y)
    weight, channels_last = _dense(weight)
    z, vectors, coefficients = map(_maybe_aligned, bn or (None,) * 3)
    prologue = _aligned_pair(prologue)
    dx = torch.empty_like(x, memory_format=torch.channels_last) if need_dx else None
    dweight = torch.empty_like(weight) if need_dweight else None
    plan = _C.cuda_plan_conv_backward(
        _problem(tuple(x.shape), weight.shape[0], groups, stride, dilation, x.dtype),
        _device(x.device),
        _ptr(dy),
        _ptr(z),
        _ptr(vectors),
        _ptr(coefficients),
        _ptr(y),
        relu,
        _ptr(x),
        *_ptrs(prologue),
        _ptr(weight),
        channels_last,
        _ptr(dx),
        _ptr(dweight),
    )
    _run(plan, x)
    return dx, dweight


# Per-channel vectors: one kernel for each function ---------------------------------------------


def _bn_ptrs(bn: BatchNorm) -> _BNPtrs:
    gamma, beta, mean, var, eps = bn
    return mean.shape[0], _ptr(gamma), _ptr(beta), _ptr(mean), _ptr(var), eps


def _training_ptrs(bn: TrainingBatchNorm | None, channels: int) -> _BNPtrs:
    gamma, beta, eps = (None, None, 0.0) if bn is None else bn
    return channels, _ptr(gamma), _ptr(beta), 0, 0, eps


def bn_affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Affine:
    """scale = gamma / sqrt(var + eps), shift = beta - mean * scale."""
    bn = dense_batch_norm((gamma, beta, mean, var, eps))
    scale, shift = affine = _vectors(2, mean.shape[0], mean)
    _run(_C.cuda_plan_bn_affine(_bn_ptrs(bn), _ptr(affine)), affine)
    return scale, shift


def bn_vectors(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float, unbias: float
) -> Tensor:
    """(5, C): mean, unbias * var, rstd, scale, shift."""
    bn = dense_batch_norm((gamma, beta, mean, var, eps))
    vectors = _vectors(5, mean.shape[0], mean)
    _run(_C.cuda_plan_bn_vectors(_bn_ptrs(bn), unbias, _ptr(vectors)), vectors)
    return vectors


# With what is ATen's ---------------------------------------------------------------------------


def _of_any_channels(kernel: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` for z of the channels that it takes, else `other`."""

    def run(z: Tensor, *args: Any, **options: Any) -> Any:
        return (kernel if z.shape[1] % 8 == 0 else other)(z, *args, **options)

    return run


# The dense convolution is cuDNN's, of as many channels out as there are.
conv1x1, conv1x1_stats, conv1x1_affine_relu, conv1x1_backward = reference.with_torch_convolution(
    _of_any_channels(normalize_relu, reference.normalize_relu),
    _of_any_channels(batch_stats, reference.batch_stats),
)
