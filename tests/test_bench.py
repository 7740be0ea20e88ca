"""The harness judged by itself: wrong, slow and impossible kernels, its bounds, its reports."""

import copy
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("tqdm", reason="the harness needs the extra [bench]")
pytest.importorskip("cpuinfo", reason="the harness needs the extra [bench]")

from bench import __main__ as cli
from bench import cases, modelled, peers, report, sweep, timing
from bench.cases import Case
from bench.peers import OURS, Candidate, Workload

ROOT = Path(__file__).parent.parent
SMALL = Case("op", "eval", 2, 8, c=16, groups=4)
FAST = timing.Method(rounds=3, min_time_ms=0.5, threads=1)
INSTANT = ("eager", "folded", "loop")


class NoFloor(timing.Roofline):
    """A machine of which nothing is measured, so that no row beats its floor."""

    def floor_ms(self, flops: float, bytes_moved: int, dtype: str) -> float:
        return 1e-9


def replaced(name: str, change: Callable[[Candidate], Candidate]) -> Any:
    """A `build` for `sweep.measure` that changes one candidate."""

    def build(work: Workload, wanted: str) -> Candidate:
        # eager stands in for ours: this is about the harness, not about a kernel
        candidate = work.build("eager" if wanted == OURS else wanted)
        return change(candidate) if wanted == name else candidate

    return build


def measured(change: Callable[[Candidate], Candidate], name: str = OURS) -> sweep.Row:
    return sweep.measure(SMALL, FAST, NoFloor(FAST), INSTANT, replaced(name, change))


def altered(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Candidate], Candidate]:
    def wrong(candidate: Candidate) -> Candidate:
        return candidate._replace(run=lambda: tuple(change(t) for t in candidate.run()))

    return wrong


def full_report(rows: list[sweep.Row]) -> report.Report:
    return {
        "schema": sweep.SCHEMA, "suite": "sweep", "complete": True, "seconds": 1,
        "created": "2000-01-01T00:00:00+00:00", "commit": "0" * 12, "versions": {"torch": "2.6"},
        "machine": {"cpu": "a CPU", "cores": 2, "kernel_isa": "avx2", "gpu": None},
        "method": {"rounds": 3, "min_time_ms": 1.0, "threads": 2, "device": "cpu"},
        "roofline": {"peak_gflops float32": 100.0, "bandwidth_gb_s 1048576": 9.0},
        "absent": {}, "summary": sweep.summarise(rows), "rows": rows,
    }  # fmt: skip


def made_row(case: Case, ours: float = 1.0, eager: float = 2.0, spread: float = 0.01) -> sweep.Row:
    """A row as `sweep.measure` returns it, with the given medians."""
    times = {
        name: {"median": t, "q1": t * (1 - spread), "q3": t * (1 + spread), "rounds": 9}
        for name, t in ((OURS, ours), ("eager", eager))
    }
    row = {
        "id": case.id, "label": case.label, **vars(case), "stage": case.stage, "bar": case.bar,
        "bar_peers": list(case.bar_peers), "absent": {}, "failed": {}, "errors": {}, "flags": [],
        "times_ms": times, "flops": case.flops, "bytes_moved": case.bytes_moved,
        "saved_bytes": {OURS: 1 << 20, "eager": 2 << 20},
        "peak_bytes": {OURS: 1 << 20, "eager": 2 << 20},
    }  # fmt: skip
    return sweep.finish(row, NoFloor(FAST))


