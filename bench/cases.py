"""What is measured: one `Case` per row, the suites made of them, and the bars they have to reach.

A case is one layer (``op``), one bottleneck (``block``) or one model (``network``) in one pass:

    eval              inference, running statistics
    forward           training forward with the autograd graph recorded, batch statistics
    forward+backward  the same and the gradients of x, weight, gamma and beta; for a network the
                      whole training step, loss and SGD update included

``flops`` and ``bytes_moved`` are lower bounds: what the pass cannot do without. So products with
the padding's zeros are left out, which on a 7x7 map are 18 % of what is commonly counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

LEVELS = ("op", "block", "network")
PASSES = ("eval", "forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
STAGES = {1: 56, 2: 28, 3: 14, 4: 7}  # stage -> height and width of its maps

# cardinality x width per group of stage 1: the paper's templates of equal complexity, their doubles
EQUAL_COMPLEXITY = ((1, 64), (2, 40), (4, 24), (8, 14), (32, 4))
TWICE_COMPLEXITY = ((2, 64), (64, 4), (32, 8))
FIXED_WIDTH = tuple((g, 128 // g) for g in (1, 2, 4, 8, 16, 32, 64, 128))
SERIES = {
    "stages": ((32, 4),),
    "complexity": EQUAL_COMPLEXITY + TWICE_COMPLEXITY,
    "width": FIXED_WIDTH,
}


def taps(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pairs of an output and a tap of the kernel that is no padding, along one dimension."""
    starts = range(-padding, size + padding - kernel + 1, stride)
    return sum(min(start + kernel, size) - max(start, 0) for start in starts)


