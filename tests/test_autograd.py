"""The graph: what is refused, what is kept, what notices a change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from behaviour import Plain, fused_units
from plain import batch_norms, randomise_
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mobilenet_ext as mx


@pytest.fixture
def model(backend64) -> nn.Module:
    torch.manual_seed(7)
    return randomise_(mx.nn.DepthwiseSeparableConv(8, 5)).double()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(8)
    return torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)


def functions(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every public function of one tensor, the other arguments fixed."""
    torch.manual_seed(9)
    w = torch.randn(8, 1, 3, 3, dtype=x.dtype, requires_grad=True)
    p = torch.randn(5, 8, 1, 1, dtype=x.dtype, requires_grad=True)
    stats8 = (torch.zeros(8, dtype=x.dtype), torch.ones(8, dtype=x.dtype), None, None)
    stats5 = (torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype), None, None)
    f = mx.functional
    return {
        "depthwise_conv2d": lambda x: f.depthwise_conv2d(x, w),
        "pointwise_conv2d": lambda x: f.pointwise_conv2d(x, p),
        "depthwise_bn_relu": lambda x: f.depthwise_bn_relu(x, w, None, *stats8),
        "depthwise_bn_relu training": lambda x: f.depthwise_bn_relu(x, w, None, *stats8, training=True),
        "pointwise_bn_relu": lambda x: f.pointwise_bn_relu(x, p, None, *stats5),
        "pointwise_bn_relu training": lambda x: f.pointwise_bn_relu(x, p, None, *stats5, training=True),
    }