# A candidate that is wrong gets no number


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 1.001,
        lambda t: t + 1e-4,
        lambda t: t.index_fill(1, torch.tensor([3]), 0.0),
        lambda t: t.where(t != t.max(), float("nan")),
        lambda t: t[:, :-1],
        lambda t: t.bfloat16().float(),
    ],
    ids=["scaled", "shifted", "channel-lost", "nan", "shape", "rounded-to-bf16"],
)
def test_wrong_kernel_gets_no_number(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    row = measured(altered(change))
    assert "wrong y" in row["failed"][OURS]
    assert not row["times_ms"]
    assert "speedup" not in row
    text = report.table(full_report([row])) + report.notes(full_report([row]))
    assert "FAILED" in text
    assert sweep.summarise([row])["failed"] == 1


def test_raising_kernel_is_a_failed_row() -> None:
    def raising(candidate: Candidate) -> Candidate:
        def run() -> Any:
            raise RuntimeError("illegal memory access")

        return candidate._replace(run=run)

    row = measured(raising)
    assert row["failed"][OURS] == "RuntimeError: illegal memory access"
    assert not row["times_ms"]


def test_kernel_that_writes_nothing_gets_no_number() -> None:
    """Its memory is, by luck, that in which a candidate before it left the right results."""

    def idle(candidate: Candidate) -> Candidate:
        shapes = [t.shape for t in candidate.run()]
        return candidate._replace(run=lambda: tuple(torch.empty(shape) for shape in shapes))

    row = measured(idle)
    assert "error nan" in row["failed"][OURS]
    assert not row["times_ms"]


def test_kernel_that_goes_wrong_later_gets_no_number() -> None:
    def tiring(candidate: Candidate) -> Candidate:
        calls = itertools.count()
        return candidate._replace(
            run=lambda: tuple(t * (1.001 if next(calls) > 2 else 1.0) for t in candidate.run())
        )

    row = measured(tiring)
    assert row["failed"][OURS].endswith("after it was timed")
    assert not row["times_ms"]
    row = measured(tiring, name="folded")
    assert set(row["times_ms"]) == {OURS, "eager", "loop"}


def test_row_that_cannot_be_set_up_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def short_of_memory(case: Case) -> Workload:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peers, "workload", short_of_memory)
    row = measured(lambda candidate: candidate)
    assert row["failed"][OURS] == "OutOfMemoryError: CUDA out of memory"
    assert "FAILED" in report.table(full_report([row]))


def test_wrong_peer_does_not_count() -> None:
    row = measured(altered(lambda t: t * 1.001), name="folded")
    assert "wrong y" in row["failed"]["folded"]
    assert set(row["times_ms"]) == {OURS, "eager", "loop"}
    assert row["best_peer"] != "folded"


@pytest.mark.parametrize("result", ["dx", "dweight", "dgamma", "dbeta", "running_var"])
def test_wrong_gradient_is_found(result: str) -> None:
    case = Case("op", "forward+backward", 2, 8, c=16, groups=4)
    work = peers.workload(case)
    candidate = work.build("eager")
    results = candidate.results(candidate.run())
    allowed = peers.eager_errors(work)
    assert peers.check(work, results, allowed).passed
    results[result] = results[result] * 1.001
    verdict = peers.check(work, results, allowed)
    assert not verdict.passed
    assert verdict.result == result


# A candidate that is slow shows as slow


def test_slow_kernel_shows_as_slow() -> None:
    def slowed(candidate: Candidate) -> Candidate:
        def run() -> Any:
            time.sleep(0.02)
            return candidate.run()

        return candidate._replace(run=run)

    row = measured(slowed)
    assert row["times_ms"][OURS]["median"] >= 20
    assert row["speedup"] < 0.5
    assert row["speedup"] == min(row["speedups"].values())
    assert sweep.summarise([row])["slower"] == [row["id"]]


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    runs: dict[str, timing.Run] = {name: partial(calls.append, name) for name in "abc"}
    found = timing.interleaved(runs, timing.Method(rounds=4, min_time_ms=1e-6, threads=1))
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 4, "b": 4, "c": 4}
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order[:3] == list("abc")  # tells how many calls a turn needs
    assert order[3:] == list("abcbcacababc")  # every round begins with the next


@pytest.mark.parametrize(
    ("alone", "warm", "calls"),
    [(1e-3, 1e-4, 200), (1e-4, 1e-4, 200), (1, 0.5, 1), (1e-6, 1e-6, 2000)],
)
def test_a_turn_lasts_as_long_as_asked_for(alone: float, warm: float, calls: int) -> None:
    def clock(run: timing.Run, calls: int) -> float:
        return alone if calls == 1 else warm

    method = timing.Method(min_time_ms=20)
    assert timing._calls_of_a_turn(lambda: None, clock, method) == calls


def test_lost_time_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    for lost, flags in ((0.04, []), (0.2, ["busy machine: 20% of the time lost to others"])):
        monkeypatch.setattr(timing, "disturbance", lambda threads, lost=lost: lambda: lost)
        row = measured(lambda candidate: candidate)
        assert row["flags"] == flags
        assert row["lost_share"] == lost


