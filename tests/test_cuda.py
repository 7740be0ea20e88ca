"""The CUDA kernels without a GPU: their plans, and their compiled PTX run on the CPU by ptxemu."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import test_backend_functions as contract
import torch
from bench import emulator
from cases import CASES, Case, Target

from resnext_kernels.backends import cuda


class Emulated(Target):
    """The CUDA backend on CPU tensors."""

    @property
    def module(self) -> ModuleType:
        return cuda

    @property
    def device(self) -> str:
        return "cpu"

    def require(self, case: Case) -> None:
        reason = emulator.why_not() or cuda._why_not_served(self.problem(case))
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture
def emulated(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    """Every access checked: bounds and alignment, races and reads of unwritten shared memory."""
    reason = emulator.why_not()
    if reason is not None:
        pytest.skip(reason)
    with emulator.Emulator(check=("race", "init")).active():
        yield Emulated("cuda", request.param)


each = pytest.mark.parametrize("case", CASES, ids=str)
dtypes = pytest.mark.parametrize("emulated", [torch.float16, torch.bfloat16], ids=["f16", "bf16"], indirect=True)
pytestmark = pytest.mark.usefixtures("poisoned")


@each
@dtypes
def test_conv_affine_relu(case: Case, emulated: Emulated) -> None:
    contract.test_conv_affine_relu(case, emulated)


@each
@dtypes
def test_conv_stats(case: Case, emulated: Emulated) -> None:
    contract.test_conv_stats(case, emulated)


@each
@dtypes
def test_conv_backward(case: Case, emulated: Emulated) -> None:
    contract.test_conv_backward(case, emulated)


@each
@dtypes
def test_pointwise(case: Case, emulated: Emulated) -> None:
    contract.test_batch_stats(case, emulated)
    contract.test_normalize_relu(case, emulated)
    contract.test_bn_relu_backward(case, emulated)
    contract.test_bn_relu_input_gradient(case, emulated)
    contract.test_nan_passes_the_relu(case, emulated)
