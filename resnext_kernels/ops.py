"""The operators as torch knows them: schemas, shapes, autograd.

Every operator is one opaque node for torch.compile and torch.export. Tensors may come in any memory
format and go out in torch.channels_last, dweight in the weight's; vectors are float32, float64 with
float64 tensors.
`backend` is a name, or "" for the one that `backends.select` finds. Arguments are not validated
here: that is `functional`'s.

    without gradients               with gradients: forward         backward
    conv_bn_relu_eval               conv_bn_relu                    conv_bn_relu_backward
    bn_relu_eval                    bn_relu                         bn_relu_backward
    conv1x1_bn_relu_eval
                                    bn_relu_max_pool                bn_relu_max_pool_backward
                                    conv1x1                         conv1x1_backward
                                    bottleneck                      bottleneck_backward

One BatchNorm is six arguments: `gamma, beta` (None: no affine), `mean, var` (None: statistics of
the batch), `eps` (None: no BatchNorm here), and `group`, the name of the process group that shares
statistics ("": none); without gradients it is the first five. What it made of them comes back as
one (5, C) tensor: mean, unbiased variance, rstd, scale, shift, with

    rstd = 1 / sqrt(var + eps),   scale = gamma * rstd,   shift = beta - mean * scale

Saved for the backward pass: the convolution's input, its output z, these vectors, the pooling's
indices, and, where a residual was added, the result y for the ReLU's mask. The activations in
between are recomputed. Gradients of gradients are taken from the same expression in plain ATen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import itemgetter, or_
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import backends
from .backends import cpu, reference
from .backends.reference import TrainingBatchNorm
from .problem import weight_format

__all__ = [
    "NO_BATCH_NORM",
    "BatchNorm",
    "Operator",
    "bn_relu",
    "bn_relu_backward",
    "bn_relu_eval",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward",
    "bottleneck",
    "bottleneck_backward",
    "conv1x1",
    "conv1x1_backward",
    "conv1x1_bn_relu_eval",
    "conv_bn_relu",
    "conv_bn_relu_backward",
    "conv_bn_relu_eval",
    "update_running",
]

_NAMESPACE = "resnext_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")


# What an implementation gives, None for what was not asked for.
Results = tuple[Tensor | None, ...]
# sum(g), sum(g * xhat), and the coefficients of the input gradient: see `reference`.
Sums = tuple[Tensor, Tensor, Tensor]


class BatchNorm(NamedTuple):
    """The six arguments of one BatchNorm."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float | None
    group: str

    @property
    def training(self) -> bool:
        """Whether it takes the statistics of the batch."""
        return self.of_batch is not None

    @property
    def of_batch(self) -> TrainingBatchNorm | None:
        """As the backends take it: None unless training."""
        if self.eps is None or self.mean is not None:
            return None
        return self.gamma, self.beta, self.eps


NO_BATCH_NORM = BatchNorm(None, None, None, None, None, "")


def _schema_of_bn(prefix: str = "") -> str:
    vectors = ", ".join(f"Tensor? {prefix}{name}" for name in ("gamma", "beta", "mean", "var"))
    return f"{vectors}, float? {prefix}eps, str {prefix}group"


# In evaluation: a BatchNorm with running statistics, and a second one that may be absent.
_EVAL_BN = "Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps"


def _schema_of_eval_bn(prefix: str) -> str:
    vectors = ", ".join(f"Tensor? {prefix}{name}" for name in ("gamma", "beta", "mean", "var"))
    return f"{vectors}, float? {prefix}eps"


# Calls ---------------------------------------------------------------------------------------


def _key_sets(*names: str) -> frozenset[int]:
    """These sets of dispatch keys, each named by its keys with a space between, as bits."""
    return frozenset(
        reduce(or_, (DispatchKeySet(getattr(DispatchKey, key)) for key in keys.split())).raw_repr()
        for keys in names
    )


# What an ordinary tensor and an ordinary thread bring to the dispatcher, the second of each in
# inference mode.
_ORDINARY_TENSORS = _key_sets(
    "CPU AutogradCPU AutocastCPU ADInplaceOrView",
    "CPU AutocastCPU",
    "CUDA AutogradCUDA AutocastCUDA ADInplaceOrView",
    "CUDA AutocastCUDA",
)
_ORDINARY_THREADS = _key_sets("BackendSelect ADInplaceOrView", "BackendSelect")
_dispatch_keys, _thread_keys = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set


