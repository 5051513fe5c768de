"""The differentiable ops over the kernel ops, one convolution each.

Every autograd edge carries the true derivative, so these ops compose freely with any other: statistics come out as
differentiable outputs and a normalisation goes in as differentiable vectors. ``mx.functional`` is made of them; the
network's chain (``chain.py``) computes the same with one autograd node and less memory traffic.

Schemas: ``csrc/ops.h``. Activations may have any strides; outputs are channels_last. ``mean``, ``scale`` and ``shift``
are ``[C]`` in the accumulation dtype, all given or all None; given, the convolution's input is
``relu((u - mean)*scale + shift)``. ``mean_y`` and ``var_y`` are the output's per-channel mean and biased variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilenet_ext import ops, storage
from mobilenet_ext.autograd import as_gradient_of, first_order
from mobilenet_ext.contract import BN_MEAN, BN_VAR, GRAD_BETA, GRAD_GAMMA, NO_PADDING, Act, acc_dtype, conv_output_size

_library = torch.library.Library("mobilenet_ext", "FRAGMENT")

# Any: the normalisation made of the statistics is not used here, only the statistics themselves are.
_EPS = 1.0


def _dense(x: Tensor) -> Tensor:
    storage.check(x)
    return x.contiguous(memory_format=torch.channels_last)


def _pack(mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """``bn`` of these vectors; RSTD = 1 makes the GAMMA row of its gradient the gradient of ``scale``."""
    if mean is None:
        return None
    return torch.stack([mean, scale, shift, torch.ones_like(mean), torch.zeros_like(mean)])


def _split_grad(dz: Tensor, grad_bn: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, mean, scale and shift from that of z = (u - mean)*scale + shift."""
    grad_shift = grad_bn[GRAD_BETA]
    grad_u = (dz * scale.view(1, -1, 1, 1)).to(dz.dtype)
    return grad_u, -scale * grad_shift, grad_bn[GRAD_GAMMA].clone(), grad_shift.clone()


def _input(u, mean, scale, shift):
    """``u``, ``bn_u`` and ``act_u`` of a convolution."""
    return _dense(u), _pack(mean, scale, shift), Act.LINEAR.value if mean is None else Act.RELU.value


def _layer_forward(kind, u, mean, scale, shift, weight, stride, padding):
    y, bn = ops.FORWARD[kind](
        *_input(u, mean, scale, shift), weight.contiguous(), stride, padding, None, None, _EPS, True
    )
    return y, bn[BN_MEAN].clone(), bn[BN_VAR].clone()


