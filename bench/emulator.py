"""The CUDA backend on CPU tensors: its real plans, run on compiled PTX by ptxemu, a PTX emulator.

ptxemu stands beside the repository in some checkouts and is no dependency; `why_not` says when it
or the CUDA compiler is missing. What comes out is right or wrong, and counted; it is never a time.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from resnext_kernels.backends import cuda

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
# What plans depend on: multiprocessors, and shared memory that one block can have. "single" is no
# real device: one multiprocessor makes a block walk through all images.
DEVICES = {
    "A100": (108, 166912),
    "H100": (132, 232448),
    "RTX4090": (128, 101376),
    "single": (1, 101376),
}


def why_not() -> str | None:
    """None where kernels can be emulated here, else the reason."""
    if importlib.util.find_spec("ptxemu") is None:
        return "ptxemu, which runs PTX on the CPU, is not installed"
    if shutil.which("nvcc") is None:
        return "nvcc, which makes the PTX, is not installed"
    if cuda._MISSING is not None and "built without CUDA" not in cuda._MISSING:
        return cuda._MISSING  # plans are in every build of the compiled library
    return None


def source_of(kernel: str) -> Path:
    """The file that defines the kernel."""
    name = "_".join(kernel.split("_")[:2]) if kernel.startswith("conv_") else "pointwise"
    return SOURCES / f"{name}.cu"


@lru_cache
def ptx_text(source: Path) -> str:
    """The PTX that nvcc makes of a file for compute capability 8.0."""
    import ptxemu

    return ptxemu.nvcc_ptx(str(source), "sm_80", ["-std=c++17"])


class Emulator:
    """Stands in for the CUDA runtime: memory with checked bounds, and launches of compiled PTX.

    Args:
        device: One of DEVICES.
        count: Whether to count instructions and memory accesses, which takes longer.
        check: Passed on to ptxemu: "race", "init".
    """

    def __init__(self, device: str = "A100", *, count: bool = False, check: tuple[str, ...] = ()):
        self.device, self.count, self.check = device, count, check
        self.launched: list[tuple[str, Any]] = []  # kernel name, ptxemu's result
        self._forget()

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
                check=self.check,
                count=self.count,
                mem=self._memory,
            )
            self.launched.append((launch.kernel, result))
        self._forget()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the functions of `backends.cuda` take CPU tensors and run here."""
        from resnext_kernels import _C

        device = _C.CudaDevice(*DEVICES[self.device])
        with mock.patch.multiple(cuda, _ptr=self.ptr, _run=self.run, _device=lambda _: device):
            yield
