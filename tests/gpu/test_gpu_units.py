"""Every layer of the network at the size it has there (224x224 images), against float64."""

from __future__ import annotations

import plain
import pytest
import torch
from plain import FORWARD, GRADIENT, Shape
from test_network import backward, check_gradients, check_running_statistics
from torch import Tensor, nn

import mobilenet_ext as mx

BATCH = 2


def fused_unit(shape: Shape, bias: bool = True) -> nn.Sequential:
    if shape.kind == "stem":
        return mx.nn.StemConvBNReLU(shape.in_channels, shape.out_channels, stride=shape.stride, bias=bias)
    if shape.kind == "depthwise":
        return mx.nn.DepthwiseConvBNReLU(shape.in_channels, stride=shape.stride, bias=bias)
    return mx.nn.PointwiseConvBNReLU(shape.in_channels, shape.out_channels, bias=bias)


def plain_unit(shape: Shape, bias: bool = True) -> nn.Sequential:
    return plain.unit(shape.kind, shape.in_channels, shape.out_channels, shape.stride, bias)


def images(shape: Shape) -> Tensor:
    x = torch.randn(BATCH, shape.in_channels, shape.size, shape.size)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", plain.layer_shapes(), ids=str)
def test_float32(backend: str, device: str, shape: Shape, training: bool) -> None:
    fused = plain.randomise_(fused_unit(shape)).to(device).train(training)
    expected = plain.in_float64(fused, plain_unit(shape).train(training))
    x = images(shape)
    given, given64 = plain.leaf(x.to(device)), plain.as_leaf64(x)
    out = fused(given)
    plain.impose(expected, [out.detach().cpu() > 0], FORWARD)
    with plain.one_thread():
        wanted = expected(given64)
    plain.assert_close(out, wanted, FORWARD, "output")
    check_running_statistics(fused, expected, FORWARD)
    backward(out, wanted, torch.randn(out.shape))
    plain.assert_close(given.grad, given64.grad, GRADIENT, "gradient of the input")
    check_gradients(fused, expected)


@pytest.mark.parametrize("shape", plain.layer_shapes(), ids=str)
def test_float32_inference(backend: str, device: str, shape: Shape) -> None:
    fused = plain.randomise_(fused_unit(shape)).to(device).eval()
    expected = plain.in_float64(fused, plain_unit(shape).eval())
    x = images(shape)
    with torch.no_grad(), plain.one_thread():
        plain.assert_close(fused(x.to(device)), expected(x.double()), FORWARD, "output")


@pytest.mark.parametrize("shape", [s for s in plain.layer_shapes() if s.kind == "depthwise"], ids=str)
def test_float32_block(backend: str, device: str, shape: Shape) -> None:
    """A depthwise and a pointwise unit frozen into one kernel."""
    block = mx.nn.DepthwiseSeparableConv(shape.in_channels, 2 * shape.in_channels, stride=shape.stride)
    fused = plain.randomise_(block).to(device).eval()
    pointwise = plain.unit("pointwise", shape.in_channels, 2 * shape.in_channels)
    expected = plain.in_float64(fused, nn.Sequential(plain_unit(shape), pointwise).eval())
    x = images(shape)
    with torch.no_grad(), plain.one_thread():
        plain.assert_close(mx.freeze(fused)(x.to(device)), expected(x.double()), FORWARD, "output")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", plain.layer_shapes((1.0, 0.25)), ids=str)
def test_16_bits(backend: str, device: str, shape: Shape, dtype: torch.dtype, training: bool) -> None:
    """Errors against float64, which takes the ReLU signs of the run it judges, beside those of PyTorch's own path.
    BatchNorm keeps float32 vectors, as under autocast. Without biases, both store the same rounded convolution output:
    with few channels, the luck of different roundings would decide."""
    own, fused = plain.randomise_(plain_unit(shape, bias=False)), fused_unit(shape, bias=False)
    for unit in (own, fused):
        unit.to(device).train(training)[0].to(dtype)
    fused.load_state_dict(own.state_dict())
    exact = plain.in_float64(fused, plain_unit(shape, bias=False).train(training))
    x = images(shape).to(dtype)
    upstream, results = None, []
    for unit in (fused, own):
        given, given64 = plain.leaf(x.to(device)), plain.as_leaf64(x)
        out = unit(given)
        upstream = torch.randn(out.shape).to(dtype) if upstream is None else upstream
        plain.impose(exact, [out.detach().cpu() > 0], plain.corner(dtype))
        exact.zero_grad()
        with plain.one_thread():
            wanted = exact(given64)
        backward(out, wanted, upstream)
        compared = {"output": (out, wanted), "gradient of the input": (given.grad, given64.grad)}
        for (name, p), q in zip(unit.named_parameters(), exact.parameters(), strict=True):
            compared[f"gradient of {name}"] = (p.grad, q.grad)
        assert out.dtype == given.grad.dtype == dtype
        results.append({name: plain.relative_error(a, b) for name, (a, b) in compared.items()})
    for name, ours in results[0].items():
        if ours > FORWARD:  # closer than float32 is held to, who is closer is luck: sums of the same 16-bit values
            plain.check_errors(ours, results[1][name], name)
