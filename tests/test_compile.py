"""``torch.compile``: one graph, the results of eager mode, and the same freedom of choice afterwards.

A graph calls the ops, which choose the backend when it runs (``test_a_compiled_graph_obeys_the_backend``): the others
run on one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

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


@pytest.mark.parametrize("compiler", [pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"])
def test_training_and_eval(compiler):
    model = features()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for _ in range(2):
        assert_same(compiled, model, twin, image())
    assert_same(compiled, model.eval(), twin.eval(), image())
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), twin(image()))


@pytest.mark.slow
def test_whole_network():
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


def test_functions():
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


def test_dynamic_batch_size():
    model = features(3)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3, 7):
        assert_same(compiled, model, twin, image(n))
    with torch.no_grad():
        for n in (4, 5):
            torch.testing.assert_close(compiled(image(n)), twin(image(n)))


def test_automatic_dynamic_shapes():
    model = features(3).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n, size in ((2, 32), (3, 32), (5, 48), (4, 33)):
            torch.testing.assert_close(compiled(image(n, size)), model(image(n, size)))


def test_a_hook_registered_before_compilation_fires():
    """One registered afterwards needs a new compilation: Dynamo does not guard the hooks of any module."""
    model, x = features(3).eval(), image()
    expected = model(x)
    model[0][1][1].register_forward_hook(lambda m, i, o: o * 2)
    changed = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(changed, model(x))
    assert not torch.allclose(changed, expected)


def test_a_swapped_child_is_seen():
    model, x = features(3).eval(), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    model[0][1][2] = nn.Hardswish()
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)


def blocks(convert: Callable[[nn.Module], nn.Module]) -> list[nn.Module]:
    return [convert(mx.nn.DepthwiseSeparableConv(8, 8)) for _ in range(3)]


class Sequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:  # Dynamo of torch 2.13 compiles no forward that is written in torch.nn
        for module in self:
            x = module(x)
        return x


def as_plain(module: nn.Module) -> nn.Module:
    return Sequential(*map(as_plain, module)) if isinstance(module, nn.Sequential) else module


def equal_blocks_in_a_row(convert, graphs):
    model = nn.Sequential(*blocks(convert))
    for block in model:
        block.compile(backend=graphs)
    for _ in range(2):
        model(torch.randn(2, 8, 8, 8))


def equal_blocks_of_one_function(convert, graphs):
    run = torch.compile(lambda block, x: block(x), backend=graphs)
    for block in blocks(convert):
        run(block, torch.randn(2, 8, 8, 8))


def blocks_of_two_strides(convert, graphs):
    for i in range(4):
        block = convert(mx.nn.DepthwiseSeparableConv(8, 8, stride=1 + i % 2))
        block.compile(backend=graphs)
        block(torch.randn(2, 8, 8, 8))


def loaded_parameters(convert, graphs):
    model = convert(features(3))
    compiled = torch.compile(model, backend=graphs)
    for _ in range(3):
        compiled(image())
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def replaced_buffers(convert, graphs):
    model = convert(features(3))
    compiled = torch.compile(model, backend=graphs)
    for _ in range(3):
        compiled(image())
        for bn in batch_norms(model):
            bn._buffers.update({name: buffer.clone() for name, buffer in bn._buffers.items()})


def three_networks(convert, graphs):
    for _ in range(3):
        model = convert(features(3))
        model.compile(backend=graphs)
        model(image())


def copies_of_a_network(convert, graphs):
    model = convert(features(3))
    for _ in range(3):
        model = copy.deepcopy(model)
        torch.compile(model, backend=graphs)(image())


def mode_and_momentum(convert, graphs):
    model = convert(features(3))
    compiled = torch.compile(model, backend=graphs)
    for training, momentum in ((True, 0.1), (False, 0.1), (True, 0.2), (True, 0.1), (False, 0.2)):
        for bn in batch_norms(model.train(training)):
            bn.momentum = momentum
        compiled(image())


@pytest.mark.parametrize(
    "use",
    [
        equal_blocks_in_a_row,
        loaded_parameters,
        three_networks,
        mode_and_momentum,
        pytest.param(equal_blocks_of_one_function, marks=pytest.mark.slow),
        pytest.param(blocks_of_two_strides, marks=pytest.mark.slow),
        pytest.param(replaced_buffers, marks=pytest.mark.slow),
        pytest.param(copies_of_a_network, marks=pytest.mark.slow),
    ],
)
def test_as_few_compilations_as_the_plain_modules(use):
    """Modules of the same make share a graph: nothing of it depends on which module or tensor it was made for."""
    counts = []
    for convert in (as_plain, lambda module: module):
        torch._dynamo.reset()
        graphs = torch._dynamo.testing.CompileCounter()
        use(convert, graphs)
        counts.append(graphs.frame_count)
    assert 0 < counts[1] <= counts[0]


@pytest.mark.parametrize("compiled_before", [False, True])
@torch._dynamo.config.patch(skip_no_tensor_aliasing_guards_on_parameters=False)  # by default torch does not look
def test_batch_norms_that_share_a_buffer(compiled_before):
    model = features(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if compiled_before:
        compiled(image())
    first, second, _ = batch_norms(model)
    second.running_mean, second.num_batches_tracked = first.running_mean, first.num_batches_tracked
    twin = copy.deepcopy(model)
    assert_same(compiled, model, twin, image())
    assert first.num_batches_tracked == 2 + compiled_before


def test_autocast():
    model = features(3).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(image().float()), model(image().float())
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
