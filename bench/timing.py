"""How it is measured: interleaved rounds, medians with their spread, memory, and the floor.

On a CPU a round is `torch.utils.benchmark.Timer.timeit` (it warms up and sets the threads); on a
GPU it is `triton.testing.do_bench` (CUDA events, the L2 cache cleared before every call). The
candidates of a row take turns, so a slow spell of the machine meets all of them.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import resource
import subprocess
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints its inner steps

import torch
from torch.utils.benchmark import Timer

from bench.cases import DTYPES

Run = Callable[[], Any]
PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "onnx", "onnxruntime", "openvino")
MIB = 2**20
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Method:
    """``rounds`` turns of at least ``min_time_ms`` each on ``threads`` CPU threads.

    A candidate that has taken ``max_time_s`` sits out after ``FEWEST_ROUNDS`` turns.
    """

    rounds: int = 11
    min_time_ms: float = 20.0
    max_time_s: float = 6.0
    threads: int = 2
    device: str = "cpu"


def interleaved(runs: Mapping[str, Run], method: Method) -> dict[str, list[float]]:
    """Time the candidates in turns; seconds a call, one figure for each round."""
    if method.device == "cuda":
        return _interleaved_cuda(runs, method)
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=method.threads)
        for name, run in runs.items()
    }
    calls = {}
    for name, timer in timers.items():
        once = timer.timeit(1).median  # also the first warm-up
        calls[name] = min(1000, max(1, math.ceil(method.min_time_ms * 1e-3 / once)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn, name in itertools.product(range(method.rounds), runs):
        if turn >= FEWEST_ROUNDS and sum(seconds[name]) * calls[name] > method.max_time_s:
            continue
        if calls[name] > 1:
            seconds[name] += timers[name].timeit(calls[name]).times
        else:  # so long a call needs no warm-up of its own
            seconds[name].append(timeit.timeit(runs[name], number=1))
    return seconds


def _interleaved_cuda(runs: Mapping[str, Run], method: Method) -> dict[str, list[float]]:
    from triton.testing import do_bench

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in itertools.product(range(method.rounds), runs):
        ms = do_bench(runs[name], warmup=5, rep=int(method.min_time_ms), return_mode="median")
        seconds[name].append(ms * 1e-3)
    return seconds


def preempted() -> Callable[[], float]:
    """A clock of disturbance: call what it returns for the preemptions a second since then."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def rate() -> float:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        return taken / (time.monotonic() - began)

    return rate


def graphed(run: Run) -> Run:
    """``run`` captured in a CUDA graph, for layers so small that launching decides."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --------------------------------------------------------------------------------------- memory


def peak_bytes(run: Run, device: str) -> int:
    """The most memory that one call holds at a time, its results included, its inputs not."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    results = profile.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"] if results else []
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def saved_bytes(run: Run) -> int:
    """Bytes that autograd keeps for the backward pass, parameters apart, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


# ---------------------------------------------------------------------------------------- floor


class Roofline:
    """Peak and bandwidth of the machine, measured in this run.

    The peak is the best of several square matrix products in the row's dtype (on a CPU in float32
    as well, where narrow dtypes may be widened: the better one counts). The bandwidth is that of
    ``copy_``, reads and writes counted, over as many bytes as the row moves: a row that fits in a
    cache is held against the cache.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._best: dict[str, float] = {}

    def refresh(self) -> None:
        """Measure everything used so far again and keep the best: a peak is what was reached."""
        for key in list(self._best):
            kind, value = key.split(" ")
            fresh = self._product(value) if kind == "flops" else self._copy(int(value))
            self._best[key] = max(self._best[key], fresh)

    def flops(self, dtype: str) -> float:
        """Floating-point operations a second."""
        names = [dtype] if self.method.device == "cuda" else ["float32", *_narrow_on_cpu(dtype)]
        return max(self._once(f"flops {name}", partial(self._product, name)) for name in names)

    def bandwidth(self, bytes_moved: int) -> float:
        """Bytes a second, for a working set of that size rounded down to 1, 4, 16, 64 ... MiB."""
        largest = 5 if self.method.device == "cuda" else 4
        step = min(largest, int(math.log(max(bytes_moved, MIB) / MIB, 4)))
        size = MIB * 4**step
        return self._once(f"copy {size}", partial(self._copy, size))

    def floor_ms(self, flops: float, bytes_moved: int, dtype: str) -> float:
        return 1e3 * max(flops / self.flops(dtype), bytes_moved / self.bandwidth(bytes_moved))

    def as_json(self) -> dict[str, float]:
        """Every figure that was used, in GFLOP/s and GB/s."""
        names = {"flops": "peak_gflops", "copy": "copy_gb_s"}
        return {
            f"{names[k.split(' ')[0]]} {k.split(' ')[1]}": round(v / 1e9, 1)
            for k, v in sorted(self._best.items())
        }

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._best:
            self._best[key] = measure()
        return self._best[key]

    def _fastest(self, run: Run) -> float:
        return min(interleaved({"run": run}, self.method)["run"])

    def _product(self, dtype: str) -> float:
        device, best = self.method.device, 0.0
        for n in (2048, 4096, 8192) if device == "cuda" else (512, 1024):
            a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
            b, out = torch.randn_like(a), torch.empty_like(a)
            best = max(best, 2 * n**3 / self._fastest(partial(torch.mm, a, b, out=out)))
        return best

    def _copy(self, size: int) -> float:
        source = torch.ones(size // 8, device=self.method.device)
        target = torch.empty_like(source)
        return size / self._fastest(lambda: target.copy_(source))


def _narrow_on_cpu(dtype: str) -> list[str]:
    """``[dtype]`` where oneDNN has instructions for it; elsewhere its product tells nothing."""
    native = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return [dtype] if dtype in native and native[dtype]() else []


# -------------------------------------------------------------------------------------- machine


@cache
def machine() -> dict[str, Any]:
    """The machine and the versions, for the JSON."""
    import cpuinfo

    info = cpuinfo.get_cpu_info()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": info.get("brand_raw", platform.processor()),
        "cpu_family_model": [info.get("family"), info.get("model")],
        "cores": os.cpu_count(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernel_isa": kernel_isa(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def kernel_isa() -> str | None:
    """The instruction set that the compiled CPU kernels run on; None without them."""
    try:
        from resnext_kernels import _C
    except ImportError:
        return None
    return _C.cpu_isa()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that was measured, ``-dirty`` when tracked files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
