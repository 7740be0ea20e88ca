"""The Triton backend without a GPU: its interpreter, and its kernels compiled ahead of time.

The launchers run as they are; what they launch is interpreted, or recorded and compiled for each
architecture. `tests/test_emulated.py` runs the compiled kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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
ARCHITECTURES: list[int | str] = [*NVIDIA, *AMD]

F16, F32 = torch.float16, torch.float32
# One problem for each configuration of the table; a test holds that they are all here.
REGIMES = {
    "d4": ConvProblem(32, 56, 56, 128, groups=32, dtype=F16),
    "d2": ConvProblem(32, 56, 56, 128, groups=64, dtype=F16),
    "d3": ConvProblem(32, 56, 56, 96, groups=32, dtype=F16),
    "d8": ConvProblem(32, 28, 28, 256, groups=32, dtype=F16),
    "d14": ConvProblem(32, 56, 56, 112, groups=8, dtype=F16),
    "d16": ConvProblem(32, 14, 14, 512, groups=32, dtype=F16),
    "d32": ConvProblem(32, 7, 7, 1024, groups=32, dtype=F16),
    "d64": ConvProblem(32, 28, 28, 128, groups=2, dtype=F16),
    "depthwise": ConvProblem(32, 14, 14, 512, groups=512, dtype=F16),
    "d4-two-groups": ConvProblem(32, 14, 14, 8, groups=2, dtype=F16),
    "d4-eight-groups": ConvProblem(32, 14, 14, 32, groups=8, dtype=F16),
    "d4-eight-groups-stride2": ConvProblem(32, 14, 14, 32, groups=8, stride=2, dtype=F16),
    "d8-stride2": ConvProblem(32, 56, 56, 256, groups=32, stride=2, dtype=F16),
    "d14-stride2": ConvProblem(32, 56, 56, 224, groups=16, stride=2, dtype=F16),
    "d32-stride2": ConvProblem(32, 14, 14, 1024, groups=32, stride=2, dtype=F16),
    "d24-stride2": ConvProblem(32, 28, 28, 96, groups=4, stride=2, dtype=F16),
    "d4-dilation2": ConvProblem(32, 56, 56, 128, groups=32, dilation=2, dtype=F16),
    "d32-dilation2": ConvProblem(32, 14, 14, 1024, groups=32, dilation=2, dtype=F16),
    "d4-f32": ConvProblem(32, 56, 56, 128, groups=32, dtype=F32),
    "d4-stride2-f32": ConvProblem(32, 56, 56, 128, groups=32, stride=2, dtype=F32),
    "d16-f32": ConvProblem(32, 14, 14, 512, groups=32, dtype=F32),
    "d32-f32": ConvProblem(32, 14, 14, 1024, groups=32, dtype=F32),
    "d40-f32": ConvProblem(32, 28, 28, 80, groups=2, dtype=F32),
}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | str], None]:
    """Makes an architecture the one that the launchers find."""

    def select(arch: int | str) -> None:
        monkeypatch.setattr(backend, "_arch", lambda device: arch)
        monkeypatch.setattr(torch.version, "hip", "7.0" if arch in AMD else None)

    return select


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
    vectors = torch.empty(5, k, device="meta")
    conv = {"stride": p.stride, "groups": p.groups, "dilation": p.dilation}
    found: dict[str, TritonLaunch] = {}

    def record(prefix: str) -> Any:
        def run(launch: TritonLaunch) -> None:
            found.setdefault(f"{prefix}{launch.kernel.__name__}", launch)

        return triton_launches(run)

    with record("eval:"):
        backend.conv_affine_relu(x, weight, v, v, residual=z, prologue=(u, u), **conv)
    with record("train:"):
        backend.conv_stats(x, weight, bn=(v, v, 1e-5), prologue=(u, u), **conv)
    with record("plain:"):
        backend.conv_stats(x, weight, bn=(v, v, 1e-5), **conv)
    with record("plain dx:"):
        backend.conv_backward(z, x, weight, **conv, need_dweight=False)
    with record(""):
        backend.bn_vectors(v, v, v, v, 1e-5, 1.0)
        backend.batch_stats(z, (v, v, 1e-5))
        backend.normalize_relu(z, v, v, residual=z, residual_affine=(v, v))
        backend.bn_relu_backward(z, z, vectors)
        backend.bn_relu_input_gradient(z, z, vectors, vectors)
        # both, which one kernel makes for many problems; then each by itself
        for needs in ({}, {"need_dweight": False}, {"need_dx": False}):
            bn = (z, vectors, vectors)
            backend.conv_backward(z, x, weight, bn=bn, prologue=(u, u), **conv, **needs)
    return found


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({}, False),
        ({"groups": 1}, True),
        ({"c": 160, "dtype": F16}, True),
        ({"c": 160, "dtype": F32}, False),
        ({"c": 64, "k": 160}, True),
    ],
    ids=str,
)
def test_wide_groups_in_half_precision_are_convolved_by_torch(
    change: dict[str, Any], dense: bool
) -> None:
    p = dataclasses.replace(ConvProblem(2, 8, 8, 128, groups=2, dtype=F16), **change)
    kernels = {launch.kernel.__name__ for launch in launches(p).values()}
    of_convolutions = {name for name in kernels if name.startswith(("_conv", "_dweight"))}
    assert dense == (not of_convolutions)
    assert {"_normalize_relu_kernel", "_batch_stats_kernel"} <= kernels


def compiled(launch: TritonLaunch, arch: int | str) -> Any:
    return launch.compiled("cuda" if isinstance(arch, int) else "hip", arch)


def resources(kernel: Any, arch: int | str) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, and on AMD spilled registers.

    NVIDIA: what the cubin says; registers spill to the stack there. AMD: what the assembler wrote
    down; its scalar registers spill into lanes of vector registers.
    """
    if isinstance(arch, str):
        text = kernel.asm["amdgcn"]
        names = ["vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"]
        found = {n: max(int(v) for v in re.findall(rf"\.{n}:\s+(\d+)", text)) for n in names}
        return {
            "registers": found["vgpr_count"],
            "stack": found["private_segment_fixed_size"],
            "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
        }
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    (registers, stack, local) = map(
        int, re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)[0]
    )
    return {"registers": registers, "stack": stack + local}


