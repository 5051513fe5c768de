"""Gradients lie in memory as the tensors that they belong to, dimensions of size 1 included, and own that memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from behaviour import Plain
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext.contract import Act


def odd(p: Tensor) -> Tensor:
    """Dense, in the order of no memory format."""
    return p.transpose(0, 1).contiguous().transpose(0, 1) if p.dim() > 1 else p


def with_other_strides_of_one(p: Tensor) -> Tensor:
    """The same memory, with strides along dimensions of size 1 that nobody would write."""
    strides = [7 if size == 1 else stride for size, stride in zip(p.shape, p.stride(), strict=True)]
    return p.as_strided(p.shape, strides)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda p: p.contiguous(),
    "channels_last": lambda p: p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p,
    "odd": odd,
    "strides of one": with_other_strides_of_one,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def lay_out_(model: nn.Module, layout: str) -> nn.Module:
    for p in model.parameters():
        p.data = LAYOUTS[layout](p.data)
    return model


@each_layout
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_network(cpu_backend, layout: str, training: bool, dtype: torch.dtype):
    model = lay_out_(mx.MobileNetV1(10, 0.25).to(dtype), layout).train(training)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    parameters = dict(model.feature.named_parameters())
    grads = torch.autograd.grad(model.feature(x).sum(), tuple(parameters.values()))
    for (name, p), grad in zip(parameters.items(), grads, strict=True):
        assert (grad.shape, grad.stride(), grad.dtype) == (p.shape, p.stride(), p.dtype), name


@each_layout
def test_values_are_those_of_contiguous_parameters(backend64, layout: str):
    torch.manual_seed(61)
    model = mx.nn.DepthwiseSeparableConv(8, 5).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    lay_out_(model, layout)
    for a, b in zip(torch.autograd.grad(model(x).square().sum(), tuple(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_with_gaps(backend64):
    """No gradient is asked to have gaps."""
    weight = torch.randn(8, 2, 3, 3, dtype=torch.float64)[:, :1].detach().requires_grad_()
    mx.functional.depthwise_conv2d(torch.randn(2, 8, 6, 6, dtype=torch.float64), weight).sum().backward()
    assert weight.grad.is_contiguous()


@pytest.mark.parametrize("autocast", [False, True])
def test_under_autocast(cpu_backend, autocast: bool):
    model = mx.nn.StemConvBNReLU(3, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(torch.randn(2, 3, 8, 8))
    out.float().sum().backward()
    assert model[0].weight.grad.stride() == model[0].weight.stride()
    assert model[0].weight.grad.dtype == torch.float32


IMAGES = {
    "contiguous": (lambda x: x, (2, 8, 6, 5)),
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), (2, 8, 6, 5)),
    "one channel, contiguous": (lambda x: x, (2, 1, 6, 5)),
    "one channel, channels_last": (lambda x: x.to(memory_format=torch.channels_last), (2, 1, 6, 5)),
    "one pixel": (lambda x: x, (3, 8, 1, 1)),
    "one image, channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), (1, 8, 6, 5)),
    "transposed": (lambda x: x.transpose(2, 3), (2, 8, 5, 6)),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("run", ["module", "depthwise_conv2d", "depthwise_bn_relu"])
def test_gradients_of_the_input(backend64, name: str, run: str):
    change, shape = IMAGES[name]
    x = change(torch.randn(shape, dtype=torch.float64)).detach().requires_grad_()
    c = x.shape[1]
    model = mx.nn.DepthwiseConvBNReLU(c).double().eval()
    weight, vectors = model[0].weight, [t.detach() for t in (model[1].running_mean, model[1].running_var)]
    calls = {
        "module": model,
        "depthwise_conv2d": lambda x: mx.functional.depthwise_conv2d(x, weight),
        "depthwise_bn_relu": lambda x: mx.functional.depthwise_bn_relu(x, weight, None, *vectors, None, None),
    }
    (grad,) = torch.autograd.grad(calls[run](x).square().sum(), x)
    assert grad.stride() == x.stride()
    torch.testing.assert_close(grad, torch.autograd.grad(calls[run](x.contiguous()).square().sum(), x)[0])


def test_gradients_of_layer_ops(backend64):
    """Of the ops themselves."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3).double().to(memory_format=torch.channels_last).requires_grad_()
    vectors = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    y, _, _ = torch.ops.mobilenet_ext.depthwise(x, *vectors, weight, 1, 1)
    for tensor, grad in zip((x, weight), torch.autograd.grad(y.sum(), (x, weight)), strict=True):
        assert grad.stride() == tensor.stride()
    z = torch.ops.mobilenet_ext.norm_act(x, *vectors, Act.RELU)
    assert torch.autograd.grad(z.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_no_two_gradients_share_memory(cpu_backend, training: bool):
    """Nor does any keep more than itself alive."""
    model = mx.nn.DepthwiseSeparableConv(8, 5).train(training)
    model(torch.randn(2, 8, 6, 6)).sum().backward()
    storages = set()
    for name, p in model.named_parameters():
        assert p.grad.untyped_storage().nbytes() == p.grad.nbytes, name
        storages.add(p.grad.untyped_storage().data_ptr())
    assert len(storages) == len(list(model.parameters()))


def test_gradients_are_taken_and_not_copied(cpu_backend):
    """What autograd accumulates into ``.grad`` is the tensor that backward made, where its strides allow."""
    model = mx.MobileNetV1(10, 0.25).to(memory_format=torch.channels_last).feature[:3]
    made: dict[str, int] = {}
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: made.__setitem__(name, grad.data_ptr()))
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert {name: p.grad.data_ptr() for name, p in model.named_parameters()} == made


def test_the_plain_modules_agree(cpu_backend):
    """What is promised here is what they do."""
    model = Plain(mx.MobileNetV1(10, 0.25).to(memory_format=torch.channels_last))
    parameters = tuple(model.parameters())
    for p, grad in zip(
        parameters, torch.autograd.grad(model(torch.randn(2, 3, 32, 32)).sum(), parameters), strict=True
    ):
        assert p.stride() == grad.stride()
