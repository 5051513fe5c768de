"""The reference backend: every kernel op in plain PyTorch, on any device, written to be read.

It is the specification that the other backends are tested against. ``csrc/ops.h`` fixes the schemas and layouts, and
has the alphabet; the mathematics is the project's: a normalised activation is never stored, each convolution reads the
*raw* output ``u`` of the one before, and normalises and activates it on load. Sums are taken in the accumulation dtype
(float64 for float64 activations, otherwise float32); activations are rounded once, when they are stored.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilenet_ext.contract import (
    BN_MEAN,
    BN_RSTD,
    BN_SCALE,
    GRAD_CONSTANT,
    GRAD_DZ_COEFFICIENT,
    GRAD_MEAN,
    GRAD_Y_COEFFICIENT,
    NO_PADDING,
    Act,
    Padding,
    acc_dtype,
)


def _acc(x: Tensor) -> Tensor:
    return x.to(acc_dtype(x.dtype))


def _channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _store(x: Tensor, like: Tensor) -> Tensor:
    return x.to(dtype=like.dtype, memory_format=torch.channels_last)


def _normalise(y: Tensor, bn: Tensor) -> Tensor:
    mean, scale, shift = bn[:3]
    return (_acc(y) - _channel(mean)) * _channel(scale) + _channel(shift)


def _silu_backward(z: Tensor, da: Tensor, slope: float) -> Tensor:
    sigmoid = z.sigmoid()
    return da * (sigmoid * (1 + z * (1 - sigmoid)))


# The value of each activation, and its derivative times ``da``, with PyTorch's values at the corners and for NaN and
# infinity (a hardswish or silu of -Inf is NaN).
_ACTIVATE = {
    Act.LINEAR: lambda z, slope: z,
    Act.RELU: lambda z, slope: z.masked_fill(z <= 0, 0),
    Act.RELU6: lambda z, slope: z.clamp(0, 6),
    Act.HARDSWISH: lambda z, slope: z * (z + 3).clamp(0, 6) / 6,
    Act.SILU: lambda z, slope: z * z.sigmoid(),
    Act.LEAKY_RELU: lambda z, slope: torch.where(z > 0, z, z * slope),
}
_ACTIVATE_BACKWARD = {
    Act.LINEAR: lambda z, da, slope: da,
    Act.RELU: lambda z, da, slope: da.masked_fill(z <= 0, 0),
    Act.RELU6: lambda z, da, slope: da.masked_fill((z <= 0) | (z >= 6), 0),
    Act.HARDSWISH: lambda z, da, slope: torch.where(z < 3, da * (z / 3 + 0.5), da).masked_fill(z <= -3, 0),
    Act.SILU: _silu_backward,
    Act.LEAKY_RELU: lambda z, da, slope: torch.where(z > 0, da, da * slope),
}


def _norm_act(u: Tensor, bn: Tensor | None, act: int, slope: float = 0.0) -> Tensor:
    return _ACTIVATE[act](_acc(u) if bn is None else _normalise(u, bn), slope)


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + _acc(residual)


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
        # Each by itself: of an infinite value var_mean makes a mean of NaN.
        mean, var = rows.mean(1), rows.var(1, correction=0)
    return _make_bn(mean, var, gamma, beta, eps)


def _make_grad_bn(dz: Tensor, y: Tensor, bn: Tensor, batch_stats: bool) -> Tensor:
    """What the backward of the BatchNorm with output gradient ``dz`` (as stored) and input ``y`` needs."""
    dz = _acc(dz)
    mean, scale, rstd = bn[BN_MEAN], bn[BN_SCALE], bn[BN_RSTD]
    grad_beta = dz.sum((0, 2, 3))
    grad_gamma = rstd * (dz * (_acc(y) - _channel(mean))).sum((0, 2, 3))
    count = max(y.numel() // y.shape[1], 1)
    zero = torch.zeros_like(mean)
    y_coefficient = -scale * rstd * grad_gamma / count if batch_stats else zero
    constant = -scale * grad_beta / count if batch_stats else zero
    return torch.stack([scale, y_coefficient, mean, constant, grad_gamma, grad_beta])


def _conv_output_grad(dz: Tensor, y: Tensor | None, grad_bn: Tensor | None) -> Tensor:
    """``dy``."""
    if grad_bn is None:
        return _acc(dz)
    dy = _acc(dz) * _channel(grad_bn[GRAD_DZ_COEFFICIENT])
    if y is not None:
        centred = _acc(y) - _channel(grad_bn[GRAD_MEAN])
        dy = dy + _channel(grad_bn[GRAD_Y_COEFFICIENT]) * centred + _channel(grad_bn[GRAD_CONSTANT])
    return dy


# Each convolution's three ops are these, with ``depthwise`` fixed.


def _forward(
    depthwise: bool,
    u: Tensor,
    bn_u: Tensor | None,
    act_u: int,
    weight: Tensor,
    stride: int,
    padding: Padding,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    stats: bool,
    bias: Tensor | None = None,
    slope_u: float = 0.0,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = conv(act(norm(u)), weight) + bias``, and where wanted the normalisation by the statistics of ``y`` as
    stored.

    u ``[N, C_in, H, W]``; y ``[N, C_out, H_out, W_out]``; bn_y acc ``[5, C_out]``, or empty.
    """
    a = _norm_act(u, bn_u, act_u, slope_u)
    y = _conv(depthwise, a if gate is None else a * _acc(gate), weight, stride, padding)
    y = _store(y if bias is None else y + _channel(bias), u)
    return y, _batch_bn(y, gamma, beta, eps) if stats else _acc(u).new_empty(0)


