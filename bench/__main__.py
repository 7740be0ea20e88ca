"""Command line: measure, print the table, write JSON and plots; compare; fill README's table."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

try:
    from bench import cases, modelled, peers, report, sweep, timing
except ModuleNotFoundError as error:
    sys.exit(f"python -m bench needs {error.name}: pip install '.[bench]'")
from bench.cases import Case
from resnext_kernels.backends import tuning

ROOT = Path(__file__).parent.parent
EPILOG = """\
suites:
  sweep   the whole picture of the device, or the product of the axes given (default)
  bars    the layers, families and networks that have a speed-up to reach on two CPU threads
  quick   every level, pass and series, in less than two minutes on two cores
  gpu     all that needs a GPU, in one call: the tests (pytest -m gpu, on all cores where
          pytest-xdist is installed), compute-sanitizer where it is installed, then the sweep on
          the CUDA device with the Triton kernels autotuned (RESNEXT_KERNELS_AUTOTUNE=0: not);
          without a device it says what it skips

peers:
{peers}

A row is FAILED where our kernel is wrong, and the exit status is then 1. In the table ± is half the
distance between the quartiles; "of floor" is the least time that the work can take, the larger of
flops / peak and bytes / bandwidth as measured in the same run, over the time taken.

examples:
  python -m bench --quick
  python -m bench --suite bars --output results.json
  python -m bench --level op --pass eval --stage 3 --batch 1 8 32 --series complexity
  python -m bench --level op --template 16x8 --stride 1 2 --dtype float32 bfloat16
  python -m bench --compare before.json after.json
