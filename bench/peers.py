"""Who runs: our kernels and the peers, each a `Candidate` over the same inputs.

Every candidate of a row computes the same equation from the same tensors, allocates its results
inside the call, and keeps its own running statistics (or its own copy of the model). What a frozen
graph prepares once (folding, weight reordering, compilation) is prepared before the first call.
`DESCRIPTION` says who they are.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from bench import timing
from bench.cases import DTYPES, LAYOUTS, Case

OURS = "ours"
PEERS = (
    "eager",
    "eager nchw",
    "folded",
    "loop",
    "compile",
    "onnxruntime",
    "openvino",
    "ours float32",
)
OPENVINO_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
DESCRIPTION = """\
  eager         conv2d -> batch_norm -> relu_ of torch: oneDNN on a CPU, cuDNN on a GPU
  eager nchw    the same on NCHW tensors (GPU, where it is sometimes the faster one)
  folded        BatchNorm folded into a weight reordered ahead, ReLU as post-op (inference)
  loop          the grouped convolution as a loop over its groups
  compile       torch.compile of eager; with freezing in inference
  onnxruntime   the exported model on the same threads (networks in inference, CPU)
  openvino      the same
  ours float32  ours on float32 inputs, beside a row of a narrower dtype"""
EPS = 1e-5
TF32_EPS = 2.0**-10


class Candidate(NamedTuple):
    """``run`` is what is timed; ``results`` turns what it returned into named tensors to check."""

    run: Callable[[], Any]
    results: Callable[[Any], dict[str, Tensor]]


class Workload(NamedTuple):
    """A case made concrete: the float64 truth, and how to build each candidate."""

    truth: dict[str, Tensor]
    build: Callable[[str], Candidate]
    bound: Callable[[str, float], float]  # (result's name, eager's error) -> largest error allowed
    error: Callable[[Tensor, Tensor], float]
    steady: tuple[str, ...]  # results that every later call gives again
    copies: int = 1  # of the inputs, which calls use in turn


def peers_of(case: Case, wanted: Sequence[str] = PEERS) -> tuple[list[str], dict[str, str]]:
    """The peers that apply to a case, and those that would but are absent, with the reason."""
    inference = case.mode == "eval"
    exported = case.level == "network" and inference and case.device == "cpu"
    applies = {
        "eager": True,
        "eager nchw": case.device == "cuda" and case.layout == "channels_last",
        "folded": case.level == "op" and inference,
        "loop": case.level == "op" and case.groups > 1,
        "compile": True,
        "onnxruntime": exported and case.dtype == "float32",
        "openvino": exported and case.dtype in OPENVINO_DTYPES,
        "ours float32": case.level == "op" and case.dtype != "float32",
    }
    needs = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
    present, absent = [], {}
    for name in wanted:
        if not applies[name]:
            continue
        missing = [m for m in needs.get(name, ()) if importlib.util.find_spec(m) is None]
        if missing:
            absent[name] = f"{' and '.join(missing)} not installed: pip install '.[bench]'"
        else:
            present.append(name)
    return present, absent


def usual_peers(case: Case, suite: str) -> tuple[str, ...]:
    """All peers that a suite measures; those of a bar are not the only ones.

    A compilation takes longer than the rest of a row. Over the cardinalities, where it runs the
    same oneDNN kernels as eager and folded, it is left to ``--peer``.
    """
    if suite == "quick":
        compiled = False
    elif suite == "bars":
        compiled = case.level == "network"
    else:
        compiled = case.level != "op" or case.series == "stages"
    return PEERS if compiled else tuple(name for name in PEERS if name != "compile")


def workload(case: Case) -> Workload:
    """Inputs, truth and candidates of a case."""
    return _op_workload(case) if case.level == "op" else _module_workload(case)


# ---------------------------------------------------------------------------------------- layer


class Layer(NamedTuple):
    """The tensors of one layer: x (N, C, H, W), weight (K, C/G, 3, 3), per-channel vectors, dy."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor


Forward = Callable[..., Tensor]


