"""The differentiable ops over the kernel ops, one convolution each, and the one op that mutates.

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
from mobilenet_ext.backends.reference import BN_MEAN, BN_VAR, GRAD_BETA, GRAD_GAMMA

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


def _split_grad(h: Tensor, grad_bn: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, mean, scale and shift from the masked gradient of z = (u - mean)*scale + shift."""
    grad_shift = grad_bn[GRAD_BETA]
    grad_u = (h * scale.view(1, -1, 1, 1)).to(h.dtype)
    return grad_u, -scale * grad_shift, grad_bn[GRAD_GAMMA].clone(), grad_shift.clone()


def _layer_forward(conv_forward, u, mean, scale, shift, weight, *geometry):
    y, bn = conv_forward(_dense(u), _pack(mean, scale, shift), weight.contiguous(), *geometry, None, None, _EPS, True)
    return y, bn[BN_MEAN].clone(), bn[BN_VAR].clone()


def _layer_fake(u, weight, stride, padding):
    h, w = (ops.conv_output_size(size, weight.shape[2], stride, padding) for size in u.shape[2:])
    c = weight.shape[0]
    y = torch.empty((u.shape[0], c, h, w), dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    return y, *(u.new_empty(c, dtype=ops.acc_dtype(u.dtype)) for _ in range(2))


def _save_layer(ctx, inputs, output):
    u, mean, scale, shift, weight, *ctx.geometry = inputs
    y, mean_y, _ = output
    ctx.save_for_backward(u, mean, scale, shift, weight, y, mean_y)


def _layer_backward(conv_backward, ctx, saved, grad_y, grad_mean, grad_var):
    u, mean, scale, shift, weight, y, mean_y = saved
    count = max(y.numel() // y.shape[1], 1)
    zero = torch.zeros_like(mean_y)
    grad_bn_y = torch.stack([zero + 1, 2 * grad_var / count, mean_y, grad_mean / count, zero, zero])
    need_u = any(ctx.needs_input_grad[:4])
    h, grad_weight, grad_bn = conv_backward(
        _dense(grad_y), y, grad_bn_y, _dense(u), _pack(mean, scale, shift), False, weight.contiguous(),
        *ctx.geometry, need_u, ctx.needs_input_grad[4],
    )  # fmt: skip
    grads = (None, None, None, None)
    if need_u:
        grad_u, *vectors = (h, None, None, None) if mean is None else _split_grad(h, grad_bn, scale)
        grads = (as_gradient_of(u, grad_u), *vectors)
    grad_weight = as_gradient_of(weight, grad_weight) if ctx.needs_input_grad[4] else None
    return *grads, grad_weight, *(None for _ in ctx.geometry)


def _depthwise(u, mean, scale, shift, weight, stride, padding):
    return _layer_forward(ops.depthwise_forward, u, mean, scale, shift, weight, stride, padding)


def _pointwise(u, mean, scale, shift, weight):
    return _layer_forward(ops.pointwise_forward, u, mean, scale, shift, weight)


@first_order("mobilenet_ext::depthwise")
def _depthwise_backward(ctx, saved, *grads):
    return _layer_backward(ops.depthwise_backward, ctx, saved, *grads)


@first_order("mobilenet_ext::pointwise")
def _pointwise_backward(ctx, saved, *grads):
    return _layer_backward(ops.pointwise_backward, ctx, saved, *grads)


def _bn_relu(y, mean, scale, shift, relu):
    return ops.bn_relu_forward(_dense(y), _pack(mean, scale, shift), relu)


def _save_bn_relu(ctx, inputs, output):
    *tensors, ctx.relu = inputs
    ctx.save_for_backward(*tensors)


@first_order("mobilenet_ext::bn_relu")
def _bn_relu_backward(ctx, saved, grad):
    y, mean, scale, shift = saved
    h, grad_bn = ops.bn_relu_backward(_dense(grad), _dense(y), _pack(mean, scale, shift), False, ctx.relu)
    grad_y, *vectors = _split_grad(h, grad_bn, scale)
    return as_gradient_of(y, grad_y), *vectors, None


def _bias_bn(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    storage.check(bias)
    bias = bias.to(ops.acc_dtype(weight.dtype))
    return _pack(torch.zeros_like(bias), torch.ones_like(bias), bias)


def _depthwise_conv2d(input, weight, bias, stride, padding):
    bn = _bias_bn(weight, bias)
    return ops.depthwise_inference(_dense(input), bn, weight.contiguous(), stride, padding, False)


def _pointwise_conv2d(input, weight, bias):
    return ops.pointwise_inference(_dense(input), _bias_bn(weight, bias), weight.contiguous(), False)


def _save_conv2d(ctx, inputs, output):
    input, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _channel_sums(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[1], dtype=ops.acc_dtype(x.dtype), device=x.device)
    identity = _pack(torch.zeros_like(ones), ones, torch.zeros_like(ones))
    return ops.bn_relu_backward(x, x, identity, False, False)[1][GRAD_BETA].clone()


def _conv2d_backward(conv_backward, ctx, saved, grad):
    input, weight = saved
    need_input, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_input = grad_weight = grad_bias = None
    if need_input or need_weight:
        grad_input, grad_weight, _ = conv_backward(
            _dense(grad), None, None, _dense(input), None, False, weight.contiguous(), *ctx.geometry,
            need_input, need_weight,
        )  # fmt: skip
    if need_bias:
        # Not Tensor.sum, which cuts a sum by the number of threads: the same bits for every number of them.
        grad_bias = _channel_sums(_dense(grad)).to(ctx.bias_dtype)
    return (
        as_gradient_of(input, grad_input) if need_input else None,
        as_gradient_of(weight, grad_weight) if need_weight else None,
        grad_bias,
        *(None for _ in ctx.geometry),
    )


@first_order("mobilenet_ext::depthwise_conv2d")
def _depthwise_conv2d_backward(ctx, saved, grad):
    return _conv2d_backward(ops.depthwise_backward, ctx, saved, grad)


@first_order("mobilenet_ext::pointwise_conv2d")
def _pointwise_conv2d_backward(ctx, saved, grad):
    return _conv2d_backward(ops.pointwise_backward, ctx, saved, grad)


@torch.no_grad()
def _update_running_stats(running_mean, running_var, mean, var, conv_bias, count, momentum):
    """running = (1 - momentum)*running + momentum*batch, one entry a BatchNorm: with the unbiased variance of ``count``
    values a channel, and the convolution's bias, which the kernels leave out, back in the mean."""
    mean = [m if bias is None else m + bias for m, bias in zip(mean, conv_bias, strict=True)]
    unbiased = torch._foreach_mul(var, [n / max(n - 1, 1) for n in count])
    batch = torch._foreach_mul([*mean, *unbiased], momentum + momentum)
    running = [*running_mean, *running_var]
    # In the accumulation dtype and rounded once, also for buffers of 16 bits.
    kept = [r.to(b.dtype) for r, b in zip(running, batch, strict=True)]
    kept = torch._foreach_mul(kept, [1 - m for m in momentum + momentum])
    torch._foreach_copy_(running, torch._foreach_add(kept, batch))


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
    _save_layer,
    casts=(0, 4),
)
pointwise = _layer_op(
    "pointwise",
    _pointwise,
    lambda u, mean, scale, shift, weight: _layer_fake(u, weight, 1, 0),
    _pointwise_backward,
    _save_layer,
    casts=(0, 4),
)
bn_relu = _layer_op(
    "bn_relu",
    _bn_relu,
    lambda y, mean, scale, shift, relu: torch.empty_like(y, memory_format=torch.channels_last),
    _bn_relu_backward,
    _save_bn_relu,
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
    lambda input, weight, bias: _layer_fake(input, weight, 1, 0)[0],
    _pointwise_conv2d_backward,
    _save_conv2d,
    casts=(0, 1, 2),
)

_library.impl("update_running_stats_", _update_running_stats, "CompositeExplicitAutograd")
torch.library.register_fake("mobilenet_ext::update_running_stats_", lambda *args: None, lib=_library)
update_running_stats_ = torch.ops.mobilenet_ext.update_running_stats_.default
