"""What only a GPU can show: streams, CUDA graphs, tensors past 2^31 elements, whole networks.

Skipped without one. `python -m bench --suite gpu` runs these with the other tests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case, Target
from test_backend_functions import Exact
from torch import Tensor

from bench import cases as rows
from bench import peers
from resnext_kernels import FusedGroupedBottleneck, backends
from resnext_kernels.backends import triton, tuning

BACKENDS = ("cuda", "triton")
CASES = [Case(2, 128, 9, 7, groups=32), Case(2, 128, 9, 8, groups=4, stride=2)]
F16, F32 = torch.float16, torch.float32

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
each = pytest.mark.parametrize(
    ("backend", "case"),
    [pytest.param(b, c, id=f"{c}-{b}", marks=needs_gpu) for b in BACKENDS for c in CASES],
)


@dataclasses.dataclass(frozen=True)
class On(Target):
    """A backend on one device."""

    index: int | None = 0

    @property
    def device(self) -> str:
        return "cpu" if self.index is None else f"cuda:{self.index}"


def exact(backend: str, case: Case, index: int | None = 0, dtype: torch.dtype = F16) -> Exact:
    """Tensors of small integers and halves, on that device."""
    target = On(backend, dtype if backend != "reference" else torch.float64, index=index)
    device = torch.device(target.device)
    problem = Target.problem(target, case)
    problem = dataclasses.replace(problem, device_type=device.type, device_index=device.index)
    reason = target.module.why_not(problem)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return Exact(case, target)


def tensors(e: Exact) -> dict[str, Tensor]:
    return {name: t for name, t in vars(e).items() if isinstance(t, Tensor)}


def results(module: ModuleType, e: Exact) -> dict[str, Tensor]:
    """Of every function of the contract but the 1x1 convolutions, which are torch's."""
    conv = e.case.conv
    prologue = (e.in_scale, e.in_shift)
    bn = (e.scale, e.shift, e.mean, e.rstd**-2, 0.0)
    calls: dict[str, Callable[[], Any]] = {
        "conv_affine_relu": lambda: module.conv_affine_relu(
            e.x, e.weight, e.scale, e.shift, residual=e.residual, **conv
        ),
        "conv_bn_relu": lambda: module.conv_bn_relu(e.x, e.weight, bn, residual=e.residual, **conv),
        "conv_stats": lambda: module.conv_stats(e.x, e.weight, bn=e.bn, prologue=prologue, **conv),
        "batch_stats": lambda: module.batch_stats(e.z, e.bn),
        "normalize_relu": lambda: module.normalize_relu(
            e.z, e.scale, e.shift, residual=e.residual, residual_affine=(e.res_scale, e.res_shift)
        ),
        "bn_relu_backward": lambda: module.bn_relu_backward(e.dy, e.z, e.vectors),
        "bn_residual_relu_backward": lambda: module.bn_residual_relu_backward(
            e.dy, e.z, e.residual, e.vectors
        ),
        "bn_relu_input_gradient": lambda: module.bn_relu_input_gradient(
            e.dy, e.z, e.vectors, e.coefficients
        ),
        "conv_backward": lambda: module.conv_backward(
            e.dy,
            e.x,
            e.weight,
            bn=(e.z, e.vectors, e.coefficients),
            prologue=prologue,
            **conv,
        ),
        "bn_affine": lambda: module.bn_affine(*bn),
        "bn_vectors": lambda: module.bn_vectors(*bn, 1.5),
    }
    found: dict[str, Tensor] = {}
    for name, call in calls.items():
        result = call()
        for i, t in enumerate(result if isinstance(result, tuple) else (result,)):
            found[f"{name}[{i}]"] = t
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in found if not torch.equal(found[name], wanted[name])]
    assert not different


def assert_right(found: dict[str, Tensor], e: Exact) -> None:
    """`found` are the reference's results in float64; all but variances are exact."""
    truth = exact("reference", e.case, None)
    for name, t in tensors(e).items():
        setattr(truth, name, t.cpu().double())
    wanted = results(truth.target.module, truth)
    for name, t in found.items():
        torch.testing.assert_close(t.cpu().double(), wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_every_function(case: Case) -> None:
    """On the CPU: no function is missing, and each result depends on what it should."""
    e = exact("reference", case, None)
    wanted = results(backends.select(Target("reference", F32).problem(case), "reference"), e)
    assert len(wanted) == 19
    assert all(t.abs().max() > 0 for t in wanted.values())
    with pytest.raises(AssertionError):
        assert_same(wanted, wanted | {"batch_stats[0]": wanted["batch_stats[0]"] + 1})


@each
def test_a_stream_of_its_own(backend: str, case: Case) -> None:
    """Inputs arrive late on a side stream: kernels elsewhere would have read what was before.

    The host is not made to wait: when the calls return, the stream is still busy.
    """
    e = exact(backend, case)
    module = e.target.module
    wanted = results(module, e)
    late = exact(backend, case)
    for t in tensors(late).values():
        t.zero_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(module, late)  # memory for this stream is there afterwards
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        for name, t in tensors(e).items():
            tensors(late)[name].copy_(t)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = results(module, late)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not stream.query()
    stream.synchronize()
    assert_same(found, wanted)


@each
def test_a_graph_is_captured_and_replayed(backend: str, case: Case) -> None:
    e, other = exact(backend, case), exact(backend, case)
    module = e.target.module
    wanted = results(module, other)  # compiles and loads what the capture needs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(module, e)
    for name, t in tensors(e).items():
        t.copy_(tensors(other)[name])
    for t in found.values():
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, wanted)


