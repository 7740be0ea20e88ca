"""One row: correctness first, then interleaved times, then what follows from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import peers, timing
from bench.cases import EQUAL_COMPLEXITY, Case, taps
from bench.peers import OURS, Candidate, Workload
from resnext_kernels.backends import tuning

SCHEMA = 1
BUSY = 0.05  # share of the time lost to others; the smallest speed-up that a bar asks for
Row = dict[str, Any]


def measure(
    case: Case,
    method: timing.Method,
    roofline: timing.Roofline,
    wanted: Sequence[str] = peers.PEERS,
    build: Callable[[Workload, str], Candidate] = lambda work, name: work.build(name),
) -> Row:
    """Check every candidate against float64, time those that passed, return the row.

    ``build`` makes the candidates; the self-tests put wrong and slow ones in.
    """
    names, absent = peers.peers_of(case, wanted)
    row: Row = {
        "id": case.id,
        "label": case.label,
        **asdict(case),
        "stage": case.stage,
        "bar": case.bar,
        "bar_peers": list(case.bar_peers),
        "absent": absent,
        "failed": {},
        "times_ms": {},
        "errors": {},
        "flags": [],
    }
    try:
        _measure(row, case, method, names, build)
    except Exception as error:  # out of memory, say: a row to show, not a crash
        row["failed"].setdefault(OURS, _text(error))
    if OURS in row["failed"]:
        row["times_ms"] = {}  # no numbers beside a kernel that is wrong
        return row
    return finish(row, roofline)


def _measure(
    row: Row,
    case: Case,
    method: timing.Method,
    names: Sequence[str],
    build: Callable[[Workload, str], Candidate],
) -> None:
    """Fill ``row`` with errors, times, memory and work."""
    work = peers.workload(case)
    eager_errors = peers.eager_errors(work)
    candidates: dict[str, Candidate] = {}
    for name in (OURS, *names):
        try:
            candidate = build(work, name)
            with peers.poisoned(name.startswith(OURS)):
                results = candidate.results(candidate.run())
            verdict = peers.check(work, results, eager_errors)
        except Exception as error:
            row["failed"][name] = _text(error)
            continue
        row["errors"][name] = verdict.error
        if verdict.passed:
            candidates[name] = candidate
        else:
            row["failed"][name] = str(verdict)
    if OURS not in candidates:
        return

    runs = {name: candidate.run for name, candidate in candidates.items()}
    timed, graphed = runs, False
    if method.device == "cuda" and (case.level, case.mode) != ("network", "forward+backward"):
        row["copies"] = work.copies
        timed, reason = _graphed(runs, work.copies)
        row["cuda_graphs"] = graphed = reason is None
        if reason:
            row["flags"].append(f"launches included: {reason}")
    lost_share = timing.disturbance(method.threads)
    measured = timing.interleaved(timed, method)
    row["lost_share"] = lost_share()
    if method.device == "cpu" and (row["lost_share"] or 0.0) > BUSY:
        row["flags"].append(f"busy machine: {row['lost_share']:.0%} of the time lost to others")
    calls = work.copies if graphed else 1
    for name, seconds in measured.items():
        row["times_ms"][name] = _summary([s / calls for s in seconds])
    for name, run in timed.items():  # what was timed is what was right
        for results in run() if graphed else [run()]:
            named = candidates[name].results(results)
            verdict = peers.check(work, named, eager_errors, work.steady)
            if not verdict.passed:
                row["failed"][name] = f"{verdict}, after it was timed"
                row["times_ms"].pop(name, None)
    row["peak_bytes"] = {
        name: timing.peak_bytes(runs[name], method.device)
        for name in (OURS, "eager")
        if name in runs
    }
    if case.mode != "eval":
        row["saved_bytes"] = {
            name: timing.saved_bytes(runs[name]) for name in (OURS, "eager") if name in runs
        }
    row["flops"], row["bytes_moved"] = _work(case)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles over the rounds, in ms."""
    times = torch.tensor(seconds, dtype=torch.float64) * 1e3
    q1, median, q3 = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


def _graphed(runs: dict[str, timing.Run], copies: int) -> tuple[dict[str, timing.Run], str | None]:
    """All candidates as CUDA graphs, or none and the reason: both sides run alike."""
    try:
        return {name: timing.graphed(run, copies) for name, run in runs.items()}, None
    except RuntimeError as error:
        return runs, str(error).splitlines()[0][:200]


