"""The op among torch's other machinery: compilers, autocast, threads, processes, memory."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Target, floor, largest, make_inputs, plain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from resnext_kernels import FusedGroupedBottleneck, GroupedConvBNReLU, backends, ops
from resnext_kernels.backends import cpu
from resnext_kernels.functional import grouped_conv_bn_relu
from resnext_kernels.problem import ConvProblem

CASE = Case(2, 128, 14, 15, groups=32)
F32_CPU = Target("cpu", torch.float32)

needs_cpu = pytest.mark.skipif(
    cpu.why_not(F32_CPU.problem(CASE)) is not None, reason=str(cpu.why_not(F32_CPU.problem(CASE)))
)
needs_linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc/self")


def images(n: int, c: int = 64, size: int = 8) -> Tensor:
    return torch.randn(n, c, size, size).contiguous(memory_format=torch.channels_last)


def block(training: bool) -> nn.Module:
    torch.manual_seed(1)
    return FusedGroupedBottleneck(64, 16, groups=8, base_width=32).train(training)


def backward(module: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """y, dx and every parameter's gradient."""
    x = x.clone().requires_grad_()
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


# torch.compile, torch.export, opcheck ----------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("compiler", "training"),
    [("aot_eager", False), ("aot_eager", True), ("inductor", True)],
    ids=["eval-aot_eager", "train-aot_eager", "train-inductor"],
)
def test_compile_whole_graph_with_dynamic_batch(compiler: str, training: bool) -> None:
    """One graph without a break, one compilation for every batch size, the same numbers."""
    eager, compiled = block(training), block(training)
    run = torch.compile(compiled, fullgraph=True, dynamic=True, backend=compiler)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 3, 5):
            x = images(n)
            for ours, expected in zip(backward(run, x), backward(eager, x), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for (name, ours), expected in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, msg=name)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_function_obeys_use() -> None:
    """The choice of a backend is made when the compiled function runs, not when it is traced."""
    module = GroupedConvBNReLU(64, 64, 16).eval()
    run = torch.compile(module, fullgraph=True, backend="eager")
    x = images(2).double()
    module.double()
    run(x)
    with backends.use("cpu"), pytest.raises(RuntimeError, match="does not serve"):
        run(x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_export_with_dynamic_batch(training: bool) -> None:
    module = block(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (images(2),), dynamic_shapes={"x": {0: batch}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("resnext_kernels.") for target in targets)
    x = images(5)
    torch.testing.assert_close(program.module()(x), block(training)(x))


def operator_calls() -> dict[str, tuple]:
    """Calls of every operator, without and with its optional arguments."""

    def images(*shape: int) -> Tensor:
        t = torch.randn(*shape).contiguous(memory_format=torch.channels_last)
        return t.requires_grad_()

    def vector(size: int) -> Tensor:
        return torch.rand(size) + 0.5

    def batch_norm(size: int, *, frozen: bool = False, affine: bool = True) -> tuple:
        affines = [vector(size).requires_grad_() if affine else None for _ in range(2)]
        statistics = [vector(size) if frozen else None for _ in range(2)]
        return (*affines, *statistics, 1e-5, "")

    c, k, groups = 12, 16, 4
    x, weight = images(2, c, 5, 6), torch.randn(k, c // groups, 3, 3, requires_grad=True)
    z, residual = images(2, k, 5, 6), images(2, k, 5, 6)
    pointwise = torch.randn(8, k, 1, 1, requires_grad=True)
    wide, square = images(2, 32, 5, 6), torch.randn(k, 32, 1, 1, requires_grad=True)
    none = (None, None, None, None, None, "")  # no BatchNorm
    conv, strided = (1, groups, 1, ""), (2, groups, 2, "")
    pool = ([3, 3], [2, 2], [1, 1], [1, 1], False, "")
    running = (*(vector(k) for _ in range(4)), 1e-5)
    in_running = (*(vector(c) for _ in range(4)), 1e-5)
    no_affine = (None, None, *running[2:])
    plain, normal = (x.detach(), weight.detach()), z.detach()
    bn, frozen = batch_norm(k), batch_norm(k, frozen=True)
    absent = none[:5]
    first, third = torch.randn(12, 32, 1, 1), torch.randn(k, k, 1, 1)
    full = torch.randn(32, k, 1, 1, requires_grad=True)
    convs = [t.requires_grad_() for t in (first, third)]
    branch = (wide, convs[0], *batch_norm(c), weight, *bn, convs[1], *bn)
    return {
        "conv_bn_relu_eval": (*plain, *no_affine, *conv, None, *absent),
        "conv_bn_relu_eval residual": (*plain, *running, *conv, residual.detach(), *absent),
        "conv_bn_relu_eval full": (*plain, *running, *conv, residual.detach(), *in_running),
        "bn_relu_eval": (normal, *no_affine, "", None, *absent),
        "bn_relu_eval residual": (normal, *running, "", residual.detach(), *absent),
        "bn_relu_eval full": (normal, *running, "", residual.detach(), *running),
        "conv_bn_relu": (x, weight, *bn, None, *none, None, *conv),
        "conv_bn_relu no affine": (
            *(x, weight, *batch_norm(k, affine=False), None, *none, None, *conv),
        ),
        "conv_bn_relu frozen": (x, weight, *frozen, residual, *none, None, *conv),
        "conv_bn_relu full": (x, weight, *bn, None, *batch_norm(c), pointwise, *strided),
        "bn_relu": (z, *bn, None, *none, ""),
        "bn_relu residual": (z, *bn, residual, *none, ""),
        "bn_relu full": (z, *bn, residual, *frozen, ""),
        "bottleneck": (*branch, residual, None, *none, 1, *conv),
        "bottleneck frozen": (
            *(wide, convs[0], *batch_norm(c, frozen=True), weight, *frozen, convs[1], *frozen),
            *(residual, None, *batch_norm(k, frozen=True, affine=False), 1, *conv),
        ),
        "bottleneck conv": (*branch, None, square, *bn, 2, *strided),
        "bottleneck identity": (
            *(wide, convs[0], *batch_norm(c), weight, *bn, full, *batch_norm(32)),
            *(None, None, *none, 1, *conv),
        ),
        "bn_relu_max_pool": (z, *bn, *pool),
        "bn_relu_max_pool frozen": (z, *frozen, *pool),
        "conv1x1": (wide, square, 1, ""),
        "conv1x1 stride": (wide, square, 2, ""),
        "conv1x1 narrow": (z, pointwise, 1, ""),
        "conv1x1_bn_relu_eval": (*(wide.detach(), square.detach(), *running, "", None, *absent),),
        "conv1x1_bn_relu_eval full": (
            *(wide.detach(), square.detach(), *running, "", residual.detach(), *running),
        ),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    """Schema, shapes of the fake implementation, autograd registration, AOT dispatch."""
    operator = getattr(torch.ops.resnext_kernels, name.split()[0]).default
    torch.library.opcheck(operator, operator_calls()[name])


def test_every_operator_with_autograd_is_checked() -> None:
    """The backward operators are checked through their forward's AOT dispatch."""
    checked = {name.split()[0] for name in operator_calls()}
    operators = {name for name in ops.__all__ if isinstance(getattr(ops, name), ops.Operator)}
    assert {name for name in operators if not name.endswith("_backward")} == checked


# What listens to operators ----------------------------------------------------------------------


class Recorder:
    """Names of the operators of this package that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def record(self, func: object, args: tuple, kwargs: dict | None) -> object:
        if str(func).startswith("resnext_kernels."):
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


class DispatchRecorder(Recorder, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs)


class FunctionRecorder(Recorder, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs)


class Subclass(Tensor):
    """Keeps its type and records, as a tensor with __torch_function__ does."""

    names: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if str(func).startswith("resnext_kernels."):
            cls.names.append(str(func).split(".")[1])
        return super().__torch_function__(func, types, args, kwargs)


def small(training: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    module = GroupedConvBNReLU(16, 16, 4).train(training).requires_grad_(training)
    return module, images(2, 16, 5).requires_grad_(training)


EXPECTED = {False: ["conv_bn_relu_eval"], True: ["conv_bn_relu", "conv_bn_relu_backward"]}
EVAL_OR_TRAIN = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@EVAL_OR_TRAIN
def test_an_ordinary_call_is_the_dispatched_one(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through the dispatcher and without it."""
    module, x = small(training)

    def results() -> list[Tensor]:
        return backward(module, x) if training else [module(x)]

    with DispatchRecorder() as recorder:
        dispatched = results()
    assert recorder.names == EXPECTED[training]
    for name in EXPECTED[training]:
        monkeypatch.setattr(getattr(ops, name), "overload", None)
    assert all(torch.equal(a, b) for a, b in zip(results(), dispatched, strict=True))


def test_an_ordinary_call_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = small(training=False)
    expected = module(x)
    monkeypatch.setattr(ops.conv_bn_relu_eval, "overload", None)
    with torch.inference_mode():
        y, again = module(x), module(x.clone())
    assert y.is_inference()
    assert torch.equal(y, expected)
    assert torch.equal(again, expected)


@EVAL_OR_TRAIN
def test_function_modes_see_the_operators(training: bool) -> None:
    module, x = small(training)
    with FunctionRecorder() as recorder:
        module(x)
    assert recorder.names == EXPECTED[training][:1]


@EVAL_OR_TRAIN
def test_subclasses_see_the_operators(training: bool) -> None:
    module, x = small(training)
    Subclass.names.clear()
    y = module(x.detach().as_subclass(Subclass).requires_grad_(training))
    assert type(y) is Subclass
    assert Subclass.names == EXPECTED[training][:1]


@EVAL_OR_TRAIN
def test_flops_are_counted(training: bool) -> None:
    module, x = small(training)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        if training:
            y.sum().backward()
    forward = 2 * 9 * y.numel() * 4
    assert counter.get_total_flops() == forward * (3 if training else 1)


@EVAL_OR_TRAIN
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_fake_tensors(inside: bool, training: bool) -> None:
    """In their mode, and left over from it."""
    module, x = small(training)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(x)
    with mode if inside else contextlib.nullcontext():
        y = module(fake)
        if training:
            y.sum().backward()
    assert type(y) is FakeTensor
    assert y.shape == x.shape
    assert type(fake.grad) is (FakeTensor if training else type(None))


@pytest.mark.filterwarnings("ignore:::torch.jit", "ignore::torch.jit.TracerWarning")
def test_make_fx_and_jit_trace() -> None:
    module, x = small(training=False)
    for tracing_mode in ("real", "fake", "symbolic"):
        traced = make_fx(module, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
        assert "conv_bn_relu_eval" in {n.target.__name__.split(".")[0] for n in calls(traced)}
    script = torch.jit.trace(module, x)
    assert "resnext_kernels::conv_bn_relu_eval" in str(script.inlined_graph)
    other = images(3, 16, 5)
    assert torch.equal(script(other), module(other))


def calls(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tangents_are_refused() -> None:
    """Forward mode, which would otherwise be left out of the result without a word."""
    x = torch.randn(2, 8, 5, 5)
    weight, vector = torch.randn(8, 2, 3, 3), torch.rand(8) + 0.5

    def layer(x: Tensor, training: bool = False) -> Tensor:
        return grouped_conv_bn_relu(x, weight, *(vector,) * 4, groups=4, training=training)

    with forward_ad.dual_level():
        layer(x)
        for training in (False, True):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                layer(forward_ad.make_dual(x, torch.ones_like(x)), training)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))


def test_vmap() -> None:
    module, x = small(training=False)
    batches = torch.stack([x, 2 * x, -x])
    each = torch.stack([module(batch) for batch in batches])
    assert torch.equal(torch.vmap(module)(batches), each)


@EVAL_OR_TRAIN
def test_lazy_negation(training: bool) -> None:
    """A negative that is a bit of the tensor, not yet a value in memory."""
    module, x = small(training)
    negative = torch._neg_view(x)
    assert negative.data_ptr() == x.data_ptr()
    assert torch.equal(module(negative), module(-x))


def test_the_profiler_shows_the_operator() -> None:
    module, x = small(training=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        module(x)
    names = {event.key for event in profiler.key_averages()}
    assert "resnext_kernels::conv_bn_relu_eval" in names


def test_below_autograd() -> None:
    """Within a kernel of another operator there is no graph, whatever the grad mode."""
    module, x = small(training=True)
    with torch._C._AutoDispatchBelowAutograd():
        y = module(x)
    assert not y.requires_grad


# autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast(training: bool, dtype: torch.dtype) -> None:
    """Result of the autocast dtype, float32 gradients; as torch's operators under autocast."""
    inputs = make_inputs(CASE, torch.float32)
    leaves = [inputs.x, inputs.weight, inputs.gamma, inputs.beta]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.autocast("cpu", dtype):
        y = grouped_conv_bn_relu(
            inputs.x,
            inputs.weight,
            inputs.gamma,
            inputs.beta,
            inputs.running_mean.clone(),
            inputs.running_var.clone(),
            training=training,
            residual=inputs.residual,
            **CASE.conv,
        )
        peer = plain(inputs, CASE.conv, training=training).y
    found = torch.autograd.grad(y, leaves, inputs.dy.to(dtype))
    truth = plain(inputs.double(), CASE.conv, training=training, residual=True).y
    assert y.dtype == dtype
    assert peer.dtype == dtype
    assert (y.double() - truth).abs().max() <= 4 * floor(dtype, largest(truth))
    assert [gradient.dtype for gradient in found] == [torch.float32] * 4


def test_autocast_of_the_block() -> None:
    theirs_like, x = block(training=True), images(2)
    expected = backward(theirs_like, x)
    with torch.autocast("cpu", torch.bfloat16):
        module = block(training=True)
        y = module(x)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), list(module.parameters()))
    assert all(g.dtype == torch.float32 for g in gradients)
    for ours, exact in zip([y.detach(), *gradients], [expected[0], *expected[2:]], strict=True):
        error = (ours.float() - exact).norm() / exact.norm()
        assert error < 0.1  # some ten roundings of bfloat16 (2**-8 each) down the block


# threads and processes --------------------------------------------------------------------------


def train_once(x: Tensor) -> list[Tensor]:
    module = block(training=True)
    return backward(module, x)


class Activations(Dataset):
    """Items that run the op where they are loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.manual_seed(index)
        x = images(2)
        with torch.no_grad():  # torch's autograd has no backward after a fork
            return block(training=True)(x) + block(training=False)(x)


def test_forked_loader_worker() -> None:
    """The op runs in a forked worker after it ran, with threads, in the parent."""
    assert torch.get_num_threads() >= 1
    expected = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker does
    for index in range(4):
        expected.append(Activations()[index])
    torch.set_num_threads(max(threads, 2))
    train_once(images(4))  # the parent's thread pool now exists
    loader = DataLoader(
        Activations(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    found = list(loader)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_bit_for_bit_from_run_to_run(num_threads: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x = images(3, size=15)
        first = train_once(x)
        for _ in range(5):
            junk = [torch.randn(size) for size in (1000, 100000)]  # move the allocations
            again = train_once(x.clone())
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            del junk
    finally:
        torch.set_num_threads(threads)


def test_several_python_threads() -> None:
    """Threads of different shapes at once get what each gets alone."""
    inputs = [images(n, size=size) for n, size in ((1, 9), (2, 14), (3, 7), (2, 1), (4, 5))]
    alone = [train_once(x) for x in inputs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(8):
            module = block_copies[i]
            found = backward(module, inputs[i])
            if not all(torch.equal(a, b) for a, b in zip(found, alone[i], strict=True)):
                wrong.append(f"thread {i}")

    # built here: torch.manual_seed is one for all threads
    block_copies = [block(training=True) for _ in inputs]
    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


COUNT_THREADS = """
import os, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from resnext_kernels.functional import grouped_conv_bn_relu
before = len(os.listdir("/proc/self/task"))
x = torch.randn(1, 128, 14, 14).contiguous(memory_format=torch.channels_last)  # too few for torch
weight = torch.randn(128, 4, 3, 3)
y = grouped_conv_bn_relu(x, weight, None, None, None, None, groups=32, training=True, backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_cpu
@needs_linux
@pytest.mark.parametrize("num_threads", [1, 3])
def test_set_num_threads_is_respected(num_threads: int) -> None:
    """A first call starts the threads that torch was told to use, and not one more."""
    result = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, str(num_threads)],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("OMP_")},
    )
    assert int(result.stdout) == num_threads - 1


@needs_cpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gil_is_released(training: bool) -> None:
    """Python runs on in another thread while a kernel does."""
    inputs = make_inputs(Case(8, 128, 112, 112, groups=32), torch.float32)
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        grouped_conv_bn_relu(
            inputs.x,
            inputs.weight,
            inputs.gamma,
            inputs.beta,
            inputs.running_mean,
            inputs.running_var,
            groups=32,
            training=training,
            backend="cpu",
        )
        span.append(time.perf_counter())

    worker = threading.Thread(target=work)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(1e-4)
    worker.join()
    start, end = span
    gaps = [b - a for a, b in zip([start, *ticks], [*ticks, end], strict=True)]
    assert max(gaps) < 0.5 * (end - start), f"no Python for {max(gaps):.3f} of {end - start:.3f} s"


# memory ---------------------------------------------------------------------------------------


def vectors_bytes(case: Case) -> int:
    return 64 * case.k * 4  # at most so many float32 vectors of K


def saved_tensors(case: Case, *, training: bool, residual: bool) -> tuple[list[Tensor], Tensor]:
    """What the op keeps for its backward pass, and x."""
    inputs = make_inputs(case, torch.float32)
    for name in ("x", "weight", "gamma", "beta", "residual"):
        getattr(inputs, name).requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = grouped_conv_bn_relu(
            inputs.x,
            inputs.weight,
            inputs.gamma,
            inputs.beta,
            inputs.running_mean,
            inputs.running_var,
            training=training,
            residual=inputs.residual if residual else None,
            **case.conv,
        )
    assert y.requires_grad
    images = {t.data_ptr(): t for t in saved if t.dim() == 4 and t.shape[-1] != 3}
    vectors = [t for t in saved if t.dim() != 4]
    assert all(t.numel() <= 8 * case.k for t in vectors)
    return list(images.values()), inputs.x


@pytest.mark.parametrize("training", [False, True], ids=["frozen", "train"])
def test_only_x_and_z_are_saved(training: bool) -> None:
    """x itself, not a copy; z; with a residual y, for the ReLU's mask."""
    images, x = saved_tensors(CASE, training=training, residual=False)
    assert len(images) == 2
    assert x.data_ptr() in {t.data_ptr() for t in images}
    images, x = saved_tensors(CASE, training=training, residual=True)
    assert len(images) == 3


def test_activations_saved_by_the_block() -> None:
    """x, the outputs of the three convolutions, y: nothing in between."""
    module, x = block(training=True), images(2).requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    width, pixels = module.conv1.out_channels, 2 * 8 * 8
    expected = (64 + width + width + 64 + 64) * pixels * 4
    assert sum(saved.values()) <= expected + 200 * width


def allocated(function: Callable[[], object]) -> int:
    """Bytes that torch allocated during the call, freed or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_allocated(dtype: torch.dtype) -> None:
    """The outputs and vectors; no copy of x, no mask, no temporary of an image's size."""
    case = Case(2, 128, 28, 28, groups=32)
    inputs = make_inputs(case, dtype)
    vectors = inputs.gamma, inputs.beta, inputs.running_mean, inputs.running_var
    image = inputs.x.numel() * dtype.itemsize
    weight = inputs.weight.numel() * dtype.itemsize

    def op(training: bool) -> Tensor:
        return grouped_conv_bn_relu(
            inputs.x, inputs.weight, *vectors, training=training, groups=32, backend="cpu"
        )

    op(False)
    assert image <= allocated(lambda: op(False)) <= image + vectors_bytes(case)  # y
    inputs.x.requires_grad_()
    inputs.weight.requires_grad_()
    assert 2 * image <= allocated(lambda: op(True)) <= 2 * image + vectors_bytes(case)  # z, y
    y = op(True)
    leaves = [inputs.x, inputs.weight]
    spent = allocated(lambda: torch.autograd.grad(y, leaves, inputs.dy))  # dx, dweight
    assert image + weight <= spent <= image + weight + vectors_bytes(case)


@needs_cpu
@needs_linux
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_resident_memory_of_a_call(training: bool) -> None:
    """What the compiled library allocates by itself stays small: the peak shows it all."""
    case = Case(8, 128, 112, 112, groups=32)
    inputs = make_inputs(case, torch.float32)
    image = inputs.x.numel() * 4
    vectors = inputs.gamma, inputs.beta, inputs.running_mean, inputs.running_var

    def resident(field: str) -> int:
        text = open("/proc/self/status").read()  # noqa: SIM115
        return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1)) * 1024  # type: ignore[union-attr]

    def op() -> Tensor:
        return grouped_conv_bn_relu(
            inputs.x, inputs.weight, *vectors, training=training, groups=32, backend="cpu"
        )

    warm = make_inputs(CASE, torch.float32)
    grouped_conv_bn_relu(warm.x, warm.weight, *vectors, training=training, groups=32, backend="cpu")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")
    before = resident("VmRSS")
    y = op()
    grown = resident("VmHWM") - before
    assert y.shape == case.out_shape
    outputs = 2 if training else 1  # z and y, or y
    assert grown <= outputs * image + 24 * 2**20, f"{grown / image:.2f} images"


