"""``torch.compile``: one graph, the results of eager mode, and the same freedom of choice afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from plain import batch_norms, is_conv_bias, randomise_
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import backends


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def features(units: int = 5) -> nn.Module:
    """The first units of the network, the pooling and a classifier, in float64: no chaos at ReLU signs."""
    torch.manual_seed(31)
    feature = randomise_(mx.MobileNetV1(10, 0.25)).double().feature
    pooled = mx.nn.FusedSequential(*feature[:units], feature[-1])
    return nn.Sequential(pooled, nn.Flatten(), nn.Linear(feature[units - 1][0].out_channels, 10).double())


def image(n: int = 2, size: int = 32) -> Tensor:
    torch.manual_seed(32)
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def assert_same(compiled, model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Output, gradients and buffers of the compiled ``model`` are those of ``twin`` in eager mode."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module in (model, twin):
        module.zero_grad()
    out, expected = compiled(a), twin(b)
    assert out.stride() == expected.stride() and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_training_and_eval(backend64, compiler):
    model = features()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for _ in range(2):
        assert_same(compiled, model, twin, image())
    assert_same(compiled, model.eval(), twin.eval(), image())
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), twin(image()))


def test_whole_network(backend64):
    torch.manual_seed(0)
    model = randomise_(mx.MobileNetV1(10, 0.25)).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    a, b = image(3, 64), image(3, 64)
    out, expected = compiled(a), twin(b)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9, msg=name)
        assert not (is_conv_bias(name) and p.grad.any())
    for bn, other in zip(batch_norms(model), batch_norms(twin), strict=True):
        assert bn.num_batches_tracked == 1
        torch.testing.assert_close(bn.running_var, other.running_var)


def test_functions(backend64):
    w, p = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((8, 1, 3, 3), (5, 8, 1, 1)))
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)

    def function(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = mx.functional.depthwise_conv2d(x, w, bias, stride=2)
        y = mx.functional.depthwise_bn_relu(y, w, bias, None, None, None, None, training=True)
        z = mx.functional.pointwise_bn_relu(y, p, None, mean, var, None, None, training=True)
        return z + mx.functional.pointwise_conv2d(y, p)

    compiled = torch.compile(function, fullgraph=True)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    other_mean, other_var = mean.clone(), var.clone()
    out, expected = compiled(x, mean, var), function(x, other_mean, other_var)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mean, other_mean)
    torch.testing.assert_close(var, other_var)
    assert mean.any()
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (x, w, bias, p)),
        torch.autograd.grad(expected.square().sum(), (x, w, bias, p)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_compiled_graph_obeys_the_backend(monkeypatch):
    """The choice is read at each call: no new compilation, and the other kernels run."""
    calls = []
    original = backends.reference.depthwise_forward

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(backends.reference, "depthwise_forward", counted)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    model, x = features(), image()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with backends.use("cpu"):
        compiled(x).sum().backward()
        assert not calls
    with backends.use("reference"):
        compiled(x).sum().backward()
        assert len(calls) == 2
    with backends.use("cpu"):
        compiled(x).sum().backward()
    assert len(calls) == 2 and graphs.frame_count == 1


def test_dynamic_batch_size(backend64):
    model = features(3)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3, 7):
        assert_same(compiled, model, twin, image(n))
    with torch.no_grad():
        for n in (4, 5):
            torch.testing.assert_close(compiled(image(n)), twin(image(n)))


def test_automatic_dynamic_shapes(backend64):
    model = features(3).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n, size in ((2, 32), (3, 32), (5, 48), (4, 33)):
            torch.testing.assert_close(compiled(image(n, size)), model(image(n, size)))


def test_a_hook_registered_before_compilation_fires(backend64):
    """One registered afterwards needs a new compilation: Dynamo does not guard the hooks of any module."""
    model, x = features(3).eval(), image()
    expected = model(x)
    model[0][1][1].register_forward_hook(lambda m, i, o: o * 2)
    changed = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(changed, model(x))
    assert not torch.allclose(changed, expected)


def test_a_swapped_child_is_seen(backend64):
    model, x = features(3).eval(), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    model[0][1][2] = nn.Hardswish()
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)


def test_autocast(cpu_backend):
    model = features(3).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(image().float()), model(image().float())
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
