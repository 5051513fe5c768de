"""The reference backend: every kernel op in plain PyTorch, on any device, written to be read.

It is the specification that the other backends are tested against. ``csrc/ops.h`` fixes the schemas, layouts and the
rows of ``bn`` and ``grad_bn``; the mathematics is the project's: a normalised activation is never stored, each
convolution reads the *raw* output ``u`` of the one before and normalises it on load. Sums are taken in the accumulation
dtype (float64 for float64 activations, otherwise float32); activations are rounded once, when they are stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of `bn`, acc [5, C]: normalise(y) = (y - MEAN) * SCALE + SHIFT (BnRow in csrc/ops.h).
BN_MEAN, BN_SCALE, BN_SHIFT, BN_RSTD, BN_VAR = range(5)
# Rows of `grad_bn`, acc [6, C]: dy = P*h + Q*(y - MEAN) + O (GradBnRow in csrc/ops.h).
GRAD_P, GRAD_Q, GRAD_MEAN, GRAD_O, GRAD_GAMMA, GRAD_BETA = range(6)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of ``dtype`` are accumulated, and of all per-channel vectors beside them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _acc(x: Tensor) -> Tensor:
    return x.to(acc_dtype(x.dtype))


def _channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _store(x: Tensor, like: Tensor) -> Tensor:
    return x.to(dtype=like.dtype, memory_format=torch.channels_last)


def _normalise(y: Tensor, bn: Tensor) -> Tensor:
    mean, scale, shift = bn[:3]
    return (_acc(y) - _channel(mean)) * _channel(scale) + _channel(shift)


def _relu(z: Tensor) -> Tensor:
    return z.masked_fill(z <= 0, 0)  # NaN stays NaN


def _activation(u: Tensor, bn: Tensor | None) -> Tensor:
    return _acc(u) if bn is None else _relu(_normalise(u, bn))


def _make_bn(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else gamma * rstd
    shift = torch.zeros_like(mean) if beta is None else beta
    return torch.stack([mean, scale, shift, rstd, var])


def _batch_bn(y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """The normalisation by the statistics of ``y`` as stored; the variance is the biased one."""
    rows = _acc(y).movedim(1, 0).flatten(1)
    if rows.shape[1] == 0:
        mean = var = rows.new_zeros(rows.shape[0])
    else:
        var, mean = torch.var_mean(rows, dim=1, correction=0)
    return _make_bn(mean, var, gamma, beta, eps)


def _make_grad_bn(h: Tensor, y: Tensor, bn: Tensor, batch_stats: bool) -> Tensor:
    """What the backward of the BatchNorm with output gradient ``h`` (masked, as stored) and input ``y`` needs."""
    h = _acc(h)
    mean, scale, rstd = bn[BN_MEAN], bn[BN_SCALE], bn[BN_RSTD]
    grad_beta = h.sum((0, 2, 3))
    grad_gamma = rstd * (h * (_acc(y) - _channel(mean))).sum((0, 2, 3))
    count = max(y.numel() // y.shape[1], 1)
    zero = torch.zeros_like(mean)
    q = -scale * rstd * grad_gamma / count if batch_stats else zero
    o = -scale * grad_beta / count if batch_stats else zero
    return torch.stack([scale, q, mean, o, grad_gamma, grad_beta])


def _conv_output_grad(h: Tensor, y: Tensor | None, grad_bn: Tensor | None) -> Tensor:
    if grad_bn is None:
        return _acc(h)
    dy = _acc(h) * _channel(grad_bn[GRAD_P])
    if y is not None:
        dy = dy + _channel(grad_bn[GRAD_Q]) * (_acc(y) - _channel(grad_bn[GRAD_MEAN])) + _channel(grad_bn[GRAD_O])
    return dy


def _forward(
    u: Tensor,
    bn_u: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    y = F.conv2d(_activation(u, bn_u), _acc(weight), stride=stride, padding=padding, groups=groups)
    y = _store(y, u)
    return y, _batch_bn(y, gamma, beta, eps) if stats else _acc(u).new_empty(0)


def _backward(
    h: Tensor,
    y: Tensor | None,
    grad_bn_y: Tensor | None,
    u: Tensor,
    bn_u: Tensor | None,
    batch_stats_u: bool,
    weight: Tensor,
    stride: int,
    padding: int,
    groups: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = _conv_output_grad(h, y, grad_bn_y)
    a = _activation(u, bn_u)
    grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
        dy, a, _acc(weight), None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups,
        [need_input, need_weight, False],
    )  # fmt: skip
    grad_weight = grad_weight.contiguous() if need_weight else a.new_empty(0)
    grad_weight = grad_weight.contiguous()
    no_bn = a.new_empty(0)  # a tensor of its own: the outputs of an op must not share memory
    if not need_input:
        return u.new_empty(0), grad_weight, no_bn
    if bn_u is None:
        return _store(grad_a, u), grad_weight, no_bn
    h_u = _store(grad_a.masked_fill(_normalise(u, bn_u) <= 0, 0), u)
    return h_u, grad_weight, _make_grad_bn(h_u, u, bn_u, batch_stats_u)


def _inference(
    x: Tensor, bn_y: Tensor | None, weight: Tensor, stride: int, padding: int, groups: int, relu: bool
) -> Tensor:
    y = F.conv2d(_acc(x), _acc(weight), stride=stride, padding=padding, groups=groups)
    if bn_y is not None:
        y = _normalise(y, bn_y)
    return _store(_relu(y) if relu else y, x)


def depthwise_forward(u, bn_u, weight, stride, padding, gamma, beta, eps, stats):
    return _forward(u, bn_u, weight, stride, padding, u.shape[1], gamma, beta, eps, stats)


def depthwise_backward(
    h, y, grad_bn_y, u, bn_u, batch_stats_u, weight, stride, padding, need_input, need_weight
):  # fmt: skip
    return _backward(
        h, y, grad_bn_y, u, bn_u, batch_stats_u, weight, stride, padding, u.shape[1], need_input, need_weight
    )


def pointwise_forward(u, bn_u, weight, gamma, beta, eps, stats):
    return _forward(u, bn_u, weight, 1, 0, 1, gamma, beta, eps, stats)


def pointwise_backward(h, y, grad_bn_y, u, bn_u, batch_stats_u, weight, need_input, need_weight):
    return _backward(h, y, grad_bn_y, u, bn_u, batch_stats_u, weight, 1, 0, 1, need_input, need_weight)


def stem_forward(x, weight, stride, padding, gamma, beta, eps, stats):
    return _forward(x, None, weight, stride, padding, 1, gamma, beta, eps, stats)


def stem_backward(h, y, grad_bn_y, x, weight, stride, padding, need_input, need_weight):
    grads = _backward(h, y, grad_bn_y, x, None, False, weight, stride, padding, 1, need_input, need_weight)
    return grads[:2]


def bn_relu_forward(y, bn_y, relu):
    z = _normalise(y, bn_y)
    return _store(_relu(z) if relu else z, y)


def bn_relu_backward(grad, y, bn_y, batch_stats, relu):
    h = grad.clone(memory_format=torch.channels_last)
    if relu:
        h.masked_fill_(_normalise(y, bn_y) <= 0, 0)
    return h, _make_grad_bn(h, y, bn_y, batch_stats)


def bn_relu_pool_forward(y, bn_y):
    return _store(_relu(_normalise(y, bn_y)).mean((2, 3), keepdim=True), y)


def bn_relu_pool_backward(grad, y, bn_y, batch_stats):
    h = (_acc(grad) / (y.shape[2] * y.shape[3])).expand(y.shape)
    h = _store(h.masked_fill(_normalise(y, bn_y) <= 0, 0), y)
    return h, _make_grad_bn(h, y, bn_y, batch_stats)


def bn_from_running(running_mean, running_var, gamma, beta, conv_bias, eps):
    """The normalisation by running statistics. The convolution leaves its bias out, so it comes off the mean here."""
    mean = _acc(running_mean) if conv_bias is None else _acc(running_mean) - conv_bias
    return _make_bn(mean, _acc(running_var), gamma, beta, eps)


def depthwise_inference(x, bn_y, weight, stride, padding, relu):
    return _inference(x, bn_y, weight, stride, padding, x.shape[1], relu)


def pointwise_inference(x, bn_y, weight, relu, packed=None):
    return _inference(x, bn_y, weight, 1, 0, 1, relu)


def stem_inference(x, bn_y, weight, stride, padding, relu):
    return _inference(x, bn_y, weight, stride, padding, 1, relu)


def block_inference(x, depthwise_bn, depthwise_weight, stride, pointwise_bn, pointwise_weight, packed=None):
    a = _inference(_acc(x), depthwise_bn, _acc(depthwise_weight), stride, 1, x.shape[1], True)
    return _store(_inference(a, pointwise_bn, _acc(pointwise_weight), 1, 0, 1, True), x)
