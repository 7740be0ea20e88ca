"""What the CUDA kernels would do, from their PTX run by an emulator: modelled, not measured.

`python -m bench.modelled_cuda` runs every 3x3 layer of ResNeXt-50 32x4d through the CUDA backend's
own functions and plans, on CPU tensors (`bench.emulator`). ptxemu counts instructions, sectors,
wavefronts and tensor-core work, and gives a lower bound on time: the busiest of a GPU's resources,
the tail of the last wave included; latency is not modelled. The floor of a pass is the time that
memory takes for its compulsory bytes:

    eval      x, weight -> y
    forward   x, weight -> z                                   (training, statistics included)
    backward  dy, z for the two sums; dy, z, x, weight -> dx, dweight

Plans depend on the GPU, so each GPU has launches of its own. Every result is checked against the
reference before its counters are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import emulator
from resnext_kernels.backends import cuda, reference
from resnext_kernels.problem import ConvProblem

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "bench" / "results" / "modelled-cuda.json"
GPUS = ("A100", "H100")
BARS = {"eval": (1.1, 1.25), "forward": (1.1, 1.25), "backward": (1.4, 1.7)}
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
TIMES = ("dram", "l2", "l1_lsu", "shared", "issue", "alu", "fma", "sfu_cvt", "tensor")


class Tensors:
    """What the passes of one layer read; images channels_last, vectors float32."""

    def __init__(self, p: ConvProblem) -> None:
        def image(c: int, h: int, w: int) -> Tensor:
            t = torch.randn(p.n, c, h, w).to(p.dtype)
            return t.contiguous(memory_format=torch.channels_last)

        k, d = p.out_channels, p.c // p.groups
        self.x = image(p.c, p.h, p.w)
        self.weight = (torch.randn(k, d, 3, 3) / (9 * d) ** 0.5).to(p.dtype)
        self.z, self.dy = image(k, p.out_h, p.out_w), image(k, p.out_h, p.out_w)
        self.scale, self.shift = torch.rand(k) + 0.5, torch.randn(k) / 2
        self.conv = {"stride": p.stride, "groups": p.groups, "dilation": p.dilation}


def run_pass(module: ModuleType, name: str, t: Tensors) -> list[Tensor]:
    """The results of the functions that one pass of the layer calls, of any backend."""
    if name == "eval":
        return [module.conv_affine_relu(t.x, t.weight, t.scale, t.shift, **t.conv)]
    prologue = None if name == "eval" else (t.scale, t.shift)
    if name == "forward":
        return [*module.conv_stats(t.x, t.weight, prologue=prologue, **t.conv)]
    sums = module.bn_relu_backward(t.dy, t.z, t.scale, t.shift, t.shift, t.scale)
    bn = (t.z, t.scale, t.shift, t.scale, t.shift / 8, t.scale / 8)
    return [
        *sums,
        *module.conv_backward(t.dy, t.x, t.weight, bn=bn, prologue=prologue, **t.conv),
    ]


def compulsory_bytes(p: ConvProblem, name: str) -> int:
    """Bytes of the tensors that each function of the pass has to read or write, each once."""
    x, z = p.n * p.h * p.w * p.c, p.n * p.out_h * p.out_w * p.out_channels
    weight = 9 * p.out_channels * (p.c // p.groups)
    forward, backward = x + weight + z, 2 * x + 2 * weight + 4 * z
    return (backward if name == "backward" else forward) * p.dtype.itemsize


def assert_right(name: str, found: list[Tensor], truth: list[Tensor]) -> None:
    """Within a few roundings, on the scale of each result, of the reference in float32."""
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        error, scale = (a.float() - b.float()).abs().max().item(), b.float().abs().max().item()
        if not error <= 4 * torch.finfo(torch.float16).eps * scale:
            raise AssertionError(f"{name}, result {i}: error {error:.3g} on a scale of {scale:.3g}")


def modelled(name: str, result: Any, gpu: str) -> dict[str, Any]:
    """Counters and estimate of one launch."""
    import ptxemu

    found = ptxemu.estimate(result, gpu)
    conflicts = ("lds", "sts", "ldsm", "cpa_sts")
    return {
        "kernel": name,
        "blocks": result["ctas"],
        "shared_bytes": result["shared_bytes_per_cta"],
        "dram_bytes": result["dram_read_bytes"] + result["dram_write_bytes"],
        "load_sectors": result["gld_sectors"] + result["cpa_sectors"],
        "store_sectors": result["gst_sectors"],
        "shared_conflicts": {k: round(result[f"{k}_conflict_factor"], 3) for k in conflicts},
        "mma_flops": result["mma_flops"],
        "tail": found["waves_tail"],
        "bound": found["bound"],
        "bound_us": found["bound_us"],
        "times_us": {k: round(found["times_us"][k], 3) for k in TIMES},
    }


def pass_row(p: ConvProblem, name: str) -> dict[str, Any]:
    """One pass of one layer on every GPU."""
    import ptxemu

    torch.manual_seed(0)
    t = Tensors(p)
    truth = run_pass(reference, name, t)
    compulsory = compulsory_bytes(p, name)
    row: dict[str, Any] = {
        "pass": name,
        **{key: getattr(p, key) for key in ("n", "c", "h", "groups", "stride")},
        "d": p.c // p.groups,
        "dtype": str(p.dtype).removeprefix("torch."),
        "compulsory_bytes": compulsory,
        "gpus": {},
    }
    for gpu, bar in zip(GPUS, BARS[name], strict=True):
        emulated = emulator.Emulator(gpu, count=True)
        with emulated.active():
            assert_right(name, run_pass(cuda, name, t), truth)
        kernels = [modelled(kernel, result, gpu) for kernel, result in emulated.launched]
        floor_us = compulsory / ptxemu.model.GPUS[gpu]["dram"] * 1e6
        bound_us = sum(k["bound_us"] for k in kernels)
        useful = p.flops("backward" if name == "backward" else "eval")
        row["gpus"][gpu] = {
            "floor_us": floor_us,
            "bound_us": bound_us,
            "ratio": bound_us / floor_us,
            "bar": bar,
            "dram_ratio": sum(k["dram_bytes"] for k in kernels) / compulsory,
            "tensor_core_waste": sum(k["mma_flops"] for k in kernels) / useful,
            "kernels": kernels,
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a reader."""
    lines = [
        "| layer | pass | mma / useful | A100: DRAM bytes / compulsory | A100 / floor, bound by "
        "| H100 / floor, bound by |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        ratios = []
        for gpu in GPUS:
            g = r["gpus"][gpu]
            bound = max(g["kernels"], key=lambda k: k["bound_us"])["bound"]
            missed = "" if g["ratio"] <= g["bar"] else f", MISSED {g['bar']}"
            ratios.append(f"{g['ratio']:.2f} {bound}{missed}")
        a100 = r["gpus"]["A100"]
        lines.append(
            f"| {r['h']}, C={r['c']}, {r['groups']}x{r['d']}, stride {r['stride']} | {r['pass']} "
            f"| {a100['tensor_core_waste']:.1f} | {a100['dram_ratio']:.2f} | {ratios[0]} "
            f"| {ratios[1]} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.modelled_cuda", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--layers", nargs="+", type=int, metavar="I", help="indices into LAYERS")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE.json")
    args = parser.parse_args(argv)
    if (reason := emulator.why_not()) is not None:
        parser.error(f"nothing can be modelled: {reason}")
    rows = []
    for i in args.layers or range(len(LAYERS)):
        c, h, stride = LAYERS[i]
        problem = ConvProblem(
            args.batch, h, h, c, groups=32, stride=stride, dtype=torch.float16, device_type="cuda"
        )
        for name in args.passes:
            rows.append(pass_row(problem, name))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    document = {
        "modelled": True,
        "what": "PTX for sm_80 run by an emulator on a CPU; lower bounds on time, not measurements",
        "backend": "cuda",
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