@pytest.mark.skipif(not timing._run_delays(), reason="this kernel tells no run delays")
def test_lost_time_is_measured() -> None:
    """Two threads that compute on one core lose half of the time to each other."""
    allowed = os.sched_getaffinity(0)
    a = torch.randn(300, 300)

    def work() -> None:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            a @ a

    os.sched_setaffinity(0, {min(allowed)})
    try:
        share = timing.disturbance(threads=2)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.25)  # the figures of a thread go with it
        lost = share()
        for thread in threads:
            thread.join()
    finally:
        os.sched_setaffinity(0, allowed)
    assert lost is not None
    assert lost > 0.2


class FakeCuda:
    """Stands in for torch.cuda: a stream is run at once, a graph records the calls it captures."""

    clock = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = FakeCuda.clock

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    class CUDAGraph:
        replays = 0

        def replay(self) -> None:
            FakeCuda.CUDAGraph.replays += 1
            FakeCuda.clock += 1.0

    @staticmethod
    def capture(graph: CUDAGraph, stream: str) -> Any:
        assert stream == "current"
        return nullcontext()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeCuda]:
    for name in ("Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", FakeCuda.capture)
    return FakeCuda


def test_cuda_events_and_graphs(fake_cuda: type[FakeCuda]) -> None:
    calls = itertools.count()
    replay = timing.graphed(lambda: next(calls), 4)
    assert replay() == [4, 5, 6, 7]  # after as many calls to warm up
    method = timing.Method(rounds=3, min_time_ms=5, threads=1, device="cuda")
    assert timing.interleaved({"a": replay}, method) == {"a": [pytest.approx(1e-3)] * 3}
    assert next(calls) == 8  # replayed, not called again


def test_so_many_copies_that_they_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert timing.rotation(10 << 20, "cpu") == 1
    assert timing.rotation(400 << 20, "cuda") == 1
    count = timing.rotation(10 << 20, "cuda")
    assert (count - 1) * (10 << 20) >= 2 * (50 << 20)


