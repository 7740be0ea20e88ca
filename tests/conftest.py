"""Backends that the tests are crossed with, seeding, and memory that shows what was not written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from cases import TARGETS, Target


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """Every backend in every dtype; `cpu` in every instruction set that this machine runs.

    On a GPU float32 is IEEE: which of torch's convolutions take TF32 is cuDNN's choice.
    """
    target: Target = request.param
    if target.device == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
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
    config.addinivalue_line("markers", "gpu: needs a GPU, skipped without one")
    for name, text in SLOW.items():
        config.addinivalue_line("markers", f"{name}: {text}; run by -m {name} alone")
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


# Minutes each: left out unless asked for.
SLOW = {
    "architectures": "compile the Triton kernels for every architecture",
    "emulated": "run compiled GPU kernels over every case in the PTX emulator",
}


def needs_gpu(item: pytest.Item) -> bool:
    """Whether the test's backend runs on a GPU here."""
    target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
    return isinstance(target, Target) and target.device == "cuda"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs a GPU; leave out the tests of SLOW, except where -m names their marker."""
    for item in filter(needs_gpu, items):
        item.add_marker("gpu")
    asked = config.getoption("markexpr", "")
    left_out = [i for i in items if any(i.get_closest_marker(m) and m not in asked for m in SLOW)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in set(left_out)]
