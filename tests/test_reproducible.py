"""Bit for bit the same: from run to run, and on the ``cpu`` backend from thread count to thread count.

The ``reference`` backend calls PyTorch's own operators, whose sums may be cut by the number of threads, so it is held
to the first only.
"""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor, nn

import mobilenet_ext as mx

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPE_IDS = ["fp32", "bf16", "fp16", "fp64"]
# A unit, its input channels, batch and image size.
UNITS = {
    "stem": (lambda: mx.nn.StemConvBNReLU(3, 24, stride=2), 3, 3, 23),
    "depthwise": (lambda: mx.nn.DepthwiseConvBNReLU(40), 40, 3, 57),
    "depthwise-s2": (lambda: mx.nn.DepthwiseConvBNReLU(24, stride=2), 24, 3, 23),
    "pointwise": (lambda: mx.nn.PointwiseConvBNReLU(24, 48), 24, 3, 23),
    "pointwise-wide": (lambda: mx.nn.PointwiseConvBNReLU(512, 256), 512, 2, 7),
    "block": (lambda: mx.nn.DepthwiseSeparableConv(16, 32), 16, 3, 23),
}


def results(module: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Everything a step leaves: output, gradients and running statistics; in eval the path without gradients too."""
    module.zero_grad()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = plain.leaf(x)
    out = module.train(training)(x)
    out.backward(out.detach().cos())
    kept = [out, x.grad, *(p.grad.clone() for p in module.parameters()), *(b.clone() for b in module.buffers())]
    if not training:
        with torch.no_grad():
            kept += [module(x), mx.freeze(module)(x)]
    module.load_state_dict(state)
    return kept


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    different = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x, y)]
    assert not different, f"results {different} of {len(a)} differ"


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("kind", UNITS)
def test_thread_counts(kind: str, dtype: torch.dtype, training: bool) -> None:
    make, channels, batch, size = UNITS[kind]
    with mx.backends.use("cpu"):
        unit = plain.randomise_(make()).to(dtype)
        x = torch.randn(batch, channels, size, size).to(dtype)
        runs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            runs.append(results(unit, x, training))
        for other in runs[1:]:
            assert_same_bits(runs[0], other)


def test_thread_counts_of_the_network() -> None:
    with mx.backends.use("cpu"):
        features = plain.randomise_(mx.MobileNetV1(10, 0.25)).feature
        x = torch.randn(3, 3, 96, 96)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(features, x, True))
        for other in runs[1:]:
            assert_same_bits(runs[0], other)


@pytest.mark.parametrize("channels", [1, 3])
def test_thread_counts_of_convolutions(channels: int) -> None:
    """One channel and many pixels: where PyTorch's own sum, for the bias, would go by the number of threads."""
    runs = []
    with mx.backends.use("cpu"):
        x = torch.randn(2, channels, 300, 301)
        weights = [torch.randn(channels, 1, 3, 3), torch.randn(1, channels, 1, 1)]
        biases = [torch.randn(channels), torch.randn(1)]
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [plain.leaf(t) for t in (x, *weights, *biases)]
            image, depthwise, pointwise, depthwise_bias, pointwise_bias = leaves
            out = mx.functional.depthwise_conv2d(image, depthwise, depthwise_bias)
            out = mx.functional.pointwise_conv2d(out, pointwise, pointwise_bias)
            out.backward(out.detach().cos())
            runs.append([out, *(leaf.grad for leaf in leaves)])
    for other in runs[1:]:
        assert_same_bits(runs[0], other)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_runs(backend: str, device: str, training: bool) -> None:
    torch.set_num_threads(2)
    network = plain.randomise_(mx.MobileNetV1(10, 0.25)).to(device)
    x = torch.randn(3, 3, 96, 96, device=device)
    first = results(network, x, training)
    for _ in range(2):
        assert_same_bits(first, results(network, x, training))


def test_an_image_does_not_depend_on_its_batch_size_in_eval(backend: str, device: str) -> None:
    """The same network of two processes, one of which sees the images one by one, agrees to rounding."""
    network = plain.randomise_(mx.MobileNetV1(10, 0.25)).to(device).eval()
    x = torch.randn(3, 3, 64, 64, device=device)
    with torch.no_grad():
        plain.assert_close(torch.cat([network(image[None]) for image in x]), network(x), plain.FORWARD)
