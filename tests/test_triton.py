"""The Triton backend without a GPU: its interpreter, and its kernels compiled ahead of time.

The launchers run as they are; what they launch is interpreted, or recorded and compiled for each
architecture. `tests/test_emulated.py` runs the compiled kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.modelled import TritonLaunch, triton_launches  # noqa: E402
from resnext_kernels.backends import triton as backend  # noqa: E402
from resnext_kernels.problem import ConvProblem  # noqa: E402

ROOT = Path(__file__).parents[1]
NVIDIA = [80, 86, 89, 90, 100, 120]
AMD = ["gfx90a", "gfx942", "gfx950"]

F16, F32 = torch.float16, torch.float32
# One problem for each regime of the table of configurations.
REGIMES = {
    "d4": ConvProblem(32, 56, 56, 128, groups=32, dtype=F16),
    "d14": ConvProblem(32, 56, 56, 112, groups=8, dtype=F16),
    "d16": ConvProblem(32, 14, 14, 512, groups=32, dtype=F16),
    "d32": ConvProblem(32, 7, 7, 1024, groups=32, dtype=F16),
    "d64": ConvProblem(32, 28, 28, 128, groups=2, dtype=F16),
    "d8-stride2": ConvProblem(32, 56, 56, 256, groups=32, stride=2, dtype=F16),
    "d24-stride2": ConvProblem(32, 28, 28, 96, groups=4, stride=2, dtype=F16),
    "d4-f32": ConvProblem(32, 56, 56, 128, groups=32, dtype=F32),
    "d16-f32": ConvProblem(32, 14, 14, 512, groups=32, dtype=F32),
    "d40-f32": ConvProblem(32, 28, 28, 80, groups=2, dtype=F32),
}


def images(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    t = torch.empty(n, c, h, w, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last)


def launches(p: ConvProblem) -> dict[str, TritonLaunch]:
    """The distinct kernels of the functions of the contract, with everything fused into them."""
    k = p.out_channels
    x = images(p.n, p.c, p.h, p.w, p.dtype)
    z = images(p.n, k, p.out_h, p.out_w, p.dtype)
    weight = torch.empty(k, p.c // p.groups, 3, 3, dtype=p.dtype, device="meta")
    v, u = (torch.empty(c, device="meta") for c in (k, p.c))
    conv = {"stride": p.stride, "groups": p.groups, "dilation": p.dilation}
    found: dict[str, TritonLaunch] = {}

    def record(prefix: str) -> Any:
        def run(launch: TritonLaunch) -> None:
            found.setdefault(f"{prefix}{launch.kernel.__name__}", launch)

        return triton_launches(run)

    with record("eval:"):
        backend.conv_affine_relu(x, weight, v, v, residual=z, prologue=(u, u), **conv)
    with record("train:"):
        backend.conv_stats(x, weight, **conv)
    with record(""):
        backend.batch_stats(z)
        backend.normalize_relu(z, v, v, residual=z, residual_affine=(v, v))
        backend.bn_relu_backward(z, z, v, v, v, v)
        backend.bn_relu_input_gradient(z, z, v, v, v, v, v)
        backend.conv_backward(z, x, weight, bn=(z, v, v, v, v, v), prologue=(u, u), **conv)
    return found


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and spills that the assembler reports."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

        return {
            "registers": field("vgpr_count"),
            "stack": field("private_segment_fixed_size"),
            "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        }
    path = Path(kernel.asm_path) if hasattr(kernel, "asm_path") else None
    del path
    tool = triton.knobs.nvidia.cuobjdump.path
    cubin = ROOT / "build" / "kernel.cubin"
    cubin.parent.mkdir(exist_ok=True)
    cubin.write_bytes(kernel.asm["cubin"])
    text = subprocess.run(
        [tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "stack": usage["STACK"], "spills": usage["LOCAL"]}
