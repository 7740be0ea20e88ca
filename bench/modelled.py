"""What the GPU kernels would do, from their compiled PTX in an emulator: modelled, not measured.

`python -m bench.modelled` runs every 3x3 layer of ResNeXt-50 32x4d through a backend's own
launchers, on CPU tensors, with each kernel that they launch compiled for sm_80 and run by ptxemu,
a PTX emulator beside the repository in some checkouts. It counts sectors, wavefronts, conflicts and
tensor-core work, and gives a lower bound on time, the busiest of the resources of a GPU; latency is
not modelled, nor is torch's own copy of the weights. The floor of a pass is the time that memory
takes for its compulsory bytes:

    eval      x, weight -> y
    forward   x, weight -> z; z -> y                                    (training)
    backward  dy, z for the two sums; dy, z, x, weight -> dx, dweight

Every result is checked against the reference before its counters are kept.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnext_kernels.backends import reference
from resnext_kernels.problem import ConvProblem

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
GPUS = ("A100", "H100")
BARS = {"eval": (1.4, 1.8), "forward": (1.4, 1.8), "backward": (1.7, 2.2)}
PASSES = tuple(BARS)
# channels, height, stride of the 3x3 layers of ResNeXt-50 32x4d
LAYERS = (
    (128, 56, 1),
    (256, 56, 2),
    (256, 28, 1),
    (512, 28, 2),
    (512, 14, 1),
    (1024, 14, 2),
    (1024, 7, 1),
)


# Triton launches, compiled and emulated without a GPU -------------------------------------------


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


_TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


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
    backend: Any = importlib.import_module("resnext_kernels.backends.triton")
    original = backend._launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        run(TritonLaunch(kernel, grid, args, meta))

    backend._launch = launch
    try:
        yield
    finally:
        backend._launch = original


# Emulation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Emulated:
    """One kernel that ran: its PTX, and the emulator's result with the counters."""

    name: str
    ptx: str
    result: Any


@contextmanager
def emulated_triton(check: tuple[str, ...] = (), arch: int = 80) -> Iterator[list[Emulated]]:
    """Run the Triton backend's kernels on CPU tensors in the emulator; collects what ran."""
    import ptxemu

    found: list[Emulated] = []

    def run(launch: TritonLaunch) -> None:
        kernel = launch.compiled("cuda", arch)
        if 0 in launch.grid:
            return
        result = ptxemu.run_triton(kernel, launch.grid, *launch.runtime_args(), check=check)
        found.append(Emulated(kernel.metadata.name, kernel.asm["ptx"], result))

    with triton_launches(run):
        yield found


# A backend: how its kernels are emulated while its functions are called on CPU tensors.
EMULATED: dict[str, Callable[[], Any]] = {"triton": emulated_triton}


@functools.cache
def _ptxas(ptx: str, name: str, arch: str) -> dict[str, Any]:
    import ptxemu

    return ptxemu.ptxas_info(ptx, name, arch)


def modelled(kernel: Emulated, gpu: str) -> dict[str, Any]:
    """The estimate for one kernel on one GPU, from the counters of its sm_80 PTX."""
    import ptxemu

    found = ptxemu.estimate(kernel.result, gpu, _ptxas(kernel.ptx, kernel.name, "sm_80"))
    return {
        "bound": found["bound"],
        "bound_us": found["bound_us"],
        "dram_us": found["times_us"]["dram"],
        "tail": found["waves_tail"],
        "times_us": found["times_us"],
        "ctas_per_sm": found["occupancy"]["ctas_per_sm"],
    }


