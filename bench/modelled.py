"""What the GPU kernels would do, from their compiled PTX in an emulator: modelled, not measured.

`python -m bench.modelled` runs every 3x3 layer of ResNeXt-50 32x4d through the launchers of the GPU
backends on CPU tensors, with their kernels, compiled for sm_80, in an emulator (`bench.emulator`).
It counts sectors, wavefronts, conflicts and tensor-core work, and gives a lower bound on time: for
each kernel the busiest of a GPU's resources, the tail of the last wave included. Latency is not
modelled, nor is torch's own copy of the weights. The floor of a pass is the time that memory takes
for its compulsory bytes:

    eval       conv_affine_relu               x, weight -> y
    forward    conv_stats                     x, weight -> z, vectors of its BatchNorm
    normalize  normalize_relu                 z -> y
    backward   bn_relu_backward               dy, z -> two sums, and coefficients of them
               conv_backward                  dy, z, x, weight -> dx, dweight

In eval the layer is by itself. In training x is the previous layer's z, as in a bottleneck: its
BatchNorm and ReLU are applied where it is loaded. Every result is checked against the reference
before its counters are kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.emulator import CudaEmulator, Emulator, TritonEmulator
from bench.report import RESULTS, markdown, save
from resnext_kernels.backends import reference
from resnext_kernels.problem import ConvProblem

Row = dict[str, Any]

WHAT = "PTX for sm_80 run by an emulator on a CPU; lower bounds on time, not measurements"
GPUS = ("A100", "H100")
PASSES = ("eval", "forward", "normalize", "backward")
BATCH = 32
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


@dataclass(frozen=True)
class Subject:
    """Kernels that are modelled, and for each pass of theirs the bars on GPUS: bound / floor."""

    module: str
    emulator: type[Emulator]
    bars: dict[str, tuple[float, ...] | None]


def _bars(forward: tuple[float, ...], backward: tuple[float, ...]) -> dict[str, Any]:
    """normalize has nothing to reach: it does little but move its bytes."""
    return {"eval": forward, "forward": forward, "normalize": None, "backward": backward}


SUBJECTS = {
    "cuda": Subject("resnext_kernels.backends.cuda", CudaEmulator, _bars((1.1, 1.25), (1.4, 1.7))),
    "triton": Subject(
        "resnext_kernels.backends.triton", TritonEmulator, _bars((1.4, 1.8), (1.7, 2.2))
    ),
    # what the fused kernels are held against
    "plain_triton": Subject("bench.plain_triton", TritonEmulator, {"eval": None}),
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
        torch.manual_seed(0)

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

    def float(self) -> Tensors:
        x, weight, z, dy = (t.float() for t in (self.x, self.weight, self.z, self.dy))
        return replace(self, x=x, weight=weight, z=z, dy=dy)


def run_pass(module: ModuleType, name: str, t: Tensors) -> list[Tensor]:
    """The results of the functions that one pass of the layer calls, of any backend."""
    prologue = (t.scale, t.shift)
    if name == "eval":
        return [module.conv_affine_relu(t.x, t.weight, t.scale, t.shift, **t.conv)]
    if name == "forward":
        bn = (t.scale, t.shift, 1e-5)
        return [*module.conv_stats(t.x, t.weight, bn=bn, prologue=prologue, **t.conv)]
    if name == "normalize":
        return [module.normalize_relu(t.z, t.scale, t.shift)]
    vectors = torch.stack((t.shift, t.scale, t.scale, t.scale, t.shift))
    sums = module.bn_relu_backward(t.dy, t.z, vectors)
    of_z = (t.z, vectors, torch.stack((t.shift, t.scale)) / 8)
    gradients = module.conv_backward(t.dy, t.x, t.weight, bn=of_z, prologue=prologue, **t.conv)
    return [*sums, *gradients]


def compulsory_bytes(problem: ConvProblem, name: str) -> int:
    """Bytes of the tensors that each function of the pass has to read or write, each once."""
    x = problem.n * problem.h * problem.w * problem.c
    z = problem.n * problem.out_h * problem.out_w * problem.out_channels
    weight = 9 * problem.out_channels * (problem.c // problem.groups)
    elements = {
        "eval": x + weight + z,
        "forward": x + weight + z,
        "normalize": 2 * z,
        "backward": 4 * z + 2 * x + 2 * weight,
    }[name]
    return elements * problem.dtype.itemsize


def useful_flops(problem: ConvProblem, name: str) -> int:
    """Of the convolutions of the pass, which tensor cores compute."""
    if name == "normalize":
        return 0
    return problem.flops("backward" if name == "backward" else "eval")


def assert_right(what: str, found: list[Tensor], truth: list[Tensor]) -> None:
    """Each result is within a few roundings of float16, on its scale, of the truth."""
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        error = (a.float() - b).abs().max().item()
        bound = 4 * torch.finfo(torch.float16).eps * b.abs().max().item()
        if not error <= bound:
            raise AssertionError(f"{what}, result {i}: error {error:.3g}, allowed {bound:.3g}")


# Rows --------------------------------------------------------------------------------------------


def layer_rows(
    problem: ConvProblem, subjects: Sequence[str], passes: Sequence[str], gpus: Sequence[str]
) -> Iterable[Row]:
    """One row for each pass and subject that has it."""
    t = Tensors.of(problem)
    for name in passes:
        truth = run_pass(reference, name, t.float())
        for who in subjects:
            subject = SUBJECTS[who]
            if name not in subject.bars:
                continue
            module = importlib.import_module(subject.module)
            launched: dict[str, list[tuple[str, Any]]] = {}
            for gpu in gpus if subject.emulator.per_device else gpus[:1]:
                emulator = subject.emulator(gpu, count=True)
                with emulator.active():
                    results = run_pass(module, name, t)
                assert_right(f"{who}, {name}, {gpu}", results, truth)
                launched[gpu] = emulator.launched
            yield {
                "backend": who,
                "pass": name,
                **{key: getattr(problem, key) for key in ("n", "c", "h", "groups")},
                "d": problem.c // problem.groups,
                "stride": problem.stride,
                "dtype": str(problem.dtype).removeprefix("torch."),
                "compulsory_bytes": compulsory_bytes(problem, name),
                "gpus": {
                    gpu: on_gpu(problem, name, launched.get(gpu, launched[gpus[0]]), gpu)
                    | {"bar": bar_of(who, name, gpu)}
                    for gpu in gpus
                },
                "commit": timing.commit(),
                "torch": torch.__version__,
            }


def bar_of(who: str, name: str, gpu: str) -> float | None:
    bars = SUBJECTS[who].bars[name]
    return None if bars is None else bars[GPUS.index(gpu)]


def on_gpu(
    problem: ConvProblem, name: str, launched: list[tuple[str, Any]], gpu: str
) -> dict[str, Any]:
    """Counters and estimate of the launches of one pass, against its compulsory bytes."""
    import ptxemu

    compulsory, useful = compulsory_bytes(problem, name), useful_flops(problem, name)
    kernels = [kernel_on_gpu(kernel, result, gpu) for kernel, result in launched]

    def total(key: str) -> Any:
        return sum(k[key] for k in kernels)

    floor_us = compulsory / ptxemu.model.GPUS[gpu]["dram"] * 1e6
    return {
        "floor_us": floor_us,
        "bound_us": total("bound_us"),
        "ratio": total("bound_us") / floor_us,
        "dram_ratio": total("dram_bytes") / compulsory,
        "sector_ratio": 32 * (total("load_sectors") + total("store_sectors")) / compulsory,
        "shared_conflicts": max(k["shared_conflicts"] for k in kernels),
        "tensor_core_waste": total("mma_flops") / useful if useful else None,
        "kernels": kernels,
    }


def kernel_on_gpu(name: str, result: Any, gpu: str) -> dict[str, Any]:
    """Counters and estimate of one launch."""
    import ptxemu

    found = ptxemu.estimate(result, gpu)
    shared = ("lds", "sts", "ldsm", "stsm", "cpa_sts")
    return {
        "kernel": name,
        "blocks": result["ctas"],
        "shared_bytes": result["shared_bytes_per_cta"],
        "dram_bytes": result["dram_read_bytes"] + result["dram_write_bytes"],
        "load_sectors": result["gld_sectors"] + result["cpa_sectors"],
        "store_sectors": result["gst_sectors"],
        "shared_conflicts": max(result[f"{k}_conflict_factor"] for k in shared),
        "mma_flops": result["mma_flops"],
        "tail": found["waves_tail"],
        "bound": found["bound"],
        "bound_us": found["bound_us"],
        # as the estimate counts them; an L2 without an L1 before it bounds nothing
        "times_us": {k: v for k, v in found["times_us"].items() if v and k != "l2_no_l1"},
    }


# Files -------------------------------------------------------------------------------------------


def file_of(who: str, folder: Path = RESULTS) -> Path:
    return folder / f"modelled-{who}.json"


def load(who: str, folder: Path = RESULTS) -> list[Row]:
    """The rows that are kept of a subject; none without a file."""
    path = file_of(who, folder)
    return json.loads(path.read_text())["rows"] if path.exists() else []


def kept() -> dict[str, list[Row]]:
    """The rows in bench/results, by subject."""
    return {who: load(who) for who in SUBJECTS}


def keep(row: Row, folder: Path) -> None:
    """Add the row to its file, in place of the one of the same layer and pass."""
    rows = {key_of(r): r for r in load(row["backend"], folder)} | {key_of(row): row}
    ordered = sorted(rows.values(), key=key_of)
    save(
        {"modelled": True, "what": WHAT, "backend": row["backend"], "rows": ordered},
        file_of(row["backend"], folder),
    )


def key_of(row: Row) -> tuple[int, int, int]:
    """Batch, layer and pass, the latter two by their places in LAYERS and PASSES."""
    layer = LAYERS.index((row["c"], row["h"], row["stride"]))
    return row["n"], layer, PASSES.index(row["pass"])


# Tables ------------------------------------------------------------------------------------------


def label(row: Row) -> str:
    return f"{row['h']}, C={row['c']}, {row['groups']}x{row['d']}, stride {row['stride']}"


def ratio_cell(row: Row | None, gpu: str) -> str:
    """``1.38 issue, MISSED 1.25``: bound / floor, what bounds the slowest kernel, the bar."""
    if row is None:
        return ""
    g = row["gpus"][gpu]
    bound = max(g["kernels"], key=lambda k: k["bound_us"])["bound"]
    missed = "" if g["bar"] is None or g["ratio"] <= g["bar"] else f", MISSED {g['bar']:g}"
    return f"{g['ratio']:.2f} {bound}{missed}"


def table(rows: Sequence[Row]) -> str:
    """Each row and GPU with its counters."""
    header = ["layer", "pass", "backend", "GPU", "launches", "DRAM / compulsory"]
    header += ["L1 sectors / compulsory", "shared conflicts", "mma / useful", "bound / floor"]
    lines = []
    for r in rows:
        for gpu, g in r["gpus"].items():
            waste = g["tensor_core_waste"]
            ratios = [g["dram_ratio"], g["sector_ratio"], g["shared_conflicts"]]
            cells = [str(len(g["kernels"])), *(f"{v:.2f}" for v in ratios)]
            cells += ["" if waste is None else f"{waste:.1f}", ratio_cell(r, gpu)]
            lines.append([label(r), r["pass"], r["backend"], gpu, *cells])
    return markdown(header, lines)


def kernel_table(rows: Sequence[Row]) -> str:
    """Each kernel on each GPU, with the times of its three busiest resources."""
    header = ["kernel", "of", "GPU", "blocks", "tail", "DRAM MB", "conflicts", "us"]
    lines = []
    for r in rows:
        for gpu, g in r["gpus"].items():
            for k in g["kernels"]:
                busiest = sorted(k["times_us"].items(), key=lambda kv: -kv[1])[:3]
                cells = [str(k["blocks"]), f"{k['tail']:.2f}", f"{k['dram_bytes'] / 1e6:.1f}"]
                cells += [f"{k['shared_conflicts']:.2f}"]
                cells += [", ".join(f"{what} {us:.1f}" for what, us in busiest)]
                lines.append([k["kernel"], f"{r['backend']}, {r['pass']}", gpu, *cells])
    return markdown(header, lines)


def readme_block(kept: dict[str, list[Row]]) -> str:
    """README's table, the subjects side by side where there is a bar, and how many are reached."""
    by_key = {who: {key_of(r): r for r in rows} for who, rows in kept.items()}
    header = ["layer", "pass", *(f"`{who}` {gpu}" for who in kept for gpu in GPUS)]
    lines = []
    for key in sorted({key for rows in by_key.values() for key in rows}):
        found = [rows.get(key) for rows in by_key.values()]
        with_bar = [r for r in found if r is not None and r["gpus"][GPUS[0]]["bar"] is not None]
        if with_bar:
            cells = [ratio_cell(r, gpu) for r in found for gpu in GPUS]
            lines.append([label(with_bar[0]), with_bar[0]["pass"], *cells])
    return "\n".join([markdown(header, lines), "", *(bars_line(w, r) for w, r in kept.items())])


