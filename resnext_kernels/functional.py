"""The fused operations as functions: validation, autocast, memory format, running statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops

__all__ = [
    "BatchNormState",
    "bn_relu",
    "bn_relu_max_pool",
    "bottleneck",
    "conv1x1",
    "conv_bn_relu",
    "grouped_conv_bn_relu",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BatchNormState(NamedTuple):
    """What one BatchNorm layer brings to a call.

    Args:
        gamma, beta: Scale and shift, (C,); None for 1 and 0.
        running_mean, running_var: (C,). Used for normalisation unless `training`; with `training`
            updated in place. None: not tracked.
        training: Normalise with the statistics of the batch.
        momentum: Weight of the batch in the running statistics; a number or a tensor of one.
        eps: Added to the variance.
        group: Name of the process group that shares the statistics; "" for none.
    """

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool = False
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    group: str = ""


# Validation ----------------------------------------------------------------------------------


def _check_image(name: str, t: Tensor) -> torch.Size:
    """The shape of `t`, which may be a batch of images."""
    shape = t.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {tuple(shape)}")
    if t.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must be of dtype {allowed}, got {t.dtype}")
    if shape[1] == 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{name} must have C, H and W of at least 1, got shape {tuple(shape)}")
    return shape


def _check_like(name: str, t: Tensor, shape: tuple[int, ...], other: str, like: Tensor) -> None:
    """`t` has this shape, and the dtype and the device of the tensor `other`."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype is not like.dtype:
        raise TypeError(f"{name} must be of {other}'s dtype {like.dtype}, got {t.dtype}")
    if not (t.is_cpu and like.is_cpu) and t.device != like.device:  # which takes longer to make
        raise ValueError(f"{name} must be on {other}'s device {like.device}, got {t.device}")


def _check_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_conv(
    name: str,
    x: Tensor,
    channels: int,
    weight: Tensor,
    stride: int,
    groups: int,
    dilation: int,
) -> int:
    """The output channels of `weight`, that of a grouped 3x3 convolution of the tensor `name`."""
    if not (
        type(stride) is type(groups) is type(dilation) is int
        and stride > 0
        and groups > 0
        and dilation > 0
    ):
        for number, value in (("stride", stride), ("groups", groups), ("dilation", dilation)):
            _check_int(number, value)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of {name}, got {groups}")
    shape = weight.shape
    out_channels = shape[0] if shape else 0
    if shape != (out_channels, channels // groups, 3, 3) or out_channels == 0:
        raise ValueError(
            f"weight must have shape (K, {channels // groups}, 3, 3) for {channels} channels of "
            f"{name} in {groups} groups, got {tuple(shape)}"
        )
    if out_channels % groups:
        raise ValueError(
            f"groups must divide the {out_channels} output channels of weight, got {groups}"
        )
    _check_like("weight", weight, shape, name, x)
    return out_channels


def _check_1x1(name: str, weight: Tensor, channels: int, other: str, like: Tensor) -> None:
    """`weight` is that of a dense 1x1 convolution of so many channels, like the tensor `other`."""
    if weight.dim() != 4 or weight.shape[0] == 0 or weight.shape[1:] != (channels, 1, 1):
        raise ValueError(f"{name} must have shape (K, {channels}, 1, 1), got {tuple(weight.shape)}")
    _check_like(name, weight, weight.shape, other, like)


def _check_bn(bn: BatchNormState, name: str, z: Tensor, channels: int, count: int) -> None:
    """`bn` fits `channels` channels on z's device, and `count` values a channel if training."""
    gamma, beta, running_mean, running_var, training, _, eps, group = bn
    if not eps >= 0:
        raise ValueError(f"{name}eps must be at least 0, got {eps}")
    shape, on_cpu = (channels,), z.is_cpu
    for vector in (gamma, beta, running_mean, running_var):
        if vector is not None and (
            vector.shape != shape
            or (not (on_cpu and vector.is_cpu) and vector.device != z.device)
            or not vector.is_floating_point()
        ):
            field = next(field for field, value in bn._asdict().items() if value is vector)
            raise _wrong_vector(f"{name}{field}", vector, channels, z.device)
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            f"{name}running_mean and {name}running_var must both be tensors or both be None"
        )
    if not training:
        if running_mean is None:
            raise ValueError(
                f"{name}running_mean and {name}running_var must be tensors unless training, "
                "got None"
            )
    elif count == 1 and not group:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{(z.shape[0], channels, 1, 1)}"
        )


