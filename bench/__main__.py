"""Command line: measure, print the table, write JSON and plots; compare; fill README's table."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases, peers, report, sweep, timing
from bench.cases import Axes, Case

ROOT = Path(__file__).parent.parent
EPILOG = """\
suites:
  sweep   the whole picture of this CPU, or the product of the axes given (default)
  bars    the layers, families and networks that have a speed-up to reach
  quick   every level, pass and series once, in less than two minutes on two cores
  gpu     the tests, compute-sanitizer where it is installed, then the sweep on the CUDA device;
          without a device it says what it skips

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
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than zero")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the fused kernels against what torch users have now. Every candidate "
        "is checked against float64 before it is timed; a wrong one gets no number.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    suites = ("sweep", "bars", "quick", "gpu")
    p.add_argument("--suite", choices=suites, default="sweep", help="what to measure (see below)")
    p.add_argument(
        "--quick",
        action="store_const",
        const="quick",
        dest="suite",
        help="the same as --suite quick",
    )

    axes = p.add_argument_group("axes", "Each makes the sweep the product of the values given.")

    def axis(flag: str, dest: str, kind: Callable[[str], Any], choices: Any, text: str) -> None:
        metavar = None if choices else flag[2:].upper()
        axes.add_argument(
            flag, dest=dest, nargs="+", type=kind, choices=choices, metavar=metavar, help=text
        )

    axis("--level", "levels", str, cases.LEVELS, "one layer, one bottleneck, one model")
    axis("--pass", "passes", str, cases.PASSES, "inference, training forward, training step")
    axis("--batch", "batches", number(int), None, "batch sizes (8)")
    axis("--stage", "stages", int, tuple(cases.STAGES), "1 to 4: maps of 56, 28, 14, 7")
    axis("--stride", "strides", int, (1, 2), "2: the layer that opens the stage")
    series = "stages: 32x4; complexity: C x d at equal complexity; width: cardinality at 128"
    axis("--series", "series", str, tuple(cases.SERIES), series)
    axis("--template", "templates", template, None, "C x d of stage 1, in place of a series: 16x8")
    axis("--dtype", "dtypes", str, tuple(cases.DTYPES), "(float32)")
    axis("--layout", "layouts", str, tuple(cases.LAYOUTS), "memory format (channels_last)")
    axis("--backend", "backends", str, None, "backends of ours, instead of the one it selects")
    axis("--model", "models", str, None, "networks (resnext50_32x4d)")
    axes.add_argument("--device", choices=("cpu", "cuda"), help="(cpu; gpu suite: cuda)")

    how = p.add_argument_group("method")
    how.add_argument(
        "--peer",
        dest="peers",
        nargs="*",
        choices=peers.PEERS,
        metavar="PEER",
        help=f"only these, of: {', '.join(peers.PEERS)} (bars: those that the bar is "
        "set against; quick and over the cardinalities: all but compile)",
    )
    how.add_argument("--rounds", type=number(int), help="turns of each candidate (11; quick: 5)")
    how.add_argument(
        "--min-time",
        type=number(float),
        metavar="MS",
        help="shortest turn in milliseconds (20; quick: 8)",
    )
    how.add_argument(
        "--threads",
        type=number(int),
        default=torch.get_num_threads(),
        help="CPU threads (%(default)s)",
    )

    out = p.add_argument_group("output")
    out.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="report; plots go beside it (bench/out/SUITE.json)",
    )
    out.add_argument("--no-plots", action="store_true", help="draw nothing")
    out.add_argument("--list", action="store_true", help="print the rows and measure nothing")

    other = p.add_argument_group("instead of measuring").add_mutually_exclusive_group()
    other.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="two reports side by side: which rows moved beyond their spread",
    )
    other.add_argument("--show", type=Path, metavar="FILE.json", help="print a report's table")
    other.add_argument("--plot", type=Path, metavar="FILE.json", help="draw the plots again")
    other.add_argument(
        "--readme",
        action="store_true",
        help="rewrite README's tables from the reports in bench/results",
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


def chosen(args: argparse.Namespace, p: argparse.ArgumentParser) -> list[Case]:
    """The rows that the arguments ask for."""
    given = {name: getattr(args, name) for name in AXES if getattr(args, name) is not None}
    if args.suite != "sweep":
        if given:
            p.error(f"--suite {args.suite} fixes its rows; axes belong to --suite sweep")
        return {"bars": cases.bars, "quick": cases.quick, "gpu": cases.gpu}[args.suite]()
    if not given and args.device != "cuda":
        return cases.sweep()
    if "templates" in given:
        given.setdefault("series", ["stages"])
    if "backends" in given:
        from resnext_kernels import backends

        unknown = set(given["backends"]) - set(backends.available())
        if unknown:
            p.error(
                f"--backend {' '.join(sorted(unknown))}: available here are "
                f"{', '.join(backends.available())}"
            )
    if "models" in given:
        for name in given["models"]:
            try:
                peers.factory(name)
            except ValueError as error:
                p.error(f"--model {error}")
    if args.device == "cuda":
        given.setdefault("dtypes", ["bfloat16"])
        given.setdefault("batches", [64])
    rows = cases.sweep(Axes(**given, device=args.device or "cpu"))
    if not rows:
        p.error(
            "these axes leave no row: stride 2 opens stages 2 to 4, a network has no pass 'forward'"
        )
    return rows


def method(args: argparse.Namespace) -> timing.Method:
    rounds, min_time = (5, 8.0) if args.suite == "quick" else (11, 20.0)
    device = "cuda" if args.suite == "gpu" else args.device or "cpu"
    return timing.Method(
        rounds=args.rounds or rounds,
        min_time_ms=args.min_time or min_time,
        threads=args.threads,
        device=device,
    )


def measure(args: argparse.Namespace, rows: list[Case]) -> int:
    """Run, print, write. The exit status is 1 when one of our kernels was wrong."""
    result = sweep.run(
        rows,
        method(args),
        args.peers,
        args.suite,
        progress=sys.stderr.isatty() or "CI" not in os.environ,
    )
    print(report.table(result), report.notes(result), sep="\n\n")
    path = args.output or Path(__file__).parent / "out" / f"{args.suite}.json"
    report.save(result, path)
    print(f"wrote {path}")
    if not args.no_plots:
        from bench import plots

        for file in plots.draw(result, path.with_suffix("")):
            print(f"wrote {file}")
    return 1 if result["summary"]["failed"] else 0


def gpu_tests(rows: list[Case]) -> int | None:
    """Run the test suite on the GPU machine; None, after saying what is skipped, without a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device here. Skipped:")
        print("  the tests of the triton and cuda backends on a device")
        print("  compute-sanitizer on the cuda backend's kernels")
        print(f"  {len(rows)} rows of the sweep (--suite gpu --list prints them)")
        print("Run the same command on a machine with a GPU.")
        return None
    print("tests:", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q"]
    status = subprocess.run(tests, cwd=ROOT, check=False).returncode
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: skipped")
        return status
    for tool in ("memcheck", "racecheck", "initcheck"):
        print(f"compute-sanitizer, {tool}:", flush=True)
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        tests_of_cuda = ["tests/test_backend_functions.py", "-k", "f16-cuda"]
        command = [*sanitizer, *tests, *tests_of_cuda]
        status = max(status, subprocess.run(command, cwd=ROOT, check=False).returncode)
    return status


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
            block = report.readme_block(report.committed())
            readme.write_text(report.rewrite_readme(readme.read_text(), block))
            print(f"wrote {readme}")
            return 0
    except ValueError as error:
        p.error(str(error))
    rows = chosen(args, p)
    if args.list:
        print("\n".join(case.id for case in rows))
        return 0
    if args.suite == "gpu":
        tested = gpu_tests(rows)
        if tested is None:
            return 0
        return max(tested, measure(args, rows))
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device")
    return measure(args, rows)


if __name__ == "__main__":
    sys.exit(main())