def bars_line(who: str, rows: list[Row]) -> str:
    """How many of the bars are reached, and at which commits."""
    figures = [g for r in rows for g in r["gpus"].values() if g["bar"] is not None]
    reached = sum(g["ratio"] <= g["bar"] for g in figures)
    commits = ", ".join(sorted({str(r["commit"]) for r in rows}))
    name = file_of(who).name
    bars = f", {reached} of {len(figures)} bars reached" if figures else ", no bars"
    return f"- `{who}`{bars}, at {commits} ([`{name}`](bench/results/{name}))"


# Command line ------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.modelled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--backends",
        nargs="+",
        choices=tuple(SUBJECTS),
        help="whose kernels (all that can be emulated here)",
    )
    layers = ", ".join(f"{i}: {h}x{h}, C={c}, stride {s}" for i, (c, h, s) in enumerate(LAYERS))
    p.add_argument(
        "--layers",
        nargs="+",
        type=int,
        choices=range(len(LAYERS)),
        metavar="I",
        default=list(range(len(LAYERS))),
        help=f"{layers} (all)",
    )
    p.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="(all)")
    p.add_argument("--gpus", nargs="+", choices=GPUS, default=GPUS, help="(both)")
    p.add_argument("--batch", type=int, default=BATCH, help="(%(default)s)")
    p.add_argument("--kernels", action="store_true", help="print a line for each kernel too")
    p.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="put each row, as soon as it is there, into FOLDER/modelled-BACKEND.json, in place of "
        "the one of the same layer and pass; README's rows are in bench/results (print alone)",
    )
    return p


