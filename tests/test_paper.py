"""The three forms of Fig. 3 are one function: same outputs, gradients and running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnext_kernels import FusedGroupedBottleneck
from resnext_kernels.paper import ConcatenatedPaths, GroupedBottleneck, SummedPaths, convert

FORMS = {"a": SummedPaths, "b": ConcatenatedPaths, "c": GroupedBottleneck}
CARDINALITY, WIDTH = 4, 3
SHAPES = {  # in_channels, out_channels, stride
    "identity": (16, 16, 1),
    "projection": (8, 16, 1),
    "downsampling": (8, 16, 2),
}


def build(form: str, shape: str) -> nn.Module:
    in_channels, out_channels, stride = SHAPES[shape]
    return FORMS[form](in_channels, out_channels, CARDINALITY, WIDTH, stride).double()


def randomize(block: nn.Module) -> nn.Module:
    """Trained-like values in place of BatchNorm's initial zeros and ones."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return block


def run(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, input gradient, parameter gradients by name, for one fixed output gradient."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)))
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, gradients  # type: ignore[return-value]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        # a sum in another order in float64: thousands of terms of order 1, so far below 1e-10
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_forms_agree(source: str, target: str, shape: str, training: bool) -> None:
    torch.manual_seed(0)
    one = randomize(build(source, shape)).train(training)
    other = build(target, shape).train(training)
    other.load_state_dict(convert(one.state_dict(), target, CARDINALITY))

    x = torch.randn(3, SHAPES[shape][0], 7, 5, dtype=torch.float64)
    y, dx, gradients = run(one, x)
    other_y, other_dx, other_gradients = run(other, x)

    assert_same({"y": other_y, "dx": other_dx}, {"y": y, "dx": dx})
    assert_same(other_gradients, convert(gradients, target, CARDINALITY))
    assert_same(other.state_dict(), convert(one.state_dict(), target, CARDINALITY))
    if training:
        assert other.bn3.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", FORMS)
def test_fused_block_is_form_c(source: str, shape: str) -> None:
    """The tensors of any form load into the block that networks are built from, and back."""
    torch.manual_seed(0)
    in_channels, out_channels, stride = SHAPES[shape]
    block = randomize(build(source, shape))
    planes = out_channels // FusedGroupedBottleneck.expansion
    fused = FusedGroupedBottleneck(
        in_channels,
        planes,
        stride,
        downsample=build("c", shape).downsample,
        groups=CARDINALITY,
        base_width=WIDTH * 64 // planes,
    ).double()
    fused.load_state_dict(convert(block.state_dict(), "c", CARDINALITY))

    x = torch.randn(3, in_channels, 7, 5, dtype=torch.float64)
    y, dx, gradients = run(block, x)
    fused_y, fused_dx, fused_gradients = run(fused, x)
    assert_same({"y": fused_y, "dx": fused_dx}, {"y": y, "dx": dx})
    assert_same(convert(fused_gradients, source, CARDINALITY), gradients)
    assert_same(convert(fused.state_dict(), source, CARDINALITY), block.state_dict())


def test_parameters_are_equation_4() -> None:
    """Sec. 3.4: C * (256*d + 3*3*d*d + d*256) weights, about 70k for 32x4d, in every form."""
    for form, block in FORMS.items():
        weights = [p for p in block(256, 256, cardinality=32, width=4).parameters() if p.dim() == 4]
        assert sum(p.numel() for p in weights) == 32 * (256 * 4 + 9 * 4 * 4 + 4 * 256), form


def test_convert_errors() -> None:
    tensors = build("c", "identity").state_dict()
    with pytest.raises(ValueError, match=r"form must be one of \['a', 'b', 'c'\], got 'd'"):
        convert(tensors, "d", CARDINALITY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cardinality must be at least 1, got 0"):
        convert(tensors, "a", 0)
    with pytest.raises(ValueError, match=r"cardinality must divide the 12 channels of .*, got 5"):
        convert(tensors, "a", 5)
    paths = convert(tensors, "a", CARDINALITY)
    with pytest.raises(ValueError, match=r"cardinality is 3, but tensors has conv1.weight for"):
        convert(paths, "c", 3)