FUNCTIONS = list(functions(torch.ones(1)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_backward_of_functions_is_refused_by_name(backend64, x, name):
    out = functions(x)[name](x)
    (grad,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
        torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad((functions(x)[name](x) ** 2).sum(), x)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_second_derivatives_are_never_silent_zeros(model, x, memory_format):
    """torch.autograd.functional takes an input that a gradient does not depend on for a derivative of zero."""
    x = x.detach().contiguous(memory_format=memory_format)
    with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
        torch.autograd.functional.hessian(lambda t: model(t).sum(), x[:, :, :1, :2].clone(memory_format=memory_format))


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_of_modules_is_refused_by_name(model, x, training):
    model.train(training)
    grads = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
            torch.autograd.grad(grad.sum(), x, retain_graph=True)
    # A gradient penalty, as users write it.
    penalty = sum(grad.square().sum() for grad in grads)
    with pytest.raises(RuntimeError, match="mobilenet_ext.*double backward"):
        penalty.backward()


def test_create_graph_gives_the_same_gradients(model, x):
    model.eval()
    with_graph = torch.autograd.grad(model(x).sum(), (x, *model.parameters()), create_graph=True)
    without = torch.autograd.grad(model(x).sum(), (x, *model.parameters()))
    for a, b in zip(with_graph, without, strict=True):
        assert torch.equal(a, b)


def test_graph_kept_and_freed(model, x):
    out = model(x).sum()
    first = torch.autograd.grad(out, (x, *model.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, (x, *model.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)


def test_part_of_the_gradients(model, x):
    """What is asked for is the same, whatever else is not."""
    out = model(x).sum()
    wanted = (x, *model.parameters())
    together = torch.autograd.grad(out, wanted, retain_graph=True)
    for tensor, grad in zip(wanted, together, strict=True):
        (alone,) = torch.autograd.grad(out, tensor, retain_graph=True)
        torch.testing.assert_close(alone, grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(model, x, use_reentrant):
    expected = torch.autograd.grad(model.eval()(x).sum(), (x, *model.parameters()))
    model.zero_grad()
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    for tensor, grad in zip((x, *model.parameters()), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_in_training(model, x, use_reentrant):
    untrained = copy.deepcopy(model)
    plain = Plain(model)
    other = x.detach().clone().requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    plain(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    # The rerun counts again, as for plain modules; without reentrance it stops before the statistics, and so does
    # the count.
    runs = 2 if use_reentrant else 1
    expected = Plain(copy.deepcopy(untrained))
    for _ in range(runs):
        expected(other)
    for bn, other_bn in zip(batch_norms(model), batch_norms(expected), strict=True):
        assert bn.num_batches_tracked == runs
        torch.testing.assert_close(bn.running_mean, other_bn.running_mean)
        torch.testing.assert_close(bn.running_var, other_bn.running_var)


def test_saved_tensors_hooks(model, x):
    """Offloading: everything kept for backward passes through them, one activation a convolution, and the input."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> tuple[int, Tensor]:
        packed.append(tensor)
        return len(packed), tensor.clone()

    expected = torch.autograd.grad(model(x).sum(), (x, *model.parameters()))
    with saved_tensors_hooks(pack, lambda kept: kept[1]):
        out = model(x)
    images = [tuple(t.shape) for t in packed if t.dim() == 4 and t.shape[0] == 2]
    assert sorted(images) == [(2, 5, 6, 6), (2, 8, 6, 6), (2, 8, 6, 6)]
    for a, b in zip(torch.autograd.grad(out.sum(), (x, *model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_activation_memory_is_half_of_the_plain_modules(model, x):
    def kept(module: nn.Module) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 4 and tensor.shape[0] == 2:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(x.detach())  # noqa: F841  # alive, so that no storage is used twice
            return sum(seen.values())

    assert kept(model) <= 0.65 * kept(Plain(model))


@pytest.mark.parametrize("which", ["depthwise weight", "pointwise weight"])
def test_changing_a_saved_weight_is_noticed(model, x, which):
    out = model(x).sum()
    with torch.no_grad():
        model[which != "depthwise weight"][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_changing_a_saved_input_is_noticed(model):
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    out = model(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("name", ["depthwise_conv2d", "pointwise_conv2d"])
def test_changing_a_saved_input_of_a_function_is_noticed(backend64, x, name):
    function = functions(x)[name]
    x = x.detach().contiguous(memory_format=torch.channels_last)
    out = function(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_changing_statistics_or_batch_norm_after_forward_changes_no_gradient(model, x):
    expected = torch.autograd.grad(model(x).sum(), (x, *model.parameters()))
    out = model(x).sum()
    with torch.no_grad():
        for bn in batch_norms(model):
            bn.running_mean.add_(1)
            bn.running_var.mul_(2)
    for a, b in zip(torch.autograd.grad(out, (x, *model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_output_may_be_changed_in_place(model, x):
    plain, other = Plain(model), x.detach().clone().requires_grad_()
    model(x).mul_(2).sum().backward()
    plain(other).mul(2).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_no_grad_in_training_mode(model, x):
    plain = Plain(model)
    with torch.no_grad():
        out = model(x)
        expected = plain(x)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(model, x, training):
    model.train(training)
    plain = Plain(model)
    with torch.inference_mode():
        assert fused_units(model, x) == 2
        plain(x)
        out, expected = model(x), plain(x)
        assert out.is_inference()
        torch.testing.assert_close(out, expected)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    model(x).sum().backward()  # and training goes on
    assert x.grad is not None


def test_running_statistics_are_changed_in_place_and_counted(model, x):
    running = [bn.running_mean for bn in batch_norms(model)]
    versions = [r._version for r in running]
    model(x)
    assert all(r._version > v for r, v in zip(running, versions, strict=True))
    assert all(bn.running_mean is r for bn, r in zip(batch_norms(model), running, strict=True))
    versions = [r._version for r in running]
    model.eval()(x)
    assert [r._version for r in running] == versions


@pytest.mark.parametrize("training", [True, False])
def test_function_transforms_of_modules_are_right(model, x, training):
    """They run the plain modules: torch.func works as on them."""
    model.train(training)
    for bn in batch_norms(model):  # in training the transforms refuse to change buffers, for plain modules too
        bn.track_running_stats = False
        if training:
            bn.running_mean = bn.running_var = None
    plain = Plain(model)
    x = x.detach()
    tangent = torch.randn_like(x)
    expected = torch.func.grad(lambda t: plain(t).square().sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda t: model(t).square().sum())(x), expected)
    expected = torch.func.jvp(plain, (x,), (tangent,))
    for a, b in zip(torch.func.jvp(model, (x,), (tangent,)), expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent, expected[1])
    batch = torch.stack([x, x + 1])
    torch.testing.assert_close(
        torch.func.vmap(model)(batch), torch.stack([plain(b) for b in batch]), rtol=1e-6, atol=1e-6
    )


def test_anomaly_mode(model, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        model(x).sum().backward()
    assert x.grad is not None