def layer_tensors(case: Case, seed: int = 0) -> Layer:
    """Random tensors with statistics that are not trivial, and the gradient of y.

    dy is zero where the ReLU's input lies within rounding of zero: there float32 and float64 may
    disagree on the mask, and the comparison would measure luck.
    """
    g = torch.Generator(case.device).manual_seed(seed)
    c, fan_in = case.c, 9 * case.c // case.groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=case.device)

    def uniform() -> Tensor:
        return 0.5 + torch.rand(c, generator=g, device=case.device)

    def images(t: Tensor) -> Tensor:  # the weight too, as in a model of that memory format
        return t.to(DTYPES[case.dtype]).to(memory_format=LAYOUTS[case.layout])

    x = images(normal(case.n, c, case.size, case.size))
    weight = images(normal(c, c // case.groups, 3, 3) / fan_in**0.5)
    gamma, beta = uniform(), 0.5 * normal(c)
    gamma[::7] *= -1
    mean, var = 0.1 * normal(c), uniform()
    dy = images(normal(case.n, c, case.out_size, case.out_size))
    t = Layer(x, weight, gamma, beta, mean, var, dy)
    if case.mode == "forward+backward":
        z = _conv(t.x.double(), t.weight.double(), case)
        pre = F.batch_norm(z, None, None, t.gamma.double(), t.beta.double(), True, 0.0, EPS)
        single = TF32_EPS if case.device == "cuda" else 16 * torch.finfo(torch.float32).eps
        kink = 4 * max(torch.finfo(t.x.dtype).eps, single)
        t.dy.masked_fill_(pre.abs() <= kink * pre.abs().max(), 0)
    return t


def _conv(x: Tensor, weight: Tensor, case: Case) -> Tensor:
    return F.conv2d(x, weight, stride=case.stride, padding=1, groups=case.groups)


def _ours(case: Case) -> Forward:
    from resnext_kernels.functional import grouped_conv_bn_relu

    training = case.mode != "eval"

    def forward(x, weight, gamma, beta, mean, var):  # type: ignore[no-untyped-def]
        return grouped_conv_bn_relu(
            x,
            weight,
            gamma,
            beta,
            mean,
            var,
            stride=case.stride,
            groups=case.groups,
            training=training,
            momentum=0.1,
            eps=EPS,
            backend=case.backend,
        )

    return forward


def _eager(case: Case) -> Forward:
    training = case.mode != "eval"

    def forward(x, weight, gamma, beta, mean, var):  # type: ignore[no-untyped-def]
        z = _conv(x, weight, case)
        return F.relu_(F.batch_norm(z, mean, var, gamma, beta, training, 0.1, EPS))

    return forward


def _loop(case: Case) -> Forward:
    training = case.mode != "eval"

    def forward(x, weight, gamma, beta, mean, var):  # type: ignore[no-untyped-def]
        pairs = zip(x.chunk(case.groups, 1), weight.chunk(case.groups, 0), strict=True)
        z = torch.cat([F.conv2d(xg, wg, stride=case.stride, padding=1) for xg, wg in pairs], 1)
        return F.relu_(F.batch_norm(z, mean, var, gamma, beta, training, 0.1, EPS))

    return forward


def _folded(case: Case, t: Layer) -> Forward:
    scale = t.gamma.double() * (t.running_var.double() + EPS).rsqrt()
    weight = (t.weight.double() * scale.view(-1, 1, 1, 1)).to(t.weight.dtype)
    bias = (t.beta.double() - t.running_mean.double() * scale).to(t.weight.dtype)
    stride, one = [case.stride] * 2, [1, 1]
    if case.device == "cuda":
        weight = weight.contiguous(memory_format=LAYOUTS[case.layout])
        return lambda x, *_: torch.cudnn_convolution_relu(
            x, weight, bias, stride, one, one, case.groups
        )
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        weight.to_mkldnn(), one, stride, one, case.groups, list(t.x.shape)
    )
    return lambda x, *_: torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, one, stride, one, case.groups, "relu", [], ""
    )


