"""The plots of a report: speed-up against cardinality, the roofline, memory.

Colours are Okabe and Ito's, told apart by every kind of colour vision; markers repeat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.peers import OURS
from bench.report import Report, provenance
from bench.sweep import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 120,
    "savefig.bbox": "tight",
    "legend.frameon": False,
}
SPEEDUP_TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MODES = ("eval", "forward", "forward+backward")
STAGE_SIZES = {1: "56×56", 2: "28×28", 3: "14×14", 4: "7×7"}


def draw(report: Report, stem: Path) -> list[Path]:
    """Write ``<stem>-speedup.png``, ``-roofline.png`` and ``-memory.png``, those that have rows."""
    rows = [r for r in report["rows"] if r["times_ms"] and r["level"] == "op"]
    written = []
    with plt.rc_context(STYLE):
        figures = {
            "speedup": _speedup(rows),
            "roofline": _roofline(report, rows),
            "memory": _memory(rows),
        }
        for name, figure in figures.items():
            if figure is None:
                continue
            figure.supxlabel(provenance(report), fontsize=6.5, color="0.4")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path)
            plt.close(figure)
            written.append(path)
    return written


def _speedup(rows: Sequence[Row]) -> Figure | None:
    """A panel for each pass and series: one line a stage, cardinality along x."""
    keep = [
        r
        for r in rows
        if "speedup" in r
        and r["stride"] == 1
        and r["layout"] == "channels_last"
        and r["backend"] is None
        and r["stage"]
    ]
    if not keep:
        return None
    dtype = max({r["dtype"] for r in keep}, key=lambda d: sum(r["dtype"] == d for r in keep))
    batches = {r["n"] for r in keep if r["groups"] not in (1, 32)} or {r["n"] for r in keep}
    n = max(batches, key=lambda b: sum(r["n"] == b for r in keep))
    keep = [r for r in keep if r["dtype"] == dtype and r["n"] == n]
    titles = {"complexity": "equal complexity", "width": "fixed width (128 at stage 1)"}
    panels = [
        (mode, title, [r for r in keep if r["mode"] == mode and _in_series(r, series)])
        for mode in MODES
        for series, title in titles.items()
    ]
    panels = [p for p in panels if len({r["groups"] for r in p[2]}) > 2]
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (mode, title, points) in zip(axes.flat, panels, strict=False):
        _speedup_panel(ax, points)
        ax.set_title(f"{mode}: {title}", fontsize=9, loc="left")
    axes[0, 0].legend(title="map", fontsize=8, title_fontsize=8)
    figure.suptitle(f"Speed-up over the best peer, batch {n}, {dtype}", fontsize=11)
    return figure


def _in_series(row: Row, series: str) -> bool:
    width = row["c"] // 2 ** (row["stage"] - 1)
    if series == "width":
        return width == 128
    return (row["groups"], width // row["groups"]) in (
        (1, 64),
        (2, 40),
        (4, 24),
        (8, 14),
        (32, 4),
    )


def _speedup_panel(ax: Axes, points: Sequence[Row]) -> None:
    ticks = {
        r["groups"]: f"{r['groups']}×{r['c'] // r['groups'] // 2 ** (r['stage'] - 1)}"
        for r in points
    }
    for i, (stage, size) in enumerate(STAGE_SIZES.items()):
        line = sorted((r["groups"], r["speedup"]) for r in points if r["stage"] == stage)
        if line:
            ax.plot(
                *zip(*line, strict=True),
                color=COLOURS[i],
                marker=MARKERS[i],
                markersize=4.5,
                linewidth=1.4,
                label=size,
            )
    ax.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(sorted(ticks), [ticks[g] for g in sorted(ticks)])
    low, high = ax.get_ylim()
    shown = [v for v in SPEEDUP_TICKS if low <= v <= high]
    ax.set_yticks(shown, [f"{v:g}×" for v in shown])
    ax.minorticks_off()
    ax.set_xlabel("cardinality × width per group at stage 1")


def _roofline(report: Report, rows: Sequence[Row]) -> Figure | None:
    """GFLOP/s over flops per byte, ours tied to the best peer, under the roof measured in the run.

    The roof has two slopes: a copy that fits in a cache, and one that does not.
    """
    keep = [r for r in rows if "speedup" in r]
    modes = [m for m in MODES if any(r["mode"] == m for r in keep)]
    figures = report["roofline"]
    peaks = [v for k, v in figures.items() if k.startswith("peak")]
    copies = {int(k.split()[1]) >> 20: v for k, v in figures.items() if not k.startswith("peak")}
    if not modes or not peaks or not copies:
        return None
    width = 3.6 * len(modes) + 0.8
    figure, axes = plt.subplots(
        1, len(modes), figsize=(width, 3.6), squeeze=False, layout="constrained", sharey=True
    )
    intensities = [r["flops"] / r["bytes_moved"] for r in keep]
    x = np.geomspace(min(intensities) / 1.5, max(intensities) * 1.5, 200)
    slopes = {size: copies[size] for size in (min(copies), max(copies))}
    for ax, mode in zip(axes.flat, modes, strict=True):
        for (size, bandwidth), line in zip(slopes.items(), ("-", "--"), strict=False):
            roof = np.minimum(max(peaks), x * bandwidth)
            ax.plot(x, roof, color="0.3", linewidth=1, linestyle=line, label=f"roof, {size} MiB")
        points = [r for r in keep if r["mode"] == mode]
        at = [r["flops"] / r["bytes_moved"] for r in points]
        ours = [r["gflop_s"] for r in points]
        peers = [r["gflop_s"] / r["speedup"] for r in points]
        ax.vlines(at, peers, ours, color="0.7", linewidth=0.8, zorder=1)
        ax.scatter(
            at,
            peers,
            s=18,
            marker="s",
            facecolors="none",
            edgecolors=COLOURS[1],
            linewidths=0.9,
            label="best peer",
        )
        ax.scatter(at, ours, s=16, color=COLOURS[0], marker="o", label=OURS)
        ax.set(xscale="log", yscale="log", xlabel="flops per compulsory byte")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        ax.set_title(mode, fontsize=9, loc="left")
    axes[0, 0].set_ylabel("GFLOP/s")
    axes[0, -1].legend(fontsize=8, loc="lower right")
    figure.suptitle("Reached speed under the roof measured in the same run", fontsize=11)
    return figure


def _memory(rows: Sequence[Row]) -> Figure | None:
    """Saved for backward and the peak of a call, ours beside eager, for the 32x4d layers."""
    keep = [
        r
        for r in rows
        if r["mode"] == "forward+backward"
        and r["groups"] == 32
        and r["dtype"] == "float32"
        and r["layout"] == "channels_last"
        and {OURS, "eager"} <= r.get("saved_bytes", {}).keys()
        and r["c"] * r["size"] // r["stride"] == 128 * 56
        and r["backend"] is None
    ]
    if not keep:
        return None
    n = max(r["n"] for r in keep)
    keep = sorted((r for r in keep if r["n"] == n), key=lambda r: (r["stride"], r["stage"]))
    figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.2), layout="constrained", sharey=True)
    titles = {"saved_bytes": "saved for backward", "peak_bytes": "peak during forward + backward"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for i, name in enumerate((OURS, "eager")):
            ax.barh(
                [y + (0.2 if i else -0.2) for y in range(len(keep))],
                [r[key][name] / 2**20 for r in keep],
                height=0.38,
                color=COLOURS[i],
                label=name,
                hatch="" if i == 0 else "//",
                edgecolor="white",
            )
        ax.set_yticks(range(len(keep)), [r["label"] for r in keep])
        ax.set_xlabel("MiB")
        ax.set_title(title, fontsize=9, loc="left")
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Memory of the layer in training, batch {n}, float32", fontsize=11)
    return figure
