"""The fused operations as modules: parameters and buffers, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import functional
from .functional import BatchNormState

__all__ = [
    "FusedGroupedBottleneck",
    "GroupedConvBNReLU",
    "batch_norm_relu",
    "batch_norm_relu_max_pool",
    "conv1x1",
    "conv_bn_relu",
    "why_not_bypass",
    "why_not_conv",
    "why_not_norm",
]

_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


def why_not_norm(bn: nn.Module) -> str | None:
    """None where the fused operations can take the place of `bn`, else the reason.

    They serve nn.BatchNorm2d, nn.SyncBatchNorm, and frozen batch norms: modules that are no torch
    normalisation and have `weight`, `bias`, `running_mean` and `running_var` of one dimension (as
    torchvision's FrozenBatchNorm2d; `eps` is 1e-5 where they have none).
    """
    if isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        if type(bn).forward in _FORWARDS:
            return None
        return f"{type(bn).__name__} has a forward of its own"
    vectors = [
        getattr(bn, name, None) for name in ("weight", "bias", "running_mean", "running_var")
    ]
    if not isinstance(bn, _NormBase) and all(
        isinstance(v, Tensor) and v.dim() == 1 for v in vectors
    ):
        return None
    return f"{type(bn).__name__} is not BatchNorm2d, SyncBatchNorm or a frozen batch norm"


def why_not_conv(conv: nn.Module) -> str | None:
    """None where the fused operations can take the place of `conv`, else the reason.

    They serve an nn.Conv2d of 3x3 without bias, of equal strides, with padding equal to dilation.
    """
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        return f"{type(conv).__name__} is not Conv2d"
    if conv.kernel_size != (3, 3):
        return f"its kernel is {conv.kernel_size}, not (3, 3)"
    if conv.bias is not None:
        return "it has a bias"
    if conv.stride[0] != conv.stride[1]:
        return f"its strides {conv.stride} differ"
    padding = (1, 1) if conv.padding == "same" and conv.dilation == (1, 1) else conv.padding
    if conv.dilation[0] != conv.dilation[1] or padding != conv.dilation:
        return f"its padding {conv.padding} is not its dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode!r}, not 'zeros'"
    return None


def why_not_bypass(module: nn.Module) -> str | None:
    """None where `module` may be computed without calling it, else the reason."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks, which would not be called"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    return None


def _is_pointwise(conv: nn.Module) -> bool:
    """Whether `conv` is nothing but conv2d(x, weight, None, stride) of 1x1."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride[0] == conv.stride[1]
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.bias is None
    )


def _tensor(module: nn.Module, name: str) -> Any:
    """module.name; a parameter or buffer in a third of the time of nn.Module.__getattr__."""
    for own in (module._parameters, module._buffers):
        if name in own:
            return own[name]
    return getattr(module, name)  # parametrized, for one


def _is_bare_pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether that is all there is to a call of `conv`: nothing hooks in."""
    return _is_pointwise(conv) and why_not_bypass(conv) is None


def _sync_group(bn: nn.SyncBatchNorm) -> str:
    """Name of the process group that `bn` shares statistics with; "" where it is alone."""
    if not (bn.training and dist.is_available() and dist.is_initialized()):
        return ""
    group: Any = bn.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _counter(bn: nn.Module | None) -> Tensor | None:
    """Where `bn` counts the batches of training, if it does now."""
    if isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) and bn.training:
        return _tensor(bn, "num_batches_tracked") if bn.track_running_stats else None
    return None


def _states(*bns: nn.Module | None) -> list[Any]:
    """BatchNormState: what each of `bns` brings to this call; counts the batch as torch does."""
    counters = [t for t in map(_counter, bns) if t is not None]
    together = len(set(map(id, counters))) == len(counters) > 1
    if together:
        torch._foreach_add_(counters, 1)  # one kernel on a GPU
    states: list[Any] = []
    for bn in bns:  # one that comes twice counts between: its momentum may depend on the count
        counter = None if together else _counter(bn)
        if counter is not None:
            counter.add_(1)
        states.append(None if bn is None else _state(bn))
    return states


def _state(bn: nn.Module) -> BatchNormState:
    """What `bn`, which has counted the batch, brings to this call, by its own training flag."""
    if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen: Any = bn  # by its attributes
        vectors = frozen.weight, frozen.bias, frozen.running_mean, frozen.running_var
        return BatchNormState(*vectors, eps=getattr(frozen, "eps", 1e-5))
    mean, var = _tensor(bn, "running_mean"), _tensor(bn, "running_var")
    training = bn.training or (mean is None and var is None)
    momentum: Any = bn.momentum
    if momentum is None:  # cumulative average
        batches = _counter(bn)
        momentum = 0.0 if batches is None else 1.0 / batches.double()
    tracked = not bn.training or bn.track_running_stats
    return BatchNormState(
        _tensor(bn, "weight"),
        _tensor(bn, "bias"),
        mean if tracked else None,
        var if tracked else None,
        training,
        momentum,
        bn.eps,
        _sync_group(bn) if isinstance(bn, nn.SyncBatchNorm) else "",
    )