def _backward(
    depthwise: bool,
    dz: Tensor,
    y: Tensor | None,
    grad_bn_y: Tensor | None,
    u: Tensor,
    bn_u: Tensor | None,
    act_u: int,
    batch_stats_u: bool,
    weight: Tensor,
    stride: int,
    padding: Padding,
    need_input: bool,
    need_weight: bool,
    slope_u: float = 0.0,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``_forward``: ``dz_u``, that of the weight, and ``grad_bn_u`` of ``dz_u`` as stored.

    dz, y ``[N, C_out, H_out, W_out]``; u, dz_u ``[N, C_in, H, W]``; grad_bn_u acc ``[6, C_in]``. What is not wanted,
    and grad_bn_u without a bn_u, is empty.
    """
    dy = _conv_output_grad(dz, y, grad_bn_y)
    a = _norm_act(u, bn_u, act_u, slope_u)
    symmetric, rest = _split_padding(padding)
    read = a if gate is None else a * _acc(gate)
    da, grad_weight, _ = torch.ops.aten.convolution_backward(
        dy, F.pad(read, rest), _acc(weight), None, [stride] * 2, symmetric, [1, 1], False, [0, 0],
        u.shape[1] if depthwise else 1, [need_input, need_weight, False],
    )  # fmt: skip
    grad_weight = grad_weight.contiguous() if need_weight else a.new_empty(0)
    no_bn = a.new_empty(0)  # a tensor of its own: the outputs of an op must not share memory
    if not need_input:
        return u.new_empty(0), grad_weight, no_bn
    da = F.pad(da, [-side for side in rest])
    if gate is not None:
        return _store(da * _acc(gate), u), grad_weight, (da * a).sum((2, 3), keepdim=True)
    if bn_u is None:
        return _store(da, u), grad_weight, no_bn
    dz_u = _store(_ACTIVATE_BACKWARD[act_u](_normalise(u, bn_u), da, slope_u), u)
    return dz_u, grad_weight, _make_grad_bn(dz_u, u, bn_u, batch_stats_u)


def _inference(
    depthwise: bool,
    x: Tensor,
    bn_y: Tensor | None,
    act_y: int,
    weight: Tensor,
    stride: int,
    padding: Padding,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    slope_y: float = 0.0,
    gate: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv(x, weight))) + residual``: x ``[N, C_in, H, W]``, the others ``[N, C_out, H_out, W_out]``."""
    a = _acc(x) if gate is None else _acc(x) * _acc(gate)
    return _store(_add(_norm_act(_conv(depthwise, a, weight, stride, padding), bn_y, act_y, slope_y), residual), x)


def _conv(depthwise: bool, a: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    groups = a.shape[1] if depthwise else 1
    symmetric, rest = _split_padding(padding)
    device = a.device.type
    # Autocast, which has cast the op's arguments, would cast these too.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return F.conv2d(F.pad(a, rest), _acc(weight), stride=stride, padding=symmetric, groups=groups)


def _split_padding(padding: Padding) -> tuple[list[int], list[int]]:
    """(rows, columns) that the convolution itself pads with, and what is left of the four sides.

    They are not the same where a weight or gradient is not finite: a convolution leaves out the taps outside its image.
    """
    left, right, top, bottom = padding
    rows, columns = min(top, bottom), min(left, right)
    return [rows, columns], [left - columns, right - columns, top - rows, bottom - rows]


depthwise_forward = partial(_forward, True)
depthwise_backward = partial(_backward, True)
depthwise_inference = partial(_inference, True)
pointwise_forward = dense_forward = partial(_forward, False)
pointwise_backward = dense_backward = partial(_backward, False)
pointwise_inference = dense_inference = partial(_inference, False)


def gated_pointwise_forward(
    u: Tensor,
    bn_u: Tensor | None,
    act_u: int,
    gate: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    stats: bool,
    bias: Tensor | None = None,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``pointwise_forward`` of ``act(norm(u)) * gate``, gate ``[N, C_in, 1, 1]``: squeeze-excite's (arXiv:1709.01507,
    equation 4)."""
    return _forward(False, u, bn_u, act_u, weight, 1, NO_PADDING, gamma, beta, eps, stats, bias, slope_u, gate)


def gated_pointwise_backward(
    dz: Tensor,
    y: Tensor | None,
    grad_bn_y: Tensor | None,
    u: Tensor,
    bn_u: Tensor | None,
    act_u: int,
    gate: Tensor,
    weight: Tensor,
    need_input: bool,
    need_weight: bool,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``gated_pointwise_forward``: ``da`` at ``a = act(norm(u))``, that of the weight, and that of the
    gate, acc ``[N, C_in, 1, 1]``.

    The gate is made of ``a`` too, by way of its mean over each image, whose gradient is only known after that of the
    gate: ``norm_act_backward`` takes both, and the activation's derivative with them.
    """
    return _backward(
        False, dz, y, grad_bn_y, u, bn_u, act_u, False, weight, 1, NO_PADDING, need_input, need_weight, slope_u, gate
    )  # fmt: skip


def gated_pointwise_inference(
    x: Tensor,
    gate: Tensor,
    bn_y: Tensor | None,
    act_y: int,
    weight: Tensor,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    slope_y: float = 0.0,
) -> Tensor:
    """``pointwise_inference`` of ``x * gate``."""
    return _inference(False, x, bn_y, act_y, weight, 1, NO_PADDING, packed, residual, slope_y, gate)


def norm_act_forward(
    y: Tensor, bn_y: Tensor, act: int, pool: bool, residual: Tensor | None = None, slope: float = 0.0
) -> Tensor:
    """``act(norm(y)) + residual``: ``[N, C, H, W]``, or pooled the mean of ``act(norm(y))`` over each image, ``[N, C,
    1, 1]``."""
    a = _norm_act(y, bn_y, act, slope)
    return _store(a.mean((2, 3), keepdim=True) if pool else _add(a, residual), y)


def norm_act_backward(
    grad: Tensor,
    y: Tensor,
    bn_y: Tensor,
    act: int,
    batch_stats: bool,
    pool: bool,
    grad_pooled: Tensor | None = None,
    need_dz: bool = True,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``dz`` ``[N, C, H, W]`` from the gradient of ``norm_act_forward``, and ``grad_bn_y`` acc ``[6, C]`` of it.

    ``grad_pooled``, ``[N, C, 1, 1]``: the gradient at the mean over each image, where that is an output too. What is
    not wanted is empty: without an activation ``dz`` is ``grad``, which is that of a residual in any case.
    """
    pixels = y.shape[2] * y.shape[3]
    da = (_acc(grad) / pixels).expand(y.shape) if pool else _acc(grad)
    da = _add(da, None if grad_pooled is None else _acc(grad_pooled) / pixels)
    dz = _store(_ACTIVATE_BACKWARD[act](_normalise(y, bn_y), da, slope), y)
    grad_bn_y = _make_grad_bn(dz, y, bn_y, batch_stats)
    if not need_dz:
        dz = y.new_empty(0)
    elif dz is grad:  # of a linear activation: the outputs of an op must not share memory with its inputs
        dz = grad.clone(memory_format=torch.channels_last)
    return dz, grad_bn_y


def bn_from_running(
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The normalisation by running statistics, all ``[C]``. An inference op leaves its convolution's bias out, so it
    comes off the mean here."""
    mean = _acc(running_mean) if conv_bias is None else _acc(running_mean) - conv_bias
    return _make_bn(mean, _acc(running_var), gamma, beta, eps)


def block_inference(
    x: Tensor,
    depthwise_bn: Tensor,
    depthwise_act: int,
    depthwise_weight: Tensor,
    stride: int,
    padding: Padding,
    pointwise_bn: Tensor,
    pointwise_act: int,
    pointwise_weight: Tensor,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    depthwise_slope: float = 0.0,
    pointwise_slope: float = 0.0,
) -> Tensor:
    """A depthwise 3x3 and a pointwise ``_inference``; what is between them is not rounded.

    x ``[N, C, H, W]``, the result and the residual ``[N, C_out, H_out, W_out]``.
    """
    a = _conv(True, _acc(x), depthwise_weight, stride, padding)
    a = _norm_act(a, depthwise_bn, depthwise_act, depthwise_slope)
    y = _norm_act(_conv(False, a, pointwise_weight, 1, NO_PADDING), pointwise_bn, pointwise_act, pointwise_slope)
    return _store(_add(y, residual), x)