def counted(kernel: Emulated) -> dict[str, Any]:
    """The counters of one kernel that say how well it uses memory and tensor cores."""
    r = kernel.result
    info = _ptxas(kernel.ptx, kernel.name, "sm_80")
    return {
        "kernel": kernel.name,
        "programs": r["ctas"],
        "threads": r["threads_per_cta"],
        "registers": info["registers"],
        "spill_bytes": info["spill_stores"] + info["spill_loads"],
        "shared_bytes": r["shared_bytes_per_cta"],
        "dram_bytes": r["dram_read_bytes"] + r["dram_write_bytes"],
        "load_sectors": r["gld_sectors"] + r["cpa_sectors"],
        "store_sectors": r["gst_sectors"],
        "shared_conflicts": max(
            r[f"{k}_conflict_factor"] for k in ("lds", "sts", "ldsm", "stsm", "cpa_sts")
        ),
        "mma_flops": r["mma_flops"],
    }


# Passes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """What a pass of one layer reads; images channels_last, vectors float32."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    z: Tensor
    dy: Tensor
    conv: dict[str, int]

    @classmethod
    def of(cls, problem: ConvProblem) -> Tensors:
        def image(c: int, h: int, w: int) -> Tensor:
            t = torch.randn(problem.n, c, h, w).to(problem.dtype)
            return t.contiguous(memory_format=torch.channels_last)

        k, d = problem.out_channels, problem.c // problem.groups
        out = (k, problem.out_h, problem.out_w)
        return cls(
            image(problem.c, problem.h, problem.w),
            (torch.randn(k, d, 3, 3) / (9 * d) ** 0.5).to(problem.dtype),
            torch.rand(k) + 0.5,
            torch.randn(k) / 2,
            image(*out),
            image(*out),
            {
                "stride": problem.stride,
                "groups": problem.groups,
                "dilation": problem.dilation,
            },
        )


def run_pass(module: ModuleType, name: str, t: Tensors) -> list[Tensor]:
    """The functions that one pass of the layer calls, of any backend; their results."""
    if name == "eval":
        return [module.conv_affine_relu(t.x, t.weight, t.scale, t.shift, **t.conv)]
    if name == "forward":
        z, mean, var = module.conv_stats(t.x, t.weight, **t.conv)
        return [z, mean, var, module.normalize_relu(z, t.scale, t.shift)]
    mean, rstd = t.shift, t.scale
    sums = module.bn_relu_backward(t.dy, t.z, t.scale, t.shift, mean, rstd)
    bn = (t.z, t.scale, t.shift, t.scale, t.shift / 8, t.scale / 8)
    return [*sums, *module.conv_backward(t.dy, t.x, t.weight, bn=bn, **t.conv)]