def _wrong_vector(name: str, vector: Tensor, channels: int, device: torch.device) -> Exception:
    """What is wrong with a vector of a BatchNorm."""
    if vector.shape != (channels,):
        return ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}")
    if not vector.is_floating_point():
        return TypeError(f"{name} must be of a floating-point dtype, got {vector.dtype}")
    return ValueError(f"{name} must be on the images' device {device}, got {vector.device}")


def _backend(name: str | None) -> str:
    """`backend` as the operators take it; they read what `use` and the environment ask for."""
    if name is not None and name not in backends.NAMES:
        allowed = ", ".join(map(repr, backends.NAMES))
        raise ValueError(f"backend must be one of {allowed}, or None, got {name!r}")
    return name or ""


def _backend_of_both_passes(name: str) -> str:
    """`name`, or what is asked for now: the backward pass may run under another setting."""
    if torch.compiler.is_compiling():
        return name  # the operators read the setting when they run
    return name or backends.requested() or ""


# Shared steps --------------------------------------------------------------------------------


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast has convolutions compute in; None where it leaves them alone."""
    device = "cpu" if x.is_cpu else x.device.type  # which takes longer to make
    if x.dtype is torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _is_nhwc(t: Tensor) -> bool:
    """Whether a convolution takes `t` for a channels_last tensor: by the order of its strides.

    As at::suggest_memory_format: `t` need not be dense, and what could be either is NCHW.
    """
    n, c, h, w = t.shape
    of_n, of_c, of_h, of_w = t.stride()
    return (
        of_c > 0
        and of_c * c <= of_w
        and of_w * w <= of_h
        and of_h * h <= of_n
        and of_h * h != of_c
        and n > 0
    )


def _operands(bn: BatchNormState | None, z: Tensor) -> tuple[Any, ...]:
    """`bn` as the operators take it: vectors of one dtype, no mean and variance in training."""
    if bn is None:
        return ops.NO_BATCH_NORM
    gamma, beta, mean, var, training, _, eps, group = bn
    dtype = torch.float64 if z.dtype is torch.float64 else torch.float32
    gamma, beta = _vector(gamma, dtype), _vector(beta, dtype)
    if training:
        return gamma, beta, None, None, eps, group
    return gamma, beta, _vector(mean, dtype), _vector(var, dtype), eps, ""


def _vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype is dtype else t.to(dtype)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _update_running(*batches: tuple[BatchNormState | None, Tensor, int]) -> None:
    """running = (1 - momentum) * running + momentum * batch, for (bn, vectors, values a channel).

    On a GPU those of one momentum go together: two kernels for all of a block.
    """
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for bn, vectors, count in batches:
        if bn is None or not bn.training or bn.running_mean is None:
            continue
        if count == 0 and not bn.group:
            continue
        assert bn.running_var is not None
        momentum, running = bn.momentum, (bn.running_mean, bn.running_var)
        if not isinstance(momentum, Tensor) and ops.update_running(vectors, *running, momentum):
            continue
        batch = vectors[0], vectors[1]
        if isinstance(momentum, Tensor) or any(t.dtype != vectors.dtype for t in running):
            for old, new in zip(running, batch, strict=True):
                old.copy_(old.to(new.dtype) * (1 - momentum) + new * momentum)
            continue
        olds, news = together.setdefault(momentum, ([], []))
        if any(old is running[0] or old is running[1] for old in olds):  # a BatchNorm used twice
            _mix(olds, news, momentum)
            olds, news = together[momentum] = [], []
        olds += running
        news += batch
    for momentum, (olds, news) in together.items():
        _mix(olds, news, momentum)


def _mix(olds: list[Tensor], news: list[Tensor], momentum: float) -> None:
    torch._foreach_mul_(olds, 1 - momentum)
    torch._foreach_add_(olds, news, alpha=momentum)


# Operations ----------------------------------------------------------------------------------


def grouped_conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Grouped 3x3 convolution, BatchNorm and ReLU in one operation.

        y = relu(batch_norm(conv3x3(x, weight)) [+ residual])

    Equivalent to

        z = F.conv2d(x, weight, None, stride, dilation, dilation, groups)
        z = F.batch_norm(z, running_mean, running_var, gamma, beta, training, momentum, eps)
        y = F.relu(z if residual is None else z + residual)

    Differentiable, twice, in x, weight, gamma, beta and residual. Saved for the backward pass: x,
    the convolution's output, per-channel vectors, and with a residual y; the BatchNorm's output and
    the ReLU's mask are recomputed. Under autocast x, weight and residual are cast as by conv2d.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, any memory format;
            torch.channels_last is what the kernels work in, others are converted.
        weight: (K, C / groups, 3, 3), x's dtype.
        gamma, beta: (K,), any floating-point dtype (computed with in float32; float64 for
            float64 x), or None for 1 and 0.
        running_mean, running_var: (K,), any floating-point dtype, or, when training, both None.
            Updated in place when training.
        stride, groups, dilation: Of the convolution; its padding is `dilation`.
        training: Normalise with the statistics of the batch rather than the running ones.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        residual: Added before the ReLU: y's shape, x's dtype; or None.
        backend: One of `backends.NAMES`, or None for the first that serves (see `backends`).

    Returns:
        y, (N, K, (H - 1) // stride + 1, (W - 1) // stride + 1), x's dtype, in the memory format
        that conv2d would give.

    Raises:
        ValueError: If a tensor's rank, shape or device is wrong; if stride, groups or dilation is
            less than 1, or groups does not divide C and K; if eps is negative; if not training and
            running statistics are None, or only one of them is; if training on a single value per
            channel; if there is no backend of that name.
        TypeError: If a dtype is wrong, or if stride, groups or dilation is not an int.
        RuntimeError: If the backend that was asked for does not serve this problem.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017,
    Fig. 3c; Ioffe and Szegedy, "Batch Normalization", ICML 2015.
    """
    bn = BatchNormState(gamma, beta, running_mean, running_var, bool(training), momentum, eps)
    return conv_bn_relu(
        x,
        weight,
        bn,
        residual=residual,
        stride=stride,
        groups=groups,
        dilation=dilation,
        backend=backend,
    )


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn: BatchNormState,
    *,
    input_bn: BatchNormState | None = None,
    residual: Tensor | None = None,
    pointwise_weight: Tensor | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """`grouped_conv_bn_relu` with its neighbours in a bottleneck.

        a = relu(input_bn(x))                          if given, else x
        y = relu(bn(conv3x3(a, weight)) [+ residual])
        y = conv1x1(y, pointwise_weight)               if given

    Equivalent to these steps by torch.nn.functional. Neither a nor the activation before the 1x1
    convolution is saved for the backward pass; the kernels of grouped convolutions make a where
    they load x, so that it is never in memory.

    Args:
        x: (N, C, H, W); with `input_bn`, the output of a convolution.
        weight: (K, C / groups, 3, 3), x's dtype.
        bn: BatchNorm of the convolution's output.
        input_bn: BatchNorm, with a ReLU, of the convolution's input; or None.
        residual, stride, groups, dilation, backend: As of `grouped_conv_bn_relu`.
        pointwise_weight: (L, K, 1, 1), x's dtype; not together with `residual`; or None.

    Returns:
        (N, K or L, H', W'), x's dtype, in the memory format that conv2d would give.

    Raises:
        As `grouped_conv_bn_relu`, and ValueError if `pointwise_weight` is of another shape or
        given together with `residual`.
    """
    n, channels, h, w = _check_image("x", x)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
        pointwise_weight = None if pointwise_weight is None else pointwise_weight.to(dtype)
    out_channels = _check_conv("x", x, channels, weight, stride, groups, dilation)
    out_h, out_w = (h - 1) // stride + 1, (w - 1) // stride + 1
    count = n * out_h * out_w
    _check_bn(bn, "", x, out_channels, count)
    if input_bn is not None:
        _check_bn(input_bn, "input_bn.", x, channels, n * h * w)
    if residual is not None:
        _check_like("residual", residual, (n, out_channels, out_h, out_w), "x", x)
    if pointwise_weight is not None:
        if residual is not None:
            raise ValueError("pointwise_weight and residual must not be given together")
        _check_1x1("pointwise_weight", pointwise_weight, out_channels, "x", x)
    return _conv_bn_relu(
        x,
        weight,
        bn,
        input_bn,
        residual,
        pointwise_weight,
        stride,
        groups,
        dilation,
        _backend(backend),
    )