def _is_ordinary(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch's dispatcher would lead a call with these tensors straight to our functions.

    It would not with whatever has a dispatch key, of a tensor or of this thread: subclasses and
    modes of __torch_dispatch__ (fake tensors, FlopCounterMode, tracing), torch.func, other devices
    and layouts, lazy negation. Before it come __torch_function__ and the profiler.
    """
    if (
        torch.overrides.has_torch_function(tensors)
        or torch._C._autograd._profiler_enabled()
        or _thread_keys().raw_repr() not in _ORDINARY_THREADS
    ):
        return False
    for t in tensors:
        if t is not None and _dispatch_keys(t).raw_repr() not in _ORDINARY_TENSORS:
            return False
    return True


def _refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    """No operator has a derivative of forward mode, which would be lost without a word."""
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError("forward-mode derivatives; backward mode has them")


class Operator:
    """An operator for CPU and CUDA tensors, registered with torch and called from here.

    An ordinary call runs what the dispatcher would, without the microseconds in which that passes
    twenty arguments on, once for autograd and once for the implementation. Any other call goes
    through the dispatcher, as does `overload`, torch's own handle. Arguments are positional. For
    what was not asked for, an ordinary call gives None and the dispatcher an empty tensor.
    """

    def __init__(self, schema: str, implementation: Callable, fake: Callable) -> None:
        name = schema[: schema.index("(")]
        tags = torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order
        _library.define(schema, tags=tags)
        for key in ("CPU", "CUDA"):
            _library.impl(name, _without_none(implementation), key)
        torch.library.register_fake(f"{_NAMESPACE}::{name}", _without_none(fake), lib=_library)
        self.overload: Any = getattr(getattr(torch.ops, _NAMESPACE), name).default
        self._implementation = implementation
        self._node: Any = None
        arguments = enumerate(self.overload._schema.arguments)
        self._tensors = itemgetter(*(i for i, a in arguments if "Tensor" in str(a.type)))

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        tensors = self._tensors(args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(tensors)
        if not _is_ordinary(tensors):
            return self.overload(*args)
        if self._node is not None and self._needs_gradient(args):
            return self._node.apply(None, *args)
        return self._implementation(*args)

    @staticmethod
    def _needs_gradient(args: tuple) -> bool:
        return (
            torch.is_grad_enabled()
            and torch._C._any_requires_grad(*args)
            # not below autograd, as inside of another operator
            and not torch._C._dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradOther)
        )

    def register_autograd(self, name: str, setup: Callable, backward: Callable) -> None:
        """Make the first result differentiable, by setup(ctx, inputs, output) and
        backward(ctx, needs, dy), which yields pairs of an input's index and its gradient.

        As torch.library.register_autograd, which at each call converts every argument of the schema
        for every argument of the schema: 0.1 ms and more for the twenty that a convolution has.
        """
        below_autograd = torch._C._after_autograd_keyset
        overload, implementation = self.overload, self._implementation

        def redispatch(keyset: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & below_autograd, *inputs)

        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            output = implementation(*inputs) if keyset is None else redispatch(keyset, *inputs)
            ctx.set_materialize_grads(False)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
            setup(ctx, inputs, output)
            return output

        def backward_with_keyset(ctx: Any, dy: Tensor | None, *_: None) -> Results:
            _, *needs = ctx.needs_input_grad
            found = [None] * len(needs)
            if dy is not None:
                for i, gradient in backward(ctx, needs, dy):
                    if needs[i]:
                        found[i] = gradient
            return None, *found

        node: Any = type(
            name,
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(backward_with_keyset)},
        )

        def kernel(keyset: Any, *inputs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return node.apply(keyset, *inputs)
            return redispatch(keyset, *inputs)

        _library.impl(overload, kernel, "Autograd", with_keyset=True)
        self._node = node


def _without_none(function: Callable) -> Callable:
    """`function` as torch takes it: with an empty tensor for each result that is None."""

    def kernel(first: Tensor, *args: Any) -> Tensor | tuple[Tensor, ...]:
        results = function(first, *args)
        if isinstance(results, Tensor):
            return results
        return tuple(first.new_empty(0) if t is None else t for t in results)

    return kernel


# Shared steps --------------------------------------------------------------------------------


def _nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _dense(weight: Tensor) -> Tensor:
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def _maybe_nhwc(t: Tensor | None) -> Tensor | None:
    return None if t is None else _nhwc(t)


def _serving(
    x: Tensor, k: int, stride: int, groups: int, dilation: int, training: bool, backend: str
) -> ModuleType:
    """The backend for a convolution of x to k channels; an empty batch is the reference's."""
    shape = x.shape
    if shape[0] == 0:
        return reference
    name = backend or backends.requested()
    return backends._select(name, shape, x.dtype, x.device, k, groups, stride, dilation, training)


def _serving_bn(z: Tensor, training: bool, backend: str) -> ModuleType:
    """The backend for BatchNorm alone: that of the depthwise convolution on the same map."""
    channels = z.shape[1]
    return _serving(z, channels, 1, channels, 1, training, backend)


def _count(z: Tensor) -> int:
    return z.numel() // z.shape[1]


def _process_group(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


def _combined_stats(
    mean: Tensor, var: Tensor, count: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance over a process group, and the number of values (Chan et al., 1979)."""
    process_group = _process_group(group)
    local = torch.cat([mean, var, mean.new_full((1,), count)])
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(ranks, local, group=process_group)
    gathered = torch.stack(ranks)
    channels = mean.numel()
    means, variances, counts = gathered.split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean, var, total


def _bn_vectors(
    kernels: ModuleType, z: Tensor, bn: BatchNorm, batch: Tensor | None = None
) -> Tensor:
    """(5, C): mean, unbiased variance, rstd, scale, shift of a BatchNorm of z.

    `batch`: those of this process's batch; None: taken here.
    """
    gamma, beta, mean, var, eps, group = bn
    if bn.of_batch is None:
        return kernels.bn_vectors(gamma, beta, mean, var, eps, 1.0)
    if batch is None:
        batch = kernels.batch_stats(z, bn.of_batch)
    if not group:
        return batch
    count = _count(z)
    biased = batch[1] * (max(count - 1, 0) / max(count, 1))
    mean, var, total = _combined_stats(batch[0], biased, count, group)
    vectors = kernels.bn_vectors(gamma, beta, mean, var, eps, 1.0)
    vectors[1].mul_(total / (total - 1))
    return vectors


def update_running(vectors: Tensor, mean: Tensor, var: Tensor, momentum: float) -> bool:
    """Update running statistics with those of a batch, whichever backend took them, in one call.

    False where it takes ATen.
    """
    return (
        not torch.compiler.is_compiling()
        and _is_ordinary((vectors, mean, var))
        and cpu.update_running(vectors, mean, var, momentum)
    )


def _affine(vectors: Tensor) -> tuple[Tensor, Tensor]:
    return vectors[3], vectors[4]


def _coefficients(
    sums: Sums | None, vectors: Tensor, count: int, training: bool, group: str
) -> Tensor | None:
    """(2, C): b and c of dz = scale*g + b*z + c; None (zero) with frozen statistics."""
    if not training:
        return None
    assert sums is not None
    sum_g, sum_g_xhat, coefficients = sums
    if not group:
        return coefficients
    shared = torch.cat([sum_g, sum_g_xhat, sum_g.new_full((1,), count)])
    dist.all_reduce(shared, group=_process_group(group))
    sum_g, sum_g_xhat = (shared[:-1] / shared[-1]).chunk(2)
    return reference.bn_gradient_vectors(sum_g, sum_g_xhat, vectors, 1)


def _affine_gradients(sums: Sums | None, needed: bool) -> Results:
    """dgamma and dbeta."""
    return (sums[1], sums[0]) if sums is not None and needed else (None, None)


def _behind_residual(
    kernels: ModuleType, dy: Tensor, z: Tensor, y: Tensor, vectors: Tensor, need_sums: bool
) -> tuple[Tensor, Sums | None]:
    """The residual's gradient g, and the sums over it."""
    if not need_sums:
        return reference.masked(dy, y), None
    g, *sums = kernels.bn_residual_relu_backward(dy, z, y, vectors)
    return g, tuple(sums)


def _conv1x1_stats(
    kernels: ModuleType, bn: BatchNorm, x: Tensor, weight: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The 1x1 convolution, and the vectors of its result's BatchNorm if training."""
    if bn.of_batch is not None:
        return kernels.conv1x1_stats(x, _dense(weight), bn.of_batch, **options)
    return kernels.conv1x1(x, _dense(weight), **options), None


# What fakes return ---------------------------------------------------------------------------


def _like_nhwc(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.channels_last)


def _like_weight(weight: Tensor) -> Tensor:
    memory_format = weight_format(weight) or torch.contiguous_format
    return torch.empty_like(weight, memory_format=memory_format)


def _fake_conv(x: Tensor, channels: int, stride: int) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, channels, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_vectors(z: Tensor, bn: BatchNorm) -> Tensor | None:
    if bn.eps is None:
        return None
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((5, z.shape[1]), dtype=dtype)


def _fake_affine(vectors: Tensor, z: Tensor, need: bool) -> Results:
    """dgamma and dbeta of a BatchNorm of z."""
    size = z.shape[1]
    return (vectors.new_empty(size), vectors.new_empty(size)) if need else (None, None)


# Gradients of gradients ----------------------------------------------------------------------


def _differentiate(expression: Callable, dy: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """Differentiable gradients of expression(*inputs) for dy; None where an input needs none."""
    # Aliases, because one input may be computed from another: each gradient is the direct one.
    aliases = [None if t is None else t.view_as(t) for t in inputs]
    needed = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(expression(*aliases), needed, dy, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]


class _SavedBatchNorm(NamedTuple):
    """What the backward pass knows of a BatchNorm, beside tensors."""

    training: bool
    eps: float | None
    group: str

    @classmethod
    def of(cls, bn: BatchNorm) -> _SavedBatchNorm:
        return cls(bn.training, bn.eps, bn.group)

    def expression(
        self, z: Tensor, gamma: Tensor | None, beta: Tensor | None, vectors: Tensor
    ) -> Tensor:
        """batch_norm(z) in differentiable steps."""
        if self.group:
            raise NotImplementedError("gradients of gradients with statistics of a process group")
        if self.training:
            assert self.eps is not None
            return torch.batch_norm(z, gamma, beta, None, None, True, 0.0, self.eps, False)
        result = (z - vectors[0][:, None, None]) * vectors[2][:, None, None]
        if gamma is not None:
            result = result * gamma[:, None, None]
        if beta is not None:
            result = result + beta[:, None, None]
        return result.to(z.dtype)


def _relu_as(y: Tensor | None, t: Tensor) -> Tensor:
    """relu(t), or with the mask that the result y shows."""
    return F.relu(t) if y is None else torch.where(y <= 0, 0, t)


# conv_bn_relu_eval, bn_relu_eval, conv1x1_bn_relu_eval: without gradients ---------------------


def _conv_bn_relu_eval(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    stride: int,
    groups: int,
    dilation: int,
    backend: str,
    residual: Tensor | None,
    in_gamma: Tensor | None,
    in_beta: Tensor | None,
    in_mean: Tensor | None,
    in_var: Tensor | None,
    in_eps: float | None,
) -> Tensor:
    kernels = _serving(x, weight.shape[0], stride, groups, dilation, False, backend)
    return kernels.conv_bn_relu(
        _nhwc(x),
        _dense(weight),
        (gamma, beta, mean, var, eps),
        residual=_maybe_nhwc(residual),
        prologue=None if in_eps is None else (in_gamma, in_beta, in_mean, in_var, in_eps),
        stride=stride,
        groups=groups,
        dilation=dilation,
    )


conv_bn_relu_eval = Operator(
    f"conv_bn_relu_eval(Tensor x, Tensor weight, {_EVAL_BN}, int stride, int groups, int dilation, "
    f"str backend, Tensor? residual, {_schema_of_eval_bn('in_')}) -> Tensor",
    _conv_bn_relu_eval,
    lambda x, weight, *args: _fake_conv(x, weight.shape[0], args[5]),
)


def _bn_relu_eval(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    backend: str,
    residual: Tensor | None,
    residual_gamma: Tensor | None,
    residual_beta: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_eps: float | None,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Of z, or of its 1x1 convolution with `weight`."""
    kernels = _serving_bn(z, False, backend)
    residual_bn = residual_gamma, residual_beta, residual_mean, residual_var, residual_eps
    run = kernels.normalize_relu
    if weight is not None:
        run = partial(kernels.conv1x1_affine_relu, weight=_dense(weight))
    scale, shift = kernels.bn_affine(gamma, beta, mean, var, eps)
    return run(
        _nhwc(z),
        scale=scale,
        shift=shift,
        residual=_maybe_nhwc(residual),
        residual_affine=None if residual_eps is None else kernels.bn_affine(*residual_bn),
    )


bn_relu_eval = Operator(
    f"bn_relu_eval(Tensor z, {_EVAL_BN}, str backend, Tensor? residual, "
    f"{_schema_of_eval_bn('residual_')}) -> Tensor",
    _bn_relu_eval,
    lambda z, *_: _like_nhwc(z),
)


conv1x1_bn_relu_eval = Operator(
    f"conv1x1_bn_relu_eval(Tensor x, Tensor weight, {_EVAL_BN}, str backend, "
    f"Tensor? residual, {_schema_of_eval_bn('residual_')}) -> Tensor",
    lambda x, weight, *args: _bn_relu_eval(x, *args, weight=weight),
    lambda x, weight, *_: _fake_conv(x, weight.shape[0], 1),
)


# conv_bn_relu: relu(bn(conv(x | relu(in_bn(x)))) [+ residual]) [, then a 1x1 convolution] ------


class _ConvBNReLU(NamedTuple):
    """The arguments of conv_bn_relu behind x and weight."""

    bn: BatchNorm
    residual: Tensor | None
    in_bn: BatchNorm
    pointwise_weight: Tensor | None
    stride: int
    groups: int
    dilation: int
    backend: str

    @classmethod
    def of(cls, args: tuple) -> _ConvBNReLU:
        return cls(BatchNorm(*args[:6]), args[6], BatchNorm(*args[7:13]), *args[13:])


def _conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    *args: Any,
    in_batch: Tensor | None = None,
    next_bn: BatchNorm = NO_BATCH_NORM,
) -> tuple[Any, ...]:
    """y, z, vectors, in_vectors, and the batch's vectors of `next_bn` on y, a 1x1 convolution's.

    `in_batch`: the batch's vectors of in_bn, where they are known.
    """
    bn, residual, in_bn, pointwise_weight, stride, groups, dilation, backend = _ConvBNReLU.of(args)
    kernels = _serving(x, weight.shape[0], stride, groups, dilation, True, backend)
    x = _nhwc(x)
    in_vectors = None if in_bn.eps is None else _bn_vectors(kernels, x, in_bn, in_batch)
    z, batch = kernels.conv_stats(
        x,
        _dense(weight),
        bn=bn.of_batch,
        prologue=None if in_vectors is None else _affine(in_vectors),
        stride=stride,
        groups=groups,
        dilation=dilation,
    )
    vectors = _bn_vectors(kernels, z, bn, batch)
    next_batch = None
    if pointwise_weight is None:
        y = kernels.normalize_relu(z, *_affine(vectors), residual=_maybe_nhwc(residual))
    else:
        y, next_batch = _conv1x1_stats(
            kernels, next_bn, z, pointwise_weight, prologue=_affine(vectors)
        )
    return y, z, vectors, in_vectors, next_batch


def _conv_bn_relu_fake(x: Tensor, weight: Tensor, *args: Any) -> Results:
    bn, _, in_bn, pointwise_weight, stride, *_ = _ConvBNReLU.of(args)
    z = _fake_conv(x, weight.shape[0], stride)
    y = _fake_conv(z, (weight if pointwise_weight is None else pointwise_weight).shape[0], 1)
    return y, z, _fake_vectors(z, bn), _fake_vectors(x, in_bn)


conv_bn_relu = Operator(
    f"conv_bn_relu(Tensor x, Tensor weight, {_schema_of_bn()}, Tensor? residual, "
    f"{_schema_of_bn('in_')}, Tensor? pointwise_weight, int stride, int groups, int dilation, "
    "str backend) -> (Tensor y, Tensor z, Tensor vectors, Tensor in_vectors)",
    lambda *args: _conv_bn_relu(*args)[:-1],
    _conv_bn_relu_fake,
)


def _conv_bn_relu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    vectors: Tensor,
    y: Tensor | None,
    in_vectors: Tensor | None,
    pointwise_weight: Tensor | None,
    stride: int,
    groups: int,
    dilation: int,
    training: bool,
    group: str,
    in_training: bool,
    in_group: str,
    needs: list[bool],
    backend: str,
) -> Results:
    need_x, need_weight, need_affine, need_residual, need_in_affine, need_pointwise = needs
    need_input = need_x or need_in_affine
    need_dz = need_input or need_weight
    need_sums = need_affine or (training and need_dz)
    kernels = _serving(x, weight.shape[0], stride, groups, dilation, True, backend)
    dx = dweight = dresidual = dpointwise = sums = in_sums = None
    dy, x, relu = _nhwc(dy), _nhwc(x), True
    if need_residual:
        assert y is not None
        dresidual, sums = _behind_residual(kernels, dy, z, y, vectors, need_sums)
        dy, y, relu = dresidual, None, False
    if pointwise_weight is not None:
        da, dpointwise = kernels.conv1x1_backward(
            dy,
            z,
            _dense(pointwise_weight),
            prologue=_affine(vectors),
            need_dx=need_dz or need_affine,
            need_dweight=need_pointwise,
        )
        dy = dy if da is None else da
    if need_sums and sums is None:
        sums = kernels.bn_relu_backward(dy, z, vectors, y=y, relu=relu)
    if need_dz:
        dx, dweight = kernels.conv_backward(
            dy,
            x,
            _dense(weight),
            bn=(z, vectors, _coefficients(sums, vectors, _count(z), training, group)),
            y=y,
            relu=relu,
            prologue=None if in_vectors is None else _affine(in_vectors),
            stride=stride,
            groups=groups,
            dilation=dilation,
            need_dx=need_input,
            need_dweight=need_weight,
        )
    if in_vectors is not None and need_input:
        if need_in_affine or in_training:
            in_sums = kernels.bn_relu_backward(dx, x, in_vectors)
        if need_x:
            coefficients = _coefficients(in_sums, in_vectors, _count(x), in_training, in_group)
            dx = kernels.bn_relu_input_gradient(dx, x, in_vectors, coefficients, inplace=True)
    return (
        dx if need_x else None,
        dweight,
        *_affine_gradients(sums, need_affine),
        dresidual,
        *_affine_gradients(in_sums, need_in_affine),
        dpointwise,
    )


def _conv_bn_relu_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor, vectors: Tensor, *args: Any
) -> Results:
    pointwise_weight, needs = args[2], args[-2]
    need_x, need_weight, need_affine, need_residual, need_in_affine, need_pointwise = needs

    return (
        _like_nhwc(x) if need_x else None,
        _like_weight(weight) if need_weight else None,
        *_fake_affine(vectors, z, need_affine),
        _like_nhwc(z) if need_residual else None,
        *_fake_affine(vectors, x, need_in_affine),
        _like_weight(pointwise_weight) if need_pointwise else None,
    )


conv_bn_relu_backward = Operator(
    "conv_bn_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor z, Tensor vectors, "
    "Tensor? y, Tensor? in_vectors, Tensor? pointwise_weight, int stride, int groups, "
    "int dilation, bool training, str group, bool in_training, str in_group, bool[6] needs, "
    "str backend) -> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta, Tensor dresidual, "
    "Tensor din_gamma, Tensor din_beta, Tensor dpointwise_weight)",
    _conv_bn_relu_backward,
    _conv_bn_relu_backward_fake,
)


def _conv_bn_relu_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, *args = inputs
    bn, residual, in_bn, pointwise_weight, *ctx.conv, ctx.backend = _ConvBNReLU.of(tuple(args))
    y, z, vectors, in_vectors = output
    ctx.save_for_backward(
        x,
        weight,
        bn.gamma,
        bn.beta,
        in_bn.gamma,
        in_bn.beta,
        pointwise_weight,
        z,
        vectors,
        None if residual is None else y,
        None if in_bn.eps is None else in_vectors,
    )
    ctx.bn, ctx.in_bn = _SavedBatchNorm.of(bn), _SavedBatchNorm.of(in_bn)


# Where the differentiable inputs stand in the schema: x, weight, gamma, beta, residual, in_gamma,
# in_beta, pointwise_weight, in the order of the backward operator's results.
_CONV_BN_RELU_INPUTS = (0, 1, 2, 3, 8, 9, 10, 15)


def _conv_bn_relu_autograd(ctx: Any, needs: list[bool], dy: Tensor) -> Any:
    *inputs, z, vectors, y, in_vectors = ctx.saved_tensors
    if torch.is_grad_enabled():
        stride, groups, dilation = ctx.conv

        def expression(
            x: Tensor,
            weight: Tensor,
            gamma: Tensor | None,
            beta: Tensor | None,
            in_gamma: Tensor | None,
            in_beta: Tensor | None,
            pointwise_weight: Tensor | None,
        ) -> Tensor:
            if in_vectors is not None:
                x = F.relu(ctx.in_bn.expression(x, in_gamma, in_beta, in_vectors))
            t = torch.conv2d(x, weight, None, stride, dilation, dilation, groups)
            t = _relu_as(y, ctx.bn.expression(t, gamma, beta, vectors))
            return t if pointwise_weight is None else torch.conv2d(t, pointwise_weight)

        found = _differentiate(expression, dy, *inputs)
        found.insert(4, None if y is None else _relu_as(y, dy))
    else:
        x, weight, *_, pointwise_weight = inputs
        i = _CONV_BN_RELU_INPUTS
        found = conv_bn_relu_backward(
            dy,
            x,
            weight,
            z,
            vectors,
            y,
            in_vectors,
            pointwise_weight,
            *ctx.conv,
            ctx.bn.training,
            ctx.bn.group,
            ctx.in_bn.training,
            ctx.in_bn.group,
            [
                needs[i[0]],
                needs[i[1]],
                needs[i[2]] or needs[i[3]],
                needs[i[4]],
                needs[i[5]] or needs[i[6]],
                needs[i[7]],
            ],
            ctx.backend,
        )
    return zip(_CONV_BN_RELU_INPUTS, found, strict=True)


conv_bn_relu.register_autograd("ConvBNReLU", _conv_bn_relu_setup, _conv_bn_relu_autograd)


# bn_relu: relu(bn(z) [+ residual | + residual_bn(residual)]) ----------------------------------


def _bn_relu(
    z: Tensor, *args: Any, batch: Tensor | None = None, residual_batch: Tensor | None = None
) -> Results:
    """`batch`, `residual_batch`: the batch's vectors of the BatchNorms, where they are known."""
    bn, residual, residual_bn, backend = _bn_relu_arguments(args)
    kernels = _serving_bn(z, True, backend)
    z, residual = _nhwc(z), _maybe_nhwc(residual)
    vectors = _bn_vectors(kernels, z, bn, batch)
    residual_vectors = None
    if residual is not None and residual_bn.eps is not None:
        residual_vectors = _bn_vectors(kernels, residual, residual_bn, residual_batch)
    y = kernels.normalize_relu(
        z,
        *_affine(vectors),
        residual=residual,
        residual_affine=None if residual_vectors is None else _affine(residual_vectors),
    )
    return y, vectors, residual_vectors


def _bn_relu_arguments(args: Any) -> tuple[BatchNorm, Tensor | None, BatchNorm, str]:
    return BatchNorm(*args[:6]), args[6], BatchNorm(*args[7:13]), args[13]


def _bn_relu_fake(z: Tensor, *args: Any) -> Results:
    bn, _, residual_bn, _ = _bn_relu_arguments(args)
    return _like_nhwc(z), _fake_vectors(z, bn), _fake_vectors(z, residual_bn)


bn_relu = Operator(
    f"bn_relu(Tensor z, {_schema_of_bn()}, Tensor? residual, {_schema_of_bn('residual_')}, "
    "str backend) -> (Tensor y, Tensor vectors, Tensor residual_vectors)",
    _bn_relu,
    _bn_relu_fake,
)


def _bn_relu_backward(
    dy: Tensor,
    z: Tensor,
    vectors: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    residual_vectors: Tensor | None,
    training: bool,
    group: str,
    residual_training: bool,
    residual_group: str,
    needs: list[bool],
    backend: str,
) -> Results:
    need_z, need_affine, need_residual, need_residual_affine = needs
    kernels = _serving_bn(z, True, backend)
    dz = dresidual = sums = residual_sums = None
    dy, z, count, relu = _nhwc(dy), _nhwc(z), _count(z), True
    need_sums = need_affine or (training and need_z)
    if need_residual or need_residual_affine:
        assert y is not None
        dresidual, sums = _behind_residual(kernels, dy, z, y, vectors, need_sums)
        dy, y, relu = dresidual, None, False
    elif need_sums:
        sums = kernels.bn_relu_backward(dy, z, vectors, y=y)
    if need_z:
        coefficients = _coefficients(sums, vectors, count, training, group)
        dz = kernels.bn_relu_input_gradient(dy, z, vectors, coefficients, y=y, relu=relu)
    if residual is not None and residual_vectors is not None and dresidual is not None:
        of_residual = _nhwc(residual), residual_vectors
        if need_residual_affine or residual_training:
            residual_sums = kernels.bn_relu_backward(dresidual, *of_residual, relu=False)
        if need_residual:
            coefficients = _coefficients(
                residual_sums, residual_vectors, count, residual_training, residual_group
            )
            dresidual = kernels.bn_relu_input_gradient(
                dresidual, *of_residual, coefficients, relu=False, inplace=True
            )
    return (
        dz,
        *_affine_gradients(sums, need_affine),
        dresidual if need_residual else None,
        *_affine_gradients(residual_sums, need_residual_affine),
    )


def _bn_relu_backward_fake(dy: Tensor, z: Tensor, vectors: Tensor, *args: Any) -> Any:
    need_z, need_affine, need_residual, need_residual_affine = args[-2]

    return (
        _like_nhwc(z) if need_z else None,
        *_fake_affine(vectors, z, need_affine),
        _like_nhwc(z) if need_residual else None,
        *_fake_affine(vectors, z, need_residual_affine),
    )


bn_relu_backward = Operator(
    "bn_relu_backward(Tensor dy, Tensor z, Tensor vectors, Tensor? y, Tensor? residual, "
    "Tensor? residual_vectors, bool training, str group, bool residual_training, "
    "str residual_group, bool[4] needs, str backend) -> (Tensor dz, Tensor dgamma, Tensor dbeta, "
    "Tensor dresidual, Tensor dresidual_gamma, Tensor dresidual_beta)",
    _bn_relu_backward,
    _bn_relu_backward_fake,
)


def _bn_relu_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, *args = inputs
    bn, residual, residual_bn, ctx.backend = _bn_relu_arguments(args)
    y, vectors, residual_vectors = output
    has_residual_bn = residual_bn.eps is not None
    ctx.save_for_backward(
        z,
        bn.gamma,
        bn.beta,
        residual if has_residual_bn else None,
        residual_bn.gamma,
        residual_bn.beta,
        vectors,
        None if residual is None else y,
        residual_vectors if has_residual_bn else None,
    )
    ctx.bn, ctx.residual_bn = _SavedBatchNorm.of(bn), _SavedBatchNorm.of(residual_bn)


# z, gamma, beta, residual, residual_gamma, residual_beta
_BN_RELU_INPUTS = (0, 1, 2, 7, 8, 9)


def _bn_relu_autograd(ctx: Any, needs: list[bool], dy: Tensor) -> Any:
    *inputs, vectors, y, residual_vectors = ctx.saved_tensors
    if torch.is_grad_enabled():

        def expression(
            z: Tensor,
            gamma: Tensor | None,
            beta: Tensor | None,
            residual: Tensor,
            residual_gamma: Tensor | None,
            residual_beta: Tensor | None,
        ) -> Tensor:
            t = ctx.bn.expression(z, gamma, beta, vectors)
            if residual_vectors is not None:
                t = t + ctx.residual_bn.expression(
                    residual, residual_gamma, residual_beta, residual_vectors
                )
            return _relu_as(y, t)

        found = _differentiate(expression, dy, *inputs)
        if y is not None and residual_vectors is None:
            found[3] = _relu_as(y, dy)
    else:
        z, _, _, residual, *_ = inputs
        i = _BN_RELU_INPUTS
        found = bn_relu_backward(
            dy,
            z,
            vectors,
            y,
            residual,
            residual_vectors,
            ctx.bn.training,
            ctx.bn.group,
            ctx.residual_bn.training,
            ctx.residual_bn.group,
            [needs[0], needs[1] or needs[2], needs[i[3]], needs[i[4]] or needs[i[5]]],
            ctx.backend,
        )
    return zip(_BN_RELU_INPUTS, found, strict=True)


bn_relu.register_autograd("BNReLU", _bn_relu_setup, _bn_relu_autograd)


# bn_relu_max_pool: max_pool2d(relu(bn(z))) ----------------------------------------------------


def _bn_relu_max_pool(z: Tensor, *args: Any) -> Results:
    bn, pool, backend = BatchNorm(*args[:6]), args[6:11], args[11]
    kernels = _serving_bn(z, True, backend)
    z = _nhwc(z)
    vectors = _bn_vectors(kernels, z, bn)
    a = kernels.normalize_relu(z, *_affine(vectors))
    y, indices = torch.ops.aten.max_pool2d_with_indices(a, *pool)
    return _nhwc(y), _nhwc(indices), vectors


def _bn_relu_max_pool_fake(z: Tensor, *args: Any) -> Results:
    y, indices = torch.ops.aten.max_pool2d_with_indices(z, *args[6:11])
    return _like_nhwc(y), _like_nhwc(indices), _fake_vectors(z, BatchNorm(*args[:6]))


_POOL = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"

bn_relu_max_pool = Operator(
    f"bn_relu_max_pool(Tensor z, {_schema_of_bn()}, {_POOL}, str backend) "
    "-> (Tensor y, Tensor indices, Tensor vectors)",
    _bn_relu_max_pool,
    _bn_relu_max_pool_fake,
)


def _bn_relu_max_pool_backward(
    dy: Tensor, z: Tensor, vectors: Tensor, indices: Tensor, *args: Any
) -> Results:
    *pool, training, group, (need_z, need_affine), backend = args
    kernels = _serving_bn(z, True, backend)
    dz = sums = None
    z = _nhwc(z)
    # z stands in for the ReLU's result, of which only the shape is used
    da = torch.ops.aten.max_pool2d_with_indices_backward(_nhwc(dy), z, *pool, _nhwc(indices))
    da = _nhwc(da)
    if need_affine or training:
        sums = kernels.bn_relu_backward(da, z, vectors)
    if need_z:
        coefficients = _coefficients(sums, vectors, _count(z), training, group)
        dz = kernels.bn_relu_input_gradient(da, z, vectors, coefficients, inplace=True)
    return dz, *_affine_gradients(sums, need_affine)


def _bn_relu_max_pool_backward_fake(dy: Tensor, z: Tensor, vectors: Tensor, *args: Any) -> Any:
    need_z, need_affine = args[-2]
    return _like_nhwc(z) if need_z else None, *_fake_affine(vectors, z, need_affine)


bn_relu_max_pool_backward = Operator(
    f"bn_relu_max_pool_backward(Tensor dy, Tensor z, Tensor vectors, Tensor indices, {_POOL}, "
    "bool training, str group, bool[2] needs, str backend) "
    "-> (Tensor dz, Tensor dgamma, Tensor dbeta)",
    _bn_relu_max_pool_backward,
    _bn_relu_max_pool_backward_fake,
)


def _bn_relu_max_pool_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, *args = inputs
    bn, ctx.pool, ctx.backend = BatchNorm(*args[:6]), args[6:11], args[11]
    _, indices, vectors = output
    ctx.save_for_backward(z, bn.gamma, bn.beta, vectors, indices)
    ctx.bn = _SavedBatchNorm.of(bn)


def _bn_relu_max_pool_autograd(ctx: Any, needs: list[bool], dy: Tensor) -> Any:
    *inputs, vectors, indices = ctx.saved_tensors
    if torch.is_grad_enabled():

        def expression(z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
            return F.max_pool2d(F.relu(ctx.bn.expression(z, gamma, beta, vectors)), *ctx.pool)

        found = _differentiate(expression, dy, *inputs)
    else:
        found = bn_relu_max_pool_backward(
            dy,
            inputs[0],
            vectors,
            indices,
            *ctx.pool,
            ctx.bn.training,
            ctx.bn.group,
            [needs[0], needs[1] or needs[2]],
            ctx.backend,
        )
    return enumerate(found)


bn_relu_max_pool.register_autograd(
    "BNReLUMaxPool", _bn_relu_max_pool_setup, _bn_relu_max_pool_autograd
)


# conv1x1: the dense 1x1 convolution -----------------------------------------------------------


def _conv1x1(x: Tensor, weight: Tensor, stride: int, backend: str) -> Tensor:
    kernels = _serving_bn(x, True, backend)
    return kernels.conv1x1(_nhwc(x), _dense(weight), stride=stride)


conv1x1 = Operator(
    "conv1x1(Tensor x, Tensor weight, int stride, str backend) -> Tensor",
    _conv1x1,
    lambda x, weight, stride, _: _fake_conv(x, weight.shape[0], stride),
)


def _conv1x1_backward(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, needs: list[bool], backend: str
) -> Results:
    kernels = _serving_bn(x, True, backend)
    need_x, need_weight = needs
    return kernels.conv1x1_backward(
        _nhwc(dz),
        _nhwc(x),
        _dense(weight),
        stride=stride,
        need_dx=need_x,
        need_dweight=need_weight,
    )


def _conv1x1_backward_fake(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, needs: list[bool], backend: str
) -> Results:
    need_x, need_weight = needs
    return _like_nhwc(x) if need_x else None, _like_weight(weight) if need_weight else None


conv1x1_backward = Operator(
    "conv1x1_backward(Tensor dz, Tensor x, Tensor weight, int stride, bool[2] needs, "
    "str backend) -> (Tensor dx, Tensor dweight)",
    _conv1x1_backward,
    _conv1x1_backward_fake,
)


def _conv1x1_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.stride, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _conv1x1_autograd(ctx: Any, needs: list[bool], dz: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        found: Any = _differentiate(
            lambda x, weight: torch.conv2d(x, weight, None, ctx.stride), dz, x, weight
        )
    else:
        found = conv1x1_backward(dz, x, weight, ctx.stride, needs[:2], ctx.backend)
    return enumerate(found)


conv1x1.register_autograd("Conv1x1", _conv1x1_setup, _conv1x1_autograd)


# bottleneck: a block of three convolutions, with its shortcut -----------------------------------


class _Bottleneck(NamedTuple):
    """The arguments of bottleneck behind x."""

    weight1: Tensor
    bn1: BatchNorm
    weight2: Tensor
    bn2: BatchNorm
    weight3: Tensor
    bn3: BatchNorm
    residual: Tensor | None  # None: x, or the 1x1 convolution of x with residual_weight
    residual_weight: Tensor | None
    residual_bn: BatchNorm
    residual_stride: int
    stride: int
    groups: int
    dilation: int
    backend: str

    @classmethod
    def of(cls, args: tuple) -> _Bottleneck:
        bn1, bn2, bn3, residual_bn = (BatchNorm(*args[at : at + 6]) for at in (1, 8, 15, 23))
        weight1, weight2, weight3, residual, residual_weight = (args[i] for i in (0, 7, 14, 21, 22))
        convs = weight1, bn1, weight2, bn2, weight3, bn3
        return cls(*convs, residual, residual_weight, residual_bn, *args[29:])

    @property
    def conv(self) -> tuple[int, int, int]:
        return self.stride, self.groups, self.dilation


def _bottleneck_forward(x: Tensor, *args: Any) -> Results:
    b = _Bottleneck.of(args)
    x = _nhwc(x)
    kernels = _serving_bn(x, True, b.backend)
    z1, batch1 = _conv1x1_stats(kernels, b.bn1, x, b.weight1)
    z3, z2, vectors2, vectors1, batch3 = _conv_bn_relu(
        *(z1, b.weight2, *b.bn2, None, *b.bn1, b.weight3, *b.conv, b.backend),
        in_batch=batch1,
        next_bn=b.bn3,
    )
    residual, z4, batch4 = x if b.residual is None else b.residual, None, None
    if b.residual_weight is not None:
        z4, batch4 = _conv1x1_stats(
            kernels, b.residual_bn, x, b.residual_weight, stride=b.residual_stride
        )
        residual = z4
    y, vectors3, vectors4 = _bn_relu(
        *(z3, *b.bn3, residual, *b.residual_bn, b.backend),
        batch=batch3,
        residual_batch=batch4,
    )
    return y, z1, z2, z3, z4, vectors1, vectors2, vectors3, vectors4


def _bottleneck_fake(x: Tensor, *args: Any) -> Results:
    b = _Bottleneck.of(args)
    z1 = _fake_conv(x, b.weight1.shape[0], 1)
    z2 = _fake_conv(z1, b.weight2.shape[0], b.stride)
    z3 = _fake_conv(z2, b.weight3.shape[0], 1)
    z4 = None
    if b.residual_weight is not None:
        z4 = _fake_conv(x, b.residual_weight.shape[0], b.residual_stride)
    found = zip((z1, z2, z3, z3), (b.bn1, b.bn2, b.bn3, b.residual_bn), strict=True)
    return _like_nhwc(z3), z1, z2, z3, z4, *(_fake_vectors(z, bn) for z, bn in found)


bottleneck = Operator(
    f"bottleneck(Tensor x, Tensor weight1, {_schema_of_bn('bn1_')}, Tensor weight2, "
    f"{_schema_of_bn('bn2_')}, Tensor weight3, {_schema_of_bn('bn3_')}, Tensor? residual, "
    f"Tensor? residual_weight, {_schema_of_bn('residual_')}, int residual_stride, int stride, "
    "int groups, int dilation, str backend) -> (Tensor y, Tensor z1, Tensor z2, Tensor z3, "
    "Tensor z4, Tensor vectors1, Tensor vectors2, Tensor vectors3, Tensor residual_vectors)",
    _bottleneck_forward,
    _bottleneck_fake,
)


def _bottleneck_backward(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    y: Tensor,
    z1: Tensor,
    z2: Tensor,
    z3: Tensor,
    vectors1: Tensor,
    vectors2: Tensor,
    vectors3: Tensor,
    residual_vectors: Tensor | None,
    residual_stride: int,
    stride: int,
    groups: int,
    dilation: int,
    training: list[bool],
    bn_groups: list[str],
    shared: bool,
    needs: list[bool],
    backend: str,
) -> Results:
    """`residual`: what its BatchNorm was of, if it has one; `shared`: the shortcut begins at x."""
    need_x, need_weight1, need_bn1, need_weight2, need_bn2, need_weight3, need_bn3 = needs[:7]
    need_residual, need_residual_weight, need_residual_bn = needs[7:]
    training1, training2, training3, residual_training = training
    group1, group2, group3, residual_group = bn_groups
    need_z1 = need_x or need_weight1
    need_z2 = need_z1 or need_bn1 or need_weight2
    kernels = _serving_bn(x, True, backend)
    x = _nhwc(x)
    dx = dweight1 = dresidual_weight = None
    dz1 = dweight2 = dgamma2 = dbeta2 = dgamma1 = dbeta1 = dweight3 = None
    need_branch = need_z2 or need_bn2 or need_weight3
    need_shortcut = need_residual_weight or (need_x if shared else need_residual)
    dz3, dgamma3, dbeta3, dresidual, dresidual_gamma, dresidual_beta = _bn_relu_backward(
        *(dy, z3, vectors3, y, residual, residual_vectors),
        *(training3, group3, residual_training, residual_group),
        [need_branch, need_bn3, need_shortcut, need_residual_bn],
        backend,
    )
    if need_branch:
        assert dz3 is not None
        dz1, dweight2, dgamma2, dbeta2, _, dgamma1, dbeta1, dweight3 = _conv_bn_relu_backward(
            *(dz3, z1, weight2, z2, vectors2, None, vectors1, weight3, stride, groups, dilation),
            *(training2, group2, training1, group1),
            [need_z1, need_weight2, need_bn2, False, need_bn1, need_weight3],
            backend,
        )
    del dz3  # y's size
    if need_z1:
        assert dz1 is not None
        # what x has from the branch is added to what it has from the shortcut, or the other way
        dx, dweight1 = kernels.conv1x1_backward(
            dz1,
            x,
            _dense(weight1),
            need_dx=need_x,
            need_dweight=need_weight1,
            dx=dresidual if need_x and shared and residual_weight is None else None,
        )
    if residual_weight is not None and need_shortcut:
        dx, dresidual_weight = kernels.conv1x1_backward(
            dresidual,
            x,
            _dense(residual_weight),
            stride=residual_stride,
            need_dx=need_x,
            need_dweight=need_residual_weight,
            dx=dx,
        )
    return (
        *(dx, dweight1, dgamma1, dbeta1, dweight2, dgamma2, dbeta2, dweight3, dgamma3, dbeta3),
        dresidual if need_residual and not shared else None,
        *(dresidual_weight, dresidual_gamma, dresidual_beta),
    )


def _bottleneck_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    y: Tensor,
    z1: Tensor,
    z2: Tensor,
    z3: Tensor,
    vectors1: Tensor,
    *args: Any,
) -> Results:
    shared, needs = args[-3], args[-2]
    need_x, need_weight1, need_bn1, need_weight2, need_bn2, need_weight3, need_bn3 = needs[:7]
    need_residual, need_residual_weight, need_residual_bn = needs[7:]

    def weight(t: Tensor | None, need: bool) -> Tensor | None:
        return _like_weight(t) if t is not None and need else None

    return (
        _like_nhwc(x) if need_x else None,
        weight(weight1, need_weight1),
        *_fake_affine(vectors1, z1, need_bn1),
        weight(weight2, need_weight2),
        *_fake_affine(vectors1, z2, need_bn2),
        weight(weight3, need_weight3),
        *_fake_affine(vectors1, z3, need_bn3),
        _like_nhwc(z3) if need_residual and not shared else None,
        weight(residual_weight, need_residual_weight),
        *_fake_affine(vectors1, z3, need_residual_bn),
    )


bottleneck_backward = Operator(
    "bottleneck_backward(Tensor dy, Tensor x, Tensor weight1, Tensor weight2, Tensor weight3, "
    "Tensor? residual, Tensor? residual_weight, Tensor y, Tensor z1, Tensor z2, Tensor z3, "
    "Tensor vectors1, Tensor vectors2, Tensor vectors3, Tensor? residual_vectors, "
    "int residual_stride, int stride, int groups, int dilation, bool[4] training, "
    "str[] bn_groups, bool shared, bool[10] needs, str backend) -> (Tensor dx, Tensor dweight1, "
    "Tensor dgamma1, Tensor dbeta1, Tensor dweight2, Tensor dgamma2, Tensor dbeta2, "
    "Tensor dweight3, Tensor dgamma3, Tensor dbeta3, Tensor dresidual, Tensor dresidual_weight, "
    "Tensor dresidual_gamma, Tensor dresidual_beta)",
    _bottleneck_backward,
    _bottleneck_backward_fake,
)


def _bottleneck_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, *args = inputs
    b = _Bottleneck.of(tuple(args))
    y, z1, z2, z3, z4, *vectors, residual_vectors = output
    has_bn = b.residual_bn.eps is not None
    ctx.save_for_backward(
        *(x, b.weight1, *b.bn1[:2], b.weight2, *b.bn2[:2], b.weight3, *b.bn3[:2]),
        *(b.residual if has_bn else None, b.residual_weight, *b.residual_bn[:2]),
        *(y, z1, z2, z3, None if b.residual_weight is None else z4),
        *vectors,
        residual_vectors if has_bn else None,
    )
    ctx.shared = b.residual is None
    ctx.bns = [_SavedBatchNorm.of(bn) for bn in (b.bn1, b.bn2, b.bn3, b.residual_bn)]
    ctx.residual_stride, ctx.conv, ctx.backend = b.residual_stride, b.conv, b.backend


# Where the differentiable inputs stand in the schema: x, weight and gamma, beta three times,
# residual, residual_weight, residual_gamma, residual_beta.
_BOTTLENECK_INPUTS = (0, 1, 2, 3, 8, 9, 10, 15, 16, 17, 22, 23, 24, 25)


def _bottleneck_autograd(ctx: Any, needs: list[bool], dy: Tensor) -> Any:
    saved = ctx.saved_tensors
    inputs, (y, z1, z2, z3, z4, *vectors) = saved[:14], saved[14:]
    has_bn = vectors[3] is not None
    if torch.is_grad_enabled():
        stride, groups, dilation = ctx.conv
        bn1, bn2, bn3, residual_bn = ctx.bns

        def expression(*inputs: Any) -> Tensor:
            x, weight1, gamma1, beta1, weight2, gamma2, beta2, weight3, gamma3, beta3 = inputs[:10]
            residual, residual_weight, *residual_affine = inputs[10:]
            t = F.relu(bn1.expression(torch.conv2d(x, weight1), gamma1, beta1, vectors[0]))
            t = torch.conv2d(t, weight2, None, stride, dilation, dilation, groups)
            t = F.relu(bn2.expression(t, gamma2, beta2, vectors[1]))
            t = bn3.expression(torch.conv2d(t, weight3), gamma3, beta3, vectors[2])
            if residual_weight is not None:
                residual = torch.conv2d(x, residual_weight, None, ctx.residual_stride)
            elif ctx.shared:
                residual = x
            if has_bn:
                residual = residual_bn.expression(residual, *residual_affine, vectors[3])
            return _relu_as(y, t if residual is None else t + residual)

        found = _differentiate(expression, dy, *inputs)
        if not (ctx.shared or has_bn):
            found[10] = _relu_as(y, dy)
    else:
        x, weight1, _, _, weight2, _, _, weight3, _, _, residual, residual_weight, _, _ = inputs
        n = [needs[i] for i in _BOTTLENECK_INPUTS]
        affines = [n[i] or n[i + 1] for i in (2, 5, 8, 12)]
        of_bn = None
        if has_bn:
            of_bn = residual if residual is not None else x if residual_weight is None else z4
        found = bottleneck_backward(
            *(dy, x, weight1, weight2, weight3, of_bn, residual_weight),
            *(y, z1, z2, z3, *vectors, ctx.residual_stride, *ctx.conv),
            [bn.training for bn in ctx.bns],
            [bn.group for bn in ctx.bns],
            ctx.shared,
            [*n[:2], affines[0], n[4], affines[1], n[7], affines[2], *n[10:12], affines[3]],
            ctx.backend,
        )
    return zip(_BOTTLENECK_INPUTS, found, strict=True)


bottleneck.register_autograd("Bottleneck", _bottleneck_setup, _bottleneck_autograd)


# Formulas for torch.utils.flop_counter: convolutions alone count, as with torch's own operators ---


@register_flop_formula(torch.ops.resnext_kernels.conv_bn_relu_eval)
def _conv_bn_relu_eval_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


@register_flop_formula(torch.ops.resnext_kernels.conv_bn_relu)
def _conv_bn_relu_flops(x: Any, weight: Any, *args: Any, out_shape: Any, **_: Any) -> int:
    y, z, *_ = out_shape
    pointwise_weight = args[13]
    flops = conv_flop_count(x, weight, z)
    return flops + (conv_flop_count(z, pointwise_weight, y) if pointwise_weight else 0)


@register_flop_formula(torch.ops.resnext_kernels.conv_bn_relu_backward)
def _conv_bn_relu_backward_flops(dy: Any, x: Any, weight: Any, z: Any, *args: Any, **_: Any) -> int:
    pointwise_weight, needs = args[3], args[11]
    need_x, need_weight, need_affine, _, need_in_affine, need_pointwise = needs
    need_input = need_x or need_in_affine
    flops = (need_input + need_weight) * conv_flop_count(x, weight, z)
    if pointwise_weight:
        need_activation = need_input or need_weight or need_affine
        flops += (need_activation + need_pointwise) * conv_flop_count(z, pointwise_weight, dy)
    return flops


@register_flop_formula(
    [torch.ops.resnext_kernels.conv1x1, torch.ops.resnext_kernels.conv1x1_bn_relu_eval]
)
def _conv1x1_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


@register_flop_formula(torch.ops.resnext_kernels.conv1x1_backward)
def _conv1x1_backward_flops(
    dz: Any, x: Any, weight: Any, stride: Any, needs: Any, *_: Any, **__: Any
) -> int:
    return sum(needs) * conv_flop_count(x, weight, dz)


@register_flop_formula(torch.ops.resnext_kernels.bottleneck)
def _bottleneck_flops(x: Any, *args: Any, out_shape: Any, **_: Any) -> int:
    _, z1, z2, z3, z4, *_ = out_shape
    weight1, weight2, weight3, residual_weight = args[0], args[7], args[14], args[22]
    flops = conv_flop_count(x, weight1, z1) + conv_flop_count(z1, weight2, z2)
    flops += conv_flop_count(z2, weight3, z3)
    return flops + (conv_flop_count(x, residual_weight, z4) if residual_weight else 0)


@register_flop_formula(torch.ops.resnext_kernels.bottleneck_backward)
def _bottleneck_backward_flops(
    dy: Any, x: Any, weight1: Any, weight2: Any, weight3: Any, *args: Any, **_: Any
) -> int:
    residual_weight, _, z1, z2, z3 = args[1:6]
    needs = args[-2]
    need_x, need_weight1, need_bn1, need_weight2, need_bn2, need_weight3, *_ = needs
    need_z1 = need_x or need_weight1 or need_bn1
    need_z2 = need_z1 or need_weight2 or need_bn2
    flops = (need_x + need_weight1) * conv_flop_count(x, weight1, z1)
    flops += (need_z1 + need_weight2) * conv_flop_count(z1, weight2, z2)
    flops += (need_z2 + need_weight3) * conv_flop_count(z2, weight3, z3)
    if residual_weight:
        flops += (need_x + needs[8]) * conv_flop_count(x, residual_weight, dy)
    return flops