MATRIX = {
    "ptx": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma",
    "amdgcn": r"v_mfma_",
}
WIDE = {
    "ptx": r"ld\.global\S*\.v4\.b32|cp\.async\S* [^;]*, 0x10[,;]",
    "amdgcn": r"(global|buffer)_load_(lds_)?dwordx4",
}


def check_budget(
    name: str, launch: TritonLaunch, arch: int | str, d: int, matrix: bool = True
) -> None:
    """No stack, no spills, room for two programs (AMD: waves) on a multiprocessor; matrix
    instructions in convolutions; loads of 16 bytes where 8 channels lie side by side."""
    kernel = compiled(launch, arch)
    used = resources(kernel, arch)
    where = f"{name} on {arch}: {used}, shared memory {kernel.metadata.shared}"
    assert used["stack"] == 0, where
    assert arch not in AMD or used["spills"] == 0, where
    assert used["registers"] * 32 * launch.meta["warps"] * 2 <= 65536 or arch in AMD, where
    assert used["registers"] <= 256, where
    assert kernel.metadata.shared <= launch_limit(arch), where

    language = "ptx" if isinstance(arch, int) else "amdgcn"
    text = kernel.asm[language]
    convolution = "_conv" in name or "dweight" in name
    assert bool(re.search(MATRIX[language], text)) == (convolution and matrix), where
    # those read vectors and weights
    over_pixels = not any(part in name for part in ("sum", "merge", "vectors"))
    # AMD's programs of 16 columns have 8 bytes for each of 64 lanes
    widths = (1, 2, 4, 8, 16, 32, 64) if arch in NVIDIA else (4, 8, 16, 32, 64)
    if over_pixels and d in widths and "two-groups" not in name:
        assert re.search(WIDE[language], text), f"{where}: no load of 16 bytes"