def memory_available() -> int:
    if not os.path.exists("/proc/meminfo"):
        return 0
    text = open("/proc/meminfo").read()  # noqa: SIM115
    return int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1)) * 1024  # type: ignore[union-attr]


@needs_cpu
@pytest.mark.large
def test_more_than_2_to_the_31_elements() -> None:
    """Offsets past 2**31 elements, forward and backward, checked in the first and last rows."""
    if memory_available() < 16 * 2**30:
        pytest.skip("needs 16 GB of free memory")
    c, groups, w = 8, 2, 2**12
    h = 2**31 // (c * w) + 8
    x = torch.zeros(1, h, w, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    for rows in (slice(0, 4), slice(h - 4, h)):
        x[:, :, rows] = torch.randn(1, c, 4, w).bfloat16()
    weight = torch.randn(c, c // groups, 3, 3).bfloat16()
    scale, shift = torch.rand(c) + 0.5, torch.randn(c)
    y = cpu.conv_affine_relu(x, weight, scale, shift, groups=groups)
    parts = {"first": (x[:, :, :4], slice(0, 3)), "last": (x[:, :, -4:], slice(1, 4))}

    def vector(t: Tensor) -> Tensor:
        return t.double()[:, None, None]

    for name, (part, rows) in parts.items():
        z = F.conv2d(part.double(), weight.double(), padding=1, groups=groups)[:, :, rows]
        truth = F.relu(vector(scale) * z + vector(shift))
        actual = y[:, :, :3] if name == "first" else y[:, :, -3:]
        assert (actual.double() - truth).abs().max() <= floor(torch.bfloat16, largest(truth)), name
    middle = y[:, :, h // 2, w // 2].double().flatten()
    torch.testing.assert_close(middle, F.relu(shift).double(), rtol=2**-8, atol=0)
    # dz = dy: dx and dweight; zeros add nothing to dweight, whose truth is that of the ends
    dx, dweight = cpu.conv_backward(x, x, weight, groups=groups)
    assert dx is not None
    assert dweight is not None
    true_dweight = torch.zeros_like(weight, dtype=torch.float64)
    for name, (part, rows) in parts.items():
        a = F.pad(part.double(), (0, 0, 2, 2)).requires_grad_()  # the zeros that surround the rows
        leaf = weight.double().requires_grad_()
        z = F.conv2d(a, leaf, padding=1, groups=groups)
        true_dx, found = torch.autograd.grad(z, [a, leaf], F.pad(part.double(), (0, 0, 2, 2)))
        true_dweight += found
        truth = true_dx[:, :, 2:-2][:, :, rows]
        actual = dx[:, :, :3] if name == "first" else dx[:, :, -3:]
        assert (actual.double() - truth).abs().max() <= floor(torch.bfloat16, largest(truth)), name
    scale_of_sum = largest(true_dweight) + (8 * w) ** 0.5
    assert (dweight.double() - true_dweight).abs().max() <= floor(torch.bfloat16, scale_of_sum)


def test_problem_counts_do_not_overflow() -> None:
    problem = ConvProblem(64, 2**10, 2**10, 256, groups=32)
    assert problem.flops() == 2 * 9 * 64 * 2**20 * 256 * 8
    assert problem.bytes() == (2 * 64 * 2**20 * 256 + 9 * 256 * 8) * 4