"""


def template(text: str) -> tuple[int, int]:
    """``32x4`` -> (32, 4)."""
    left, cross, right = text.partition("x")
    if not (cross and left.isdigit() and right.isdigit() and int(left) * int(right)):
        raise argparse.ArgumentTypeError(f"{text!r} is not CARDINALITYxWIDTH, as in 32x4")
    return int(left), int(right)


def number(kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number greater than zero."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not greater than zero and finite")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the fused kernels against what torch users have now. Every candidate\n"
        "is checked against float64 before it is timed; a wrong one gets no number.",
        epilog=EPILOG.replace("{peers}", peers.DESCRIPTION),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    suites = ("sweep", "bars", "quick", "gpu")
    suite = p.add_mutually_exclusive_group()
    suite.add_argument(
        "--suite", choices=suites, default="sweep", help="what to measure, see below (sweep)"
    )
    suite.add_argument(
        "--quick",
        action="store_const",
        const="quick",
        dest="suite",
        help="the same as --suite quick",
    )
    p.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where to measure (the CUDA device where there is one, else the CPU)",
    )

    axes = p.add_argument_group(
        "axes",
        "Each takes one or several values. Any of them makes the sweep the product of those given\n"
        "and of the defaults, in parentheses, of the others.",
    )

    def axis(flag: str, dest: str, kind: Callable[[str], Any], choices: Any, text: str) -> None:
        metavar = None if choices else flag[2:].upper()
        axes.add_argument(
            flag, dest=dest, nargs="+", type=kind, choices=choices, metavar=metavar, help=text
        )

    axis(
        "--level",
        "levels",
        str,
        cases.LEVELS,
        "one 3x3 layer with its BatchNorm and ReLU, one bottleneck, one model (all; op and block "
        "with --stage, --stride, --series or --template; network with --model alone)",
    )
    axis(
        "--pass",
        "passes",
        str,
        cases.PASSES,
        "inference, training forward, training forward and backward; for a network a training "
        "step, and no pass forward (all)",
    )
    axis("--batch", "batches", number(int), None, "batch sizes (8; CUDA: 64)")
    stages = "of ResNet, 1 to 4: maps of 56, 28, 14 and 7 pixels a side (all)"
    axis("--stage", "stages", int, tuple(cases.STAGES), stages)
    axis("--stride", "strides", int, (1, 2), "2: the layer that opens stage 2, 3 or 4 (1)")
    axis(
        "--series",
        "series",
        str,
        tuple(cases.SERIES),
        "cardinality x width per group at stage 1. stages: 32x4; complexity: 1x64, 2x40, 4x24, "
        "8x14, 32x4, and 2x64, 64x4, 32x8 of twice theirs; width: 128 channels in 1 to 128 "
        "groups (all)",
    )
    axis("--template", "templates", template, None, "C x d at stage 1, in place of a series: 16x8")
    axis("--dtype", "dtypes", str, tuple(cases.DTYPES), "of x and weight (float32; CUDA: bfloat16)")
    layouts = "memory format of x; contiguous is NCHW (channels_last)"
    axis("--layout", "layouts", str, tuple(cases.LAYOUTS), layouts)
    axis("--backend", "backends", str, None, "backends of ours (the one that ours selects)")
    axis("--model", "models", str, None, "networks of resnext_kernels.models (resnext50_32x4d)")

    how = p.add_argument_group("method")
    how.add_argument(
        "--peer",
        dest="peers",
        nargs="*",
        choices=peers.PEERS,
        metavar="PEER",
        help="only these peers, see below; without a name ours alone (all, but compile only in "
        "sweep for the stages, blocks and networks and in bars for networks)",
    )
    how.add_argument(
        "--rounds", type=number(int), help="turns that each candidate takes (11; quick: 5)"
    )
    how.add_argument(
        "--min-time",
        type=number(float),
        metavar="MS",
        help="a turn in milliseconds, of as many calls as it takes (20; quick: 8)",
    )
    how.add_argument(
        "--threads",
        type=number(int),
        default=torch.get_num_threads(),
        help="CPU threads of every candidate (%(default)s)",
    )

    out = p.add_argument_group("output")
    out.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="where the report goes, and the plots beside it (bench/out/SUITE.json)",
    )
    out.add_argument("--no-plots", action="store_true", help="draw nothing")
    out.add_argument("--list", action="store_true", help="print the rows and measure nothing")

    other = p.add_argument_group("instead of measuring").add_mutually_exclusive_group()
    other.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="set two reports side by side and say which rows moved beyond their spread",
    )
    other.add_argument("--show", type=Path, metavar="FILE.json", help="print a report's table")
    other.add_argument("--plot", type=Path, metavar="FILE.json", help="draw a report's plots again")
    other.add_argument(
        "--readme",
        action="store_true",
        help="rewrite README's tables from the files in bench/results",
    )
    return p


AXES = (
    "levels",
    "passes",
    "batches",
    "stages",
    "strides",
    "series",
    "templates",
    "dtypes",
    "layouts",
    "backends",
    "models",
)


LAYER_AXES = {"stages", "strides", "series", "templates"}


def device(args: argparse.Namespace, p: argparse.ArgumentParser) -> str:
    """The device to measure: the one asked for, or the one at hand."""
    fixed = {"bars": "cpu", "gpu": "cuda"}.get(args.suite)
    if fixed and args.device not in (None, fixed):
        p.error(f"--suite {args.suite} is for --device {fixed}, not {args.device}")
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list and not fixed:
        p.error("--device cuda: torch sees no CUDA device")
    return fixed or args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def chosen(args: argparse.Namespace, p: argparse.ArgumentParser, device: str) -> list[Case]:
    """The rows that the arguments ask for."""
    given = {name: getattr(args, name) for name in AXES if getattr(args, name) is not None}
    if args.suite != "sweep":
        if given:
            p.error(f"--suite {args.suite} fixes its rows; axes belong to --suite sweep")
        suites = {"bars": cases.bars, "quick": lambda: cases.quick(device), "gpu": cases.gpu}
        return suites[args.suite]()
    if not given:
        return cases.gpu() if device == "cuda" else cases.sweep()
    of_layers = LAYER_AXES & given.keys()
    if "levels" not in given:
        if of_layers and "models" not in given:
            given["levels"] = ["op", "block"]
        elif "models" in given and not of_layers:
            given["levels"] = ["network"]
    levels = given.get("levels", cases.LEVELS)
    if "models" in given and "network" not in levels:
        p.error("--model belongs to --level network")
    if of_layers and set(levels) == {"network"}:
        p.error("--stage, --stride, --series and --template belong to --level op and block")
    if "templates" in given:
        if "series" in given:
            p.error("--template takes the place of --series: give one of them")
        given["series"] = ["stages"]
    if "backends" in given:
        from resnext_kernels import backends

        unknown = set(given["backends"]) - set(backends.available())
        if unknown:
            p.error(
                f"--backend {' '.join(sorted(unknown))}: available here are "
                f"{', '.join(backends.available())}"
            )
    for name in given.get("models", []):
        try:
            peers.factory(name)
        except ValueError as error:
            p.error(f"--model {error}")
    rows = cases.product(replace(cases.usual(device), **given))
    if not rows:
        p.error(
            "these axes leave no row: stride 2 opens stages 2 to 4, a network has no pass 'forward'"
        )
    return rows


def method(args: argparse.Namespace, device: str) -> timing.Method:
    rounds, min_time = (5, 8.0) if args.suite == "quick" else (11, 20.0)
    return timing.Method(
        rounds=args.rounds or rounds,
        min_time_ms=args.min_time or min_time,
        threads=args.threads,
        device=device,
    )


def output(args: argparse.Namespace, p: argparse.ArgumentParser) -> Path:
    """Where the report goes. What would lose it after hours of measuring is said before."""
    path: Path = args.output or Path(__file__).parent / "out" / f"{args.suite}.json"
    if path.suffix != ".json":
        p.error(f"--output {path}: the name has to end in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        p.error(f"--output {path}: {error.strerror}")
    if not path.stat().st_size:
        path.unlink()
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        p.error("the plots need matplotlib: pip install '.[bench]', or --no-plots")
    return path


def measure(args: argparse.Namespace, rows: list[Case], how: timing.Method, path: Path) -> int:
    """Run, print, write. The exit status is 1 when one of our kernels was wrong."""
    result = sweep.run(
        rows,
        how,
        args.peers,
        args.suite,
        progress=sys.stderr.isatty() or "CI" not in os.environ,
    )
    print(report.table(result), report.notes(result), sep="\n\n")
    report.save(result, path)
    print(f"wrote {path}")
    if not args.no_plots:
        from bench import plots

        for file in plots.draw(result, path.with_suffix("")):
            print(f"wrote {file}")
    return 1 if result["summary"]["failed"] else 0


def gpu_tests(rows: list[Case]) -> int | None:
    """Run the tests that need a GPU; None, after saying what is skipped, without one."""
    if not torch.cuda.is_available():
        print("no CUDA device here. Skipped:")
        print(
            "  the tests of the triton and cuda backends on a device, tests/test_gpu.py among them"
        )
        print("  compute-sanitizer on the kernels of both")
        print("  autotuning of the triton backend's kernels")
        print(f"  {len(rows)} rows of the sweep (--suite gpu --list prints them)")
        print("Run the same command on a machine with a GPU.")
        return None
    print("tests:", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    spread = ["-n", "auto"] if importlib.util.find_spec("xdist") else []  # Triton compiles for long
    status = subprocess.run([*tests, *spread], cwd=ROOT, check=False).returncode
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: skipped")
        return status
    for tool in ("memcheck", "racecheck", "initcheck"):
        print(f"compute-sanitizer, {tool}:", flush=True)
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        of_kernels = ["tests/test_backend_functions.py", "-k", "f16-cuda or f16-triton"]
        command = [*sanitizer, *tests, *of_kernels]
        # each tensor an allocation of its own: an access past its end is then seen
        own = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status = max(status, subprocess.run(command, cwd=ROOT, env=own, check=False).returncode)
    return status


def with_tables(readme: str) -> str:
    """README with the tables of bench/results: measured, and modelled."""
    readme = report.rewrite_readme(readme, "bench", report.readme_block(report.committed()))
    return report.rewrite_readme(readme, "modelled", modelled.readme_block(modelled.kept()))


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.compare:
            print(report.compare(*(report.load(path) for path in args.compare)))
            return 0
        if args.show:
            result = report.load(args.show)
            print(report.table(result), report.notes(result), sep="\n\n")
            return 0
        if args.plot:
            from bench import plots

            for file in plots.draw(report.load(args.plot), args.plot.with_suffix("")):
                print(f"wrote {file}")
            return 0
        if args.readme:
            readme = ROOT / "README.md"
            readme.write_text(with_tables(readme.read_text()))
            print(f"wrote {readme}")
            return 0
    except ValueError as error:
        p.error(str(error))
    where = device(args, p)
    rows = chosen(args, p, where)
    if args.list:
        print("\n".join(case.id for case in rows))
        return 0
    if args.threads > (os.cpu_count() or args.threads):
        p.error(f"--threads {args.threads}: this machine has {os.cpu_count()} cores")
    path = output(args, p)
    tested = gpu_tests(rows) if args.suite == "gpu" else 0
    if tested is None:
        return 0
    if args.suite == "gpu":
        os.environ.setdefault("RESNEXT_KERNELS_AUTOTUNE", "1")
        print(f"autotuned configurations are kept in {tuning.directory()}")
    return max(tested, measure(args, rows, method(args, where), path))


if __name__ == "__main__":
    sys.exit(main())