def _work(case: Case) -> tuple[int, int]:
    """Flops and compulsory bytes; a network's are those of its layers, counted in a forward pass.

    A network reads its images and parameters; training also reads the parameters for the gradients
    of the maps, and writes those of the parameters. Its first layer has no gradient to pass on.
    """
    if case.level != "network":
        return case.flops, case.bytes_moved
    model, x = peers.eager_module(case).eval(), peers.module_input(case).cpu()
    flops: list[int] = []

    def count(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            size, kernel, stride = inputs[0].shape[2:], layer.kernel_size, layer.stride
            padding = [int(p) for p in layer.padding]
            height, width = (taps(size[i], kernel[i], stride[i], padding[i]) for i in (0, 1))
            inside = case.n * height * width
            flops.append(2 * inside * layer.out_channels * (layer.in_channels // layer.groups))
        else:
            flops.append(2 * case.n * layer.in_features * layer.out_features)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(x[:1])
    parameters, images = sum(p.numel() * 4 for p in model.parameters()), x.numel() * 4
    if case.mode == "eval":
        return sum(flops), parameters + images
    return 3 * sum(flops) - flops[0], 3 * parameters + 2 * images


def _fewest_multiplications(row: Row) -> float:
    """The share of the direct algorithm's multiplications that our kernels may do with.

    The floor counts the direct algorithm. On AVX-512 ours compute stride 1 by Winograd's F(2, 3),
    in two thirds of them, and may be below it; but for bfloat16 in eval where it is multiplied in
    pairs.
    """
    isa = timing.kernel_isa() or ""
    pairs = isa == "avx512_bf16" and row["dtype"] == "bfloat16" and row["mode"] == "eval"
    winograd = row["device"] == "cpu" and isa.startswith("avx512") and not pairs
    return 2 / 3 if winograd and row["stride"] == 1 else 1.0


def finish(row: Row, roofline: timing.Roofline) -> Row:
    """What follows from the times: speed-ups, rates, the share of the floor, flags."""
    ours = row["times_ms"][OURS]
    others = {k: v["median"] for k, v in row["times_ms"].items() if k != OURS}
    rivals = {k: v for k, v in others.items() if k != "ours float32"} or others
    row["speedups"] = {name: ms / ours["median"] for name, ms in others.items()}
    if rivals:
        row["best_peer"] = min(rivals, key=lambda name: rivals[name])
        row["speedup"] = row["speedups"][row["best_peer"]]
    against = [others[name] for name in row["bar_peers"] if name in others]
    if against:
        row["bar_ratio"] = min(against) / ours["median"]
    row["gflop_s"] = row["flops"] / ours["median"] / 1e6
    row["gb_s"] = row["bytes_moved"] / ours["median"] / 1e6
    row["floor_ms"] = roofline.floor_ms(row["flops"], row["bytes_moved"], row["dtype"])
    row["share_of_floor"] = row["floor_ms"] / ours["median"]
    row["flags"] = [f for f in row["flags"] if not f.startswith("beats the floor")]
    for name, t in row["times_ms"].items():
        flops = row["flops"] * (_fewest_multiplications(row) if name.startswith(OURS) else 1)
        floor_ms = roofline.floor_ms(flops, row["bytes_moved"], row["dtype"])
        if t["q3"] < floor_ms:  # beaten by more than the spread
            share = floor_ms / t["median"]
            row["flags"].append(f"beats the floor: {name} at {share:.2f} of it")
    return row


def run(
    cases: Iterable[Case],
    method: timing.Method,
    wanted: Sequence[str] | None = None,
    suite: str = "sweep",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure all cases and return the report that is written as JSON."""
    torch.set_num_threads(method.threads)
    memory_kept = timing.keep_memory()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions may: the peak is TF32's
    autotune = tuning.enabled(torch.device(method.device))
    started = time.monotonic()
    roofline = timing.Roofline(method)
    rows = []
    bar = tqdm(list(cases), unit="row", disable=not progress, dynamic_ncols=True)
    complete = True
    try:
        with timing.side_stream(method.device):
            for case in bar:
                bar.set_description_str(case.id)
                chosen = peers.usual_peers(case, suite) if wanted is None else wanted
                began = time.monotonic()
                rows.append(measure(case, method, roofline, chosen))
                rows[-1]["seconds"] = round(time.monotonic() - began, 1)
    except KeyboardInterrupt:  # what was measured so far is reported
        complete = False
    roofline.refresh()
    rows = [finish(row, roofline) if row["times_ms"] else row for row in rows]
    absent: dict[str, str] = {}
    for row in rows:
        absent |= row["absent"]
    return {
        "schema": SCHEMA,
        "suite": suite,
        "complete": complete,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
        "commit": timing.commit(),
        "machine": timing.machine(),
        "versions": timing.versions(),
        "method": asdict(method) | {"memory_kept": memory_kept, "autotune": autotune},
        "roofline": roofline.as_json(),
        "absent": absent,
        "summary": summarise(rows),
        "rows": rows,
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures over several rows: the family of equal complexity, wins and losses, memory."""
    timed = [r for r in rows if "speedup" in r]
    out: dict[str, Any] = {
        "rows": len(rows),
        "failed": sum(bool(r["failed"].get(OURS)) for r in rows),
        "faster": sum(r["speedup"] > 1 for r in timed),
        "slower": sorted(r["id"] for r in timed if r["speedup"] < 1),
    }
    family = [
        r
        for r in timed
        if r["level"] == "op"
        and r["mode"] == "eval"
        and r["n"] == 8
        and "bar_ratio" in r
        and r["stride"] == 1
        and r["dtype"] == "float32"
        and r["layout"] == "channels_last"
        and (r["groups"], r["c"] // r["groups"] // 2 ** (r["stage"] - 1)) in EQUAL_COMPLEXITY
    ]
    many = [r["bar_ratio"] for r in family if r["groups"] > 1]
    if many:
        out["equal_complexity_eval"] = {
            "rows": len(family),
            "geometric_mean": geometric_mean(many),
            "geometric_mean_bar": 1.25,
            "minimum": min(r["bar_ratio"] for r in family),
            "minimum_bar": 0.95,
            "minimum_where": min(family, key=lambda r: r["bar_ratio"])["label"],
        }
    for r in timed:
        if r["level"] == "network" and r["mode"] == "forward+backward" and "saved_bytes" in r:
            megabytes = {k: v / r["n"] / 1e6 for k, v in r["saved_bytes"].items()}
            out.setdefault("saved_mb_per_image", {})[r["model"]] = megabytes
    return out
