"""What every kernel op should give: PyTorch's own functions, autograd for every derivative, all in float64.

The ops have the names and arguments that they have in ``csrc/ops.h``, which has their alphabet too. The other functions
are the steps that they consist of, for tests of kernels that round between two of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import plain
import torch
import torch.nn.functional as F
from plain import one_thread
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act, Padding


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of the same values in float64, on one thread, where autograd is on."""

    @functools.wraps(function)
    def exact(*args: Any) -> Any:
        with one_thread(), torch.enable_grad():
            outputs = function(*[a.detach().cpu().double() if isinstance(a, Tensor) else a for a in args])
        return tuple(o.detach() for o in outputs) if isinstance(outputs, tuple) else outputs.detach()

    return exact


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


@_exactly
def activate(z: Tensor, act: Act, slope: float = 0.0) -> Tensor:
    return plain.activate(act, z, slope)


@_exactly
def activate_backward(z: Tensor, da: Tensor, act: Act, slope: float = 0.0) -> Tensor:
    """``da`` times the derivative. At NaN, where PyTorch's vectorised code of some differs from its scalar code, it is
    the scalar code's: what is not on one side of a corner passes the gradient."""
    z.requires_grad_()
    (dz,) = torch.autograd.grad(plain.activate(act, z, slope), z, da)
    return torch.where(z.isnan(), da, dz) if act in (Act.RELU6, Act.HARDSWISH) else dz


@_exactly
def normalise(y: Tensor, bn: Tensor) -> Tensor:
    mean, scale, shift = map(_channels, bn[:3])
    return (y - mean) * scale + shift


def norm_act(u: Tensor, bn: Tensor | None, act: Act, slope: float = 0.0) -> Tensor:
    return activate(u if bn is None else normalise(u, bn), act, slope)