def launch_limit(arch: int | str) -> int:
    """Shared memory of a program where two share a multiprocessor, which keeps 1 KiB for each."""
    return backend.SHARED_KIB[arch] * 1024 // 2 - 1024


# Plain pytest compiles every configuration for one architecture of each maker, and these for every
# one. The marker `architectures` stands for the rest.
EVERYWHERE = ("d4",)
USUAL = (80, "gfx942")


def matrix() -> list[Any]:
    return [
        pytest.param(
            regime,
            arch,
            id=f"{regime}-{arch}",
            marks=[] if arch in USUAL or regime in EVERYWHERE else [pytest.mark.architectures],
        )
        for regime in REGIMES
        for arch in ARCHITECTURES
    ]


@pytest.mark.parametrize(("regime", "arch"), matrix())
def test_budget(regime: str, arch: int | str, on: Callable[[int | str], None]) -> None:
    """Every kernel and configuration, compiled: registers, shared memory, instructions."""
    on(arch)
    problem = REGIMES[regime]
    found = launches(problem)
    assert len(found) >= 9
    for name, launch in found.items():
        check_budget(f"{regime}, {name}", launch, arch, problem.c // problem.groups)


def test_ieee_float32_has_no_matrix_instruction(
    monkeypatch: pytest.MonkeyPatch, on: Callable[[int | str], None]
) -> None:
    on(80)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for name, launch in launches(REGIMES["d4-f32"]).items():
        if "conv" in name or "dweight" in name:
            check_budget(name, launch, 80, 4, matrix=False)


# The table ---------------------------------------------------------------------------------------

WIDTHS = [*range(1, 33), 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320]


def table(arch: int | str) -> Iterator[tuple[torch.dtype, backend.Config]]:
    """What the table gives to each width, dtype, walk and source, with many groups."""
    sources = [(walk, source) for walk in (0, 1, 2) for source in ("x", "activation")]
    for d, dtype, (walk, source) in itertools.product(
        WIDTHS, (F16, F32), [*sources, (0, "dz"), (1, "dz")]
    ):
        groups = 64 if d > 1 else 512
        yield dtype, backend._conv_config(d, d, groups, 56, walk, dtype, source, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_is_compiled(
    arch: int | str, on: Callable[[int | str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """REGIMES leave out no row of the table: kernel, tiles, pixels, unrolling, warps, stages."""

    def row(dtype: torch.dtype, config: backend.Config) -> tuple[Any, ...]:
        # how many groups make a tile is the row's D; how many rows a program walks is no constant
        return dtype, dataclasses.replace(config, pack=0, rows=min(config.rows, 1))

    def fused(problem: ConvProblem) -> set[tuple[Any, ...]]:
        found = launches(problem).values()
        metas = [t.meta for t in found if t.kernel is backend._conv_backward_kernel]
        return {tuple(m[name] for name in ("TILES", "CHUNKS", "STRIDE", "warps")) for m in metas}

    on(arch)
    every = [
        ConvProblem(32, 56, 56, d * groups, groups=groups, stride=stride, dtype=F16)
        for d, groups, stride in itertools.product(WIDTHS, (8, 64), (1, 2))
    ]
    assert set().union(*map(fused, every)) <= set().union(*map(fused, REGIMES.values()))

    original = backend._conv_config
    met: set[tuple[Any, ...]] = set()

    def recorded(*args: Any) -> backend.Config:
        config = original(*args)
        met.add(row(args[5], config))
        return config

    wanted = {row(*entry) for entry in table(arch)}
    monkeypatch.setattr(backend, "_conv_config", recorded)
    for problem in REGIMES.values():
        launches(problem)
    assert not wanted - met


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_configurations_fit_the_architecture(arch: int | str) -> None:
    """The table's and what autotuning tries; `test_budget` has what the compiler made of it."""
    for dtype, config in table(arch):
        alternatives = backend._alternatives(config, 56, dtype, arch)
        assert alternatives
        assert config not in alternatives
        for c in (config, *alternatives):
            assert c.shared_bytes(dtype.itemsize) <= backend.SHARED_KIB[arch] * 1024, c
            assert c.block_p >= 16
            assert c.warps >= 1


@pytest.mark.parametrize("regime", REGIMES)
def test_grids_of_the_most_pixels(regime: str, on: Callable[[int | str], None]) -> None:
    """CUDA's limits: 2^31 - 1 programs along the first axis, 65535 along the others."""
    on(90)
    problem = REGIMES[regime]
    most = dataclasses.replace(problem, n=(2**31 - 1) // (problem.h * problem.w))
    for name, launch in launches(most).items():
        x, *others = launch.grid
        assert x < 2**31, name
        assert max(others, default=1) <= 65535, name


def test_shared_memory_is_bounded_by_the_configuration(
    on: Callable[[int | str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Config.shared_bytes` is no less than what the compiled kernel takes."""
    chosen: list[backend.Config] = []
    original = backend._conv_config
    monkeypatch.setattr(
        backend, "_conv_config", lambda *args: chosen.append(original(*args)) or chosen[-1]
    )
    for arch in USUAL:
        on(arch)
        for regime in ("d4", "d32", "d8-stride2", "d4-f32"):
            problem = REGIMES[regime]
            x = images(problem.n, problem.c, problem.h, problem.w, problem.dtype)
            weight = torch.empty(problem.c, problem.c // problem.groups, 3, 3, device="meta")
            found: list[TritonLaunch] = []
            with triton_launches(found.append):
                backend.conv_stats(
                    x,
                    weight.to(problem.dtype),
                    bn=(None, None, 1e-5),
                    groups=problem.groups,
                    stride=problem.stride,
                )
            shared = compiled(found[0], arch).metadata.shared
            assert 0 < shared <= chosen[-1].shared_bytes(problem.dtype.itemsize), (regime, arch)


def test_the_architecture_decides() -> None:
    """The reasons in the table, one by one."""

    def config(
        arch: int | str, d: int, dtype: torch.dtype, source: str, stride: int = 1
    ) -> backend.Config:
        return backend._conv_config(d, d, 32, 56, stride, dtype, source, arch)

    for stride, source in itertools.product((1, 2), ("x", "activation")):
        assert all(config(arch, 4, F16, source, stride).shifts for arch in NVIDIA)
        assert not any(config(arch, 4, F16, source, stride).shifts for arch in AMD)
    assert [config("gfx942", d, F16, "x").unroll for d in (2, 4)] == [2, 1]
    assert [config("gfx942", d, F16, "dz").unroll for d in (2, 4)] == [1, 2]
    assert [config(arch, 4, F16, "dz").block_p for arch in (80, "gfx942")] == [16, 32]
    assert [config(arch, 14, F16, "dz").block_p for arch in (80, "gfx942")] == [16, 16]
    assert [config(arch, 16, F32, "x").block_p for arch in (86, 90)] == [16, 32]
    widths = [config(arch, 4, F32, "x").src_width for arch in (80, "gfx90a")]
    assert widths == [backend._NARROW_FLOAT32, 16]
    assert backend._shared_bytes(86) == 99 * 1024
    assert backend._shared_bytes(80) == 163 * 1024
    assert backend._shared_bytes(90) == 227 * 1024
    # what is not known yet gets the least that its maker has offered
    assert backend._shared_bytes(150) == min(backend._shared_bytes(a) for a in NVIDIA)
    assert backend._shared_bytes("gfx1300") == min(backend._shared_bytes(a) for a in AMD)


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
