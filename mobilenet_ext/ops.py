"""The kernel ops as PyTorch sees them: fake kernels, and one kernel a call that hands it to the current backend.

``csrc/ops.h`` holds the schemas with their conventions; the C++ library defines them when ``mobilenet_ext.backends``
loads it. What each op computes is written in ``backends/reference.py``. Kernel ops are functional, take and return
channels_last activations, and have no autograd: ``layers.py`` and ``chain.py`` differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mobilenet_ext import backends
from mobilenet_ext.contract import BN_ROWS, GRAD_ROWS, NO_PADDING, acc_dtype, conv_output_size

_library = torch.library.Library("mobilenet_ext", "FRAGMENT")


def _kernel_op(op: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """The op of this name, which is defined by now; ``fake`` gives its outputs' shapes, dtypes and strides."""

    def dispatch(first: Tensor, *rest: Any) -> Any:
        return backends.kernel(op, first.device.type)(first, *rest)

    _library.impl(op, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mobilenet_ext::{op}", fake, lib=_library)
    # The overload, not the packet: resolving a packet at each call costs host time.
    return getattr(torch.ops.mobilenet_ext, op).default


def _acc_empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=acc_dtype(like.dtype))


def _image(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _conv_output(u: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    h, w = conv_output_size(*u.shape[2:], weight.shape[2], stride, padding)
    return _image(u, u.shape[0], weight.shape[0], h, w)


def _conv_forward(u, bn_u, act_u, weight, stride, padding, gamma, beta, eps, stats, bias=None, slope_u=0.0):
    bn = _acc_empty(u, BN_ROWS, weight.shape[0]) if stats else _acc_empty(u, 0)
    return _conv_output(u, weight, stride, padding), bn


def _conv_backward(
    dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, stride, padding, need_input, need_weight, slope_u=0.0
):  # fmt: skip
    dz_u = torch.empty_like(u, memory_format=torch.channels_last) if need_input else u.new_empty(0)
    grad_weight = _acc_empty(u, *weight.shape) if need_weight else _acc_empty(u, 0)
    with_bn = need_input and bn_u is not None
    return dz_u, grad_weight, _acc_empty(u, GRAD_ROWS, u.shape[1]) if with_bn else _acc_empty(u, 0)


def _conv_inference(x, bn_y, act_y, weight, stride, padding, packed=None, residual=None, slope_y=0.0):
    return _conv_output(x, weight, stride, padding)


def _gated_forward(u, bn_u, act_u, gate, weight, gamma, beta, eps, stats, bias=None, slope_u=0.0):
    return _conv_forward(u, bn_u, act_u, weight, 1, NO_PADDING, gamma, beta, eps, stats)


def _gated_backward(dz, y, grad_bn_y, u, bn_u, act_u, gate, weight, need_input, need_weight, slope_u=0.0):
    da, grad_weight, _ = _conv_backward(
        dz, y, grad_bn_y, u, bn_u, act_u, False, weight, 1, NO_PADDING, need_input, need_weight
    )
    return da, grad_weight, _acc_empty(u, *gate.shape) if need_input else _acc_empty(u, 0)


def _gated_inference(x, gate, bn_y, act_y, weight, packed=None, residual=None, slope_y=0.0):
    return _conv_output(x, weight, 1, NO_PADDING)


def _norm_act_forward(y, bn_y, act, pool, residual=None, slope=0.0):
    return _image(y, *y.shape[:2], 1, 1) if pool else torch.empty_like(y, memory_format=torch.channels_last)


def _norm_act_backward(grad, y, bn_y, act, batch_stats, pool, grad_pooled=None, need_dz=True, slope=0.0):
    dz = torch.empty_like(y, memory_format=torch.channels_last) if need_dz else y.new_empty(0)
    return dz, _acc_empty(y, GRAD_ROWS, y.shape[1])


def _bn_from_running(running_mean, running_var, gamma, beta, conv_bias, eps):
    return _acc_empty(running_mean, BN_ROWS, running_mean.shape[0])


def _block_inference(
    x, depthwise_bn, depthwise_act, depthwise_weight, stride, padding, pointwise_bn, pointwise_act, pointwise_weight,
    packed=None, residual=None, depthwise_slope=0.0, pointwise_slope=0.0,
):  # fmt: skip
    h, w = conv_output_size(*x.shape[2:], depthwise_weight.shape[2], stride, padding)
    return _image(x, x.shape[0], pointwise_weight.shape[0], h, w)


depthwise_forward = _kernel_op("depthwise_forward", _conv_forward)
depthwise_backward = _kernel_op("depthwise_backward", _conv_backward)
depthwise_inference = _kernel_op("depthwise_inference", _conv_inference)
pointwise_forward = _kernel_op("pointwise_forward", _conv_forward)
pointwise_backward = _kernel_op("pointwise_backward", _conv_backward)
pointwise_inference = _kernel_op("pointwise_inference", _conv_inference)
dense_forward = _kernel_op("dense_forward", _conv_forward)
dense_backward = _kernel_op("dense_backward", _conv_backward)
dense_inference = _kernel_op("dense_inference", _conv_inference)
gated_pointwise_forward = _kernel_op("gated_pointwise_forward", _gated_forward)
gated_pointwise_backward = _kernel_op("gated_pointwise_backward", _gated_backward)
gated_pointwise_inference = _kernel_op("gated_pointwise_inference", _gated_inference)
norm_act_forward = _kernel_op("norm_act_forward", _norm_act_forward)
norm_act_backward = _kernel_op("norm_act_backward", _norm_act_backward)
bn_from_running = _kernel_op("bn_from_running", _bn_from_running)
block_inference = _kernel_op("block_inference", _block_inference)

# By the kind of the convolution.
FORWARD = {"depthwise": depthwise_forward, "pointwise": pointwise_forward, "dense": dense_forward}
BACKWARD = {"depthwise": depthwise_backward, "pointwise": pointwise_backward, "dense": dense_backward}
INFERENCE = {"depthwise": depthwise_inference, "pointwise": pointwise_inference, "dense": dense_inference}
