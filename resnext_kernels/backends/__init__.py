"""The backends, in the order in which they are tried, and the choice between them.

A backend is a module that offers the functions of `reference` under the same names, and
`why_not(problem)`: None where it serves the problem, else the reason. The first that serves a
problem is used, unless one is asked for: by the `backend` argument, by `use`, or by the environment
variable RESNEXT_KERNELS_BACKEND, in this order of precedence. What is asked for and cannot serve
raises; nothing is replaced silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from ..problem import ConvProblem
from .tuning import autotune

__all__ = ["NAMES", "autotune", "available", "compatible", "requested", "select", "use"]

NAMES: tuple[str, ...] = tuple(
    name
    for name in ("cuda", "triton", "cpu", "reference")
    if importlib.util.find_spec(f"{__name__}.{name}") is not None
)
_MODULES: dict[str, ModuleType] = {
    name: importlib.import_module(f"{__name__}.{name}") for name in NAMES
}
_ENVIRONMENT = "RESNEXT_KERNELS_BACKEND"
# What os.environ reads: its own `get` takes half a microsecond, at each call of an operator, to see
# that there is no such variable.
_variables: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_VARIABLE = os.environ.encodekey(_ENVIRONMENT)
_used: ContextVar[str | None] = ContextVar("resnext_kernels_backend", default=None)


def _module(name: str, source: str) -> ModuleType:
    if name not in _MODULES:
        allowed = ", ".join(map(repr, NAMES))
        raise ValueError(f"{source} must be one of {allowed}, got {name!r}")
    return _MODULES[name]


def compatible(problem: ConvProblem) -> list[str]:
    """Names of the backends that serve `problem`, the preferred one first."""
    return [name for name, module in _MODULES.items() if module.why_not(problem) is None]


def available() -> list[str]:
    """Names of the backends that serve an ordinary problem on a device of this machine.

    That is ResNeXt's 32x4d layer in float32 or float16, in training, on the CPU or on CUDA.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    names = {
        name
        for device in devices
        for dtype in (torch.float32, torch.float16)
        for name in compatible(
            ConvProblem(1, 56, 56, 128, groups=32, dtype=dtype, device_type=device, training=True)
        )
    }
    return [name for name in NAMES if name in names]


def requested() -> str | None:
    """The backend that `use` or, outside of it, RESNEXT_KERNELS_BACKEND asks for.

    Raises:
        ValueError: If RESNEXT_KERNELS_BACKEND names no backend.
    """
    name = _used.get()
    if name is None and _VARIABLE in _variables:
        name = os.environ[_ENVIRONMENT] or None
        if name is not None:
            _module(name, _ENVIRONMENT)
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything inside on the backend `name`, in this thread (or asynchronous task) only.

    Equivalent to passing `backend=name` to every call that is not given one. The backward pass uses
    the backend of its forward pass. A compiled function reads this setting when it runs.

    Args:
        name: One of `NAMES`.

    Raises:
        ValueError: If there is no backend `name`.
    """
    _module(name, "name")
    token = _used.set(name)
    try:
        yield
    finally:
        _used.reset(token)


def select(problem: ConvProblem, backend: str | None = None) -> ModuleType:
    """The backend for `problem`: the one asked for, else the first that serves it.

    Args:
        problem: What is to be computed.
        backend: One of `NAMES`; None for the one that `requested` gives, if any.

    Raises:
        ValueError: If there is no backend of that name.
        RuntimeError: If the backend that was asked for does not serve the problem; the text says
            why.
    """
    name = backend or requested()
    if name is not None:
        module = _module(name, "backend")
        reason = module.why_not(problem)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} does not serve {problem}: {reason}")
        return module
    for module in _MODULES.values():
        if module.why_not(problem) is None:
            return module
    raise AssertionError("the reference serves every problem")


@lru_cache(maxsize=4096)
def _select(
    name: str | None,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    k: int,
    groups: int,
    stride: int,
    dilation: int,
    training: bool,
) -> ModuleType:
    """`select` for such an x, remembered: what each call of an operator asks."""
    n, c, h, w = shape
    on = (dtype, device.type, training, device.index)
    return select(ConvProblem(n, h, w, c, k, groups, stride, dilation, *on), name)
