"""The GPU backends without a GPU: what they launch on CPU tensors, compiled and run by ptxemu.

ptxemu, a PTX emulator, stands beside the repository in some checkouts and is no dependency. It runs
compiled kernels thread for thread, checks every access and counts; it never gives a time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from resnext_kernels.backends import cuda

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


@dataclass(frozen=True)
class Device:
    """What a backend may cut its work for."""

    multiprocessors: int
    shared_bytes: int  # that one block can have


DEVICES = {
    "A100": Device(108, 166912),
    "H100": Device(132, 232448),
    "RTX4090": Device(128, 101376),
    "single": Device(1, 101376),  # no real one: a block walks through all images
}


class Emulator:
    """Inside `active`, the functions of a backend take CPU tensors, and their kernels run here.

    Args:
        device: One of DEVICES.
        count: Whether to count instructions and memory accesses, which takes longer.
        check: Passed on to ptxemu: "race", "init". Bounds and alignment are always checked.
    """

    backend: ClassVar[str]
    # Whether launches differ from device to device; if not, those for one stand for all.
    per_device: ClassVar[bool]

    def __init__(self, device: str = "A100", *, count: bool = False, check: tuple[str, ...] = ()):
        self.device = DEVICES[device]
        self.options: dict[str, Any] = {"count": count, "check": check}
        self.launched: list[tuple[str, Any]] = []  # kernel name, ptxemu's result

    @classmethod
    def why_not(cls) -> str | None:
        """None where the backend can be emulated here, else the reason."""
        if importlib.util.find_spec("ptxemu") is None:
            return "ptxemu, which runs PTX on the CPU, is not installed"
        return cls._why_no_ptx()

    @classmethod
    def _why_no_ptx(cls) -> str | None:
        raise NotImplementedError

    def active(self) -> Any:
        """A context manager."""
        raise NotImplementedError


# CUDA --------------------------------------------------------------------------------------------


def source_of(kernel: str) -> Path:
    """The file that defines the CUDA kernel."""
    name = "_".join(kernel.split("_")[:2]) if kernel.startswith("conv_") else "pointwise"
    return SOURCES / f"{name}.cu"


@functools.cache
def ptx_text(source: Path) -> str:
    """The PTX that nvcc makes of a file for compute capability 8.0."""
    import ptxemu

    return ptxemu.nvcc_ptx(str(source), "sm_80", ["-std=c++17"])


class CudaEmulator(Emulator):
    """Stands in for the CUDA runtime: the compiled library's real plans, on emulated memory."""

    backend = "cuda"
    per_device = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forget()

    @classmethod
    def _why_no_ptx(cls) -> str | None:
        if shutil.which("nvcc") is None:
            return "nvcc, which makes the PTX, is not installed"
        if cuda._MISSING is not None and "built without CUDA" not in cuda._MISSING:
            return cuda._MISSING  # plans are in every build of the compiled library
        return None

    def _forget(self) -> None:
        import ptxemu

        self._memory = ptxemu.GlobalMemory()
        self._known: list[Tensor] = []

    def ptr(self, t: Tensor | None) -> int:
        """The tensor's address in the emulated memory."""
        if t is None or t.numel() == 0:
            return 0
        self._known.append(t)
        return self._memory.ptr(t)

    def run(self, plan: Any, on: Tensor) -> None:
        """`backends.cuda._run`."""
        import ptxemu

        workspace = torch.full((plan.workspace_floats,), float("nan"))
        at = self.ptr(workspace)
        for launch in plan.launches:
            params = bytearray(launch.params)
            if launch.workspace_at >= 0:
                params[launch.workspace_at : launch.workspace_at + 8] = at.to_bytes(8, "little")
            result = ptxemu.launch(
                ptxemu.api.load(ptx_text(source_of(launch.kernel))),
                launch.kernel,
                tuple(launch.grid),
                launch.block,
                [bytes(params)],
                launch.shared_bytes,
                mem=self._memory,
                **self.options,
            )
            self.launched.append((launch.kernel, result))
        self._forget()

    @contextmanager
    def active(self) -> Iterator[None]:
        from resnext_kernels import _C

        device = _C.CudaDevice(self.device.multiprocessors, self.device.shared_bytes)
        with mock.patch.multiple(cuda, _ptr=self.ptr, _run=self.run, _device=lambda _: device):
            yield


# Triton ------------------------------------------------------------------------------------------

_TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class TritonLaunch:
    """One kernel[grid](*args), as the launchers of the Triton backend ask for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def _unspecialised(self) -> set[str]:
        return {p.name for p in self.kernel.params if p.do_not_specialize}

    @property
    def _constant(self) -> list[bool]:
        names = zip(self.kernel.arg_names, self.args, strict=False)
        return [
            a is None or (type(a) is int and a == 1 and name not in self._unspecialised)
            for name, a in names
        ]

    def compiled(self, backend: str = "cuda", arch: int | str = 80) -> Any:
        """What Triton's just-in-time compiler makes of it: same specialisation of arguments."""
        warps, stages = self.meta["warps"], self.meta["stages"]
        constants = {k: v for k, v in self.meta.items() if k not in ("warps", "stages")}
        signature: dict[str, str] = {}
        divisible = []
        for name, arg, constant in zip(
            self.kernel.arg_names, self.args, self._constant, strict=False
        ):
            if constant:
                constants[name] = arg
            elif isinstance(arg, Tensor):
                signature[name] = "*" + _TRITON_TYPES[arg.dtype]
                divisible.append(name)
            elif isinstance(arg, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= arg < 2**31 else "i64"
                if arg % 16 == 0 and name not in self._unspecialised:
                    divisible.append(name)
        return _compiled(
            self.kernel,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(divisible),
            warps,
            stages,
            backend,
            arch,
        )

    def runtime_args(self) -> list[Any]:
        """The arguments that are not constants of the compiled kernel."""
        return [a for a, constant in zip(self.args, self._constant, strict=True) if not constant]


@functools.cache
def _compiled(
    kernel: Any,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    divisible: tuple[str, ...],
    warps: int,
    stages: int,
    backend: str,
    arch: int | str,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(signature)
    values = dict(constants)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=values,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


@contextmanager
def triton_launches(run: Callable[[TritonLaunch], None]) -> Iterator[None]:
    """Hand each launch of the Triton backend to `run` in place of the GPU."""
    backend = importlib.import_module("resnext_kernels.backends.triton")

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        run(TritonLaunch(kernel, grid, args, meta))

    with mock.patch.object(backend, "_launch", launch):
        yield


class TritonEmulator(Emulator):
    """Compiles what the Triton backend launches as its just-in-time compiler would for sm_80."""

    backend = "triton"
    per_device = False

    @classmethod
    def _why_no_ptx(cls) -> str | None:
        return importlib.import_module("resnext_kernels.backends.triton")._MISSING

    def run(self, launch: TritonLaunch) -> None:
        import ptxemu

        kernel = launch.compiled("cuda", 80)
        if 0 in launch.grid:
            return
        args = launch.runtime_args()
        result = ptxemu.run_triton(kernel, launch.grid, *args, **self.options)
        self.launched.append((kernel.metadata.name, result))

    @contextmanager
    def active(self) -> Iterator[None]:
        with triton_launches(self.run):
            yield


EMULATORS: dict[str, type[Emulator]] = {e.backend: e for e in (CudaEmulator, TritonEmulator)}
