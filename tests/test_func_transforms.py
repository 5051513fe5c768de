"""vmap over a backward whose forward ran on the kernels, and torch.func over modules and functions: plain's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from behaviour import KernelOps, Plain, plain_forward
from plain import batch_norms, randomise_
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import mobilenet_ext as mx

BATCH = 3


@pytest.fixture
def model(backend64) -> nn.Module:
    torch.manual_seed(51)
    return randomise_(mx.nn.FusedSequential(mx.nn.DepthwiseSeparableConv(4, 3), mx.nn.DepthwiseConvBNReLU(3))).double()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(52)
    return torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)


def batched_by_autograd(out: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, upstream, is_grads_batched=True)


def batched_with_graph(out: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, create_graph=True)


def batched_by_vmap(out: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    return vmap(lambda v: torch.autograd.grad(out, inputs, v, retain_graph=True))(upstream)


def batched_by_two_vmaps(out: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    both = torch.stack([upstream, 2 * upstream], 2)
    return vmap(vmap(lambda v: torch.autograd.grad(out, inputs, v, retain_graph=True)), in_dims=2)(both)


WAYS = [batched_by_autograd, batched_with_graph, batched_by_vmap, batched_by_two_vmaps]
each_way = pytest.mark.parametrize("batched", WAYS, ids=lambda way: way.__name__)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        # The gradient of a bias in front of batch statistics is zero, and a rounding error in the plain modules.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_way
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batched_gradients_of_modules(model, x, batched: Callable, training: bool, memory_format: torch.memory_format):
    model.train(training)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    plain = Plain(model)
    with KernelOps() as ops:
        out = model(x)
    assert ops.units == 3
    upstream = torch.randn(BATCH, *out.shape, dtype=torch.float64)
    expected = batched(plain(x), (x, *plain.parameters()), upstream)
    assert_same(batched(out, (x, *model.parameters()), upstream), expected)


@each_way
def test_batched_gradients_of_a_part(model, x, batched: Callable):
    """Only some parameters learn, and a pooling ends the chain."""
    model = mx.nn.FusedSequential(*model, nn.AdaptiveAvgPool2d(1)).requires_grad_(False)
    model[1][1].weight.requires_grad_(True)
    plain, wanted = Plain(model), model[1][1].weight
    out, expected_out = model(x.detach()), plain(x.detach())
    upstream = torch.randn(BATCH, *out.shape, dtype=torch.float64)
    expected = batched(expected_out, (plain.module[1][1].weight,), upstream)
    assert_same(batched(out, (wanted,), upstream), expected)


def functions() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """Of an image, a depthwise or pointwise weight and a vector: each function, and the same in plain PyTorch."""
    f = mx.functional
    mean, var = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(1, 2, 4, dtype=torch.float64)

    def bn(training: bool) -> Callable[..., Tensor]:
        stats = (None, None) if training else (mean, var)
        return lambda x, v: torch.relu(F.batch_norm(x, *stats, v, None, training, 0.1, 1e-5))

    def fused(function: Callable[..., Tensor], training: bool) -> Callable[..., Tensor]:
        stats = (None, None) if training else (mean, var)
        return lambda x, w, v: function(x, w, None, *stats, v, None, training=training)

    return {
        "depthwise_conv2d": (
            lambda x, w, v: f.depthwise_conv2d(x, w, v, 2),
            lambda x, w, v: F.conv2d(x, w, v, 2, 1, groups=4),
        ),
        "pointwise_conv2d": (f.pointwise_conv2d, F.conv2d),
        "depthwise_bn_relu": (
            fused(f.depthwise_bn_relu, False),
            lambda x, w, v: bn(False)(F.conv2d(x, w, None, 1, 1, groups=4), v),
        ),
        "depthwise_bn_relu training": (
            fused(f.depthwise_bn_relu, True),
            lambda x, w, v: bn(True)(F.conv2d(x, w, None, 1, 1, groups=4), v),
        ),
        "pointwise_bn_relu": (fused(f.pointwise_bn_relu, False), lambda x, w, v: bn(False)(F.conv2d(x, w), v)),
        "pointwise_bn_relu training": (fused(f.pointwise_bn_relu, True), lambda x, w, v: bn(True)(F.conv2d(x, w), v)),
    }


each_function = pytest.mark.parametrize("name", list(functions()))


def arguments(name: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(53)
    shape = (4, 1, 3, 3) if "depthwise" in name else (4, 4, 1, 1)
    shapes = ((2, 4, 5, 4), shape, (4,))
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


@each_way
@each_function
def test_batched_gradients_of_functions(backend64, name: str, batched: Callable):
    ours, plain = functions()[name]
    given = arguments(name)
    out, expected = ours(*given), plain(*given)
    upstream = torch.randn(BATCH, *out.shape, dtype=torch.float64)
    assert_same(batched(out, given, upstream), batched(expected, given, upstream))


def test_a_batch_for_one_of_several_outputs(backend64):
    """The gradients of the layers' statistics stay unbatched."""
    x, w, _ = arguments("depthwise")
    y, mean, var = torch.ops.mobilenet_ext.depthwise(x, None, None, None, w, 1, 1)
    upstream = torch.randn(BATCH, *y.shape, dtype=torch.float64)
    ones = (torch.ones_like(mean), torch.ones_like(var))

    def backward(v: Tensor, y: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y, mean, var), (x, w), (v, *ones), retain_graph=True)

    plain = F.conv2d(x, w, None, 1, 1, groups=4)
    stats = (plain.mean((0, 2, 3)), plain.var((0, 2, 3), correction=0))
    expected = [backward(v, plain, *stats) for v in upstream]
    actual = vmap(lambda v: backward(v, y, mean, var))(upstream)
    assert_same(actual, tuple(map(torch.stack, zip(*expected, strict=True))))


