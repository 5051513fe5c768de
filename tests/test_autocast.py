"""Autocast on the CPU: dtypes and statistics as with plain modules, and the same combinations of dtypes accepted."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from behaviour import Plain, fused_units
from plain import assert_close, batch_norms, randomise_
from torch import Tensor, nn

import mobilenet_ext as mx

LOW = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 5e-3}


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(13)
    return torch.randn(4, 8, 8, 8).to(dtype).requires_grad_()


def block() -> nn.Module:
    torch.manual_seed(14)
    return randomise_(mx.nn.DepthwiseSeparableConv(8, 16))


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("training", [True, False])
def test_block(cpu_backend, low, training):
    model = block().train(training)
    plain = Plain(model)
    x, other = image(), image()
    with torch.autocast("cpu", low):
        assert fused_units(model, x) == 2
        plain(other)  # the count above was a step of the running statistics
        out, expected = model(x), plain(other)
    assert out.dtype == expected.dtype == low
    assert_close(out, expected, TOLERANCE[low])
    upstream = torch.randn_like(expected)
    out.backward(upstream)
    expected.backward(upstream)
    assert x.grad.dtype == other.grad.dtype == torch.float32
    assert_close(x.grad, other.grad, 0.1)  # how close is the numerical tests' business
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype == torch.float32, name
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=name)
    if training:
        assert all(bn.num_batches_tracked == 2 for bn in batch_norms(model))


@pytest.mark.parametrize("low", LOW)
def test_running_statistics_are_updated(cpu_backend, low):
    """Those of the model, not of a temporary copy."""
    model = mx.MobileNetV1(10, 0.25)
    buffers = [bn.running_mean for bn in batch_norms(model)]
    with torch.autocast("cpu", low):
        out = model(torch.randn(4, 3, 64, 64))
    out.float().sum().backward()
    assert out.dtype == low
    for bn, buffer in zip(batch_norms(model), buffers, strict=True):
        assert bn.running_mean is buffer and buffer.dtype == torch.float32
        assert buffer.any() and not torch.equal(bn.running_var, torch.ones_like(bn.running_var))


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("training", [True, False])
def test_network_dtypes(cpu_backend, low, training):
    model = mx.MobileNetV1(10, 0.25).train(training)
    x = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", low):
        for module in (model.feature[:-1], model.feature, model):
            assert module(x).dtype == Plain(module)(x).dtype == low
        with torch.no_grad():
            assert model(x).dtype == low
        with torch.autocast("cpu", enabled=False):
            assert model(x).dtype == torch.float32


@pytest.mark.parametrize("low", LOW)
def test_functions(cpu_backend, low):
    x, w, b = image(), torch.randn(8, 1, 3, 3), torch.randn(8)
    p, c = torch.randn(5, 8, 1, 1, requires_grad=True), torch.randn(5)
    mean, var, gamma, beta = torch.zeros(5), torch.ones(5), torch.ones(5, requires_grad=True), torch.zeros(5)
    with torch.autocast("cpu", low):
        out = mx.functional.depthwise_conv2d(x, w, b)
        assert out.dtype == F.conv2d(x, w, b, 1, 1, 1, 8).dtype == low
        assert mx.functional.pointwise_conv2d(x, p, c).dtype == low
        fused = mx.functional.pointwise_bn_relu(x, p, c, mean, var, gamma, beta, training=True)
        assert fused.dtype == low
    assert (mean != 0).all() and (var != 1).all() and mean.dtype == torch.float32
    (out.float().sum() + fused.float().square().sum()).backward()
    assert x.grad.dtype == p.grad.dtype == gamma.grad.dtype == torch.float32


def test_float64_is_left_alone(backend64):
    model, x = block().double(), image(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        mixed = mx.functional.depthwise_conv2d(x, torch.randn(8, 1, 3, 3, dtype=torch.float64))
        assert fused_units(model, x) == 2
    assert out.dtype == mixed.dtype == torch.float64


def outcome(call) -> tuple[torch.dtype, ...] | None:
    """The dtypes of output and gradients, None where it is refused."""
    try:
        out, tensors = call()
        out.float().sum().backward()
    except (RuntimeError, TypeError, ValueError):
        return None
    return out.dtype, *(t.grad.dtype for t in tensors)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("autocast", [None, *LOW])
@pytest.mark.parametrize("activation", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_accepted_combinations(cpu_backend, autocast, activation, training):
    """(activation, convolution, BatchNorm parameters, buffers): accepted and refused where plain modules do, with the
    same dtypes of the output and the gradients."""
    for conv_dtype, parameter, buffer in itertools.product(DTYPES, DTYPES, DTYPES):
        model = mx.nn.PointwiseConvBNReLU(8, 5).train(training)
        conv, bn, _ = model
        conv.to(conv_dtype)
        bn.to(parameter)
        bn.running_mean, bn.running_var = bn.running_mean.to(buffer), bn.running_var.to(buffer)
        plain = Plain(model)

        def run(module: nn.Module):
            x = image(activation)
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                return module(x), (x, *module.parameters())  # called at once

        what = f"convolution {conv_dtype}, parameters {parameter}, buffers {buffer}"
        assert outcome(lambda: run(model)) == outcome(lambda: run(plain)), what  # noqa: B023


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_models(cpu_backend, dtype):
    """``.half()`` and ``.bfloat16()``, with and without autocast, with BatchNorm in float32 or not."""
    for batch_norm_dtype in (dtype, torch.float32):
        model = block().to(dtype)
        for bn in batch_norms(model):
            bn.to(batch_norm_dtype)
        plain = Plain(model)
        x = image(dtype)
        assert fused_units(model, x) == 2
        out = model(x)
        out.float().sum().backward()
        plain(image(dtype))
        assert out.dtype == plain(image(dtype)).dtype == dtype
        for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2, msg=name)
