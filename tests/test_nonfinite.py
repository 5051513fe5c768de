"""NaN and Inf go where PyTorch sends them, forward and backward: a gradient scaler depends on it."""

from __future__ import annotations

from collections.abc import Callable

import plain
import pytest
import torch
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext.contract import Act

NAN, INF = float("nan"), float("inf")
VALUES = {"nan": NAN, "inf": INF, "minus-inf": -INF}
UNITS = {
    "stem": lambda: mx.nn.StemConvBNReLU(3, 4, stride=2),
    "depthwise": lambda: mx.nn.DepthwiseConvBNReLU(3),
    "depthwise-s2": lambda: mx.nn.DepthwiseConvBNReLU(3, stride=2),
    "pointwise": lambda: mx.nn.PointwiseConvBNReLU(3, 4),
}
PLAIN = {
    "stem": lambda: plain.unit("stem", 3, 4, 2),
    "depthwise": lambda: plain.unit("depthwise", 3, 3),
    "depthwise-s2": lambda: plain.unit("depthwise", 3, 3, 2),
    "pointwise": lambda: plain.unit("pointwise", 3, 4),
}


def classes(x: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 Inf, 3 -Inf, element by element."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def assert_same_places(actual: Tensor, expected: Tensor, what: str) -> None:
    actual, expected = classes(actual.detach().cpu()), classes(expected.detach().cpu())
    assert torch.equal(actual, expected), f"{what}: {(actual != expected).sum()} elements of {actual.numel()} differ"


def assert_same_finite(actual: Tensor, expected: Tensor, what: str) -> None:
    """For sums over many elements: whether one of them ends as Inf or as NaN depends on how PyTorch itself adds up (its
    float32 and float64 differ), whether it is finite does not."""
    actual, expected = actual.detach().cpu().isfinite(), expected.detach().cpu().isfinite()
    assert torch.equal(actual, expected), f"{what}: {(actual != expected).sum()} elements of {actual.numel()} differ"


def run(unit: nn.Sequential, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output, running statistics and gradients. The gradient of a bias in front of batch statistics is left out: it is
    zero by contract."""
    x = plain.leaf(x)
    out = unit(x)
    out.backward(upstream.to(out))
    gradients = {f"gradient of {name}": p.grad for name, p in unit.named_parameters() if name != "0.bias"}
    return {"output": out, "input": x.grad, **gradients, **dict(unit.named_buffers())}


def compare(kind: str, device: str, training: bool, poison: Callable[[nn.Sequential, Tensor, Tensor], None]) -> None:
    """``poison`` puts a value into the unit, the input or the upstream gradient; both paths must spread it alike."""
    fused = plain.randomise_(UNITS[kind]()).train(training)
    x = torch.randn(2, 3, 6, 7)
    upstream = torch.randn(fused(x).shape)
    poison(fused, x, upstream)
    expected = PLAIN[kind]().train(training)
    expected.load_state_dict(fused.state_dict())
    wanted = run(expected, x, upstream)
    actual = run(fused.to(device), x.to(device), upstream)
    assert not all(value.isfinite().all() for value in wanted.values()), "the poison was lost: nothing is tested"
    for name, value in wanted.items():
        check = assert_same_places if name in ("output", "input") else assert_same_finite
        check(actual[name], value, name)


@pytest.fixture(params=VALUES)
def value(request: pytest.FixtureRequest) -> float:
    return VALUES[request.param]


@pytest.fixture(params=UNITS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "eval"])
def training(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_input(backend: str, device: str, kind: str, training: bool, value: float) -> None:
    def poison(unit: nn.Sequential, x: Tensor, upstream: Tensor) -> None:
        x[1, 1, 2, 2] = value

    compare(kind, device, training, poison)


def test_upstream_gradient(backend: str, device: str, kind: str, training: bool, value: float) -> None:
    def poison(unit: nn.Sequential, x: Tensor, upstream: Tensor) -> None:
        upstream[0] = value  # a whole image, so that some of it passes the ReLU

    compare(kind, device, training, poison)


def test_conv_weight(backend: str, device: str, kind: str, training: bool, value: float) -> None:
    def poison(unit: nn.Sequential, x: Tensor, upstream: Tensor) -> None:
        weight = unit[0].weight.data
        # The centre never meets the padding, where PyTorch's own algorithms disagree about 0 * Inf.
        weight[1, 0, weight.shape[2] // 2, weight.shape[3] // 2] = value

    compare(kind, device, training, poison)


@pytest.mark.parametrize("vector", ["weight", "bias", "running_mean"])
def test_bn_vectors(backend: str, device: str, kind: str, training: bool, vector: str, value: float) -> None:
    if vector == "bias" and value == -INF:
        value = INF  # minus infinity closes the ReLU: zeros, with nothing to compare
    if vector == "weight":
        # An infinite scale: PyTorch's CPU kernel folds y*scale - mean*scale, Inf - Inf, where its CUDA kernel and the
        # contract have (y - mean)*scale.
        value = NAN

    def poison(unit: nn.Sequential, x: Tensor, upstream: Tensor) -> None:
        getattr(unit[1], vector).data[1] = value

    compare(kind, device, training, poison)


def test_conv_bias(backend: str, device: str, kind: str, training: bool, value: float) -> None:
    """Batch statistics cancel a bias, but not one that is not finite."""

    def poison(unit: nn.Sequential, x: Tensor, upstream: Tensor) -> None:
        unit[0].bias.data[1] = value

    compare(kind, device, training, poison)


def test_relu_passes_the_gradient_of_nan(backend: str, device: str) -> None:
    u = (
        torch.tensor([NAN, -1.0, 0.0, 2.0], device=device)
        .view(1, 1, 2, 2)
        .contiguous(memory_format=torch.channels_last)
    )
    grad = torch.ones_like(u)
    bn = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]], device=device)
    assert torch.ops.mobilenet_ext.norm_act_forward(u, bn, Act.RELU, False).isnan().flatten().tolist() == [
        True,
        False,
        False,
        False,
    ]
    h, _ = torch.ops.mobilenet_ext.norm_act_backward(grad, u, bn, Act.RELU, False, False)
    assert h.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


def network(device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    fused = plain.randomise_(mx.MobileNetV1(4, 0.25))
    expected = plain.Network(4, 0.25)
    expected.load_state_dict(fused.state_dict())
    return fused.to(device), expected, torch.randn(4, 3, 64, 64)


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_gradient_scaler_sees_an_overflow_of_the_loss(backend: str, device: str, value: float) -> None:
    """Every parameter that PyTorch gives a gradient that is not finite has one here, conv biases apart."""
    fused, expected, x = network(device)
    for module, images in ((fused, x.to(device)), (expected, x)):
        loss = module(images).square()
        loss[0, 0].mul(value).add(loss[1:].sum()).backward()
    for (name, p), q in zip(fused.named_parameters(), expected.parameters(), strict=True):
        if not plain.is_conv_bias(name):
            assert p.grad.isfinite().all().item() == q.grad.isfinite().all().item(), name


def test_nan_in_an_image_reaches_the_output(backend: str, device: str) -> None:
    """In eval the other images stay as they were; in training the whole batch is lost, as in the plain network."""
    fused, expected, x = network(device)
    x[2, 0, 5, 5] = NAN
    for training in (False, True):
        with torch.no_grad():
            out = fused.train(training)(x.to(device))
            wanted = expected.train(training)(x)
        assert_same_places(out, wanted, "output")
    for (name, actual), wanted in zip(fused.named_buffers(), expected.buffers(), strict=True):
        assert_same_finite(actual, wanted, name)


def test_fp16_overflow(backend: str, device: str) -> None:
    """A convolution output beyond 65504 is Inf, and its BatchNorm NaN, as in the plain unit."""
    own = plain.unit("pointwise", 3, 4).half()
    fused = UNITS["pointwise"]().half().to(device)
    fused.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 5, 5).half()
    x[0, 0, 0, 0] = 6e4
    with torch.no_grad():
        own[0].weight[0, 0], own[0].weight[1, 0] = 4, 0.5
        fused[0].weight.copy_(own[0].weight)
    out, wanted = fused(x.to(device)), own(x)
    assert wanted[:, 0].isnan().all() and wanted[:, 1].isfinite().all()
    assert_same_places(out, wanted, "output")