@each
def test_a_second_device(backend: str, case: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    e = exact(backend, case, 1)
    found = results(e.target.module, e)
    assert torch.cuda.current_device() == 0
    assert {t.device for t in found.values()} == {torch.device("cuda", 1)}
    assert_right(found, e)


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=needs_gpu) for c in CASES])
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
def test_float32(case: Case, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers and halves are exact in TF32, too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    e = exact("triton", case, dtype=F32)
    assert_right(results(e.target.module, e), e)


@pytest.fixture
def memory() -> Iterator[None]:
    """The test's memory is there for other processes afterwards."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.large
@pytest.mark.usefixtures("memory")
@each
def test_past_int32(backend: str, case: Case) -> None:
    """Tensors of more than 2^31 elements: the last images are those of a small batch."""
    kept = 4
    small = exact(backend, dataclasses.replace(case, n=kept))
    n = 2**31 // small.z[0].numel() + kept
    free, _ = torch.cuda.mem_get_info()
    needed = n * 2 * (3 * small.x[0].numel() + 4 * small.z[0].numel())
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GB of GPU memory, {free >> 30} are free")
    module = small.target.module
    reason = module.why_not(
        dataclasses.replace(
            small.target.problem(dataclasses.replace(case, n=n)),
            device_type="cuda",
            device_index=0,
        )
    )
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")

    def large(t: Tensor) -> Tensor:
        shape = (n, *t.shape[1:])
        format = {"memory_format": torch.channels_last}
        whole = torch.empty(shape, dtype=t.dtype, device=t.device, **format).zero_()
        whole[-kept:] = t
        return whole

    conv = case.conv
    x, z, dy = large(small.x), large(small.z), large(small.dy)
    assert min(x.numel(), z.numel()) > 2**31
    vectors = (small.scale, small.shift)

    def check(whole: Tensor | None, part: Tensor | None) -> None:
        assert whole is not None
        assert part is not None
        assert torch.equal(whole[-kept:], part)

    check(
        module.conv_affine_relu(x, small.weight, *vectors, residual=z, **conv),
        module.conv_affine_relu(small.x, small.weight, *vectors, residual=small.z, **conv),
    )
    check(
        module.conv_stats(x, small.weight, bn=small.bn, **conv)[0],
        module.conv_stats(small.x, small.weight, bn=small.bn, **conv)[0],
    )
    check(module.normalize_relu(z, *vectors), module.normalize_relu(small.z, *vectors))
    # a gradient of zeros but for the last images: sums over all pixels are those of the last
    frozen = (small.vectors, None)
    whole = module.conv_backward(dy, x, small.weight, bn=(z, *frozen), **conv)
    part = module.conv_backward(small.dy, small.x, small.weight, bn=(small.z, *frozen), **conv)
    check(whole[0], part[0])
    assert torch.equal(whole[1], part[1])
    *sums, _ = module.bn_relu_backward(dy, z, small.vectors)
    *parts, _ = module.bn_relu_backward(small.dy, small.z, small.vectors)
    assert torch.equal(torch.stack(sums), torch.stack(parts))


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=needs_gpu) for c in CASES])
def test_autotuning(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is chosen computes the same; a capture times nothing; the disk is read again."""
    monkeypatch.setenv("RESNEXT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    e = exact("triton", case)
    wanted = results(e.target.module, e)
    monkeypatch.setattr(tuning, "_asked", True)
    alternatives = triton._alternatives
    monkeypatch.setattr(triton, "_alternatives", lambda *args: alternatives(*args)[:2])

    def check(found: dict[str, Tensor]) -> None:
        torch.cuda.synchronize()
        for name, t in found.items():  # statistics are merged in another order
            torch.testing.assert_close(t, wanted[name], rtol=1e-5, atol=1e-5)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(e.target.module, e)
    assert not list(tmp_path.iterdir())
    graph.replay()
    check(captured)
    check(results(e.target.module, e))
    files = sorted(tmp_path.iterdir())
    assert files
    assert all(min(t for t in json.loads(f.read_text())["times_ms"] if t) > 0 for f in files)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr("triton.testing.do_bench", None)  # is not called
    check(results(e.target.module, e))
    assert sorted(tmp_path.iterdir()) == files


def on_gpu(*parameters: Any) -> Any:
    return pytest.param(*parameters, id="-".join(map(str, parameters)), marks=needs_gpu)


@pytest.mark.parametrize("mode", ["eval", "forward+backward"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [on_gpu(b, d) for b in BACKENDS for d in ("float16", "bfloat16", "float32")
     if (b, d) != ("cuda", "float32")],
)  # fmt: skip
def test_a_network(backend: str, dtype: str, mode: str) -> None:
    """torchvision's ResNeXt-50 after `fuse`, in autocast, is as exact as before."""
    case = rows.Case(
        "network", mode, 4, 96, dtype=dtype, device="cuda", backend=backend, model="resnext50_32x4d"
    )
    work = peers.workload(case)
    candidate = work.build(peers.OURS)
    with peers.poisoned(True):
        results = candidate.results(candidate.run())
    verdict = peers.check(work, results, peers.eager_errors(work))
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [on_gpu(torch.float16), on_gpu(torch.float32)])
def test_a_compiled_block(dtype: torch.dtype, training: bool) -> None:
    """One graph for the CUDA device, with the numbers of the block without torch.compile."""
    torch.compiler.reset()
    module = FusedGroupedBottleneck(256, 64, groups=32, base_width=4).train(training)
    module = module.to("cuda", memory_format=torch.channels_last)
    x = torch.randn(4, 256, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)

    def step(module: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.autocast("cuda", dtype, enabled=dtype != F32):
            y = module(leaf)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [leaf, *parameters])]

    parameters = list(module.parameters())
    wanted = step(module)
    for got, value in zip(step(torch.compile(module, fullgraph=True)), wanted, strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(got, value, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)
