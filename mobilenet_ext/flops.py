"""Formulas for ``torch.utils.flop_counter.FlopCounterMode``: every op counts as the convolutions that it computes.

They hand on to PyTorch's own formulas for convolutions, so that a model counts the same on the kernels and as plain
modules, whichever way this version of PyTorch counts. BatchNorm, ReLU and pooling count as nothing there, and here.

``torch.profiler`` with ``with_flops=True`` cannot be told: it knows the operators whose names are written in
``torch/csrc/profiler/util.cpp`` (``computeFlops``), and no others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from mobilenet_ext import backends  # noqa: F401  (its library defines the ops)

_convolution = flop_registry[torch.ops.aten.convolution]
_convolution_backward = flop_registry[torch.ops.aten.convolution_backward]


def _forward(x: Tensor, weight: Tensor, y: Tensor) -> int:
    groups = x.shape[1] // weight.shape[1]
    return _convolution(x, weight, None, None, None, None, False, None, groups, out_val=y)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor, grad_weight: Tensor, need_x: bool, need_weight: bool
) -> int:
    groups = x.shape[1] // weight.shape[1]
    return _convolution_backward(
        grad, x, weight, None, None, None, None, False, None, groups, (need_x, need_weight, False),
        out_val=(grad_x, grad_weight, None),
    )  # fmt: skip


def _register(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    packets = [getattr(torch.ops.mobilenet_ext, name) for name in names]
    return register_flop_formula(packets, get_raw=True)


@_register("depthwise_forward", "pointwise_forward", "dense_forward")
def _conv_forward(u, bn_u, act_u, weight, *rest, out_val):
    return _forward(u, weight, out_val[0])


@_register("depthwise_backward", "pointwise_backward", "dense_backward")
def _conv_backward(dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, *rest, out_val):
    need_input, need_weight = rest[2:4]
    return _backward(dz, u, weight, *out_val[:2], need_input, need_weight)


@_register("depthwise_inference", "pointwise_inference", "dense_inference")
def _inference(x, bn_y, act_y, weight, *rest, out_val):
    return _forward(x, weight, out_val)


@_register("gated_pointwise_forward")
def _gated_forward(u, bn_u, act_u, gate, weight, *rest, out_val):
    return _forward(u, weight, out_val[0])


@_register("gated_pointwise_backward")
def _gated_backward(dz, y, grad_bn_y, u, bn_u, act_u, gate, weight, need_input, need_weight, *rest, out_val):
    return _backward(dz, u, weight, *out_val[:2], need_input, need_weight)


@_register("gated_pointwise_inference")
def _gated_inference(x, gate, bn_y, act_y, weight, *rest, out_val):
    return _forward(x, weight, out_val)


@_register("block_inference")
def _block_inference(
    x, depthwise_bn, depthwise_act, depthwise_weight, stride, padding, pointwise_bn, pointwise_act, pointwise_weight,
    *rest, out_val,
):  # fmt: skip
    n, _, h, w = out_val.shape
    between = torch.empty((n, x.shape[1], h, w), device="meta")
    return _forward(x, depthwise_weight, between) + _forward(between, pointwise_weight, out_val)


@_register("depthwise", "pointwise")
def _layer(u, mean, scale, shift, weight, *rest, out_val):
    return _forward(u, weight, out_val[0])


@_register("depthwise_conv2d", "pointwise_conv2d")
def _layer_conv2d(input, weight, *rest, out_val):
    return _forward(input, weight, out_val)