@pytest.mark.parametrize(
    ("case", "name"),
    [(SMALL, "loop"), (Case("block", "eval", 2, 7, c=1024, groups=32), "eager")],
    ids=["op", "block"],
)
def test_copies_take_turns(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "rotation", lambda bytes_moved, device: 3)
    work = peers.workload(case)
    candidate, allowed = work.build(name), peers.eager_errors(work)
    convolution, read = torch.nn.functional.conv2d, list[int]()

    def spy(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        read.append(x.data_ptr())
        return convolution(x, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    inputs = []
    for _ in range(4):
        read.clear()
        results = candidate.results(candidate.run())
        inputs.append(read[0])
        assert peers.check(work, results, allowed).passed
    assert len(set(inputs)) == 3
    assert inputs[3] == inputs[0]


# The floor


def test_beaten_floor_is_flagged() -> None:
    class Slow(NoFloor):
        def floor_ms(self, flops: float, bytes_moved: int, dtype: str) -> float:
            return 1.5

    row = sweep.finish(made_row(SMALL, ours=1.0, eager=2.0), Slow(FAST))
    assert row["flags"] == ["beats the floor: ours at 1.50 of it"]
    within = sweep.finish(made_row(SMALL, ours=1.49, spread=0.02), Slow(FAST))
    assert within["flags"] == []


@pytest.mark.parametrize(
    ("isa", "stride", "flagged"),
    [("avx512", 1, 0), ("avx512_bf16", 1, 0), ("avx512", 2, 1), ("avx2", 1, 1)],
)
def test_fewer_multiplications_have_a_floor_of_their_own(
    isa: str, stride: int, flagged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compute(NoFloor):
        def floor_ms(self, flops: float, bytes_moved: int, dtype: str) -> float:
            return flops / 1e6

    monkeypatch.setattr(timing, "kernel_isa", lambda: isa)
    row = made_row(replace(SMALL, stride=stride), ours=1.0, eager=2.0) | {"flops": 1.5e6}
    row = sweep.finish(row, Compute(FAST))
    assert row["share_of_floor"] == pytest.approx(1.5)
    assert len(row["flags"]) == flagged


def test_floor_is_the_larger_of_its_two_sides() -> None:
    roofline = timing.Roofline(FAST)
    roofline._best = {"flops float32": 100e9, **{f"bytes {2**20 * 4**i}": 10e9 for i in range(5)}}
    assert roofline.floor_ms(1e9, 2**20, "float32") == pytest.approx(10.0)
    assert roofline.floor_ms(1e6, 2**20, "float32") == pytest.approx(2**20 / 10e6)


def test_multiply_adds_are_made() -> None:
    library = pytest.importorskip("resnext_kernels._C")
    few, many = 1 << 12, 1 << 18
    operations = library.multiply_adds(many, 1)
    assert operations == library.multiply_adds(few, 1) * (many // few)
    assert operations == library.multiply_adds(many // 2, 2)
    times = [
        min(timeit.repeat(partial(library.multiply_adds, rounds, 1), number=1, repeat=20))
        for rounds in (few, many)
    ]
    assert times[1] > 8 * times[0]  # 64 times the work: none of it is optimised away


@pytest.mark.parametrize("operations", [1, 10**15])
def test_peak_is_the_best_of_registers_and_products(
    operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        @staticmethod
        def multiply_adds(rounds: int, num_threads: int) -> int:
            return operations

    monkeypatch.setattr(timing, "compiled_library", lambda: Library)
    of_registers = timing.Roofline(FAST).flops("float32")
    monkeypatch.setattr(timing, "compiled_library", lambda: None)
    of_products = timing.Roofline(FAST).flops("float32")
    assert 1e8 < of_products < 1e14
    assert of_registers > 1e18 if operations > 1 else 1e8 < of_registers < 1e14


def test_machine_is_measured() -> None:
    roofline = timing.Roofline(timing.Method(rounds=2, min_time_ms=1, threads=1))
    assert 1e8 < roofline.flops("float32") < 1e14
    assert 1e8 < roofline.bandwidth(2**20) < 1e13
    roofline.refresh()
    sizes = [2**20 * 4**i for i in range(5)]
    assert list(roofline.as_json()) == [
        "peak_gflops float32",
        *(f"bandwidth_gb_s {size}" for size in sizes),
    ]


def test_flops_and_bytes() -> None:
    case = Case("op", "eval", 8, 56, c=128, groups=32)
    assert case.flops == 2 * 8 * (3 * 56 - 2) ** 2 * 128 * 4
    assert case.bytes_moved == 4 * (2 * 8 * 56 * 56 * 128 + 128 * 4 * 9)
    both = Case("op", "forward+backward", 8, 56, c=256, groups=32, stride=2)
    assert both.flops == 3 * 2 * 8 * (3 * 28 - 1) ** 2 * 256 * 8
    x, y, weight = 8 * 56 * 56 * 256, 8 * 28 * 28 * 256, 256 * 8 * 9
    assert both.bytes_moved == 4 * (3 * x + 4 * y + 3 * weight)


def non_padding(size: int, kernel: int, stride: int, padding: int) -> int:
    """Products of a convolution that are not with padding, by a convolution that counts them."""
    ones = torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel)
    return int(torch.nn.functional.conv2d(*ones, stride=stride, padding=padding).sum())


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0)])
def test_padding_is_no_work(size: int, kernel: int, stride: int, padding: int) -> None:
    expected = non_padding(size, kernel, stride, padding)
    assert cases.taps(size, kernel, stride, padding) ** 2 == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_block_flops_are_those_that_torch_counts_less_the_padding(stride: int) -> None:
    case = Case("block", "eval", 1, 14 * stride, c=512, groups=32, stride=stride)
    module, x = peers.eager_module(case), peers.module_input(case)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(x)
    padded = 9 * 14 * 14 - non_padding(14 * stride, 3, stride, 1)
    assert counter.get_total_flops() - 2 * padded * 512 * 16 == case.flops


def test_network_work_is_that_which_torch_counts_less_the_padding() -> None:
    case = Case("network", "eval", 2, 64, model="resnext14_4x4d")
    model, x = peers.eager_module(case).eval(), peers.module_input(case)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    padded = 0

    def count(conv: torch.nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal padded
        (kernel, _), (stride, _), (padding, _) = conv.kernel_size, conv.stride, conv.padding
        all_products = (output.shape[-1] * kernel) ** 2
        inside = non_padding(inputs[0].shape[-1], kernel, stride, padding)
        channels = conv.out_channels * conv.in_channels // conv.groups
        padded += 2 * case.n * channels * (all_products - inside)

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    flops, _ = sweep._work(case)
    assert padded > 0
    assert flops == counter.get_total_flops() - padded
    stem = 2 * case.n * 64 * 3 * non_padding(64, 7, 2, 3)
    assert sweep._work(replace(case, mode="forward+backward"))[0] == 3 * flops - stem


# Memory


def test_memory_is_counted() -> None:
    x = torch.ones(1000, 1000, requires_grad=True)
    assert timing.saved_bytes(lambda: (x * 2).exp().exp()) == 2 * 4_000_000
    assert timing.peak_bytes(lambda: x.detach() + 1, "cpu") == pytest.approx(4e6, rel=1e-3)
    assert timing.peak_bytes(lambda: (x.detach() + 1).add(1).add(1), "cpu") == pytest.approx(
        8e6, rel=1e-3
    )


def test_memory_is_kept() -> None:
    script = """
import resource, torch
from bench import timing
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(25, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
if timing.keep_memory():
    later = [faults() for _ in range(5)]  # until the heap has grown to what is asked of it
    print(before, later[-1])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("no glibc here")
    before, after = map(int, done.stdout.split())
    assert before > 3 * 20_000  # of 25,600 pages: what mallopt is for
    assert after < 100


# Cases and candidates


def test_every_op_peer_is_right() -> None:
    for mode in cases.PASSES:
        for stride in (1, 2):
            work = peers.workload(Case("op", mode, 2, 9, c=16, groups=4, stride=stride))
            allowed = peers.eager_errors(work)
            for name in peers.peers_of(Case("op", mode, 2, 9, c=16, groups=4), INSTANT)[0]:
                candidate = work.build(name)
                verdict = peers.check(work, candidate.results(candidate.run()), allowed)
                assert verdict.passed, f"{mode} {name}: {verdict}"


@pytest.mark.parametrize("mode", cases.PASSES)
def test_ours_is_right_at_every_level(mode: str) -> None:
    rows = [Case("op", mode, 2, 9, c=16, groups=4), Case("block", mode, 2, 7, c=1024, groups=32)]
    if mode != "forward":
        rows.append(Case("network", mode, 2, 64, model="resnext14_4x4d"))
    for case in rows:
        work = peers.workload(case)
        candidate = work.build(OURS)
        verdict = peers.check(work, candidate.results(candidate.run()), peers.eager_errors(work))
        assert verdict.passed, f"{case.id}: {verdict}"


def test_bars() -> None:
    asked = {case.id: case.bar for case in cases.bars() if case.bar is not None}
    assert len(asked) == 2 * 4 + (4 + 3) + 2 * 4 + 2
    assert asked["op-eval-n8-h56-c128-g32-s1-float32-channels_last-cpu"] == 3.5
    assert asked["op-eval-n1-h7-c1024-g32-s1-float32-channels_last-cpu"] == 1.05
    assert asked["op-forward+backward-n8-h56-c256-g32-s2-float32-channels_last-cpu"] == 2.0
    family = [c for c in cases.bars() if c.mode == "eval" and c.n == 8 and c.dtype == "float32"]
    assert len([c for c in family if c.level == "op"]) == 4 * 5


def test_ids_are_unique() -> None:
    for suite in (cases.bars(), cases.quick(), cases.sweep(), cases.gpu()):
        assert len({case.id for case in suite}) == len(suite)


def test_equal_complexity_widths() -> None:
    widths = [cases.layer(1, g, d)["c"] for g, d in cases.EQUAL_COMPLEXITY]
    assert widths == [64, 80, 96, 112, 128]
    assert cases.layer(3, 32, 4, stride=2) == {"size": 28, "c": 512, "groups": 32, "stride": 2}


def test_absent_peer_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    case = Case("network", "eval", 1, 224, model="resnext50_32x4d")
    present, absent = peers.peers_of(case)
    assert present == ["eager", "compile"]
    assert absent["openvino"] == "openvino not installed: pip install '.[bench]'"


@pytest.mark.parametrize("level", ["op", "block"])
def test_compiled_peer_is_frozen(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are constants of the graph: changing them changes nothing any more."""
    parameters: list[torch.nn.Parameter] = []
    compile_ = torch.compile

    def spy(module: torch.nn.Module, **options: Any) -> Any:
        parameters.extend(module.parameters())
        return compile_(module, **options)

    monkeypatch.setattr(torch, "compile", spy)
    work = peers.workload(Case(level, "eval", 1, 7, c=1024, groups=32))
    candidate = work.build("compile")
    before = candidate.results(candidate.run())["y"].clone()
    for parameter in parameters:
        parameter.data.zero_()
    assert parameters
    assert torch.equal(candidate.results(candidate.run())["y"], before)


# Reports


def test_report_survives_the_file(tmp_path: Path) -> None:
    result = full_report([made_row(case) for case in cases.quick() if case.level == "op"])
    report.save(result, tmp_path / "a.json")
    loaded = report.load(tmp_path / "a.json")
    assert report.table(loaded) == report.table(report.load(tmp_path / "a.json"))
    assert loaded["rows"][0]["speedup"] == 2.0
    assert loaded["machine"] == result["machine"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "schema"), ('{"schema": 0}', "schema")]
)
def test_bad_report_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.load(path)
    with pytest.raises(ValueError, match="No such file"):
        report.load(tmp_path / "none.json")


def test_compare_tells_what_moved() -> None:
    rows = [case for case in cases.bars() if case.level == "op"][:4]
    before = full_report([made_row(case) for case in rows])
    after = copy.deepcopy(before)
    after["rows"][0] = made_row(rows[0], ours=1.3)
    after["rows"][1] = made_row(rows[1], ours=0.7)
    after["rows"][2] = made_row(rows[2], ours=1.01)
    del after["rows"][3]
    lines = report.compare(before, after).splitlines()
    moved = [line.split("|")[-2].strip() for line in lines if line.startswith("| ")][2:]
    assert moved == ["slower", "faster", ""]
    assert "3 rows in both, 2 moved beyond their spread" in lines
    assert lines[-1] == f"only in A: {rows[3].id}"


def test_what_peers_move_is_no_move() -> None:
    """Unchanged peers that moved by a fifth between two runs set the spread between them."""
    rows = [case for case in cases.bars() if case.level == "op"][:10]
    before = full_report([made_row(case) for case in rows])
    drifts = [1.0, 1.2, 1.05, 0.95, 1.1, 0.9, 1.0, 1.2, 0.85, 1.15]
    ours = [1.0, 1.1, 0.9, 1.3, 0.7, 1.0, 1.0, 1.0, 1.0, 1.0]
    after = full_report(
        [
            made_row(case, ours=ms, eager=2 * drift)
            for case, ms, drift in zip(rows, ours, drifts, strict=True)
        ]
    )
    after["rows"][9]["flags"] = ["busy machine: 40% of the time lost to others"]
    text = report.compare(before, after)
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    moved = [line.split("|")[-2].strip() for line in lines]
    assert moved == ["", "", "", "slower", "faster", "", "", "", "", "busy"]
    assert "19 of 20 times of peers are within 1.20x" in text
    after["versions"] = {"torch": "2.7"}
    assert "versions differ" in report.compare(before, after)


def test_missed_bar_is_marked() -> None:
    case = Case("op", "eval", 8, 56, c=128, groups=32)
    missed, reached = made_row(case, ours=1.0, eager=3.4), made_row(case, ours=1.0, eager=3.6)
    assert report.bar_cell(missed) == "3.40x of 3.5x MISSED"
    assert report.bar_cell(reached) == "3.60x of 3.5x"
    assert "bars: 1 of 2 reached, 1 missed, 0 failed" in report.notes(
        full_report([missed, reached])
    )


def test_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.committed()
    assert all(modelled.kept().values())
    assert cli.with_tables(text) == text, (
        "README's tables are not those of bench/results: run python -m bench --readme"
    )


def test_readme_block() -> None:
    result = full_report([made_row(case) for case in cases.bars() if case.level == "op"])
    block = report.readme_block([("cpu.json", result)])
    text = "head\n<!-- bench:begin -->\nold\n<!-- bench:end -->\ntail\n"
    new = report.rewrite_readme(text, "bench", block)
    assert new == f"head\n<!-- bench:begin -->\n{block}\n<!-- bench:end -->\ntail\n"
    assert report.rewrite_readme(new, "bench", block) == new
    assert "2.00x" in block
    for wrong in ("no markers", text + text, "<!-- bench:end --><!-- bench:begin -->"):
        with pytest.raises(ValueError, match="README needs"):
            report.rewrite_readme(wrong, "bench", block)


def test_plots_are_drawn(tmp_path: Path) -> None:
    plots = pytest.importorskip("bench.plots")
    rows = [made_row(case) for case in cases.sweep() if case.level == "op"]
    drawn = plots.draw(full_report(rows), tmp_path / "cpu")
    assert [path.name for path in drawn] == [
        "cpu-speedup.png",
        "cpu-roofline.png",
        "cpu-memory.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert plots.draw(full_report([]), tmp_path / "none") == []


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "all"], "invalid choice: 'all'"),
        (["--batch", "0"], "0 is not greater than zero"),
        (["--batch", "x"], "'x' is not a whole number"),
        (["--min-time", "nan"], "nan is not greater than zero and finite"),
        (["--quick", "--suite", "bars"], "not allowed with argument"),
        (["--suite", "gpu", "--device", "cpu"], "--suite gpu is for --device cuda, not cpu"),
        (["--level", "op", "--model", "resnet50"], "--model belongs to --level network"),
        (["--level", "network", "--stage", "1"], "belong to --level op and block"),
        (["--template", "16x8", "--series", "width"], "give one of them"),
        (["--threads", "100000"], "this machine has"),
        (["--output", "results.txt"], "has to end in .json"),
        (["--output", "/proc/none/a.json"], "--output /proc/none/a.json: No such file"),
        (["--peer", "jax"], "invalid choice: 'jax'"),
        (["--template", "32"], "'32' is not CARDINALITYxWIDTH"),
        (["--suite", "bars", "--batch", "1"], "fixes its rows"),
        (["--stage", "1", "--stride", "2", "--level", "op"], "leave no row"),
        (["--model", "alexnet"], "alexnet is no network"),
        (["--backend", "tpu"], "--backend tpu: available here are"),
        (["--compare", "a.json", "b.json"], "No such file"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_wrong_option_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--level", "op", "--template", "16x8", "--batch", "1", "--list"]) == 0
    lines = capsys.readouterr().out.split()
    assert len(lines) == 3 * 4
    assert lines[0] == "op-eval-n1-h56-c128-g16-s1-float32-channels_last-cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_gpu_suite_says_what_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--suite", "gpu"]) == 0
    text = capsys.readouterr().out
    assert "no CUDA device here. Skipped:" in text
    assert f"{len(cases.gpu())} rows" in text