@_exactly
def make_bn(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    rstd = 1 / (var + eps).sqrt()
    scale = rstd if gamma is None else gamma * rstd
    return torch.stack([mean, scale, torch.zeros_like(mean) if beta is None else beta, rstd, var])


@_exactly
def batch_bn(y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """The normalisation by the statistics of ``y``, which of nothing are 0."""
    if not y.numel():
        mean = var = y.new_zeros(y.shape[1])
    else:
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return make_bn(mean, var, gamma, beta, eps)


@_exactly
def grad_bn(dz: Tensor, y: Tensor, bn: Tensor, batch_stats: bool) -> Tensor:
    """What the backward of a normalisation needs, of its gradient and input as they were stored.

    ``dy`` is the derivative by y alone and, with batch statistics, those by mean and variance, which change by
    ``1 / count`` and ``2 (y - mean) / count`` with each y. Those two have gamma as a factor, which is no part of their
    sums here, so that an infinite one makes no NaN of them.
    """
    mean, scale, _, rstd, var = bn
    eps, gamma = rstd**-2 - var, scale / rstd
    leaves = [t.clone().requires_grad_() for t in (torch.ones_like(mean), torch.zeros_like(mean), mean, var)]
    factor, summand, of_mean, of_var = map(_channels, leaves)
    z = (y - of_mean) / (of_var + _channels(eps)).sqrt() * factor + summand
    by_gamma, by_beta, by_mean, by_var = torch.autograd.grad(z, leaves, dz)
    if batch_stats:
        count = max(y.numel() // y.shape[1], 1)
        y_coefficient, constant = 2 * gamma * by_var / count, gamma * by_mean / count
    else:
        y_coefficient = constant = torch.zeros_like(mean)
    return torch.stack([scale, y_coefficient, mean, constant, by_gamma, by_beta])


@_exactly
def output_grad(dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None) -> Tensor:
    """``dy``."""
    if grad_bn_y is None:
        return dz
    dz_coefficient, y_coefficient, mean, constant = map(_channels, grad_bn_y[:4])
    dy = dz_coefficient * dz
    return dy if y is None else dy + y_coefficient * (y - mean) + constant


def _conv(a: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """What two sides have in common is the convolution's own padding, whose taps PyTorch leaves out: there a weight or
    gradient that is not finite reaches nothing."""
    left, right, top, bottom = padding
    rows, columns = min(top, bottom), min(left, right)
    a = F.pad(a, [left - columns, right - columns, top - rows, bottom - rows])
    return F.conv2d(a, weight, stride=stride, padding=(rows, columns), groups=a.shape[1] // weight.shape[1])


@_exactly
def conv_forward(
    u: Tensor,
    bn_u: Tensor | None,
    act_u: Act,
    weight: Tensor,
    stride: int,
    padding: Padding,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    stats: bool = False,
    bias: Tensor | None = None,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor]:
    y = _conv(norm_act(u, bn_u, act_u, slope_u), weight, stride, padding)
    y = y if bias is None else y + _channels(bias)
    return y, batch_bn(y, gamma, beta, eps) if stats else y.new_empty(0)


@_exactly
def conv_backward(
    dz: Tensor,
    y: Tensor | None,
    grad_bn_y: Tensor | None,
    u: Tensor,
    bn_u: Tensor | None,
    act_u: Act,
    batch_stats_u: bool,
    weight: Tensor,
    stride: int,
    padding: Padding,
    need_input: bool = True,
    need_weight: bool = True,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    z = u if bn_u is None else normalise(u, bn_u)
    a, weight = activate(z, act_u, slope_u).requires_grad_(), weight.requires_grad_()
    out = _conv(a, weight, stride, padding)
    da, grad_weight = torch.autograd.grad(out, (a, weight), output_grad(dz, y, grad_bn_y))
    nothing = u.new_empty(0)
    if not need_input:
        return nothing, grad_weight, nothing
    dz_u = activate_backward(z, da, act_u, slope_u)
    grad_bn_u = nothing if bn_u is None else grad_bn(dz_u, u, bn_u, batch_stats_u)
    return dz_u, grad_weight if need_weight else nothing, grad_bn_u


@_exactly
def depthwise_by_taps(dy: Tensor, a: Tensor, weight: Tensor, stride: int, padding: Padding) -> tuple[Tensor, Tensor]:
    """The gradients of a and of the weight of a depthwise convolution, tap by tap of the pixels that there are: nothing
    is multiplied by padding, infinite or not, which PyTorch does with some shapes."""
    left, _, top, _ = padding
    grad_a, grad_weight = torch.zeros_like(a), torch.zeros_like(weight)
    for i, j in itertools.product(*map(range, weight.shape[2:])):
        rows, columns = (
            torch.arange(outputs) * stride + tap - side
            for outputs, tap, side in zip(dy.shape[2:], (i, j), (top, left), strict=True)
        )
        row_exists, column_exists = (
            (0 <= at) & (at < size) for at, size in zip((rows, columns), a.shape[2:], strict=True)
        )
        of_tap = dy[:, :, row_exists][..., column_exists]
        read = rows[row_exists, None], columns[column_exists]
        grad_a[:, :, read[0], read[1]] += of_tap * weight[:, :, i, j, None]
        grad_weight[:, 0, i, j] = (of_tap * a[:, :, read[0], read[1]]).sum((0, 2, 3))
    return grad_a, grad_weight


def product_backward(
    dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, stride, padding,
    need_input=True, need_weight=True, slope_u=0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz_u and the weight's gradient of a ``conv_backward`` whose products have operands of the activations' dtype."""
    dy, a = output_grad(dz, y, grad_bn_y).to(dz.dtype), norm_act(u, bn_u, act_u, slope_u).to(u.dtype)
    da, grad_weight, _ = conv_backward(dy, None, None, a, None, Act.LINEAR, False, weight, stride, padding)
    return da if bn_u is None else activate_backward(normalise(u, bn_u), da, act_u, slope_u), grad_weight


@_exactly
def conv_inference(
    x: Tensor,
    bn_y: Tensor | None,
    act_y: Act,
    weight: Tensor,
    stride: int,
    padding: Padding,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    slope_y: float = 0.0,
) -> Tensor:
    return _add(norm_act(_conv(x, weight, stride, padding), bn_y, act_y, slope_y), residual)


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


depthwise_forward = pointwise_forward = dense_forward = conv_forward
depthwise_backward = pointwise_backward = dense_backward = conv_backward
depthwise_inference = pointwise_inference = dense_inference = conv_inference


@_exactly
def gated_pointwise_forward(
    u, bn_u, act_u, gate, weight, gamma, beta, eps, stats, bias=None, slope_u=0.0
) -> tuple[Tensor, Tensor]:
    gated = norm_act(u, bn_u, act_u, slope_u) * gate
    return conv_forward(gated, None, Act.LINEAR, weight, 1, NO_PADDING, gamma, beta, eps, stats, bias)


@_exactly
def gated_pointwise_backward(
    dz, y, grad_bn_y, u, bn_u, act_u, gate, weight, need_input=True, need_weight=True, slope_u=0.0
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [t.requires_grad_() for t in (norm_act(u, bn_u, act_u, slope_u), weight, gate)]
    a, weight, gate = leaves
    out = _conv(a * gate, weight, 1, NO_PADDING)
    da, grad_weight, grad_gate = torch.autograd.grad(out, leaves, output_grad(dz, y, grad_bn_y))
    nothing = u.new_empty(0)
    return da if need_input else nothing, grad_weight if need_weight else nothing, grad_gate if need_input else nothing


@_exactly
def gated_pointwise_inference(x, gate, bn_y, act_y, weight, packed=None, residual=None, slope_y=0.0) -> Tensor:
    return conv_inference(x * gate, bn_y, act_y, weight, 1, NO_PADDING, packed, residual, slope_y)


@_exactly
def norm_act_forward(
    y: Tensor, bn_y: Tensor, act: Act, pool: bool, residual: Tensor | None = None, slope: float = 0.0
) -> Tensor:
    a = norm_act(y, bn_y, act, slope)
    return a.mean((2, 3), keepdim=True) if pool else _add(a, residual)


@_exactly
def norm_act_backward(
    grad: Tensor,
    y: Tensor,
    bn_y: Tensor,
    act: Act,
    batch_stats: bool,
    pool: bool,
    grad_pooled: Tensor | None = None,
    need_dz: bool = True,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    a = norm_act(y, bn_y, act, slope).requires_grad_()
    mean = a.mean((2, 3), keepdim=True)
    outputs, grads = [mean if pool else a], [grad]
    if grad_pooled is not None:
        outputs, grads = [*outputs, mean], [*grads, grad_pooled]
    (da,) = torch.autograd.grad(outputs, a, grads)
    dz = activate_backward(normalise(y, bn_y), da, act, slope)
    return dz if need_dz else y.new_empty(0), grad_bn(dz, y, bn_y, batch_stats)


@_exactly
def bn_from_running(
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The bias of a convolution that leaves it out comes off the mean."""
    mean = running_mean if conv_bias is None else running_mean - conv_bias
    return make_bn(mean, running_var, gamma, beta, eps)


@_exactly
def block_inference(
    x: Tensor,
    depthwise_bn: Tensor,
    depthwise_act: Act,
    depthwise_weight: Tensor,
    stride: int,
    padding: Padding,
    pointwise_bn: Tensor,
    pointwise_act: Act,
    pointwise_weight: Tensor,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    depthwise_slope: float = 0.0,
    pointwise_slope: float = 0.0,
) -> Tensor:
    a = conv_inference(x, depthwise_bn, depthwise_act, depthwise_weight, stride, padding, None, None, depthwise_slope)
    return conv_inference(
        a, pointwise_bn, pointwise_act, pointwise_weight, 1, NO_PADDING, None, residual, pointwise_slope
    )
