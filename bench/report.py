"""What is shown: the JSON file, the tables, the comparison of two files, README's block."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench.cases import EQUAL_COMPLEXITY, STAGES, TWICE_COMPLEXITY
from bench.peers import OURS, PEERS
from bench.sweep import SCHEMA, Row

Report = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(report), indent=1, ensure_ascii=False) + "\n")


def rounded(value: Any) -> Any:
    """Floats to five significant digits: more than any timing is worth, and diffs stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def load(path: Path) -> Report:
    """Read a report. ValueError says what is wrong with a file that is none."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a report of schema {SCHEMA} (python -m bench writes those)")
    return report


# --------------------------------------------------------------------------------------- tables


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first two columns are text, the others numbers."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    pad = [str.ljust if i < 2 else str.rjust for i in range(len(header))]
    padded = [[p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))


def milliseconds(t: dict[str, Any] | None, spread: bool = False) -> str:
    if t is None:
        return ""
    digits = 3 if t["median"] < 10 else 1
    text = f"{t['median']:.{digits}f}"
    return f"{text} ±{100 * (t['q3'] - t['q1']) / 2 / t['median']:.0f}%" if spread else text


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def bar_cell(row: Row) -> str:
    """``3.61x of 3.5x``: reached and asked for, marked when it is missed."""
    if row["bar"] is None or "bar_ratio" not in row:
        return ""
    mark = "" if row["bar_ratio"] >= row["bar"] else " MISSED"
    against = " our float32" if row["bar_peers"] == ["ours float32"] else ""
    return f"{times(row['bar_ratio'])} of {row['bar']:g}x{against}{mark}"


def where(row: Row) -> str:
    """The parts of the row's name that its label leaves out."""
    parts = [row["label"], f"batch {row['n']}"]
    parts += [row["dtype"]] if row["dtype"] != "float32" else []
    parts += ["NCHW"] if row["layout"] == "contiguous" else []
    parts += [row["backend"]] if row["backend"] else []
    return ", ".join(parts)


def table(report: Report) -> str:
    """All rows: ours, each peer, the ratios, the bar, the share of the floor."""
    rows = report["rows"]
    peers = [p for p in PEERS if any(p in r["times_ms"] for r in rows)]
    header = [
        "layer",
        "pass",
        f"{OURS} ms",
        *(f"{p} ms" for p in peers),
        "best peer",
        "bar",
        "GFLOP/s",
        "GB/s",
        "of floor",
    ]
    lines = []
    for r in rows:
        start = [where(r), r["mode"]]
        if OURS in r["failed"] or not r["times_ms"]:
            lines.append([*start, "FAILED", *[""] * (len(header) - 3)])
            continue
        cells = [milliseconds(r["times_ms"][OURS], spread=True)]
        cells += [
            "failed" if p in r["failed"] else milliseconds(r["times_ms"].get(p)) for p in peers
        ]
        best = f"{times(r['speedup'])} {r['best_peer']}" if "speedup" in r else ""
        rates = [f"{r['gflop_s']:.0f}", f"{r['gb_s']:.1f}", percent(r["share_of_floor"])]
        lines.append([*start, *cells, best, bar_cell(r), *rates])
    return markdown(header, lines)


def notes(report: Report) -> str:
    """Below the table: what failed, what was flagged, what was absent, and the summary."""
    out = [provenance(report), "measured in this run: " + roofline(report)]
    failures: dict[tuple[str, str], list[str]] = {}
    for r in report["rows"]:
        for name, why in r["failed"].items():
            failures.setdefault((name, why), []).append(r["id"])
        out += [f"flag {r['id']}: {flag}" for flag in r["flags"]]
    out += [f"FAILED {name}: {why}: {', '.join(ids)}" for (name, why), ids in failures.items()]
    out += [f"absent {name}: {why}" for name, why in report["absent"].items()]
    s = report["summary"]
    if "equal_complexity_eval" in s:
        f = s["equal_complexity_eval"]
        out.append(
            f"equal complexity, eval, batch 8, {f['rows']} rows: geometric mean for C > 1 "
            f"{times(f['geometric_mean'])} (bar {f['geometric_mean_bar']}x), minimum "
            f"{times(f['minimum'])} at {f['minimum_where']} (bar {f['minimum_bar']}x)"
        )
    for model, mb in s.get("saved_mb_per_image", {}).items():
        amounts = ", ".join(f"{name} {v:.1f} MB" for name, v in mb.items())
        out.append(f"{model}: saved for backward per image: {amounts}")
    missed = [r for r in report["rows"] if "MISSED" in bar_cell(r)]
    asked = [r for r in report["rows"] if r["bar"] is not None]
    if asked:
        failed = sum(OURS in r["failed"] for r in asked)
        reached = len(asked) - len(missed) - failed
        out.append(
            f"bars: {reached} of {len(asked)} reached, {len(missed)} missed, {failed} failed"
        )
    counted = [r for r in report["rows"] if "speedup" in r]
    out.append(
        f"{s['rows']} rows: faster than every peer in {s['faster']}, "
        f"slower than one in {len(s['slower'])}, without a peer {s['rows'] - len(counted)}"
    )
    if not report["complete"]:
        out.append("interrupted: rows are missing")
    return "\n".join(out)


