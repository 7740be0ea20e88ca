"""The Triton backend without a GPU: its interpreter, and its kernels compiled ahead of time.

The launchers run as they are; what they launch is interpreted, or recorded and compiled for each
architecture. `tests/test_emulated.py` runs the compiled kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.emulator import TritonLaunch, triton_launches  # noqa: E402
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
    """Registers, stack and spills to memory that the assembler reports.

    AMD's scalar registers spill into lanes of vector registers, not into memory.
    """
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

        return {
            "registers": field("vgpr_count"),
            "stack": field("private_segment_fixed_size"),
            "spills": field("vgpr_spill_count"),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "stack": usage["STACK"], "spills": usage["LOCAL"]}


# Plain pytest compiles these; the marker `architectures` stands for the others.
FEW = {("d4", 80), ("d4-f32", 80), ("d32", 80), ("d4", "gfx942")}


def marked(regimes: dict[str, ConvProblem], architectures: list[Any]) -> list[Any]:
    return [
        pytest.param(
            regime,
            arch,
            id=f"{regime}-{arch}",
            marks=[] if (regime, arch) in FEW else [pytest.mark.architectures],
        )
        for regime in regimes
        for arch in architectures
    ]


@pytest.mark.parametrize(("regime", "arch"), marked(REGIMES, [*NVIDIA, *AMD]))
def test_compiles_without_spills(
    regime: str, arch: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every configuration of the table: no stack, no spills, and on NVIDIA two programs at least
    on a multiprocessor.

    A stack of 8 bytes without spills is a saved convergence barrier of nested loops.
    """
    if arch in AMD:
        monkeypatch.setattr(torch.version, "hip", "7.0")
    for name, launch in launches(REGIMES[regime]).items():
        kernel = launch.compiled("cuda" if isinstance(arch, int) else "hip", arch)
        used = resources(kernel)
        assert used["spills"] == 0, f"{name}: {used}"
        assert used["stack"] <= (8 if isinstance(arch, int) else 0), f"{name}: {used}"
        if isinstance(arch, int):
            assert used["registers"] * 32 * launch.meta["warps"] * 2 <= 65536, f"{name}: {used}"
            assert kernel.metadata.shared * 2 <= 99 * 1024, f"{name}: {kernel.metadata.shared}"
        else:
            assert kernel.metadata.shared <= 64 * 1024, f"{name}: {kernel.metadata.shared}"


@pytest.mark.parametrize(("regime", "arch"), marked(REGIMES, [80]))
def test_instructions(regime: str, arch: int) -> None:
    """Matrix instructions, unless float32 has to be IEEE's; loads of 16 bytes, where channels of a
    program lie side by side."""
    problem = REGIMES[regime]
    d = problem.c // problem.groups
    for name, launch in launches(problem).items():
        ptx = launch.compiled("cuda", arch).asm["ptx"]
        if "conv" in name or "dweight" in name:
            assert "mma.sync" in ptx, f"{name}: no matrix instruction"
            if d in (4, 8, 16, 32, 64):
                assert re.search(r"ld\.global\S*\.v4|cp\.async\S* .*0x10", ptx), (
                    f"{name}: no wide load"
                )
        elif "kernel" in name and "sum" not in name and "merge" not in name and d % 8 == 0:
            assert re.search(r"ld\.global\S*\.v4", ptx), f"{name}: no wide load"


def test_ieee_float32_has_no_matrix_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name, launch in launches(REGIMES["d4-f32"]).items():
        if "conv" in name or "dweight" in name:
            kernel = launch.compiled("cuda", 80)
            assert "mma.sync" not in kernel.asm["ptx"], name
            used = resources(kernel)
            assert used["spills"] == 0, f"{name}: {used}"
            assert used["stack"] <= 8, f"{name}: {used}"


INTERPRETED = {
    "test_backend_functions.py": "n2-c128-h9w7 or n1-c15-h7w7 or n1-c80-h5w9 or n0-c128",
    "test_op.py": "nan_and_inf and f16 and x-nan and n2-c128",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present: it runs these tests")
@pytest.mark.parametrize("file", INTERPRETED)
def test_interpreter(file: str) -> None:
    """The contract's own tests, in Triton's interpreter, launchers included."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"tests/{file}", "-k", f"triton and ({INTERPRETED[file]})"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-1000:]


def test_why_not() -> None:
    assert "cuda" in str(backend.why_not(ConvProblem(2, 7, 7, 64, groups=16)))
    double = ConvProblem(2, 7, 7, 64, groups=16, dtype=torch.float64, device_type="cuda")
    assert "float64" in str(backend.why_not(double))