def _conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn: BatchNormState,
    input_bn: BatchNormState | None,
    residual: Tensor | None,
    pointwise_weight: Tensor | None,
    stride: int,
    groups: int,
    dilation: int,
    name: str,
) -> Tensor:
    """`conv_bn_relu` of arguments that are checked and cast."""
    nhwc = (
        _is_nhwc(x)
        or _is_nhwc(weight)
        or (pointwise_weight is not None and _is_nhwc(pointwise_weight))
    )
    in_training = input_bn is not None and input_bn.training
    operands, in_operands = _operands(bn, x), _operands(input_bn, x)
    if not (bn.training or in_training) and not _needs_gradient(
        x,
        weight,
        bn.gamma,
        bn.beta,
        residual,
        pointwise_weight,
        *(() if input_bn is None else input_bn[:2]),
    ):
        y = ops.conv_bn_relu_eval(
            x,
            weight,
            *operands[:5],
            stride,
            groups,
            dilation,
            name,
            residual,
            *in_operands[:5],
        )
        if pointwise_weight is not None:
            y = ops.conv1x1(y, pointwise_weight, 1, name)
        return y if nhwc else y.contiguous()
    y, _, vectors, in_vectors = ops.conv_bn_relu(
        _nhwc(x),
        weight,
        *operands,
        residual,
        *in_operands,
        pointwise_weight,
        stride,
        groups,
        dilation,
        _backend_of_both_passes(name),
    )
    n, _, h, w = x.shape
    out_count = n * ((h - 1) // stride + 1) * ((w - 1) // stride + 1)
    _update_running((bn, vectors, out_count), (input_bn, in_vectors, n * h * w))
    return y if nhwc else y.contiguous()


def conv1x1(x: Tensor, weight: Tensor, *, stride: int = 1, backend: str | None = None) -> Tensor:
    """The dense 1x1 convolution, with which a bottleneck begins and ends.

        z[n, k, h, w] = sum over c of weight[k, c, 0, 0] * x[n, c, stride * h, stride * w]

    Equivalent to F.conv2d(x, weight, None, stride), which it is wherever the backend has no kernel
    of its own, and for x in NCHW unless a backend is asked for. Differentiable, twice. Saved for
    the backward pass: x.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, any memory format.
        weight: (K, C, 1, 1), x's dtype.
        stride: Of the convolution.
        backend: As of `grouped_conv_bn_relu`.

    Returns:
        z, (N, K, (H - 1) // stride + 1, (W - 1) // stride + 1), x's dtype, in the memory format
        that conv2d would give.

    Raises:
        ValueError, TypeError: As `grouped_conv_bn_relu`, of x, weight, stride and backend.
    """
    _check_image("x", x)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    _check_int("stride", stride)
    _check_1x1("weight", weight, x.shape[1], "x", x)
    name = _backend_of_both_passes(_backend(backend))
    nhwc = _is_nhwc(x) or _is_nhwc(weight)
    if not nhwc and not name:
        return torch.conv2d(x, weight, None, stride)
    z = ops.conv1x1(_nhwc(x), weight, stride, name)
    return z if nhwc else z.contiguous()


def _check_bn_relu(z: Tensor, bn: BatchNormState) -> int:
    n, channels, h, w = _check_image("z", z)
    _check_bn(bn, "", z, channels, n * h * w)
    return n * h * w


def bn_relu(
    z: Tensor,
    bn: BatchNormState,
    *,
    residual: Tensor | None = None,
    residual_bn: BatchNormState | None = None,
    backend: str | None = None,
) -> Tensor:
    """BatchNorm, residual addition and ReLU in one operation.

        y = relu(bn(z) [+ residual | + residual_bn(residual)])

    Equivalent to F.batch_norm of z (and of residual with `residual_bn`), their sum, and F.relu.
    Saved for the backward pass: z, vectors, y if there is a residual, and the residual only if it
    has a BatchNorm of its own.

    Args:
        z: (N, C, H, W), float32, bfloat16, float16 or float64, any memory format.
        bn: BatchNorm of z.
        residual: z's shape and dtype, or None.
        residual_bn: BatchNorm of the residual (a bottleneck's downsampling branch), or None.
        backend: As of `grouped_conv_bn_relu`.

    Returns:
        y, z's shape, dtype and memory format.

    Raises:
        As `grouped_conv_bn_relu`, and ValueError if `residual_bn` is given without `residual`.
    """
    count = _check_bn_relu(z, bn)
    if residual is not None:
        _check_like("residual", residual, z.shape, "z", z)
    if residual_bn is not None:
        if residual is None:
            raise ValueError("residual_bn must be None without a residual")
        _check_bn(residual_bn, "residual_bn.", z, z.shape[1], count)
    return _bn_relu(z, bn, residual, residual_bn, _backend(backend))


def _bn_relu(
    z: Tensor,
    bn: BatchNormState,
    residual: Tensor | None,
    residual_bn: BatchNormState | None,
    name: str,
) -> Tensor:
    """`bn_relu` of arguments that are checked."""
    nhwc = _is_nhwc(z)
    operands, residual_operands = _operands(bn, z), _operands(residual_bn, z)
    training = bn.training or (residual_bn is not None and residual_bn.training)
    if not training and not _needs_gradient(
        z, bn.gamma, bn.beta, residual, *(() if residual_bn is None else residual_bn[:2])
    ):
        y = ops.bn_relu_eval(z, *operands[:5], name, residual, *residual_operands[:5])
        return y if nhwc else y.contiguous()
    y, vectors, residual_vectors = ops.bn_relu(
        _nhwc(z),
        *operands,
        None if residual is None else _nhwc(residual),
        *residual_operands,
        _backend_of_both_passes(name),
    )
    n, _, h, w = z.shape
    count = n * h * w
    _update_running((bn, vectors, count), (residual_bn, residual_vectors, count))
    return y if nhwc else y.contiguous()


def bn_relu_max_pool(
    z: Tensor,
    bn: BatchNormState,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    backend: str | None = None,
) -> Tensor:
    """BatchNorm, ReLU and max pooling, as after the first convolution of a ResNet.

        y = max_pool2d(relu(bn(z)))

    Equivalent to F.batch_norm, F.relu and F.max_pool2d. Saved for the backward pass: z, vectors and
    the pooling's indices, not the ReLU's output.

    Args:
        z: (N, C, H, W), float32, bfloat16, float16 or float64, any memory format.
        bn: BatchNorm of z.
        kernel_size, stride, padding, dilation, ceil_mode: Of the pooling, (vertical, horizontal).
        backend: As of `grouped_conv_bn_relu`.

    Returns:
        y, (N, C, H', W') as max_pool2d, z's dtype and memory format.

    Raises:
        As `grouped_conv_bn_relu`; what max_pool2d raises.
    """
    count = _check_bn_relu(z, bn)
    name = _backend(backend)
    nhwc = _is_nhwc(z)
    operands = _operands(bn, z)
    pool = kernel_size, stride, padding, dilation, ceil_mode
    if not bn.training and not _needs_gradient(z, bn.gamma, bn.beta):
        y = ops.bn_relu_eval(z, *operands[:5], name, None, *ops.NO_BATCH_NORM[:5])
        y = torch.max_pool2d(y, *pool)
    else:
        name = _backend_of_both_passes(name)
        y, _, vectors = ops.bn_relu_max_pool(_nhwc(z), *operands, *pool, name)
        _update_running((bn, vectors, count))
    return y if nhwc else y.contiguous()


def bottleneck(
    x: Tensor,
    first_weight: Tensor,
    bn1: BatchNormState,
    weight: Tensor,
    bn2: BatchNormState,
    pointwise_weight: Tensor,
    bn3: BatchNormState,
    residual: Tensor | None = None,
    *,
    residual_weight: Tensor | None = None,
    residual_bn: BatchNormState | None = None,
    residual_stride: int = 1,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """A bottleneck block.

        t = relu(bn1(conv1x1(x, first_weight)))
        t = relu(bn2(conv3x3(t, weight)))
        y = relu(bn3(conv1x1(t, pointwise_weight)) + shortcut | + residual_bn(shortcut))

        shortcut = residual | x | conv1x1(x, residual_weight)

    Equivalent to these steps by torch.nn.functional. Differentiable, twice. Saved for the backward
    pass: x, the outputs of the convolutions, per-channel vectors and y, and a residual only if it
    has a BatchNorm.

    Args:
        x: (N, B, H, W), float32, bfloat16, float16 or float64, any memory format.
        first_weight: (C, B, 1, 1), x's dtype.
        bn1, bn2, bn3: BatchNorm of the three convolutions' outputs.
        weight: (K, C / groups, 3, 3), x's dtype.
        pointwise_weight: (L, K, 1, 1), x's dtype.
        residual: y's shape; cast to the dtype that the convolutions give. None: the shortcut is x,
            or its convolution with `residual_weight`.
        residual_weight: (L, B, 1, 1), x's dtype, not together with `residual`; or None.
        residual_bn: BatchNorm of the shortcut, or None.
        residual_stride: Of the convolution with `residual_weight`.
        stride, groups, dilation, backend: As of `grouped_conv_bn_relu`.

    Returns:
        y, (N, L, (H - 1) // stride + 1, (W - 1) // stride + 1), in the memory format that the
        convolutions would give.

    Raises:
        As `grouped_conv_bn_relu`, and ValueError if `residual` and `residual_weight` are given
        together, or the shortcut has not y's shape.
    """
    n, channels, h, w = _check_image("x", x)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, first_weight, weight = x.to(dtype), first_weight.to(dtype), weight.to(dtype)
        pointwise_weight = pointwise_weight.to(dtype)
        residual_weight = None if residual_weight is None else residual_weight.to(dtype)
    residual = None if residual is None else residual.to(x.dtype)
    _check_1x1("first_weight", first_weight, channels, "x", x)
    width = first_weight.shape[0]
    _check_conv("first_weight", first_weight, width, weight, stride, groups, dilation)
    out_h, out_w = (h - 1) // stride + 1, (w - 1) // stride + 1
    count = n * out_h * out_w
    _check_bn(bn1, "bn1.", x, width, n * h * w)
    _check_bn(bn2, "bn2.", x, weight.shape[0], count)
    _check_1x1("pointwise_weight", pointwise_weight, weight.shape[0], "x", x)
    out_channels = pointwise_weight.shape[0]
    out_shape = n, out_channels, out_h, out_w
    _check_bn(bn3, "bn3.", x, out_channels, count)
    if residual_bn is not None:
        _check_bn(residual_bn, "residual_bn.", x, out_channels, count)
    if residual is not None:
        if residual_weight is not None:
            raise ValueError("residual and residual_weight must not be given together")
        _check_like("residual", residual, out_shape, "x", x)
    elif residual_weight is not None:
        _check_int("residual_stride", residual_stride)
        _check_1x1("residual_weight", residual_weight, channels, "x", x)
        rows, columns = (h - 1) // residual_stride + 1, (w - 1) // residual_stride + 1
        shape = n, residual_weight.shape[0], rows, columns
        if shape != out_shape:
            raise ValueError(
                f"the convolution with residual_weight must have shape {out_shape}, got {shape}"
            )
    elif x.shape != out_shape:
        raise ValueError(f"x must have shape {out_shape} to be the residual, got {tuple(x.shape)}")

    name = _backend(backend)
    states = bn1, bn2, bn3, residual_bn
    vectors = [vector for bn in states if bn is not None for vector in (bn.gamma, bn.beta)]
    images = x, first_weight, weight, pointwise_weight, residual, residual_weight
    if any(bn is not None and bn.training for bn in states) or _needs_gradient(*images, *vectors):
        nhwc = any(_is_nhwc(t) for t in (x, first_weight, weight, pointwise_weight))
        y, _, _, _, _, *batches = ops.bottleneck(
            _nhwc(x),
            first_weight,
            *_operands(bn1, x),
            weight,
            *_operands(bn2, x),
            pointwise_weight,
            *_operands(bn3, x),
            None if residual is None else _nhwc(residual),
            residual_weight,
            *_operands(residual_bn, x),
            residual_stride,
            stride,
            groups,
            dilation,
            _backend_of_both_passes(name),
        )
        counts = n * h * w, count, count, count
        _update_running(*zip(states, batches, counts, strict=True))
        return y if nhwc else y.contiguous()
    z = conv1x1(x, first_weight, backend=backend)
    if residual is None:
        residual = x
    if residual_weight is not None:
        residual = conv1x1(x, residual_weight, stride=residual_stride, backend=backend)
    t = _conv_bn_relu(z, weight, bn2, bn1, None, None, stride, groups, dilation, name)
    nhwc = _is_nhwc(t) or _is_nhwc(pointwise_weight)
    y = ops.conv1x1_bn_relu_eval(
        t,
        pointwise_weight,
        *_operands(bn3, t)[:5],
        name,
        residual,
        *_operands(residual_bn, t)[:5],
    )
    return y if nhwc else y.contiguous()