def provenance(report: Report) -> str:
    """One line: device, threads, versions, commit."""
    m, v = report["machine"], report["versions"]
    if report["method"]["device"] == "cuda":
        device = f"{m['gpu']} (CUDA {m['cuda']}, cuDNN {m['cudnn']})"
    else:
        isa = m["kernel_isa"] or "no compiled kernels"
        device = f"{m['cpu']} ({m['cores']} cores, {isa}), {report['method']['threads']} threads"
    return f"{device}, torch {v['torch']}, commit {report['commit']}, {report['created'][:10]}"


def roofline(report: Report) -> str:
    figures = [(*key.split(" "), value) for key, value in report["roofline"].items()]
    peaks = [f"{value:.0f} GFLOP/s {what}" for kind, what, value in figures if "peak" in kind]
    sizes = {int(what) >> 20: value for kind, what, value in figures if "peak" not in kind}
    return ", ".join(peaks + [f"{sizes[size]:.0f} GB/s over {size} MiB" for size in sorted(sizes)])


# -------------------------------------------------------------------------------------- compare


def compare(a: Report, b: Report) -> str:
    """Two reports side by side, and which rows moved.

    A row moved when its quartiles do not overlap, and when it moved further than the peers did,
    whose code is the same in both: between two runs of one program a machine differs by more than
    within one.
    """
    rows_a, rows_b = ({r["id"]: r for r in report["rows"]} for report in (a, b))
    pairs = [(rows_a[i], rows_b[i]) for i in rows_a if i in rows_b]
    same = all(a[key] == b[key] for key in ("machine", "method", "versions"))
    noise = _noise(pairs) if same else None
    lines, moved = [], 0
    for row_a, row_b in pairs:
        verdict = _moved(row_a, row_b, noise or 1.0)
        moved += verdict not in ("", "busy")
        ta, tb = (row["times_ms"].get(OURS) for row in (row_a, row_b))
        spreads = ["FAILED" if t is None else milliseconds(t, spread=True) for t in (ta, tb)]
        ratio = times(ta["median"] / tb["median"]) if ta and tb else ""
        speedups = " → ".join(
            times(row["speedup"]) if "speedup" in row else "-" for row in (row_a, row_b)
        )
        lines.append([where(row_a), row_a["mode"], *spreads, ratio, speedups, verdict])
    header = ["layer", "pass", "A ms", "B ms", "A / B", "against the best peer", "moved"]
    out = [f"A: {provenance(a)}", f"B: {provenance(b)}", "", markdown(header, lines), ""]
    out.append(f"{len(pairs)} rows in both, {moved} moved beyond their spread")
    if noise:
        out.append(
            f"the spread between these runs: 19 of 20 times of peers are within {noise:.2f}x"
        )
    for name, mine, other in (("A", rows_a, rows_b), ("B", rows_b, rows_a)):
        only = [i for i in mine if i not in other]
        if only:
            out.append(f"only in {name}: {', '.join(only)}")
    if not same:
        out.append("note: machine, method or versions differ; times say little, compare the ratios")
    return "\n".join(out)


def _busy(row: Row) -> bool:
    return any(flag.startswith("busy machine") for flag in row["flags"])


