"""Strides, odd shapes and empty batches: the output is laid out as ``nn.Conv2d`` and its followers lay it out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from behaviour import assert_same_step, fused_units, plain_forward
from plain import Network, batch_norms, randomise_, unit
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import mobilenet_ext as mx

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def image(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    # Not .contiguous(): it would leave a tensor of one channel or one pixel as it is.
    return torch.empty(shape, memory_format=memory_format).normal_()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("inputs", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 8, 24])
def test_strides(cpu_backend, inputs, weights, channels):
    for kind, stride in (("stem", 2), ("depthwise", 1), ("depthwise", 2), ("pointwise", 1)):
        out_channels = channels if kind == "depthwise" else 4
        plain = unit(kind, channels, out_channels, stride).to(memory_format=FORMATS[weights])
        fused = mx.nn.FusedSequential(*copy.deepcopy(plain))
        for size in ((7, 5), (4, 1), (1, 4), (1, 1)):
            x = image(2, channels, *size, memory_format=FORMATS[inputs])
            for training in (True, False):
                expected, actual = plain.train(training)(x), fused.train(training)(x)
                assert actual.stride() == expected.stride(), (kind, size, training)
                with torch.no_grad():
                    assert fused(x).stride() == expected.stride(), (kind, size, training)
            assert fused_units(fused, x) == 1
            frozen = mx.freeze(fused)
            assert frozen(x).stride() == expected.stride(), (kind, size)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("inputs", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 8, 24])
def test_strides_of_functions(cpu_backend, inputs, weights, channels):
    weight = image(channels, 1, 3, 3, memory_format=FORMATS[weights])
    mixing = image(5, channels, 1, 1, memory_format=FORMATS[weights])
    for size in ((7, 5), (4, 1), (1, 1)):
        x = image(2, channels, *size, memory_format=FORMATS[inputs])
        for stride in (1, 2):
            expected = F.conv2d(x, weight, None, stride, 1, 1, channels)
            assert mx.functional.depthwise_conv2d(x, weight, None, stride).stride() == expected.stride()
        assert mx.functional.pointwise_conv2d(x, mixing).stride() == F.conv2d(x, mixing).stride()
        expected = torch.batch_norm(F.conv2d(x, mixing), None, None, None, None, True, 0.1, 1e-5, False)
        actual = mx.functional.pointwise_bn_relu(x, mixing, None, None, None, None, None, training=True)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("inputs", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_strides_of_the_network(cpu_backend, inputs, training):
    model = mx.MobileNetV1(10, 0.25).train(training)
    plain = Network(10, 0.25).train(training)
    x = image(2, 3, 64, 64, memory_format=FORMATS[inputs])
    assert model.feature(x).stride() == plain.feature(x).stride()
    assert model.feature[:-1](x).stride() == plain.feature[:-1](x).stride()
    assert model.feature[:4](x).stride() == plain.feature[:4](x).stride()
    half = copy.deepcopy(model.feature[:6])
    half[3].to(memory_format=torch.channels_last)
    assert half(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("inputs", FORMATS)
def test_fake_kernels_give_the_strides_of_the_real_ones(cpu_backend, inputs, weights):
    functions = (
        lambda x, w, p: mx.functional.depthwise_conv2d(x, w, None, 2),
        lambda x, w, p: mx.functional.pointwise_conv2d(x, p),
        lambda x, w, p: mx.functional.depthwise_bn_relu(x, w, None, None, None, None, None, training=True),
        lambda x, w, p: mx.functional.pointwise_bn_relu(x, p, None, None, None, None, None, training=True),
    )
    for channels, size in ((8, (7, 5)), (8, (1, 1)), (1, (4, 4)), (3, (5, 1))):
        x = image(2, channels, *size, memory_format=FORMATS[inputs])
        w = image(channels, 1, 3, 3, memory_format=FORMATS[weights])
        p = image(6, channels, 1, 1, memory_format=FORMATS[weights])
        for function in functions:
            real = function(x, w, p)
            with FakeTensorMode() as mode:
                fake = function(*(mode.from_tensor(t) for t in (x, w, p)))
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


STRIDED = {
    "transposed": lambda x: x.transpose(2, 3),
    "permuted": lambda x: x.permute(0, 2, 1, 3)[:, :8],
    "sliced": lambda x: x[:, :, 1::2, ::2],
    "every other channel": lambda x: torch.cat([x, x], 1)[:, ::2],
    "offset": lambda x: x[1:],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded channels": lambda x: x[:, :1].expand(-1, 8, -1, -1),
    "expanded pixels": lambda x: x[:, :, :1, :1].expand(-1, -1, 6, 6),
    "flipped": lambda x: x.flip(3),
    "sliced channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:, :-1],
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_input_strides(backend64, name):
    x = STRIDED[name](torch.randn(3, 8, 10, 10, dtype=torch.float64))
    model = mx.nn.DepthwiseSeparableConv(8, 5).double()
    expected = model(x.contiguous())
    leaf = x.detach().requires_grad_()  # the same strides; expanded ones too
    torch.testing.assert_close(model(leaf), expected)
    # Against the plain modules through a parent of dense strides, so that the gradient has a place.
    assert_same_step(model, x.contiguous().requires_grad_(), units=2)
    upstream = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(model.eval()(leaf), leaf, upstream)
    dense = x.contiguous().requires_grad_()
    (dense_grad,) = torch.autograd.grad(model(dense), dense, upstream)
    torch.testing.assert_close(grad, dense_grad)


@pytest.mark.parametrize("upstream", ["NHWC", "expanded", "transposed"])
def test_any_strides_of_the_upstream_gradient(backend64, upstream):
    model = mx.nn.DepthwiseSeparableConv(8, 5).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    out = model(x)
    grad = {
        "NHWC": torch.randn_like(out).contiguous(memory_format=torch.channels_last),
        "expanded": torch.randn(2, 5, 1, 1, dtype=torch.float64).expand_as(out),
        "transposed": torch.randn_like(out).transpose(2, 3),
    }[upstream]
    actual = torch.autograd.grad(out, (x, *model.parameters()), grad, retain_graph=True)
    expected = torch.autograd.grad(out, (x, *model.parameters()), grad.contiguous())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels", [1, 3, 8, 24])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 7), (5, 1), (9, 7), (33, 17)])
def test_channel_counts_and_sizes(backend64, channels, size):
    model = mx.nn.FusedSequential(
        mx.nn.StemConvBNReLU(3, channels),
        mx.nn.DepthwiseSeparableConv(channels, 8),
        mx.nn.DepthwiseSeparableConv(8, channels, stride=2),
        nn.AdaptiveAvgPool2d(1),
    ).double()
    x = torch.randn(4, 3, *size, dtype=torch.float64, requires_grad=True)
    assert_same_step(model, x, tolerance=1e-7, units=5)
    assert_same_step(model.eval(), x, units=5)


@pytest.mark.parametrize("size", [(31, 33), (17, 64)])
def test_network_on_odd_sizes(backend64, size):
    model = randomise_(mx.MobileNetV1(10, 0.25)).double().eval()
    assert_same_step(model, torch.randn(2, 3, *size, dtype=torch.float64), units=27)


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(cpu_backend, training):
    model, plain = mx.MobileNetV1(10, 0.25).train(training), Network(10, 0.25).train(training)
    plain.load_state_dict(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(0, 3, 32, 32, requires_grad=True)
    out = model(x)
    assert out.shape == plain(x).shape == (0, 10)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    for (name, after), same in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(after, same), name
        assert torch.equal(after, before[name] + (training and "num_batches_tracked" in name)), name


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_of_functions(cpu_backend, training):
    x = torch.randn(0, 8, 6, 6, requires_grad=True)
    weight = torch.randn(8, 1, 3, 3, requires_grad=True)
    mean, var = torch.ones(8), torch.ones(8)
    out = mx.functional.depthwise_bn_relu(x, weight, None, mean, var, None, None, stride=2, training=training)
    assert out.shape == (0, 8, 3, 3)
    out.sum().backward()
    assert x.grad.shape == x.shape and weight.grad is not None and not weight.grad.any()
    assert torch.equal(mean, torch.ones(8)) and torch.equal(var, torch.ones(8))
    assert mx.functional.pointwise_conv2d(x, torch.randn(5, 8, 1, 1)).shape == (0, 5, 6, 6)
    assert mx.functional.depthwise_conv2d(x, weight).shape == (0, 8, 6, 6)


def test_empty_batch_of_a_frozen_model(cpu_backend):
    frozen = mx.freeze(mx.MobileNetV1(10, 0.25))
    assert frozen(torch.randn(0, 3, 32, 32)).shape == (0, 10)


def test_input_is_left_alone(cpu_backend):
    model = mx.nn.DepthwiseSeparableConv(8, 5)
    for memory_format in FORMATS.values():
        x = image(2, 8, 6, 6, memory_format=memory_format)
        before = x.clone()
        model(x)
        model.eval()(x)
        mx.freeze(model)(x)
        assert torch.equal(x, before)
        assert batch_norms(model.train())


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("inputs", FORMATS)
@pytest.mark.parametrize("pool", [True, False])
def test_strides_behind_one_channel_and_one_pixel(cpu_backend, inputs, weights, pool):
    narrow = (unit("depthwise", 7, 7, 2), unit("stem", 7, 1, 2), unit("pointwise", 1, 24, 1))
    small = (unit("pointwise", 7, 2, 1), unit("depthwise", 2, 2, 2), unit("pointwise", 2, 31, 1))
    for units, size in ((narrow, (33, 7)), (small, (2, 1))):
        modules = [*units, nn.AdaptiveAvgPool2d(1)] if pool else units
        fused = mx.nn.FusedSequential(*modules).to(memory_format=FORMATS[weights])
        x = image(2, 7, *size, memory_format=FORMATS[inputs])
        for training in (True, False):
            expected = plain_forward(fused.train(training), x)
            assert fused(x).stride() == expected.stride()
        assert mx.freeze(fused)(x).stride() == expected.stride()
