"""The GPU backends' compiled kernels against the contract's own tests, run by a PTX emulator.

The launchers run on CPU tensors; what they launch is compiled for sm_80 and run thread for thread,
with accesses checked for bounds and alignment, and shared memory for races and for reads of what
was never written. ptxemu is a PTX emulator beside the repository in some checkouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_backend_functions as contract
import torch
from cases import DTYPE_NAMES, Case, Target

from bench.modelled import EMULATED

pytest.importorskip("ptxemu", reason="the PTX emulator is not beside this checkout")
pytestmark = pytest.mark.usefixtures("poisoned")


@dataclasses.dataclass(frozen=True)
class EmulatedTarget(Target):
    """A GPU backend in the emulator, on CPU tensors."""

    @property
    def device(self) -> str:
        return "cpu"

    def require(self, case: Case) -> None:
        pass


EMULATED_ONLY = pytest.mark.emulated
CHECKS = ("race", "init")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ALL: list[tuple[Case, torch.dtype]] = [
    # one row for each configuration, and the odd sizes
    (Case(2, 128, 9, 7, groups=32), F16),
    (Case(1, 128, 3, 30, groups=32), BF16),
    (Case(1, 256, 8, 7, groups=32, stride=2), F16),
    (Case(2, 64, 8, 8, groups=4), F16),
    (Case(1, 64, 7, 7, groups=2), BF16),
    (Case(1, 112, 6, 7, groups=8), F16),
    (Case(1, 15, 7, 7, groups=3, stride=2), F16),
    (Case(1, 80, 7, 5, groups=2), F16),
    (Case(1, 256, 5, 5, groups=2), F16),
    (Case(2, 24, 7, 9, groups=24), F16),
    (Case(1, 12, 6, 6, groups=4, k=20), F16),
    (Case(1, 32, 9, 9, groups=8, dilation=2), F16),
    (Case(1, 128, 13, 12, groups=32, stride=2, dilation=2), BF16),
    (Case(1, 32, 10, 11, groups=8, stride=3), F16),
    (Case(2, 128, 1, 1, groups=32), F16),
    (Case(2, 128, 9, 7, groups=32), F32),
    (Case(1, 112, 7, 7, groups=8, stride=2), F32),
]
FUNCTIONS: list[Callable[..., None]] = [
    contract.test_conv_affine_relu,
    contract.test_conv_stats,
    contract.test_conv_backward,
]
POINTWISE: list[Callable[..., None]] = [
    contract.test_batch_stats,
    contract.test_normalize_relu,
    contract.test_bn_relu_backward,
    contract.test_bn_relu_input_gradient,
    contract.test_nan_passes_the_relu,
]


# Plain pytest runs these; the marker `emulated` runs them all.
FEW = [ALL[0], ALL[2]]


def marked(cases: list[tuple[Case, torch.dtype]]) -> list[Any]:
    return [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{DTYPE_NAMES[dtype]}",
            marks=[] if (case, dtype) in FEW else [pytest.mark.emulated],
        )
        for case, dtype in cases
    ]


def names(values: list[Callable[..., None]]) -> list[str]:
    return [value.__name__.removeprefix("test_") for value in values]


@pytest.fixture(params=EMULATED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with EMULATED[request.param](check=CHECKS) as kernels:
        yield request.param
    assert kernels, "no kernel ran"


@pytest.mark.parametrize("function", FUNCTIONS, ids=names(FUNCTIONS))
@pytest.mark.parametrize(("case", "dtype"), marked(ALL))
def test_convolutions(
    case: Case, dtype: torch.dtype, function: Callable[..., None], backend: str
) -> None:
    function(case, EmulatedTarget(backend, dtype))


@pytest.mark.parametrize("function", POINTWISE, ids=names(POINTWISE))
@pytest.mark.parametrize(("case", "dtype"), marked([ALL[0], ALL[6], ALL[15]]))
def test_pointwise(
    case: Case, dtype: torch.dtype, function: Callable[..., None], backend: str
) -> None:
    function(case, EmulatedTarget(backend, dtype))


@EMULATED_ONLY
def test_ieee_float32(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for case in (Case(2, 32, 5, 6, groups=8), Case(1, 64, 5, 4, groups=4)):
        contract.test_conv_stats(case, EmulatedTarget(backend, F32))
        contract.test_conv_backward(case, EmulatedTarget(backend, F32))


@EMULATED_ONLY
@pytest.mark.parametrize("stride", [1, 2])
def test_statistics_of_a_large_mean(stride: int, backend: str) -> None:
    contract.test_statistics_of_a_large_mean(
        Case(2, 64, 8, 7, groups=8, stride=stride), 1e4, EmulatedTarget(backend, F32)
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=EMULATED_ONLY)])
@pytest.mark.parametrize(
    ("c", "groups"), [(32, 8), pytest.param(64, 2, marks=EMULATED_ONLY)], ids=["d4", "d32"]
)
def test_odd_values_stay_in_their_group(
    c: int, groups: int, stride: int, value: float, backend: str
) -> None:
    """Groups, and pixels, that share a matrix instruction do not see each other's NaN and Inf."""
    case = Case(2, c, 6, 5, groups=groups, stride=stride)
    contract.test_odd_values_stay_in_their_group(case, value, EmulatedTarget(backend, F16))