def test_gpu_suite_is_one_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests, compute-sanitizer on both backends, then the sweep, autotuned."""
    done: list[str] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
        done.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    def measure(args: Any, rows: list[Case], how: timing.Method, path: Path) -> int:
        done.append(f"{len(rows)} rows, autotune {os.environ['RESNEXT_KERNELS_AUTOTUNE']}")
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cli.subprocess, "run", run)
    monkeypatch.setattr(cli, "measure", measure)
    monkeypatch.setenv("RESNEXT_KERNELS_AUTOTUNE", "")
    monkeypatch.delenv("RESNEXT_KERNELS_AUTOTUNE")
    assert cli.main(["--suite", "gpu", "--output", str(tmp_path / "gpu.json"), "--no-plots"]) == 0
    tests, *sanitizers, sweep = done
    assert "-m pytest -q -m gpu" in tests
    assert [c.split()[2] for c in sanitizers] == ["memcheck", "racecheck", "initcheck"]
    assert all("f16-cuda or f16-triton" in c for c in sanitizers)
    assert sweep == f"{len(cases.gpu())} rows, autotune 1"


def test_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    status = cli.main(
        ["--level", "op", "--stage", "4", "--series", "stages", "--batch", "1", "--pass", "eval",
         "--peer", "eager", "--rounds", "2", "--min-time", "1", "--output", str(path)]
    )  # fmt: skip
    assert status == 0
    result = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "method", "roofline", "rows"} <= result.keys()
    assert result["rows"][0]["times_ms"].keys() == {OURS, "eager"}
    text = capsys.readouterr().out
    assert "7, C=1024, 32x32, batch 1" in text
    assert cli.main(["--compare", str(path), str(path)]) == 0
    assert "0 moved beyond their spread" in capsys.readouterr().out


def test_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    row = "op-eval-n1-h7-c1024-g32-s1-float32-channels_last-cpu-eager"

    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", row]
    command += ["--benchmark", f"--benchmark-json={path}", "--benchmark-max-time=0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    (found,) = json.loads(path.read_text())["benchmarks"]
    assert found["group"] == row.removesuffix("-eager")
    assert found["stats"]["median"] > 0
    assert found["extra_info"]["bar"] == 1.05