def _noise(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """The factor that 19 of 20 times of peers stay within; None where there are too few."""
    factors = []
    for a, b in pairs:
        if _busy(a) or _busy(b):
            continue
        for name in (a["times_ms"].keys() & b["times_ms"].keys()) - {OURS, "ours float32"}:
            ratio = b["times_ms"][name]["median"] / a["times_ms"][name]["median"]
            factors.append(max(ratio, 1 / ratio))
    return quantiles(factors, n=20, method="inclusive")[-1] if len(factors) > 1 else None


def _moved(a: Row, b: Row, noise: float) -> str:
    """The verdict on one row, empty when it did not move."""
    ta, tb = a["times_ms"].get(OURS), b["times_ms"].get(OURS)
    if ta is None or tb is None:
        return "FAILED" if tb is None and ta else "mended" if tb else ""
    if _busy(a) or _busy(b):
        return "busy"
    if tb["q1"] > ta["q3"] and tb["median"] > ta["median"] * noise:
        return "slower"
    if tb["q3"] < ta["q1"] and tb["median"] < ta["median"] / noise:
        return "faster"
    return ""


# --------------------------------------------------------------------------------------- README


def readme_block(reports: Sequence[tuple[str, Report]]) -> str:
    """README's tables: the 32x4d layers and the networks of each committed report, and its sum."""
    parts = []
    for name, report in reports:
        parts += [f"**{provenance(report)}** ([`{name}`](bench/results/{name}))", ""]
        shown = [
            r
            for r in report["rows"]
            if r["times_ms"]
            and r["series"] in ("stages", "network")
            and r["layout"] == "channels_last"
            and r["backend"] is None
            and r["mode"] != "forward"
            and (r["bar"] or r["level"] != "op" or r["n"] == 32 or r["device"] != "cpu")
        ]
        header = [
            "layer",
            "pass",
            "ours ms",
            "best peer ms",
            "best peer",
            "speed-up",
            "bar",
            "of floor",
        ]
        lines = [
            [
                where(r),
                r["mode"],
                milliseconds(r["times_ms"][OURS]),
                milliseconds(r["times_ms"][r["best_peer"]]),
                r["best_peer"],
                times(r["speedup"]),
                bar_cell(r),
                percent(r["share_of_floor"]),
            ]
            for r in shown
            if "speedup" in r
        ]
        parts += [markdown(header, lines), ""]
        parts += [t for mode in ("eval", "forward+backward") for t in family_table(report, mode)]
        s = report["summary"]
        if "equal_complexity_eval" in s:
            f = s["equal_complexity_eval"]
            parts.append(
                f"Over the family of equal complexity (1x64, 2x40, 4x24, 8x14, 32x4) at every "
                f"stage, eval, batch 8, over the faster of eager and folded: geometric mean "
                f"{times(f['geometric_mean'])} where C > 1, "
                f"minimum {times(f['minimum'])} ({f['minimum_where']})."
            )
        for model, mb in s.get("saved_mb_per_image", {}).items():
            parts.append(
                f"Saved for backward, {model}: {mb[OURS]:.0f} MB per image, eager "
                f"{mb['eager']:.0f} MB."
            )
        slower = len(s["slower"])
        parts.append(
            f"All {s['rows']} rows of that run: faster than every peer in {s['faster']}, slower "
            f"than one of them in {slower}, failed {s['failed']}."
        )
        flags = Counter(flag.split(":")[0] for r in report["rows"] for flag in r["flags"])
        if flags:
            counts = (f"{flag} ({count} rows)" for flag, count in flags.items())
            parts.append("Flagged: " + ", ".join(counts) + ".")
        if report["absent"]:
            parts.append("Absent: " + "; ".join(report["absent"]) + ".")
        parts.append(f"Floor measured in the same run: {roofline(report)}.")
        parts.append("")
    return "\n".join(parts).strip()


def family_table(report: Report, mode: str) -> list[str]:
    """Speed-ups over the best peer: a line for each stage, a column for each cardinality."""
    found = {
        (r["stage"], r["groups"], r["c"] // r["groups"] // 2 ** (r["stage"] - 1)): r
        for r in report["rows"]
        if "speedup" in r
        and (r["level"], r["mode"], r["stride"]) == ("op", mode, 1)
        and (r["layout"], r["backend"]) == ("channels_last", None)
        and (r["n"], r["dtype"]) == ((8, "float32") if r["device"] == "cpu" else (64, "bfloat16"))
    }
    templates = [*EQUAL_COMPLEXITY, *TWICE_COMPLEXITY]
    lines = [
        [f"{size}×{size}", mode, *(_speedup_cell(found.get((stage, *t))) for t in templates)]
        for stage, size in STAGES.items()
    ]
    if sum(cell != "" for line in lines for cell in line[2:]) <= len(lines):
        return []
    header = ["map", "pass", *(f"{g}x{d}" for g, d in templates)]
    return [markdown(header, lines), ""]


def _speedup_cell(row: Row | None) -> str:
    return times(row["speedup"]) if row else ""


def committed() -> list[tuple[str, Report]]:
    """The reports of measurements in bench/results, by name; what is modelled is no report."""
    paths = sorted(RESULTS.glob("*.json"))
    return [(path.name, load(path)) for path in paths if not path.name.startswith("modelled-")]


def rewrite_readme(text: str, name: str, block: str) -> str:
    """``text`` with the part between the markers of ``name`` replaced.

    ValueError when they are not there.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README needs one {begin} and, after it, one {end}")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{block}\n{end}{tail}"
