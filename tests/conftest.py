"""Backends that the tests are crossed with, seeding, and memory that shows what was not written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import TARGETS, Target


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend in every dtype; `cpu` in every instruction set that this machine runs."""
    target: Target = request.param
    if target.isa is None:
        yield target
        return
    from resnext_kernels import _C

    before = _C.cpu_isa()
    _C.set_cpu_isa(target.isa)
    yield target
    _C.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty and its kin hand out NaN: an element that a kernel leaves unwritten shows.

    That is what torch.utils.deterministic.fill_uninitialized_memory does, on by default.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs more than 10 GB of memory, skipped below that")