class _EagerLayer(nn.Module):
    """The eager layer as a module: freezing folds only what a module owns."""

    def __init__(self, case: Case, t: Layer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(case.c, case.c, 3, case.stride, 1, groups=case.groups, bias=False)
        self.bn = nn.BatchNorm2d(case.c)
        self.conv.weight = nn.Parameter(t.weight)
        self.bn.weight, self.bn.bias = nn.Parameter(t.gamma), nn.Parameter(t.beta)
        self.bn.running_mean, self.bn.running_var = t.running_mean, t.running_var

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


def _compiled(case: Case, t: Layer) -> Forward:
    torch._dynamo.reset()
    if case.mode != "eval":
        return torch.compile(_eager(case), dynamic=False)
    module = torch.compile(_EagerLayer(case, t).eval(), dynamic=False)
    return lambda x, *_: module(x)


def _frozen(candidate: Candidate) -> Candidate:
    """Compile now, with parameters as constants; torch.compile's own option does not do it."""
    with torch._inductor.config.patch(freezing=True):
        candidate.run()
    return candidate


def _run_op(forward: Forward, t: Layer, mode: str) -> Candidate:
    """The pass of ``mode`` around a forward function, on a private copy of the statistics."""
    mean, var = t.running_mean.clone(), t.running_var.clone()
    leaves = [v.detach().requires_grad_(mode != "eval") for v in t[:4]]

    def run_eval() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (forward(*leaves, mean, var),)

    def run_forward() -> tuple[Tensor, ...]:
        return (forward(*leaves, mean, var), mean, var)

    def run_both() -> tuple[Tensor, ...]:
        y = forward(*leaves, mean, var)
        return (y, mean, var, *torch.autograd.grad(y, leaves, t.dy))

    run = {"eval": run_eval, "forward": run_forward, "forward+backward": run_both}[mode]
    names = ("y", "running_mean", "running_var", "dx", "dweight", "dgamma", "dbeta")
    return Candidate(run, lambda out: dict(zip(names, out, strict=False)))


def _op_workload(case: Case) -> Workload:
    t, copies = layer_tensors(case), timing.rotation(case.bytes_moved, case.device)
    double = Layer(*(v.double() for v in t))
    exact = _run_op(_eager(case), double, case.mode)
    truth = {k: v.detach() for k, v in exact.results(exact.run()).items()}

    def build(name: str) -> Candidate:
        tensors = t
        if name == "ours float32":
            tensors = Layer(*(v.float() for v in t))
        elif name == "eager nchw":
            x, weight, dy = (v.contiguous() for v in (t.x, t.weight, t.dy))
            tensors = t._replace(x=x, weight=weight, dy=dy)
        makers: dict[str, Callable[[], Forward]] = {
            OURS: lambda: _ours(case),
            "ours float32": lambda: _ours(case),
            "eager": lambda: _eager(case),
            "eager nchw": lambda: _eager(case),
            "loop": lambda: _loop(case),
            "folded": lambda: _folded(case, tensors),
            "compile": lambda: _compiled(case, tensors),
        }
        forward = makers[name]()
        candidate = in_turn([_run_op(forward, own, case.mode) for own in copied(tensors, copies)])
        return _frozen(candidate) if (name, case.mode) == ("compile", "eval") else candidate

    pixels = case.n * case.out_size**2
    terms = 9 * case.c // case.groups

    def bound(result: str, eager_error: float) -> float:
        """Twice what eager errs, one rounding to the dtype, and float32 sums of so many terms."""
        summed = pixels if result in ("dweight", "dgamma", "dbeta", "running_mean") else terms
        single = torch.finfo(torch.float32).eps
        return 2 * eager_error + torch.finfo(DTYPES[case.dtype]).eps + single * summed**0.5

    steady = tuple(name for name in truth if not name.startswith("running_"))
    return Workload(truth, build, bound, max_error, steady, copies)


def copied(t: Layer, count: int) -> list[Layer]:
    """``t`` and further copies of it in memory of their own."""
    return [t, *(Layer(*(v.clone() for v in t)) for _ in range(count - 1))]


def in_turn(candidates: Sequence[Candidate]) -> Candidate:
    """Each call is one of the next candidate."""
    if len(candidates) == 1:
        return candidates[0]
    order = itertools.cycle(candidates)
    return Candidate(lambda: next(order).run(), candidates[0].results)


def max_error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute error, relative to the largest value of the truth."""
    if value.numel() == 0:
        return 0.0
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def norm_error(value: Tensor, truth: Tensor) -> float:
    """The error's Euclidean norm, relative to the truth's."""
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


# ---------------------------------------------------------------------------- block and network


def eager_module(case: Case) -> nn.Module:
    """The block or network as plain torch modules, weights random, statistics of a forward pass."""
    torch.manual_seed(0)
    if case.level == "network":
        module = _plain_network(case.model)
    else:
        from torchvision.models.resnet import Bottleneck

        module = Bottleneck(*_block_arguments(case)[0], **_block_arguments(case)[1])
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for bn in norms:
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.2)
            bn.momentum = 1.0
        module.train()(module_input(case)[:2].float().cpu())
    for bn in norms:
        bn.momentum = 0.1
    return module.to(memory_format=LAYOUTS[case.layout])


def factory(name: str) -> Callable[[], nn.Module]:
    """The factory of `resnext_kernels.models` of that name; ``resnext50_2x40d`` from its template.

    ValueError when there is none.
    """
    from resnext_kernels import models

    if name in models.__all__ and name.startswith(("resnet", "resnext5", "resnext1", "resnext29")):
        return getattr(models, name)
    parsed = re.fullmatch(r"resnext(\d+)_(\d+)x(\d+)d", name)
    if not parsed:
        raise ValueError(
            f"{name} is no network of resnext_kernels.models nor resnext50_2x40d's like"
        )
    return partial(models.resnext, *map(int, parsed.groups()))


def _plain_network(name: str) -> nn.Module:
    """The network of our factory built from torchvision's blocks alone."""
    from torchvision.models.resnet import Bottleneck, ResNet

    ours: Any = factory(name)()
    stages = [ours.get_submodule(f"layer{i + 1}") for i in range(ours.num_stages)]
    conv2 = stages[0][0].conv2
    layers = [*map(len, stages), 1][:4]
    plain = ResNet(
        Bottleneck, layers, groups=conv2.groups, width_per_group=conv2.out_channels // conv2.groups
    )
    if len(stages) < 4:  # the CIFAR networks
        plain.layer4 = nn.Sequential()
    plain.conv1, plain.maxpool, plain.fc = ours.conv1, ours.maxpool, ours.fc
    plain.load_state_dict(ours.state_dict())
    return plain


def _block_arguments(case: Case) -> tuple[tuple[int, int], dict[str, Any]]:
    """``(inplanes, planes)`` and the keyword arguments of torchvision's Bottleneck."""
    inplanes = case.planes * (2 if case.stride > 1 else 4)
    downsample = None
    if case.stride > 1:
        conv = nn.Conv2d(inplanes, case.planes * 4, 1, case.stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(case.planes * 4))
    width = math.ceil(case.c * 64 / (case.planes * case.groups))
    return (inplanes, case.planes), {
        "stride": case.stride,
        "groups": case.groups,
        "base_width": width,
        "downsample": downsample,
    }


def module_input(case: Case) -> Tensor:
    """A batch of images for a network, of feature maps for a block."""
    channels = 3
    if case.level == "block":
        channels = case.planes * (2 if case.stride > 1 else 4)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(case.n, channels, case.size, case.size, generator=g)
    return x.to(case.device, memory_format=LAYOUTS[case.layout])


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _fused_module(case: Case, eager: nn.Module) -> nn.Module:
    if case.level == "network":
        from resnext_kernels.fuse import fuse

        fuse(eager)
        return eager
    from resnext_kernels import FusedGroupedBottleneck

    arguments, keywords = _block_arguments(case)
    module = FusedGroupedBottleneck(*arguments, **keywords)
    module.load_state_dict(eager.state_dict())
    return module


@contextmanager
def _mode(case: Case, dtype: torch.dtype) -> Iterator[None]:
    """Inference or training; narrower dtypes through autocast, as networks are run in practice."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    with (
        torch.inference_mode(case.mode == "eval"),
        torch.autocast(case.device, dtype, enabled=narrow),
    ):
        yield


def _run_module(case: Case, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Candidate:
    """Inference, the block's forward + backward, or the network's whole training step."""
    module = module.to(case.device)
    if case.mode == "eval":

        def infer() -> Tensor:
            with _mode(case, dtype):
                return module(x)

        return Candidate(infer, lambda y: {"y": y})
    parameters = {k.removeprefix("_orig_mod."): p for k, p in module.named_parameters()}
    if case.level == "block":
        x = x.detach().requires_grad_()
        dy = torch.randn(
            case.n,
            case.planes * 4,
            case.out_size,
            case.out_size,
            generator=torch.Generator().manual_seed(2),
        ).to(case.device, x.dtype, memory_format=_format(x))

        def block() -> tuple[Tensor, ...]:
            with _mode(case, dtype):
                y = module(x)
            if case.mode == "forward":
                return (y,)
            return (y, *torch.autograd.grad(y, (x, *parameters.values()), dy.to(y.dtype)))

        return Candidate(block, lambda out: dict(zip(("y", "dx", *parameters), out, strict=False)))
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-4, momentum=0.9)
    target = torch.arange(case.n, device=case.device) % 10

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _mode(case, dtype):
            loss = F.cross_entropy(module(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def results(loss: Tensor) -> dict[str, Tensor]:
        grads = [p.grad.flatten() for p in parameters.values() if p.grad is not None]
        return {"loss": loss, "gradients": torch.cat(grads)}

    return Candidate(step, results)


def _module_workload(case: Case) -> Workload:
    eager = eager_module(case).train(case.mode != "eval")
    x, dtype = module_input(case), DTYPES[case.dtype]
    exact = _run_module(case, copy.deepcopy(eager).double(), x.double(), torch.float64)
    truth = {k: v.detach().clone() for k, v in exact.results(exact.run()).items()}
    del exact

    copies = timing.rotation(case.bytes_moved, case.device) if case.level == "block" else 1

    def run(module: nn.Module, x: Tensor) -> Candidate:
        own = [x, *(x.clone() for _ in range(copies - 1))]
        return in_turn([_run_module(case, module, images, dtype) for images in own])

    def build(name: str) -> Candidate:
        module = copy.deepcopy(eager)
        if name == OURS:
            module = _fused_module(case, module).train(eager.training)
            module.to(memory_format=LAYOUTS[case.layout])
            return _with_backend(case, run(module, x))
        if name == "compile":
            torch._dynamo.reset()
            compiled: Any = torch.compile(module, dynamic=False)
            return _frozen(run(compiled, x)) if case.mode == "eval" else run(compiled, x)
        if name == "eager nchw":
            return run(module.to(memory_format=torch.contiguous_format), x.contiguous())
        if name == "onnxruntime":
            return _onnxruntime(module, x)
        if name == "openvino":
            return _openvino(module, x, OPENVINO_DTYPES[case.dtype])
        return run(module, x)

    def bound(result: str, eager_error: float) -> float:
        """Twice eager's error, some roundings to the dtype.

        A gradient also steps where a ReLU's input rounds across zero. In narrow dtypes eager's
        own error shows how often; in float32 that is so seldom that eager's may have none.
        """
        flips = 0.0 if result in ("y", "loss") else 4 * torch.finfo(torch.float32).eps ** 0.5
        return 2 * eager_error + 8 * torch.finfo(dtype).eps + flips

    trained = case.level == "network" and case.mode != "eval"  # every step moves the parameters
    return Workload(truth, build, bound, norm_error, () if trained else tuple(truth), copies)


def _with_backend(case: Case, candidate: Candidate) -> Candidate:
    name = case.backend
    if name is None:
        return candidate
    from resnext_kernels import backends

    def run() -> Any:
        with backends.use(name):
            return candidate.run()

    return candidate._replace(run=run)


def _onnxruntime(module: nn.Module, x: Tensor) -> Candidate:
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes on its own deprecation
        torch.onnx.export(module, (x,), file, dynamo=False)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads wait by spinning, which is fair inside a call and costs the next candidate 50 %
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}  # read in place
    return Candidate(lambda: session.run(None, feed), lambda out: {"y": torch.from_numpy(out[0])})


def _openvino(module: nn.Module, x: Tensor, precision: str) -> Candidate:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's notes
        graph = openvino.convert_model(module, example_input=x, input=[list(x.shape)])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(graph, "CPU", settings)
    feed = [x.contiguous().numpy()]
    return Candidate(
        lambda: compiled(feed, share_inputs=True, share_outputs=True),
        lambda out: {"y": torch.from_numpy(out[0])},
    )


@dataclass(frozen=True)
class Check:
    """The verdict on one candidate: the worst result's error and its bound."""

    result: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        return f"wrong {self.result}: error {self.error:.1e}, allowed {self.bound:.1e}"


@contextmanager
def poisoned(enabled: bool) -> Iterator[None]:
    """Fresh memory holds NaN: a result that was not written is not, by luck, the last candidate's.

    That is what torch.utils.deterministic.fill_uninitialized_memory does, on by default.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if enabled:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def eager_errors(work: Workload) -> dict[str, float]:
    """The error of torch's own operations in the row's dtype, for each result."""
    candidate = work.build("eager")
    results = candidate.results(candidate.run())
    return {name: work.error(results[name].detach(), truth) for name, truth in work.truth.items()}


def check(
    work: Workload,
    results: dict[str, Tensor],
    allowed: dict[str, float],
    names: Sequence[str] | None = None,
) -> Check:
    """Compare a candidate's results with the float64 truth; the worst of them is returned.

    ``allowed`` holds eager's errors, which set the bound; ``names``, where given, the results that
    are compared.
    """
    checks = [Check("nothing", 0.0, 1.0)]
    for name in work.truth if names is None else names:
        truth = work.truth[name]
        value = results[name].detach()
        if value.shape != truth.shape:
            shapes = f"{name} (shape {tuple(value.shape)}, not {tuple(truth.shape)})"
            return Check(shapes, math.nan, 0.0)
        error = work.error(value.to(truth.device), truth)
        checks.append(Check(name, error, work.bound(name, allowed[name])))
    return max(checks, key=lambda c: math.inf if math.isnan(c.error) else c.error / c.bound)
