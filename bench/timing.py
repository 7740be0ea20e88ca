"""How it is measured: interleaved rounds, medians with their spread, memory, and the floor.

On a CPU a round is `torch.utils.benchmark.Timer.timeit` (it warms up and sets the threads); on a
GPU it is as many calls between two CUDA events. The candidates of a row take turns, so a slow spell
of the machine meets all of them, and the order rotates, so none always follows the same other.

Caches are as warm for one as for the other. On a CPU all read the same tensors, call after call,
and allocate their results from the same allocator, whose memory stays mapped: what fits in a cache
is there. The floor is that of the cache, too. On a GPU copies of a layer's tensors take turns, so
many that they do not fit in its cache, and CUDA graphs of all of them leave launching out.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import platform
import subprocess
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints its inner steps

import torch
from torch.utils.benchmark import Timer

from bench.cases import DTYPES

Run = Callable[[], Any]
PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "onnx", "onnxruntime", "openvino")
MIB = 2**20
FEWEST_ROUNDS = 5
MOST_CALLS = 2000  # of a turn
SETTLE_S = 0.02  # until the threads of the candidate before have stopped spinning
ROUNDS = 1 << 16  # multiply-adds on each chain of registers: half a millisecond


@dataclass(frozen=True)
class Method:
    """``rounds`` turns of ``min_time_ms`` or so, or of one call, on ``threads`` CPU threads.

    A candidate that has taken ``max_time_s`` sits out after ``FEWEST_ROUNDS`` turns.
    """

    rounds: int = 11
    min_time_ms: float = 20.0
    max_time_s: float = 6.0
    threads: int = 2
    device: str = "cpu"


def keep_memory() -> bool:
    """Let malloc keep what is freed instead of giving it back to the system; False without glibc.

    Given back, it costs a page fault for every 4 KiB that is allocated again: more than the layer,
    and for one candidate and not the next, since it hangs on what else lies on the heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def interleaved(runs: Mapping[str, Run], method: Method) -> dict[str, list[float]]:
    """Time the candidates in turns; seconds a call, one figure for each round."""
    clock = _cuda_seconds if method.device == "cuda" else partial(_cpu_seconds, method.threads)
    calls = {name: _calls_of_a_turn(run, clock, method) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn, name in turns(runs, method):
        if turn < FEWEST_ROUNDS or sum(seconds[name]) * calls[name] <= method.max_time_s:
            seconds[name].append(clock(runs[name], calls[name]))
    return seconds


def _calls_of_a_turn(run: Run, clock: Callable[[Run, int], float], method: Method) -> int:
    """How many fill ``min_time_ms``, counted in a turn: a lone call, its threads just woken, takes
    several times as long.
    """
    run()
    calls = 1
    for _ in range(2):
        needed = math.ceil(method.min_time_ms * 1e-3 / clock(run, calls))
        if needed <= calls:
            break
        calls = min(MOST_CALLS, needed)
    return calls


def _cpu_seconds(threads: int, run: Run, calls: int) -> float:
    if calls > 1:
        return Timer("run()", globals={"run": run}, num_threads=threads).timeit(calls).median
    time.sleep(SETTLE_S)  # so long a call needs no warm-up of its own
    return timeit.timeit(run, number=1)


def _cuda_seconds(run: Run, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def turns(runs: Mapping[str, Run], method: Method) -> Iterator[tuple[int, str]]:
    """The candidates of every round, each round beginning with the next of them."""
    names = list(runs)
    for turn in range(method.rounds):
        start = turn % len(names)
        yield from ((turn, name) for name in names[start:] + names[:start])


def disturbance(threads: int) -> Callable[[], float | None]:
    """A clock of disturbance: call what it returns for the share of the time since then that was
    lost to others; None where the kernel does not tell.

    Lost is the time that our threads were ready to run and waited for a core (Linux' run delay), a
    thread's share of it, and the time that the hypervisor gave to others. How often a thread is
    interrupted says nothing: two threads on two idle cores are 30 times a second, for no time.
    """
    began, waited, stolen = time.monotonic(), _run_delays(), _stolen()

    def share() -> float | None:
        wall, now = time.monotonic() - began, _run_delays()
        if not now:
            return None
        delay = sum(seconds - waited.get(thread, 0.0) for thread, seconds in now.items())
        return delay / (wall * threads) + (_stolen() - stolen) / wall

    return share


def _run_delays() -> dict[str, float]:
    """Seconds that each thread of this process has waited for a core."""
    delays = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # a thread that ends, a kernel without the figures
            delays[path.parent.name] = int(path.read_text().split()[1]) * 1e-9
    return delays


def _stolen() -> float:
    """Seconds that the hypervisor has withheld, the mean of our cores."""
    cores = [f"cpu{core}" for core in os.sched_getaffinity(0)]
    with suppress(OSError):
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [int(line[8]) for line in lines if line[0] in cores and len(line) > 8]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") / len(cores)
    return 0.0


def rotation(bytes_moved: int, device: str) -> int:
    """How many copies of a row's tensors take turns: on a GPU so many that they leave its cache."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return 1 + min(63, 2 * cache // max(bytes_moved, 1))


def side_stream(device: str) -> AbstractContextManager[Any]:
    """On a GPU, for what shall be `graphed`: a stream that is not the default one, on which nothing
    can be captured.

    Autograd's nodes for the gradients of leaves belong to the stream on which they were made, and
    live as long as any result of theirs. Captured on another stream, the backward pass would wait
    for that one, which ends the capture. So everything runs on one stream, from the first call on.
    """
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def graphed(run: Run, calls: int) -> Run:
    """So many calls of ``run`` captured in one CUDA graph; it returns the results of each.

    They are kept, so that every call of the graph writes to memory of its own. The current stream
    is a `side_stream`.
    """
    for _ in range(max(3, calls)):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = [run() for _ in range(calls)]

    def replay() -> list[Any]:
        graph.replay()
        return results

    return replay


# --------------------------------------------------------------------------------------- memory


def peak_bytes(run: Run, device: str) -> int:
    """The most memory that one call holds at a time, its results included, its inputs not.

    That is memory from torch's allocator. What a library keeps for itself is left out: oneDNN's
    scratchpad as well as the packed weights and partial sums of our compiled kernels.
    """
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
    """Peak and bandwidth of the machine, measured in this run: the best that any code reached.

    The peak is the best of several square matrix products and, in float32 on a CPU, of
    multiply-adds on registers alone, in our compiled library: a BLAS may leave a fifth of the
    machine unused. In a narrower dtype it is that of the arithmetic that the machine has for it,
    used or not: our CPU kernels widen bfloat16 to float32, and where bfloat16 instructions exist
    the share of the floor says what is left to gain by them. Where there are none the float32 peak
    counts.

    The bandwidth is the best of a copy and of an update in place, bytes read and written counted,
    over as many bytes as the row moves or more, in steps of 4: a row that fits in a cache is held
    against the cache, and what calling costs a short copy does not count as the machine's.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._best: dict[str, float] = {}

    def refresh(self) -> None:
        """Measure everything used so far again and keep the best: a peak is what was reached."""
        for key in list(self._best):
            kind, value = key.split(" ")
            fresh = self._arithmetic(value) if kind == "flops" else self._memory(int(value))
            self._best[key] = max(self._best[key], fresh)

    def flops(self, dtype: str) -> float:
        """Floating-point operations a second."""
        names = [dtype] if self.method.device == "cuda" else ["float32", *_narrow_on_cpu(dtype)]
        return max(self._once(f"flops {name}", partial(self._arithmetic, name)) for name in names)

    def bandwidth(self, bytes_moved: int) -> float:
        """Bytes a second, for a working set of that size, rounded down to 1, 4, 16 ... MiB."""
        largest = 5 if self.method.device == "cuda" else 4
        step = min(largest, (max(bytes_moved // MIB, 1).bit_length() - 1) // 2)
        sizes = [MIB * 4**i for i in range(step, largest + 1)]
        return max(self._once(f"bytes {size}", partial(self._memory, size)) for size in sizes)

    def floor_ms(self, flops: float, bytes_moved: int, dtype: str) -> float:
        return 1e3 * max(flops / self.flops(dtype), bytes_moved / self.bandwidth(bytes_moved))

    def as_json(self) -> dict[str, float]:
        """Every figure that was used, in GFLOP/s and GB/s."""
        names = {"flops": "peak_gflops", "bytes": "bandwidth_gb_s"}
        kinds = list(names)
        split = (key.split(" ") for key in self._best)
        keys = sorted(split, key=lambda k: (kinds.index(k[0]), len(k[1]), k[1]))
        return {f"{names[k]} {v}": round(self._best[f"{k} {v}"] / 1e9, 1) for k, v in keys}

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._best:
            self._best[key] = measure()
        return self._best[key]

    def _fastest(self, *runs: Run) -> list[float]:
        """Seconds of the fastest turn of each."""
        named = {str(i): run for i, run in enumerate(runs)}
        return [min(seconds) for seconds in interleaved(named, self.method).values()]

    def _arithmetic(self, dtype: str) -> float:
        device, best = self.method.device, 0.0
        for n in (2048, 4096, 8192) if device == "cuda" else (512, 1024):
            a = torch.randn(n, n, device=device).to(DTYPES[dtype])
            b, out = torch.randn_like(a), torch.empty_like(a)
            (seconds,) = self._fastest(partial(torch.mm, a, b, out=out))
            best = max(best, 2 * n**3 / seconds)
        if device == "cpu" and dtype == "float32" and (library := compiled_library()):
            operations = library.multiply_adds(ROUNDS, self.method.threads)
            run = partial(library.multiply_adds, ROUNDS, self.method.threads)
            best = max(best, operations / self._fastest(run)[0])
        return best

    def _memory(self, size: int) -> float:
        both = torch.ones(size // 4, device=self.method.device)
        source, target = both.chunk(2)
        copy, update = self._fastest(lambda: target.copy_(source), lambda: both.neg_())
        return max(size / copy, 2 * size / update)


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


def compiled_library() -> ModuleType | None:
    try:
        from resnext_kernels import _C
    except ImportError:
        return None
    return _C


def kernel_isa() -> str | None:
    """The instruction set that the compiled CPU kernels run on; None without them."""
    library = compiled_library()
    return library.cpu_isa() if library else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that was run, ``-dirty`` when tracked files, results apart, differ from it."""
    root = Path(__file__).parents[1]

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        results = (":!bench/results", ":!README.md")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head
