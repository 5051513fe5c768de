"""Functions: depthwise 3x3 and 5x5 and pointwise convolutions, alone and with BatchNorm and ReLU, on the fused kernels.

They take and return ordinary activations ``[N, C, H, W]`` in float32, bfloat16, float16 or float64 (CPU and reference
backends), in any memory format; the output is channels_last if the input or the weight is, as ``nn.Conv2d`` has it, and
channels_last inputs are the fast ones. All are differentiable once; differentiating a gradient raises RuntimeError.
Under ``torch.func``, in forward-mode differentiation and for subclasses of ``torch.Tensor`` PyTorch's own functions
run.
Under autocast the input and the convolution's weight are cast, BatchNorm's vectors and buffers are not.

Arguments that are not accepted raise ValueError or TypeError before anything is computed. While a tool traces
(``torch.fx``, ``torch.jit.trace``, ``make_fx``, ``torch.export``, ONNX export) it is shown the functions of
``torch.nn.functional`` that compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mobilenet_ext import chain, layers
from mobilenet_ext.arguments import as_padding, check_batch_norm, check_conv, check_running_stats
from mobilenet_ext.autograd import is_transformed
from mobilenet_ext.contract import NO_PADDING, Act
from mobilenet_ext.memory_format import gives_channels_last, is_channels_last, match_memory_format
from mobilenet_ext.tracing import is_traced
from mobilenet_ext.unit_tensors import Unit
from mobilenet_ext.units import TENSORS

__all__ = ["depthwise_bn_relu", "depthwise_conv2d", "pointwise_bn_relu", "pointwise_conv2d"]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | Sequence[int] = 1,
) -> Tensor:
    """Depthwise 3x3 or 5x5 convolution: ``F.conv2d(input, weight, bias, stride, padding, groups=C)``.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[C, 1, K, K]`` with K 3 or 5, dtype and device of ``input``.
        bias: ``[C]``, the same dtype and device.
        stride: 1 or 2.
        padding: zeros around the image, 0 to 2: one number, (vertical, horizontal) as ``F.conv2d`` has it, or (left,
            right, top, bottom) as ``F.pad`` has it.

    Returns:
        ``[N, C, (H + top + bottom - K)//stride + 1, (W + left + right - K)//stride + 1]`` in the dtype of ``input``.
    """
    sides = as_padding(padding)
    if is_traced():
        return _plain_conv2d(input, weight, bias, stride, sides, weight.shape[0])
    check_conv(input, weight, bias, depthwise=True, stride=stride, padding=sides)
    if _runs_plain(input, weight, bias):
        return _plain_conv2d(input, weight, bias, stride, sides, input.shape[1])
    out = layers.depthwise_conv2d(input, weight, bias, int(stride), sides)
    return match_memory_format(out, is_channels_last(input) or is_channels_last(weight))


def pointwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution: ``F.conv2d(input, weight, bias)``.

    Args:
        input: ``[N, K, H, W]``.
        weight: ``[C, K, 1, 1]``, dtype and device of ``input``.
        bias: ``[C]``, the same dtype and device.

    Returns:
        ``[N, C, H, W]`` in the dtype of ``input``.
    """
    if is_traced():
        return F.conv2d(input, weight, bias)
    check_conv(input, weight, bias, depthwise=False)
    if _runs_plain(input, weight, bias):
        return F.conv2d(input, weight, bias)
    out = layers.pointwise_conv2d(input, weight, bias)
    return match_memory_format(out, is_channels_last(input) or is_channels_last(weight))


def depthwise_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """``relu(F.batch_norm(depthwise_conv2d(input, weight, bias, stride, padding), ...))``.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[C, 1, K, K]`` with K 3 or 5, dtype and device of ``input``.
        bias: ``[C]``, the same. In front of batch statistics it changes ``running_mean`` only; its gradient is zero.
        running_mean, running_var: ``[C]``; updated in place when ``training``, needed when not. These and the next two
            have one dtype: that of ``input``, or float32 beside 16-bit activations.
        bn_weight, bn_bias: BatchNorm's scale and shift, ``[C]``; None: 1 and 0.
        stride, padding: as in :func:`depthwise_conv2d`.
        training: normalise by the batch's statistics (the biased variance) instead of the running ones.
        momentum: share of the batch in the new running statistics, which keep the unbiased variance.
        eps: added to the variance.
        relu: False leaves the ReLU out.

    Returns:
        The shape of :func:`depthwise_conv2d`, in the dtype of ``input``.

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """
    vectors = (running_mean, running_var, bn_weight, bn_bias)
    if is_traced():
        y = depthwise_conv2d(input, weight, bias, stride, padding)
        return _plain_bn_relu(y, *vectors, training, momentum, eps, relu)
    sides = as_padding(padding)
    check_conv(input, weight, bias, depthwise=True, stride=stride, padding=sides)
    check_batch_norm(input, weight, *vectors, training, momentum, eps, relu)
    return _conv_bn_relu("depthwise", input, weight, bias, vectors, stride, sides, training, momentum, eps, relu)


def pointwise_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """``relu(F.batch_norm(pointwise_conv2d(input, weight, bias), ...))``.

    Args:
        input: ``[N, K, H, W]``.
        weight: ``[C, K, 1, 1]``, dtype and device of ``input``.
        bias, running_mean, running_var, bn_weight, bn_bias: ``[C]``, as in :func:`depthwise_bn_relu`.
        training, momentum, eps, relu: as in :func:`depthwise_bn_relu`.

    Returns:
        ``[N, C, H, W]`` in the dtype of ``input``.
    """
    vectors = (running_mean, running_var, bn_weight, bn_bias)
    if is_traced():
        return _plain_bn_relu(pointwise_conv2d(input, weight, bias), *vectors, training, momentum, eps, relu)
    check_conv(input, weight, bias, depthwise=False)
    check_batch_norm(input, weight, *vectors, training, momentum, eps, relu)
    return _conv_bn_relu("pointwise", input, weight, bias, vectors, 1, NO_PADDING, training, momentum, eps, relu)


def _conv_bn_relu(kind, input, weight, bias, vectors, stride, padding, training, momentum, eps, relu):
    running_mean, running_var, gamma, beta = vectors
    stride, momentum, eps = int(stride), float(momentum), float(eps)
    if _runs_plain(input, weight, bias, *vectors):
        y = _plain_conv2d(input, weight, bias, stride, padding, input.shape[1] if kind == "depthwise" else 1)
        return _plain_bn_relu(y, *vectors, training, momentum, eps, relu)
    others = {"input": input, "weight": weight, "bias": bias, "bn_weight": gamma, "bn_bias": beta}
    check_running_stats(running_mean, running_var, others, training)
    track = momentum if training and running_mean is not None and input.numel() else None
    act = (Act.RELU if relu else Act.LINEAR).value
    unit = Unit(kind, stride, padding, weight, bias, gamma, beta, running_mean, running_var, training, track, eps, act)
    out = chain.run(input, [unit], "activation")
    return match_memory_format(out, gives_channels_last(input.shape, is_channels_last(input), [unit]))


def _plain_conv2d(input, weight, bias, stride, padding, groups):
    left, right, top, bottom = padding
    if (left, top) == (right, bottom):
        return F.conv2d(input, weight, bias, stride, (top, left), groups=groups)
    return F.conv2d(F.pad(input, padding), weight, bias, stride, groups=groups)


def _plain_bn_relu(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu):
    y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return F.relu(y) if relu else y


def _runs_plain(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's own functions compute this: they know every transform, and subclasses know them."""
    return is_transformed() or not all(t is None or type(t) in (*TENSORS, FakeTensor) for t in tensors)
