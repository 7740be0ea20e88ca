"""How Triton kernels are launched and tuned, without a GPU: stand-ins for its driver and timer.

`tests/test_gpu.py` has the same on a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from bench.emulator import TritonLaunch, triton_launches  # noqa: E402
from resnext_kernels import backends  # noqa: E402
from resnext_kernels.backends import cuda, tuning  # noqa: E402
from resnext_kernels.backends import triton as backend  # noqa: E402
from resnext_kernels.problem import ConvProblem  # noqa: E402

F16 = torch.float16


class Current:
    """The current device, as torch and Triton see it; current streams of four devices."""

    STREAMS = (1000, 1001, 1002, 1003)

    def __init__(self) -> None:
        self.device = 0
        self.entered: list[int] = []

    def exchange(self, device: int) -> int:
        before, self.device = self.device, device
        self.entered.append(device)
        return before


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Current:
    """`torch.cuda.device` at work on four devices that are not there."""
    found = Current()
    monkeypatch.setattr(torch.cuda, "_exchange_device", found.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", found.exchange)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


# Launches ----------------------------------------------------------------------------------------


class OnCuda(Tensor):
    """A CPU tensor that says it is on the third device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 2)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@pytest.fixture
def launched(current: Current) -> Iterator[list[dict[str, Any]]]:
    """What Triton's own launch path, compiler included, would hand to the driver."""
    found: list[dict[str, Any]] = []

    def launcher(src: Any, metadata: Any) -> Callable[..., None]:
        def run(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            found.append({"grid": (x, y, z), "stream": stream, "device": current.device})

        return run

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
        load_binary=lambda *args: (None, None, 32, 0, 1024),
    )
    driver = SimpleNamespace(
        get_current_device=lambda: current.device,
        get_current_stream=lambda device: Current.STREAMS[device],
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
        launcher_cls=launcher,
        utils=utils,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield found
    finally:
        triton.runtime.driver._active = before
        _copy_kernel.device_caches.clear()


@pytest.mark.skipif(backend._INTERPRETED, reason="the interpreter has no launches")
def test_launches_are_on_the_tensors_device_and_its_current_stream(
    launched: list[dict[str, Any]], current: Current
) -> None:
    x = torch.zeros(64).as_subclass(OnCuda)
    backend._launch(_copy_kernel, (5, 2), x, x, BLOCK=64, warps=1, stages=1)
    assert launched == [{"grid": (5, 2, 1), "stream": Current.STREAMS[2], "device": 2}]
    assert current.device == 0, "the current device is as it was"


def test_launches_without_the_guard_would_be_seen(
    launched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend._INTERPRETED:
        pytest.skip("the interpreter has no launches")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.zeros(64).as_subclass(OnCuda)
    backend._launch(_copy_kernel, (1,), x, x, BLOCK=64, warps=1, stages=1)
    assert launched[0]["stream"] == Current.STREAMS[0]


def test_a_failing_launch_gives_the_device_back(current: Current) -> None:
    x = torch.zeros(64).as_subclass(OnCuda)
    with pytest.raises(TypeError):
        backend._launch(None, (1,), x, warps=1, stages=1)
    assert current.entered == [2, 0]


def test_every_kernel_goes_through_the_guard() -> None:
    """`kernel[grid](...)` stands once in the backend, in `_launch`."""
    tree = ast.parse(Path(backend.__file__).read_text())
    found = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert found == ["_launch"]


# The tensors' own device -------------------------------------------------------------------------


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device 0, the current one, is too old; device 1 is an H100, device 2 an RTX 4090."""
    capabilities = {None: (7, 5), 0: (7, 5), 1: (9, 0), 2: (8, 9)}

    def index(device: Any) -> int | None:
        return device.index if isinstance(device, torch.device) else device

    def properties(device: Any = None) -> SimpleNamespace:
        major, minor = capabilities[index(device)]
        return SimpleNamespace(major=major, minor=minor, gcnArchName="gfx942:sramecc+:xnack-")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capabilities[index(device)]
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    backend._arch.cache_clear()
    yield
    backend._arch.cache_clear()


@pytest.mark.skipif(backend._INTERPRETED, reason="the interpreter takes CPU tensors")
@pytest.mark.usefixtures("mixed")
def test_why_not_asks_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ConvProblem(2, 7, 7, 64, groups=16, dtype=F16, device_type="cuda", device_index=0)
    monkeypatch.setattr(cuda, "_MISSING", None)
    for module in (backend, cuda):
        assert "not 7.5" in str(module.why_not(problem))
        assert "not 7.5" in str(module.why_not(replace(problem, device_index=None)))
    assert backend.why_not(replace(problem, device_index=1)) is None
    assert "capability" not in str(cuda.why_not(replace(problem, device_index=1)))


def test_a_problem_knows_its_device() -> None:
    x, weight = torch.zeros(1, 8, 3, 3), torch.zeros(8, 4, 3, 3)
    assert ConvProblem.of(x, weight, groups=2).device_index is None
    assert ConvProblem.of(x.as_subclass(OnCuda), weight, groups=2).device_index == 2


@pytest.mark.usefixtures("mixed")
def test_the_architecture_is_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend._arch(torch.device("cuda", 1)) == 90
    assert backend._arch(torch.device("cuda", 2)) == 89
    assert backend._arch(torch.device("cpu")) == 80
    monkeypatch.setattr(torch.version, "hip", "7.0")
    backend._arch.cache_clear()
    assert backend._arch(torch.device("cuda", 1)) == "gfx942"


# Autotuning --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    size: int
    stages: int = 1


TILES = [Tile(16), Tile(32), Tile(64)]
PROBLEM = {"shape": [2, 64, 7, 7], "stride": 1}


class Timer:
    """Stands in for `triton.testing.do_bench`: runs once, and gives what was written down."""

    def __init__(self) -> None:
        self.times_ms: dict[Any, float] = {Tile(16): 3.0, Tile(32): 1.0, Tile(64): 2.0}
        self.timed: list[Any] = []
        self.running: Any = None

    def do_bench(self, call: Callable[[], Any], **kwargs: Any) -> float:
        call()
        self.timed.append(self.running)
        return self.times_ms.get(self.running, 5.0)

    def run(self, config: Any) -> None:
        self.running = config
        if self.times_ms.get(config) == math.inf:
            raise OutOfResources(200000, 100000, "shared memory")


@pytest.fixture
def timer(current: Current, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timer:
    found = Timer()
    monkeypatch.setattr("triton.testing.do_bench", found.do_bench)
    monkeypatch.setenv("RESNEXT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_asked", True)
    return found


def choose(timer: Timer, **changes: Any) -> Tile:
    arguments: dict[str, Any] = {
        "candidates": TILES,
        "device": torch.device("cuda", 2),
        "source": "hash",
        "problem": PROBLEM,
    }
    arguments |= changes
    candidates = arguments.pop("candidates")
    return tuning.choose(candidates, timer.run, **arguments)


def files() -> list[Path]:
    return sorted(tuning.directory().iterdir())


def test_the_fastest_is_chosen_once(timer: Timer, current: Current) -> None:
    assert choose(timer) == Tile(32)
    assert timer.timed == TILES
    assert set(current.entered) == {2, 0}, "timed on the tensors' device"
    assert current.device == 0
    assert choose(timer) == Tile(32)
    assert timer.timed == TILES
    (path,) = files()
    stored = json.loads(path.read_text())
    assert stored["times_ms"] == [3.0, 1.0, 2.0]
    assert stored["key"]["device"] == "GPU cuda:2"
    assert stored["key"]["triton"] == triton.__version__


def test_a_second_process_reads_the_disk(timer: Timer) -> None:
    assert choose(timer) == Tile(32)
    code = """
import sys
sys.path[:0] = ["tests"]
import torch, triton.testing
import test_launch as t
from resnext_kernels.backends import tuning
def fail(*args, **kwargs): raise AssertionError("timed")
triton.testing.do_bench = fail
torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda device: 0
torch.cuda.get_device_name = lambda device: f"GPU {device}"
torch.cuda.is_current_stream_capturing = lambda: False
print(t.choose(t.Timer()).size)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["32"]


@pytest.mark.parametrize(
    "change",
    [
        {"problem": PROBLEM | {"stride": 2}},
        {"device": torch.device("cuda", 1)},
        {"source": "another hash"},
        {"candidates": [*TILES, Tile(128)]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_is_tuned_anew(timer: Timer, change: dict[str, Any]) -> None:
    choose(timer)
    timer.timed.clear()
    choose(timer, **change)
    assert len(timer.timed) == len(change.get("candidates", TILES))
    assert len(files()) == 2


def test_another_triton_tunes_anew(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(timer)
    monkeypatch.setattr(triton, "__version__", "99.0")
    choose(timer)
    assert len(timer.timed) == 2 * len(TILES)


def test_nothing_is_timed_while_a_graph_is_captured(
    timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(timer) == TILES[0]
    assert not timer.timed
    assert not tuning.directory().exists()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(timer) == Tile(32), "the choice of the capture was not kept"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuning._chosen.clear()
    assert choose(timer) == Tile(32), "what the disk knows can be captured"
    assert timer.timed == TILES


def test_what_does_not_fit_is_not_chosen(timer: Timer) -> None:
    timer.times_ms[Tile(32)] = math.inf
    assert choose(timer) == Tile(64)
    assert json.loads(files()[0].read_text())["times_ms"] == [3.0, None, 2.0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00\xff",
        lambda text: "[1, 2]",
        lambda text: text.replace('"stride": 1', '"stride": 3'),
        lambda text: text.replace('"chosen": {', '"chosen": {"size": 7, "other": 1}, "x": {'),
    ],
    ids=["empty", "cut", "binary", "list", "other-problem", "no-candidate"],
)
def test_a_corrupt_file_is_survived(timer: Timer, damage: Callable[[str], str]) -> None:
    choose(timer)
    (path,) = files()
    path.write_text(damage(path.read_text()), encoding="latin-1")
    tuning._chosen.clear()
    with pytest.warns(RuntimeWarning, match=str(path)):
        assert choose(timer) == Tile(32)
    assert len(timer.timed) == 2 * len(TILES)
    tuning._chosen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(timer) == Tile(32), "mended"
    assert len(timer.timed) == 2 * len(TILES)


def test_a_cache_that_cannot_be_written_is_survived(
    timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNEXT_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning) as raised:
        assert choose(timer) == Tile(32)
    assert all(str(tmp_path / "file" / "below") in str(w.message) for w in raised)
    assert choose(timer) == Tile(32)
    assert timer.timed == TILES, "known to this process"


def test_files_appear_whole(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def watched(source: Any, target: Any) -> None:
        assert not Path(target).exists()
        json.loads(Path(source).read_text())
        original(source, target)

    monkeypatch.setattr(os, "replace", watched)
    choose(timer)
    (path,) = files()
    assert path.suffix == ".json"

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        choose(timer, source="another hash")
    assert files() == [path], "nothing half-written is left"


def test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNEXT_KERNELS_CACHE", "/a/b")
    assert tuning.directory() == Path("/a/b")
    monkeypatch.delenv("RESNEXT_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuning.directory() == Path("/x/resnext_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tuning.directory() == Path("/home/me/.cache/resnext_kernels")


def test_autotuning_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(tuning, "_asked", None)
    monkeypatch.delenv("RESNEXT_KERNELS_AUTOTUNE", raising=False)
    assert not tuning.enabled(device)
    for text, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("RESNEXT_KERNELS_AUTOTUNE", text)
        assert tuning.enabled(device) == on
    monkeypatch.setenv("RESNEXT_KERNELS_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"RESNEXT_KERNELS_AUTOTUNE.*'0' or '1'.*'yes'"):
        tuning.enabled(device)
    backends.autotune()
    assert tuning.enabled(device)
    assert not tuning.enabled(torch.device("cpu"))
    backends.autotune(False)
    assert not tuning.enabled(device)


@pytest.fixture
def convolution(
    timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[TritonLaunch]]]:
    """Calls conv_stats as on a GPU; gives the launches of the convolution that followed."""
    if backend._INTERPRETED:
        pytest.skip("kernels that are interpreted are not tuned")
    monkeypatch.setattr(tuning, "enabled", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    launches: list[TritonLaunch] = []

    def run(launch: TritonLaunch) -> None:
        launches.append(launch)
        timer.running = launch.meta["BLOCK_P"], launch.meta["stages"], launch.meta["warps"]

    def call(h: int = 14, stride: int = 1, d: int = 2) -> list[TritonLaunch]:
        launches.clear()
        x = torch.empty(8, 128, h, 14, dtype=F16, device="meta")
        x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(128, d, 3, 3, dtype=F16, device="meta")
        backend.conv_stats(x, weight, groups=128 // d, stride=stride)
        return launches

    with triton_launches(run):
        yield call


def test_convolutions_are_tuned(
    convolution: Callable[..., list[TritonLaunch]], timer: Timer
) -> None:
    timer.times_ms = {(32, 2, 4): 1.0}
    launches = convolution()
    assert len(launches) > 5, "each candidate, and then the chosen one"
    assert len(timer.timed) == len(launches) - 1
    assert len({str(launch.meta) + str(launch.args[-4]) for launch in launches}) > 4
    assert launches[-1].meta["BLOCK_P"] == 32
    assert launches[-1].grid[1] == 8 * 14 // 32 + 1, "the grid is the chosen configuration's"
    assert len(convolution()) == 1
    assert len(convolution(h=7)) > 1
    assert len(convolution(stride=2)) > 1
    assert len(convolution(d=4)) > 1
    kernels = backend._conv_rows_kernel, backend._conv_kernel, backend._conv_shift_kernel
    sources = {json.loads(path.read_text())["key"]["source"] for path in files()}
    assert sources == {kernel.cache_key for kernel in kernels}


def test_convolutions_are_not_tuned_while_captured(
    convolution: Callable[..., list[TritonLaunch]],
    timer: Timer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert len(convolution()) == 1
    assert not timer.timed