def compulsory_bytes(problem: ConvProblem, name: str) -> int:
    """Bytes of the tensors that each function of the pass has to read or write, each once."""
    x = problem.n * problem.h * problem.w * problem.c
    z = problem.n * problem.out_h * problem.out_w * problem.out_channels
    weight = 9 * problem.out_channels * (problem.c // problem.groups)
    elements = {
        "eval": x + weight + z,
        "forward": x + weight + 3 * z,
        "backward": 4 * z + 2 * x + 2 * weight,
    }[name]
    return elements * problem.dtype.itemsize


def assert_right(name: str, t: Tensors, results: list[Tensor]) -> None:
    """Each result is within a few roundings of its dtype, on its scale, of the reference."""
    exact = replace(t, x=t.x.float(), weight=t.weight.float(), z=t.z.float(), dy=t.dy.float())
    for i, (found, truth) in enumerate(zip(results, run_pass(reference, name, exact), strict=True)):
        eps = torch.finfo(t.x.dtype).eps
        error = (found.float() - truth).abs().max().item()
        bound = 4 * eps * truth.abs().max().item()
        if not error <= bound:
            raise AssertionError(f"{name}, result {i}: error {error:.3g}, allowed {bound:.3g}")


def layer_rows(backend: str, problem: ConvProblem, passes: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for each pass of a layer, and one of the plain Triton convolution in eval."""
    import ptxemu

    ours = importlib.import_module(f"resnext_kernels.backends.{backend}")
    plain = importlib.import_module("bench.plain_triton")
    rows = []
    for who, module, name in [*((backend, ours, p) for p in passes), ("plain", plain, "eval")]:
        if name not in passes:
            continue
        torch.manual_seed(0)
        t = Tensors.of(problem)
        with EMULATED.get(who, emulated_triton)() as kernels:
            results = run_pass(module, name, t)
        assert_right(name, t, results)
        rows.append({"kernels of": who} | pass_row(problem, name, kernels, ptxemu.GPUS))
    return rows


def pass_row(
    problem: ConvProblem, name: str, kernels: list[Emulated], gpus: dict[str, Any]
) -> dict[str, Any]:
    """Counters and estimates of the kernels of one pass, against its compulsory bytes."""
    compulsory = compulsory_bytes(problem, name)
    useful = problem.flops("backward" if name == "backward" else "eval")
    counters = [counted(kernel) for kernel in kernels]
    row: dict[str, Any] = {
        "pass": name,
        "n": problem.n,
        "c": problem.c,
        "h": problem.h,
        "groups": problem.groups,
        "d": problem.c // problem.groups,
        "stride": problem.stride,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "launches": len(kernels),
        "compulsory_bytes": compulsory,
        "dram_ratio": sum(c["dram_bytes"] for c in counters) / compulsory,
        "sector_ratio": 32
        * sum(c["load_sectors"] + c["store_sectors"] for c in counters)
        / compulsory,
        "shared_conflicts": max(c["shared_conflicts"] for c in counters),
        "tensor_core_waste": sum(c["mma_flops"] for c in counters) / useful,
        "kernels": counters,
        "gpus": {},
    }
    for gpu, bar in zip(GPUS, BARS[name], strict=True):
        estimates = [modelled(kernel, gpu) for kernel in kernels]
        floor_us = compulsory / gpus[gpu]["dram"] * 1e6
        total = sum(e["bound_us"] for e in estimates)
        row["gpus"][gpu] = {
            "floor_us": floor_us,
            "bound_us": total,
            "ratio": total / floor_us,
            "bar": bar,
            "kernels": estimates,
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a reader."""
    lines = [
        "| layer | pass | launches | DRAM bytes / compulsory | L1 sectors / compulsory | conflicts "
        "| mma / useful | A100 / floor | H100 / floor |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        who = "" if r["kernels of"] != "plain" else ", plain Triton"
        name = f"{r['h']}, C={r['c']}, {r['groups']}x{r['d']}, stride {r['stride']}"
        ratios = []
        for gpu in GPUS:
            g = r["gpus"][gpu]
            missed = "" if who or g["ratio"] <= g["bar"] else f" (bar {g['bar']})"
            ratios.append(f"{g['ratio']:.2f}{missed}")
        lines.append(
            f"| {name} | {r['pass']}{who} | {r['launches']} | {r['dram_ratio']:.2f} "
            f"| {r['sector_ratio']:.2f} | {r['shared_conflicts']:.2f} "
            f"| {r['tensor_core_waste']:.1f} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.modelled", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--backend", choices=tuple(EMULATED), default="triton")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--layers", nargs="+", type=int, metavar="I", help="indices into LAYERS")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, help="JSON (bench/results/modelled-BACKEND.json)")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("ptxemu") is None:
        parser.error("ptxemu, the PTX emulator, cannot be imported: nothing can be modelled")
    rows: list[dict[str, Any]] = []
    for i in args.layers or range(len(LAYERS)):
        c, h, stride = LAYERS[i]
        problem = ConvProblem(
            args.batch, h, h, c, groups=32, stride=stride, dtype=torch.float16, device_type="cuda"
        )
        rows += layer_rows(args.backend, problem, tuple(args.passes))
        print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    output = args.output or RESULTS / f"modelled-{args.backend}.json"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    document = {
        "modelled": True,
        "what": "PTX for sm_80 run by an emulator on a CPU; lower bounds on time, not measurements",
        "backend": args.backend,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
