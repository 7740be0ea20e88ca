"""The plots of a report: speed-up against cardinality, the roofline, memory.

Colours are Okabe and Ito's, told apart by every kind of colour vision; markers repeat them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from bench.cases import EQUAL_COMPLEXITY, FIXED_WIDTH, STAGES, TWICE_COMPLEXITY
from bench.cases import PASSES as MODES
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
PANELS = {
    "equal complexity": EQUAL_COMPLEXITY,
    "twice the complexity": TWICE_COMPLEXITY,
    "128 channels at stage 1": FIXED_WIDTH,
}
SPEEDUP_TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def draw(report: Report, stem: Path) -> list[Path]:
    """Write ``<stem>-speedup.png``, ``-roofline.png`` and ``-memory.png``, those that have rows."""
    rows = [
        r
        for r in report["rows"]
        if "speedup" in r
        and r["level"] == "op"
        and r["layout"] == "channels_last"
        and r["backend"] is None
        and r["stage"]
    ]
    dtype = _commonest(r["dtype"] for r in rows)
    rows = [r for r in rows if r["dtype"] == dtype]
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


def _commonest(values: Iterable[Any]) -> Any:
    """The value that occurs most often; None where there is none."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


def _speedup(rows: Sequence[Row]) -> Figure | None:
    """A panel for each pass and series: one line a stage, cardinality along x."""
    keep = [r for r in rows if r["stride"] == 1]
    n = _commonest(r["n"] for r in keep)
    panels = {
        (mode, title): found
        for mode in MODES
        for title, templates in PANELS.items()
        if (found := [r for r in keep if r["n"] == n and _of(r, mode, templates)])
        and len({r["groups"] for r in found}) > 2
    }
    if not panels:
        return None
    modes = [mode for mode in MODES if any(m == mode for m, _ in panels)]
    titles = [title for title in PANELS if any(t == title for _, t in panels)]
    figure, axes = plt.subplots(
        len(modes),
        len(titles),
        figsize=(max(6.4, 3.7 * len(titles)), 2.7 * len(modes) + 0.8),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for (i, mode), (j, title) in itertools.product(enumerate(modes), enumerate(titles)):
        ax = axes[i, j]
        if (mode, title) in panels:
            _speedup_panel(ax, panels[mode, title])
            ax.set_title(f"{mode}: {title}", fontsize=9, loc="left")
        else:
            ax.set_axis_off()
    _speedup_scale(axes)
    for ax in axes[:, 0]:
        ax.set_ylabel("speed-up (grey: ours is slower)")
    for ax in axes[-1]:
        ax.set_xlabel("cardinality × width per group (at stage 1)")
    stages = sorted({r["stage"] for found in panels.values() for r in found})
    handles = [_stage_handle(stage) for stage in stages]
    figure.legend(handles=handles, loc="outside right upper", title="map", title_fontsize=8)
    figure.suptitle(f"Speed-up over the best peer, batch {n}, {rows[0]['dtype']}", fontsize=11)
    return figure


def _of(row: Row, mode: str, templates: Sequence[tuple[int, int]]) -> bool:
    width = row["c"] // 2 ** (row["stage"] - 1)
    return row["mode"] == mode and (row["groups"], width // row["groups"]) in templates


def _stage_handle(stage: int) -> Line2D:
    return Line2D([], [], **_stage_style(stage), label=f"{STAGES[stage]}×{STAGES[stage]}")


def _stage_style(stage: int) -> dict[str, Any]:
    colour, marker = COLOURS[stage - 1], MARKERS[stage - 1]
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}


def _speedup_panel(ax: Axes, points: Sequence[Row]) -> None:
    """Speed-ups with the quartiles of both times; the side where ours loses is shaded."""
    ticks = {
        r["groups"]: f"{r['groups']}×{r['c'] // r['groups'] // 2 ** (r['stage'] - 1)}"
        for r in points
    }
    for stage in STAGES:
        line = sorted((r for r in points if r["stage"] == stage), key=lambda r: r["groups"])
        if not line:
            continue
        y = [r["speedup"] for r in line]
        ours = [r["times_ms"][OURS] for r in line]
        best = [r["times_ms"][r["best_peer"]] for r in line]
        low = [v - b["q1"] / o["q3"] for v, o, b in zip(y, ours, best, strict=True)]
        high = [b["q3"] / o["q1"] - v for v, o, b in zip(y, ours, best, strict=True)]
        x = [r["groups"] for r in line]
        ax.errorbar(x, y, yerr=(low, high), elinewidth=1, **_stage_style(stage))
    ax.axhline(1.0, color="0.3", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(sorted(ticks), [ticks[g] for g in sorted(ticks)])
    ax.tick_params(axis="x", labelsize=8)


def _speedup_scale(axes: Any) -> None:
    """The one y scale of all panels, 1 in view, and the losing side shaded."""
    first = axes.flat[0]
    low, high = first.get_ylim()
    low, high = min(low, 0.8), max(high, 1.25)
    shown = [v for v in SPEEDUP_TICKS if low <= v <= high]
    for ax in axes.flat:
        ax.axhspan(low, 1, color="0.5", alpha=0.1, linewidth=0)
        ax.set_ylim(low, high)
        ax.set_yticks(shown, [f"{v:g}×" for v in shown])
        ax.minorticks_off()


def _roofline(report: Report, rows: Sequence[Row]) -> Figure | None:
    """GFLOP/s over flops per byte, ours tied to the best peer, under the roof measured in the run.

    The roof has two slopes: data that fits in a cache, and data that does not.
    """
    modes = [m for m in MODES if any(r["mode"] == m for r in rows)]
    figures = report["roofline"]
    peaks = {k.split()[1]: v for k, v in figures.items() if k.startswith("peak")}
    slopes = {int(k.split()[1]) >> 20: v for k, v in figures.items() if not k.startswith("peak")}
    if not modes or not peaks or not slopes:
        return None
    peak = peaks.get(rows[0]["dtype"], max(peaks.values()))
    figure, axes = plt.subplots(
        1,
        len(modes),
        figsize=(3.4 * len(modes) + 2.2, 3.8),
        squeeze=False,
        layout="constrained",
        sharey=True,
    )
    intensities = [r["flops"] / r["bytes_moved"] for r in rows]
    ridge = peak / min(slopes.values())
    x = np.geomspace(min(*intensities, ridge) / 2, max(*intensities, ridge) * 1.5, 200)
    for ax, mode in zip(axes.flat, modes, strict=True):
        for size, line in zip((min(slopes), max(slopes)), ("-", "--"), strict=True):
            roof = np.minimum(peak, x * slopes[size])
            ax.plot(x, roof, color="0.3", linestyle=line, label=f"roof, data of {size} MiB")
        points = [r for r in rows if r["mode"] == mode]
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
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(
        f"Speed reached under the roof measured in the same run, {rows[0]['dtype']}", fontsize=11
    )
    return figure


def _memory(rows: Sequence[Row]) -> Figure | None:
    """Saved for backward and the peak of a call, ours beside eager, for the 32x4d layers."""
    keep = [
        r
        for r in rows
        if _of(r, "forward+backward", [(32, 4)])
        and {OURS, "eager"} <= r.get("saved_bytes", {}).keys()
    ]
    if not keep:
        return None
    n = max(r["n"] for r in keep)
    keep = sorted((r for r in keep if r["n"] == n), key=lambda r: (r["stride"], r["stage"]))
    figure, axes = plt.subplots(
        1, 2, figsize=(8.8, 1.2 + 0.55 * len(keep)), layout="constrained", sharey=True
    )
    titles = {"saved_bytes": "saved for backward", "peak_bytes": "peak during forward + backward"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for i, name in enumerate((OURS, "eager")):
            bars = ax.barh(
                [y + (0.2 if i else -0.2) for y in range(len(keep))],
                [r[key][name] / 2**20 for r in keep],
                height=0.38,
                color=COLOURS[i],
                label=name,
                hatch="" if i == 0 else "//",
                edgecolor="white",
            )
            ax.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        ax.set_yticks(range(len(keep)), [r["label"] for r in keep])
        ax.set_xlabel("MiB")
        ax.set_title(title, fontsize=9, loc="left")
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(f"Memory of the layer in training, batch {n}, {keep[0]['dtype']}", fontsize=11)
    return figure
