"""The kernel ops as PyTorch sees them: fake kernels, and one kernel a call that hands it to the current backend.

``csrc/ops.h`` holds the schemas with their conventions; the C++ library defines them when ``mobilenet_ext.backends``
loads it. What each op computes is written in ``backends/reference.py``. Kernel ops are functional, take and return
channels_last activations, and have no autograd: ``layers.py`` and ``chain.py`` differentiate.

Each function below is an op's fake kernel (outputs of the right shape, dtype and strides, without values); the name is
then bound to the op itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mobilenet_ext import backends
from mobilenet_ext.backends.reference import acc_dtype

BN_ROWS, GRAD_ROWS = 5, 6

_library = torch.library.Library("mobilenet_ext", "FRAGMENT")


def conv_output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Output rows (or columns) of a convolution over ``size`` of them."""
    return (size + 2 * padding - kernel) // stride + 1


def _kernel_op(fake: Callable[..., Any]) -> torch._ops.OpOverload:
    op = fake.__name__

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
    h, w = (conv_output_size(size, weight.shape[2], stride, padding) for size in u.shape[2:])
    return _image(u, u.shape[0], weight.shape[0], h, w)


def _conv_forward(u: Tensor, weight: Tensor, stride: int, padding: int, stats: bool) -> tuple[Tensor, Tensor]:
    bn = _acc_empty(u, BN_ROWS, weight.shape[0]) if stats else _acc_empty(u, 0)
    return _conv_output(u, weight, stride, padding), bn


def _conv_backward(u: Tensor, bn_u: Tensor | None, weight: Tensor, need_input: bool, need_weight: bool):
    h_u = torch.empty_like(u, memory_format=torch.channels_last) if need_input else u.new_empty(0)
    grad_weight = _acc_empty(u, *weight.shape) if need_weight else _acc_empty(u, 0)
    with_bn = need_input and bn_u is not None
    return h_u, grad_weight, _acc_empty(u, GRAD_ROWS, u.shape[1]) if with_bn else _acc_empty(u, 0)


def _normalise_backward(y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y, memory_format=torch.channels_last), _acc_empty(y, GRAD_ROWS, y.shape[1])


@_kernel_op
def depthwise_forward(u, bn_u, weight, stride, padding, gamma, beta, eps, stats):
    return _conv_forward(u, weight, stride, padding, stats)


@_kernel_op
def depthwise_backward(
    h, y, grad_bn_y, u, bn_u, batch_stats_u, weight, stride, padding, need_input, need_weight
):  # fmt: skip
    return _conv_backward(u, bn_u, weight, need_input, need_weight)


@_kernel_op
def pointwise_forward(u, bn_u, weight, gamma, beta, eps, stats):
    return _conv_forward(u, weight, 1, 0, stats)


@_kernel_op
def pointwise_backward(h, y, grad_bn_y, u, bn_u, batch_stats_u, weight, need_input, need_weight):
    return _conv_backward(u, bn_u, weight, need_input, need_weight)


@_kernel_op
def stem_forward(x, weight, stride, padding, gamma, beta, eps, stats):
    return _conv_forward(x, weight, stride, padding, stats)


@_kernel_op
def stem_backward(h, y, grad_bn_y, x, weight, stride, padding, need_input, need_weight):
    return _conv_backward(x, None, weight, need_input, need_weight)[:2]


@_kernel_op
def bn_relu_forward(y, bn_y, relu):
    return torch.empty_like(y, memory_format=torch.channels_last)


@_kernel_op
def bn_relu_backward(grad, y, bn_y, batch_stats, relu):
    return _normalise_backward(y)


@_kernel_op
def bn_relu_pool_forward(y, bn_y):
    return _image(y, y.shape[0], y.shape[1], 1, 1)


@_kernel_op
def bn_relu_pool_backward(grad, y, bn_y, batch_stats):
    return _normalise_backward(y)


@_kernel_op
def bn_from_running(running_mean, running_var, gamma, beta, conv_bias, eps):
    return _acc_empty(running_mean, BN_ROWS, running_mean.shape[0])


@_kernel_op
def depthwise_inference(x, bn_y, weight, stride, padding, relu):
    return _conv_output(x, weight, stride, padding)


@_kernel_op
def pointwise_inference(x, bn_y, weight, relu, packed=None):
    return _conv_output(x, weight, 1, 0)


@_kernel_op
def stem_inference(x, bn_y, weight, stride, padding, relu):
    return _conv_output(x, weight, stride, padding)


@_kernel_op
def block_inference(x, depthwise_bn, depthwise_weight, stride, pointwise_bn, pointwise_weight, packed=None):
    h, w = (conv_output_size(size, 3, stride, 1) for size in x.shape[2:])
    return _image(x, x.shape[0], pointwise_weight.shape[0], h, w)
