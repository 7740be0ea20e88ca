"""The 32x4d layers under pytest-benchmark: ``pytest --benchmark``. Wrong kernels fail, untimed.

Groups are rows, so ``--benchmark-compare`` and ``--benchmark-histogram`` set the candidates of a
row side by side. `python -m bench` times the same candidates in turns and knows the floor.
"""

from functools import lru_cache
from typing import Any

import pytest

from bench import peers, timing
from bench.cases import Axes, Case, product
from bench.peers import OURS, Workload

CASES = [
    *product(Axes(levels=["op"], passes=["eval"], batches=[1, 8], series=["stages"])),
    *product(Axes(levels=["op"], passes=["forward+backward"], series=["stages"])),
]
QUICK_PEERS = ("eager", "folded", "loop")


@pytest.fixture(scope="module", autouse=True)
def memory() -> None:
    timing.keep_memory()


@lru_cache(maxsize=1)  # the candidates of a row follow each other
def prepared(case: Case) -> tuple[Workload, dict[str, float]]:
    work = peers.workload(case)
    return work, peers.eager_errors(work)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.id}-{name}")
        for case in CASES
        for name in (OURS, *peers.peers_of(case, QUICK_PEERS)[0])
    ],
)
def test_layer(benchmark: Any, case: Case, name: str) -> None:
    work, errors = prepared(case)
    candidate = work.build(name)
    verdict = peers.check(work, candidate.results(candidate.run()), errors)
    assert verdict.passed, f"{name}: {verdict}"
    benchmark.group = case.id
    benchmark.name = name
    benchmark.extra_info.update(
        flops=case.flops, bytes_moved=case.bytes_moved, error=verdict.error, bar=case.bar
    )
    benchmark(candidate.run)