def _layer_fake(u, weight, stride, padding):
    h, w = conv_output_size(*u.shape[2:], weight.shape[2], stride, padding)
    c = weight.shape[0]
    y = torch.empty((u.shape[0], c, h, w), dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    return y, *(u.new_empty(c, dtype=acc_dtype(u.dtype)) for _ in range(2))


def _save_layer(ctx, inputs, output):
    u, mean, scale, shift, weight, *_ = inputs
    y, mean_y, _ = output
    ctx.save_for_backward(u, mean, scale, shift, weight, y, mean_y)


def _layer_backward(kind, ctx, saved, stride, padding, grad_y, grad_mean, grad_var):
    u, mean, scale, shift, weight, y, mean_y = saved
    count = max(y.numel() // y.shape[1], 1)
    one, zero = torch.ones_like(mean_y), torch.zeros_like(mean_y)
    # d mean_y / dy = 1/count, d var_y / dy = 2*(y - mean_y)/count.
    grad_bn_y = torch.stack([one, 2 * grad_var / count, mean_y, grad_mean / count, zero, zero])
    need_u = any(ctx.needs_input_grad[:4])
    dz_u, grad_weight, grad_bn = ops.BACKWARD[kind](
        _dense(grad_y), y, grad_bn_y, *_input(u, mean, scale, shift), False, weight.contiguous(), stride, padding,
        need_u, ctx.needs_input_grad[4],
    )  # fmt: skip
    grads = (None, None, None, None)
    if need_u:
        grad_u, *vectors = (dz_u, None, None, None) if mean is None else _split_grad(dz_u, grad_bn, scale)
        grads = (as_gradient_of(u, grad_u), *vectors)
    return *grads, as_gradient_of(weight, grad_weight) if ctx.needs_input_grad[4] else None


def _depthwise(u, mean, scale, shift, weight, stride, padding):
    return _layer_forward("depthwise", u, mean, scale, shift, weight, stride, padding)


def _pointwise(u, mean, scale, shift, weight):
    return _layer_forward("pointwise", u, mean, scale, shift, weight, 1, NO_PADDING)


def _save_depthwise(ctx, inputs, output):
    _save_layer(ctx, inputs, output)
    ctx.stride, ctx.padding = inputs[5:]


@first_order("mobilenet_ext::depthwise")
def _depthwise_backward(ctx, saved, *grads):
    return *_layer_backward("depthwise", ctx, saved, ctx.stride, ctx.padding, *grads), None, None


@first_order("mobilenet_ext::pointwise")
def _pointwise_backward(ctx, saved, *grads):
    return _layer_backward("pointwise", ctx, saved, 1, NO_PADDING, *grads)


def _norm_act(y, mean, scale, shift, act, slope=0.0):
    return ops.norm_act_forward(_dense(y), _pack(mean, scale, shift), act, False, None, slope)


def _save_norm_act(ctx, inputs, output):
    *tensors, ctx.act, ctx.slope = inputs
    ctx.save_for_backward(*tensors)


@first_order("mobilenet_ext::norm_act")
def _norm_act_backward(ctx, saved, grad):
    y, mean, scale, shift = saved
    bn = _pack(mean, scale, shift)
    dz, grad_bn = ops.norm_act_backward(
        _dense(grad), _dense(y), bn, ctx.act, False, False, None, True, ctx.slope
    )  # fmt: skip
    grad_y, *vectors = _split_grad(dz, grad_bn, scale)
    return as_gradient_of(y, grad_y), *vectors, None, None


def _bias_bn(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    storage.check(bias)
    bias = bias.to(acc_dtype(weight.dtype))
    return _pack(torch.zeros_like(bias), torch.ones_like(bias), bias)


def _conv2d(kind, input, weight, bias, stride, padding):
    bn = _bias_bn(weight, bias)
    return ops.INFERENCE[kind](_dense(input), bn, Act.LINEAR.value, weight.contiguous(), stride, padding)


def _depthwise_conv2d(input, weight, bias, stride, padding):
    return _conv2d("depthwise", input, weight, bias, stride, padding)


def _pointwise_conv2d(input, weight, bias):
    return _conv2d("pointwise", input, weight, bias, 1, NO_PADDING)


def _save_conv2d(ctx, inputs, output):
    input, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _channel_sums(x: Tensor) -> Tensor:
    """The sum of each channel, in an order of its own: the same bits for every number of threads, unlike Tensor.sum.

    It is what a BatchNorm's backward computes for beta; the normalisation handed to it plays no part.
    """
    ones = torch.ones(x.shape[1], dtype=acc_dtype(x.dtype), device=x.device)
    identity = _pack(torch.zeros_like(ones), ones, torch.zeros_like(ones))
    return ops.norm_act_backward(x, x, identity, Act.LINEAR.value, False, False)[1][GRAD_BETA].clone()


def _conv2d_backward(kind, ctx, saved, stride, padding, grad):
    input, weight = saved
    need_input, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_input = grad_weight = grad_bias = None
    if need_input or need_weight:
        grad_input, grad_weight, _ = ops.BACKWARD[kind](
            _dense(grad), None, None, _dense(input), None, Act.LINEAR.value, False, weight.contiguous(),
            stride, padding, need_input, need_weight,
        )  # fmt: skip
    if need_bias:
        grad_bias = _channel_sums(_dense(grad)).to(ctx.bias_dtype)
    return (
        as_gradient_of(input, grad_input) if need_input else None,
        as_gradient_of(weight, grad_weight) if need_weight else None,
        grad_bias,
    )


@first_order("mobilenet_ext::depthwise_conv2d")
def _depthwise_conv2d_backward(ctx, saved, grad):
    return *_conv2d_backward("depthwise", ctx, saved, *ctx.geometry, grad), None, None


@first_order("mobilenet_ext::pointwise_conv2d")
def _pointwise_conv2d_backward(ctx, saved, grad):
    return _conv2d_backward("pointwise", ctx, saved, 1, NO_PADDING, grad)


def _autocast(op: str, casts: tuple[int, ...], device: str) -> None:
    """Under autocast cast the arguments at positions ``casts``: the activation and the convolution's own parameters.

    ``torch.library.register_autocast`` would fix one dtype, and cast every tensor: statistics and buffers too.
    """
    key = f"Autocast{device.upper()}"
    overload = getattr(torch.ops.mobilenet_ext, op).default

    def call(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [
            a.to(dtype) if i in casts and a is not None and a.is_floating_point() and a.dtype != torch.float64 else a
            for i, a in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return overload(*cast)

    _library.impl(op, call, key)


def _layer_op(op, forward, fake, backward, setup_context, casts):
    _library.impl(op, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mobilenet_ext::{op}", fake, lib=_library)
    torch.library.register_autograd(f"mobilenet_ext::{op}", backward, setup_context=setup_context, lib=_library)
    if casts:
        for device in ("cpu", "cuda"):
            _autocast(op, casts, device)
    return getattr(torch.ops.mobilenet_ext, op).default


depthwise = _layer_op(
    "depthwise",
    _depthwise,
    lambda u, mean, scale, shift, weight, stride, padding: _layer_fake(u, weight, stride, padding),
    _depthwise_backward,
    _save_depthwise,
    casts=(0, 4),
)
pointwise = _layer_op(
    "pointwise",
    _pointwise,
    lambda u, mean, scale, shift, weight: _layer_fake(u, weight, 1, NO_PADDING),
    _pointwise_backward,
    _save_layer,
    casts=(0, 4),
)
norm_act = _layer_op(
    "norm_act",
    _norm_act,
    lambda y, mean, scale, shift, act, slope=0.0: torch.empty_like(y, memory_format=torch.channels_last),
    _norm_act_backward,
    _save_norm_act,
    casts=(),
)
depthwise_conv2d = _layer_op(
    "depthwise_conv2d",
    _depthwise_conv2d,
    lambda input, weight, bias, stride, padding: _layer_fake(input, weight, stride, padding)[0],
    _depthwise_conv2d_backward,
    _save_conv2d,
    casts=(0, 1, 2),
)
pointwise_conv2d = _layer_op(
    "pointwise_conv2d",
    _pointwise_conv2d,
    lambda input, weight, bias: _layer_fake(input, weight, 1, NO_PADDING)[0],
    _pointwise_conv2d_backward,
    _save_conv2d,
    casts=(0, 1, 2),
)