def chosen(args: argparse.Namespace, p: argparse.ArgumentParser) -> list[str]:
    """The subjects to run. One that was asked for has to be there; of the others it is said."""
    asked = args.backends or list(SUBJECTS)
    reasons = {who: SUBJECTS[who].emulator.why_not() for who in asked}
    found = [who for who in asked if reasons[who] is None]
    missing = "; ".join(f"{who}: {reasons[who]}" for who in asked if who not in found)
    if missing and (args.backends or not found):
        p.error(f"cannot be modelled here: {missing}")
    if missing:
        print(f"left out: {missing}", file=sys.stderr)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.batch < 1:
        p.error(f"--batch {args.batch}: has to be 1 or more")
    subjects = chosen(args, p)
    partial = args.batch != BATCH or set(args.gpus) != set(GPUS)
    if args.output and args.output.resolve() == RESULTS.resolve() and partial:
        p.error(f"--output {args.output}: rows there are of batch {BATCH} on both GPUs")
    rows: list[Row] = []
    for i in args.layers:
        c, h, stride = LAYERS[i]
        problem = ConvProblem(
            args.batch, h, h, c, groups=32, stride=stride, dtype=torch.float16, device_type="cuda"
        )
        for row in layer_rows(problem, subjects, args.passes, args.gpus):
            rows.append(row)
            if args.output:
                keep(row, args.output)
            cells = ", ".join(f"{gpu} {ratio_cell(row, gpu)}" for gpu in args.gpus)
            print(f"{label(row)}: {row['backend']}, {row['pass']}: {cells}", file=sys.stderr)
    print(table(rows))
    if args.kernels:
        print(f"\n{kernel_table(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