def conv_bn_relu(
    conv: nn.Conv2d,
    bn: nn.Module,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """relu(bn(conv(x)) [+ residual]) of modules that `why_not_conv` and `why_not_norm` allow.

    Their parameters, buffers and training flags are used; their forward and hooks are not called.
    """
    return functional.conv_bn_relu(
        x,
        _tensor(conv, "weight"),
        *_states(bn),
        residual=residual,
        stride=conv.stride[0],
        groups=conv.groups,
        dilation=conv.dilation[0],
        backend=backend,
    )


def conv1x1(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), by `functional.conv1x1` where it is nothing but a dense one and nothing hooks in."""
    if not _is_bare_pointwise(conv):
        return conv(x)
    return functional.conv1x1(x, conv.weight, stride=conv.stride[0])


def batch_norm_relu(
    bn: nn.Module,
    z: Tensor,
    *,
    residual: Tensor | None = None,
    residual_bn: nn.Module | None = None,
    backend: str | None = None,
) -> Tensor:
    """relu(bn(z) [+ residual | + residual_bn(residual)]) of modules `why_not_norm` allows."""
    own, of_residual = _states(bn, residual_bn)
    return functional.bn_relu(z, own, residual=residual, residual_bn=of_residual, backend=backend)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def batch_norm_relu_max_pool(
    bn: nn.Module, z: Tensor, pool: nn.MaxPool2d, *, backend: str | None = None
) -> Tensor:
    """pool(relu(bn(z))) of a module that `why_not_norm` allows and a plain nn.MaxPool2d."""
    return functional.bn_relu_max_pool(
        z,
        *_states(bn),
        kernel_size=_pair(pool.kernel_size),
        stride=_pair(pool.stride),
        padding=_pair(pool.padding),
        dilation=_pair(pool.dilation),
        ceil_mode=pool.ceil_mode,
        backend=backend,
    )


def _normalization(norm_layer: Callable[..., nn.Module] | None, channels: int) -> nn.Module:
    bn = (nn.BatchNorm2d if norm_layer is None else norm_layer)(channels)
    reason = why_not_norm(bn)
    if reason is not None:
        allowed = "nn.BatchNorm2d, nn.SyncBatchNorm or a frozen batch norm"
        raise TypeError(f"norm_layer must make {allowed}: {reason}")
    return bn


class GroupedConvBNReLU(nn.Module):
    """Grouped 3x3 convolution, BatchNorm and ReLU in one operation.

        y = relu(bn(conv(x)) [+ residual])

    Equivalent to

        nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False),
            nn.BatchNorm2d(out_channels, eps, momentum),
            nn.ReLU(),
        )

    Args:
        in_channels, out_channels: C and K.
        groups: Groups of the convolution, a divisor of both.
        stride, dilation: Of the convolution; its padding is `dilation`.
        eps, momentum: Of the BatchNorm.
        norm_layer: Makes the BatchNorm from `out_channels`, in place of nn.BatchNorm2d with `eps`
            and `momentum`: an nn.BatchNorm2d, nn.SyncBatchNorm or frozen batch norm.
        backend: One of `backends.NAMES`, or None for the first that serves.

    Attributes:
        conv: The nn.Conv2d that holds `weight`.
        bn: The BatchNorm that holds gamma (`weight`), beta (`bias`) and the statistics.

    Input:
        x: (N, C, H, W); torch.channels_last is the layout that the kernels work in.
        residual: y's shape, added before the ReLU; or None.

    Returns:
        y, (N, K, (H - 1) // stride + 1, (W - 1) // stride + 1).

    Raises:
        ValueError: If `groups` does not divide `in_channels` and `out_channels`; on a call, as
            `functional.grouped_conv_bn_relu`.
        TypeError: If `norm_layer` makes another kind of module; on a call, as there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        norm_layer: Callable[..., nn.Module] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            3,
            stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn = (
            nn.BatchNorm2d(out_channels, eps, momentum)
            if norm_layer is None
            else _normalization(norm_layer, out_channels)
        )
        self.backend = backend

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.Module, *, backend: str | None = None) -> GroupedConvBNReLU:
        """The module that shares the parameters and buffers of `conv` and `bn`.

        Raises:
            ValueError: If `why_not_conv(conv)` or `why_not_norm(bn)` gives a reason.
        """
        for name, reason in (("conv", why_not_conv(conv)), ("bn", why_not_norm(bn))):
            if reason is not None:
                raise ValueError(f"{name} cannot be fused: {reason}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.conv = conv
        module.bn = bn
        module.backend = backend
        module.training = bn.training
        return module

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        own: dict[str, Any] = self._modules  # past nn.Module.__getattr__
        return conv_bn_relu(own["conv"], own["bn"], x, residual=residual, backend=self.backend)


class FusedGroupedBottleneck(nn.Module):
    """The bottleneck block of ResNeXt, with everything behind its convolutions fused.

        y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))

    Equivalent to torchvision's Bottleneck of the same arguments, in results, parameters and state
    dict. bn1 and its ReLU are applied where the 3x3 convolution loads its input; bn2 and its ReLU
    follow it; bn3, the residual (with the BatchNorm of the downsampling branch) and the last ReLU
    are one pass. To autograd the block is one operation, unless hooks have to be called. Saved for
    the backward pass: x, the outputs of the convolutions, and y.

    Args:
        inplanes: Channels of x.
        planes: A quarter of the channels of y.
        stride: Of the 3x3 convolution.
        downsample: Maps x to y's shape; None for the identity.
        groups: Groups of the 3x3 convolution (the paper's cardinality).
        base_width: Channels of a group, for 64 planes (the paper's width).
        dilation: Of the 3x3 convolution.
        norm_layer: Makes a BatchNorm from a number of channels: nn.BatchNorm2d (None),
            nn.SyncBatchNorm or a frozen batch norm.

    Input:
        x: (N, inplanes, H, W); torch.channels_last is the layout that the kernels work in.

    Returns:
        y, (N, 4 * planes, (H - 1) // stride + 1, (W - 1) // stride + 1), in x's memory format.

    Raises:
        TypeError: If `norm_layer` makes another kind of module.
        ValueError: On a call, if x has not `inplanes` channels or `downsample(x)` not y's shape.

    Hooks on conv2, conv3 and the BatchNorms (that of `downsample` too, where it is a convolution
    and a BatchNorm) are not called.

    Source: Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017,
    Fig. 3c; stride in the 3x3 convolution as in torchvision.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = _normalization(norm_layer, width)
        self.conv2 = nn.Conv2d(
            width,
            width,
            3,
            stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn2 = _normalization(norm_layer, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = _normalization(norm_layer, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        bare = _is_bare_pointwise(self.conv1) and self.conv1.stride == (1, 1)
        if not (bare and self._ends_pointwise()):
            return self._join(self._branch(x), x)
        residual = weight = residual_bn = None
        stride = 1
        if self.downsample is not None:
            conv, residual_bn = self._shortcut_layers()
            if residual_bn is not None and _is_bare_pointwise(conv):
                weight, stride = conv.weight, conv.stride[0]
            else:
                residual = conv(x)
        bn1, bn2, bn3, of_residual = _states(self.bn1, self.bn2, self.bn3, residual_bn)
        return functional.bottleneck(
            x,
            self.conv1.weight,
            bn1,
            self.conv2.weight,
            bn2,
            self.conv3.weight,
            bn3,
            residual,
            residual_weight=weight,
            residual_bn=of_residual,
            residual_stride=stride,
            stride=self.conv2.stride[0],
            groups=self.conv2.groups,
            dilation=self.conv2.dilation[0],
        )

    def _ends_pointwise(self) -> bool:
        return _is_pointwise(self.conv3) and self.conv3.stride == (1, 1)

    def _branch(self, x: Tensor) -> Tensor:
        """conv3's output."""
        pointwise = self._ends_pointwise()
        z = conv1x1(self.conv1, x)
        bn1, bn2 = _states(self.bn1, self.bn2)
        z = functional.conv_bn_relu(
            z,
            self.conv2.weight,
            bn2,
            input_bn=bn1,
            pointwise_weight=self.conv3.weight if pointwise else None,
            stride=self.conv2.stride[0],
            groups=self.conv2.groups,
            dilation=self.conv2.dilation[0],
        )
        return z if pointwise else conv1x1(self.conv3, z)

    def _shortcut(self, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        """The residual, and the BatchNorm that is still to be applied to it."""
        if self.downsample is None:
            return x, None
        layers, bn = self._shortcut_layers()
        return conv1x1(layers, x), bn

    def _shortcut_layers(self) -> tuple[nn.Module, nn.Module | None]:
        """The downsampling branch: what is called, and the BatchNorm behind it that is not."""
        shortcut = self.downsample
        assert shortcut is not None
        if (
            type(shortcut) is nn.Sequential
            and len(shortcut) == 2
            and why_not_norm(shortcut[1]) is None
        ):
            return shortcut[0], shortcut[1]
        return shortcut, None

    def _join(self, z: Tensor, x: Tensor) -> Tensor:
        """relu(bn3(z) + downsample(x))."""
        residual, residual_bn = self._shortcut(x)
        return batch_norm_relu(self.bn3, z, residual=residual.to(z.dtype), residual_bn=residual_bn)