@dataclass(frozen=True)
class Case:
    """One row. ``size`` is the height and width of the input, ``c`` the width of the 3x3 layer."""

    level: str
    mode: str
    n: int
    size: int
    c: int = 0
    groups: int = 1
    stride: int = 1
    dtype: str = "float32"
    layout: str = "channels_last"
    device: str = "cpu"
    backend: str | None = None
    model: str = ""
    series: str = field(default="stages", compare=False)

    @property
    def id(self) -> str:
        """A name that is the same in every run: `--compare` matches rows by it."""
        what = self.model or f"h{self.size}-c{self.c}-g{self.groups}-s{self.stride}"
        parts = (self.level, self.mode, f"n{self.n}", what, self.dtype, self.layout, self.device)
        return "-".join((*parts, self.backend) if self.backend else parts)

    @property
    def label(self) -> str:
        """The row's name for a reader."""
        if self.level == "network":
            return self.model
        out = self.size // self.stride if self.stride > 1 else self.size
        arrow = f"{self.size}→{out}" if self.stride > 1 else f"{self.size}"
        name = "" if self.level == "op" else "block "
        return f"{name}{arrow}, C={self.c}, {self.groups}x{self.c // self.groups}"

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    @property
    def stage(self) -> int:
        """The stage that the layer belongs to, told by its output."""
        return next((s for s, size in STAGES.items() if size == self.out_size), 0)

    @property
    def planes(self) -> int:
        """Of the bottleneck: a quarter of its output channels."""
        return 64 * 56 // self.out_size

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolutions; the backward pass has twice those."""
        m_in, m_out = self.n * self.size**2, self.n * self.out_size**2
        inside = self.n * taps(self.size, kernel=3, stride=self.stride, padding=1) ** 2
        flops = 2 * inside * self.c * (self.c // self.groups)
        if self.level == "block":
            inplanes = self.planes * 2 if self.stride > 1 else self.planes * 4
            flops += 2 * m_in * inplanes * self.c + 2 * m_out * self.c * self.planes * 4
            if self.stride > 1:
                flops += 2 * m_out * inplanes * self.planes * 4
        return flops * (3 if self.mode == "forward+backward" else 1)

    @property
    def bytes_moved(self) -> int:
        """Bytes that have to be read or written at least once.

        Layer: x and y; in training z, which is saved (who computes it again instead pays another
        convolution); backward reads dy, z, x and writes dx.
        Block: only what enters and leaves it, since the inner maps could stay in the cache.
        """
        item = DTYPES[self.dtype].itemsize
        m_in, m_out = self.n * self.size**2, self.n * self.out_size**2
        if self.level == "block":
            inplanes = self.planes * 2 if self.stride > 1 else self.planes * 4
            maps = m_in * inplanes + m_out * self.planes * 4
            weight = self.c * (self.c // self.groups) * 9 + self.c * (inplanes + self.planes * 4)
            passes = 2 if self.mode == "forward+backward" else 1
            return item * passes * (maps + weight)
        x, y = m_in * self.c, m_out * self.c
        weight = self.c * (self.c // self.groups) * 9
        elements = {
            "eval": x + y + weight,
            "forward": x + 2 * y + weight,
            "forward+backward": (x + 2 * y + weight) + (2 * x + 2 * y + 2 * weight),
        }
        return item * elements[self.mode]

    @property
    def bar(self) -> float | None:
        """The speed-up that this row has to reach on two CPU threads; None where none is set."""
        plain = self.device == "cpu" and self.layout == "channels_last" and self.backend is None
        if not plain:
            return None
        if self.level == "network" and self.model == "resnext50_32x4d" and self.n == 8:
            bars = {"eval": 1.1, "forward+backward": 1.2}
            return bars.get(self.mode) if self.dtype == "float32" else None
        if self.level != "op" or (self.c, self.groups) not in {(128 << s, 32) for s in range(4)}:
            return None
        if self.c != 128 * 56 // self.out_size:
            return None
        if self.dtype == "bfloat16" and self.n == 8 and self.stride == 1:
            return 1.0 if self.mode in ("eval", "forward+backward") else None
        if self.dtype == "float32" and self.mode == "eval" and self.stride == 1:
            bars_by_size = {56: 3.5, 28: 1.8, 14: 1.1, 7: 1.05}
            return bars_by_size[self.size] if self.n in (1, 8) else None
        if self.dtype == "float32" and self.mode == "forward+backward" and self.n == 8:
            return {56: 4.0, 28: 2.0, 14: 1.4, 7: 1.25}[self.out_size]
        return None

    @property
    def bar_peers(self) -> tuple[str, ...]:
        """The peers whose best the bar is set against."""
        if self.level == "op" and self.dtype == "bfloat16":
            return ("ours float32",)
        return ("eager", "folded") if self.level == "op" and self.mode == "eval" else ("eager",)


def layer(stage: int, cardinality: int, width: int, *, stride: int = 1) -> dict[str, Any]:
    """The 3x3 layer that a template C x d of stage 1 has in ``stage``; stride 2 opens the stage."""
    c = cardinality * width * 2 ** (stage - 1)
    return {"size": STAGES[stage] * stride, "c": c, "groups": cardinality, "stride": stride}


@dataclass(frozen=True)
class Axes:
    """The values that a sweep is the product of."""

    levels: Sequence[str] = LEVELS
    passes: Sequence[str] = PASSES
    batches: Sequence[int] = (8,)
    stages: Sequence[int] = tuple(STAGES)
    strides: Sequence[int] = (1,)
    series: Sequence[str] = tuple(SERIES)
    templates: Sequence[tuple[int, int]] | None = None  # in place of the series' own
    dtypes: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ("channels_last",)
    backends: Sequence[str | None] = (None,)
    models: Sequence[str] = ("resnext50_32x4d",)
    device: str = "cpu"


def product(axes: Axes) -> list[Case]:
    """Every combination of the axes, each once."""
    cases = []
    common = itertools.product(
        axes.passes, axes.batches, axes.dtypes, axes.layouts, axes.backends, axes.levels
    )
    for mode, n, dtype, layout, backend, level in common:
        if level == "network":
            cases += [
                Case(
                    level,
                    mode,
                    n,
                    32 if model.startswith("resnext29") else 224,
                    dtype=dtype,
                    layout=layout,
                    backend=backend,
                    model=model,
                    device=axes.device,
                    series="network",
                )
                for model in axes.models
                if mode != "forward"
            ]
            continue
        for series, stage, stride in itertools.product(axes.series, axes.stages, axes.strides):
            if stage == 1 and stride > 1:
                continue  # stage 1 is opened by the max-pooling
            for template in axes.templates or SERIES[series]:
                shape = layer(stage, *template, stride=stride)
                cases.append(
                    Case(
                        level,
                        mode,
                        n,
                        **shape,
                        dtype=dtype,
                        layout=layout,
                        backend=backend,
                        device=axes.device,
                        series=series,
                    )
                )
    return unique(cases)


def unique(cases: Iterable[Case]) -> list[Case]:
    return list(dict.fromkeys(cases))


def bars() -> list[Case]:
    """The rows that have a bar alone or as a family, and batch 32 for the record."""
    opens = Axes(levels=["op"], passes=["forward+backward"], series=["stages"], strides=[1, 2])
    inference = Axes(levels=["op"], passes=["eval"], series=["stages"], batches=[1, 8, 32])
    narrow = Axes(
        levels=["op"], passes=["eval", "forward+backward"], series=["stages"], dtypes=["bfloat16"]
    )
    family = Axes(levels=["op"], passes=["eval"], series=["complexity"], templates=EQUAL_COMPLEXITY)
    network = Axes(levels=["network"], passes=["eval", "forward+backward"])
    parts = (inference, family, opens, narrow, network)
    return unique(itertools.chain.from_iterable(product(axes) for axes in parts))


def quick(device: str = "cpu") -> list[Case]:
    """Every level, pass and series: a glance of less than two minutes on two cores."""
    common = usual(device)
    stages = replace(common, levels=["op"], series=["stages"])
    family = replace(
        common, levels=["op"], passes=["eval"], series=["complexity", "width"], stages=[1]
    )
    block = replace(
        common,
        levels=["block"],
        passes=["eval", "forward+backward"],
        series=["stages"],
        stages=[2],
    )
    network = replace(common, levels=["network"], passes=["eval"])
    if device == "cpu":
        network = replace(network, batches=[1])
    parts = (stages, family, block, network)
    return unique(itertools.chain.from_iterable(product(axes) for axes in parts))


def usual(device: str) -> Axes:
    """The batch and dtype that a device is used with."""
    return Axes(device="cuda", dtypes=["bfloat16"], batches=[64]) if device == "cuda" else Axes()


def sweep() -> list[Case]:
    """The whole picture of this CPU, the bars included."""
    stages = Axes(levels=["op"], batches=[1, 8], series=["stages"], strides=[1, 2])
    layouts = Axes(levels=["op"], passes=["eval"], series=["stages"], layouts=["contiguous"])
    families = Axes(
        levels=["op"], passes=["eval", "forward+backward"], series=["complexity", "width"]
    )
    blocks = Axes(levels=["block"], passes=["eval", "forward+backward"], series=["stages"])
    parts = (stages, families, blocks, layouts)
    return unique([*bars(), *itertools.chain.from_iterable(product(a) for a in parts)])


def gpu() -> list[Case]:
    """The picture of a GPU: the CPU's axes at the batches and dtypes that a GPU is used with."""
    common = usual("cuda")
    stages = replace(common, levels=["op"], series=["stages"], strides=[1, 2])
    parts = (
        replace(stages, batches=[1, 64, 256]),
        replace(stages, dtypes=["float16", "float32"]),
        replace(stages, backends=["triton"]),
        replace(
            common,
            levels=["op"],
            passes=["eval", "forward+backward"],
            series=["complexity", "width"],
        ),
        replace(common, levels=["block"], series=["stages"]),
        replace(common, levels=["network"], batches=[64, 256]),
    )
    return unique(itertools.chain.from_iterable(product(axes) for axes in parts))