@each_function
def test_gradcheck_with_batched_gradients(backend64, name: str):
    ours, _ = functions()[name]
    assert gradcheck(ours, arguments(name), check_batched_grad=True)


def test_gradcheck_of_a_module_with_batched_gradients(model, x):
    assert gradcheck(model.eval(), (x,), check_batched_grad=True)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobian(model, x, strategy: str):
    model.eval()
    expected = torch.autograd.functional.jacobian(lambda t: plain_forward(model, t), x)
    actual = torch.autograd.functional.jacobian(model, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(actual, expected)


def test_second_derivatives_stay_refused(model, x):
    with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
        torch.autograd.functional.hessian(lambda t: model(t).square().sum(), x, vectorize=True)
    (first,) = torch.autograd.grad(model(x), x, torch.ones(BATCH, 2, 3, 5, 4).double(), create_graph=True,
                                   is_grads_batched=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
        first.square().sum().backward()


@each_function
@pytest.mark.parametrize("graph", [True, False])
def test_torch_func_of_functions(backend64, name: str, graph: bool):
    """In every argument at once, and in one alone, beside others that need a gradient of their own or do not."""
    ours, plain = functions()[name]
    given = tuple(t.detach().requires_grad_(graph) for t in arguments(name))
    tangents = tuple(torch.randn_like(t) for t in given)
    for transform in (
        lambda f: grad(lambda *args: f(*args).square().sum(), argnums=(0, 1, 2))(*given),
        lambda f: (grad(lambda w: f(given[0], w, given[2]).square().sum())(given[1]),),
        lambda f: (grad(lambda x: grad(lambda x: f(x, *given[1:]).square().sum())(x).square().sum())(given[0]),),
        lambda f: jvp(f, given, tangents),
        lambda f: vjp(f, *given)[1](torch.ones_like(plain(*given))),
        lambda f: jacrev(f, argnums=(1, 2))(*given),
        lambda f: (jacfwd(f, argnums=2)(*given),),
        lambda f: (vmap(f, in_dims=(0, None, None))(torch.stack([given[0], tangents[0]]), *given[1:]),),
        lambda f: (vmap(f, in_dims=(None, 1, 0))(given[0], *(torch.stack([g, t], d) for g, t, d in
                                                             zip(given[1:], tangents[1:], (1, 0), strict=True))),),
    ):  # fmt: skip
        assert_same(transform(ours), transform(plain))


@pytest.mark.parametrize("name", ["depthwise_conv2d", "depthwise_bn_relu training"])
def test_forward_mode_of_functions(backend64, name: str):
    ours, plain = functions()[name]
    given = arguments(name)
    for i in range(3):
        tangent, results = torch.randn_like(given[i]), []
        for function in (ours, plain):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(given[i].detach(), tangent)
                out = function(*given[:i], dual, *given[i + 1 :])
                results.append(torch.autograd.forward_ad.unpack_dual(out).tangent.detach())
        torch.testing.assert_close(*results)


def test_gradients_per_sample(model, x):
    """The recipe of functional_call, grad and vmap."""
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    plain = Plain(model).module

    def per_sample(module: nn.Module, forward: Callable[..., Tensor]) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return forward(module, parameters, (image[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(parameters, x.detach())

    plain.forward = lambda t: plain_forward(nn.Sequential(*plain), t)
    actual, expected = per_sample(model, functional_call), per_sample(plain, functional_call)
    assert_same(tuple(actual.values()), tuple(expected.values()))
    jacobian = jacrev(lambda p: functional_call(model, p, (x.detach(),)))(parameters)
    assert_same(
        tuple(jacobian.values()),
        tuple(jacrev(lambda p: functional_call(plain, p, (x.detach(),)))(parameters).values()),
    )


def test_refusals_come_first_under_transforms_too():
    x, w = torch.randn(2, 4, 5, 5), torch.randn(5, 1, 3, 3)
    with pytest.raises(ValueError, match="^weight: "):
        grad(lambda x: mx.functional.depthwise_conv2d(x, w).sum())(x)


def test_running_statistics_under_vmap_are_refused_as_by_the_plain_modules(model, x):
    batch = torch.stack([x, x]).detach()
    before = [bn.running_mean.clone() for bn in batch_norms(model)]
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(Plain(model))(batch)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(model)(batch)
    assert all(torch.equal(a, bn.running_mean) for a, bn in zip(before, batch_norms(model), strict=True))
