"""Functions: depthwise 3x3 and pointwise convolutions, alone and with BatchNorm and ReLU, on the fused kernels.

They take and return ordinary activations ``[N, C, H, W]`` in float32, bfloat16, float16 or float64 (CPU and reference
backends), in any memory format; the output is channels_last if the input or the weight is, as ``nn.Conv2d`` has it, and
channels_last inputs are the fast ones. All are differentiable once; differentiating a gradient raises RuntimeError.
Under autocast the input and the convolution's weight are cast, BatchNorm's vectors and buffers are not.

Arguments that are not accepted raise ValueError or TypeError before anything is computed. While a tool traces
(``torch.fx``, ``torch.jit.trace``, ``make_fx``, ``torch.export``, ONNX export) it is shown the functions of
``torch.nn.functional`` that compute the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mobilenet_ext import chain, layers
from mobilenet_ext.fusion import DTYPES, gives_channels_last, is_channels_last, match_memory_format
from mobilenet_ext.tracing import is_traced

__all__ = ["depthwise_bn_relu", "depthwise_conv2d", "pointwise_bn_relu", "pointwise_conv2d"]


def depthwise_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 1
) -> Tensor:
    """Depthwise 3x3 convolution: ``F.conv2d(input, weight, bias, stride, padding, groups=C)``.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[C, 1, 3, 3]``, dtype and device of ``input``.
        bias: ``[C]``, the same dtype and device.
        stride: 1 or 2.
        padding: zeros around the image, 0 or 1.

    Returns:
        ``[N, C, (H + 2*padding - 3)//stride + 1, ...]`` in the dtype of ``input``.
    """
    if is_traced():
        return F.conv2d(input, weight, bias, stride, padding, groups=weight.shape[0])
    _check_conv(input, weight, bias, depthwise=True, stride=stride, padding=padding)
    out = layers.depthwise_conv2d(input, weight, bias, stride, padding)
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
    _check_conv(input, weight, bias, depthwise=False)
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
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """``relu(F.batch_norm(depthwise_conv2d(input, weight, bias, stride), ...))``.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[C, 1, 3, 3]``, dtype and device of ``input``; the convolution pads one zero on each side.
        bias: ``[C]``, the same. In front of batch statistics it changes ``running_mean`` only; its gradient is zero.
        running_mean, running_var: ``[C]``; updated in place when ``training``, needed when not. These and the next two
            have one dtype: that of ``input``, or float32 beside 16-bit activations.
        bn_weight, bn_bias: BatchNorm's scale and shift, ``[C]``; None: 1 and 0.
        stride: 1 or 2.
        training: normalise by the batch's statistics (the biased variance) instead of the running ones.
        momentum: share of the batch in the new running statistics, which keep the unbiased variance.
        eps: added to the variance.
        relu: False leaves the ReLU out.

    Returns:
        ``[N, C, ceil(H/stride), ceil(W/stride)]`` in the dtype of ``input``.

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """
    vectors = (running_mean, running_var, bn_weight, bn_bias)
    if is_traced():
        return _plain_bn_relu(depthwise_conv2d(input, weight, bias, stride), *vectors, training, momentum, eps, relu)
    _check_conv(input, weight, bias, depthwise=True, stride=stride, padding=1)
    _check_batch_norm(input, weight, *vectors, training, momentum, eps, relu)
    return _conv_bn_relu("depthwise", input, weight, bias, vectors, stride, training, momentum, eps, relu)


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
    _check_conv(input, weight, bias, depthwise=False)
    _check_batch_norm(input, weight, *vectors, training, momentum, eps, relu)
    return _conv_bn_relu("pointwise", input, weight, bias, vectors, 1, training, momentum, eps, relu)


def _conv_bn_relu(kind, input, weight, bias, vectors, stride, training, momentum, eps, relu):
    running_mean, running_var, gamma, beta = vectors
    track = momentum if training and running_mean is not None and input.numel() else None
    padding = 1 if kind == "depthwise" else 0
    unit = chain.Unit(kind, stride, padding, weight, bias, gamma, beta, running_mean, running_var, training, track, eps)
    out = chain.run(input, [unit], "relu" if relu else "linear")
    return match_memory_format(out, gives_channels_last(input, [unit]))


def _plain_bn_relu(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu):
    y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return F.relu(y) if relu else y


def _check_conv(input, weight, bias, *, depthwise, stride=1, padding=0):
    _check_activation("input", input)
    _check_tensor("weight", weight, input.device)
    if bias is not None:
        _check_tensor("bias", bias, input.device)
    channels = input.shape[1]
    if depthwise:
        if tuple(weight.shape) != (channels, 1, 3, 3):
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, accepted is [{channels}, 1, 3, 3]")
    elif weight.ndim != 4 or tuple(weight.shape[1:]) != (channels, 1, 1) or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, accepted is [C, {channels}, 1, 1] with C > 0")
    _check_vector("bias", bias, weight.shape[0])
    if type(stride) is not int or stride not in (1, 2):
        raise ValueError(f"stride: got {stride!r}, accepted are 1 and 2")
    if type(padding) is not int or padding not in (0, 1):
        raise ValueError(f"padding: got {padding!r}, accepted are 0 and 1")
    smallest = weight.shape[2] - 2 * padding
    if min(input.shape[2:]) < smallest:
        raise ValueError(f"input: got an image of {tuple(input.shape[2:])}, accepted are sides of {smallest} and more")

    if forward_ad._current_level >= 0:
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise TypeError(f"{name}: got a dual tensor; forward-mode differentiation is not supported")
    accepted = [d for d in DTYPES if d != torch.float64] if chain.is_autocast(input) else [input.dtype]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in accepted:
            raise TypeError(
                f"{name}: got {tensor.dtype}, accepted beside an input of {input.dtype}: {_names(accepted)}"
            )


def _check_batch_norm(
    input, weight, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu
):  # fmt: skip
    for name, switch in (("training", training), ("relu", relu)):
        if not isinstance(switch, bool):
            raise TypeError(f"{name}: got {type(switch).__name__}, a bool is accepted")
    vectors = {"running_mean": running_mean, "running_var": running_var, "bn_weight": bn_weight, "bn_bias": bn_bias}
    dtype = chain.compute_dtype(input)
    accepted = [dtype] if dtype.itemsize > 2 else [dtype, torch.float32]
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    for name, vector in given.items():
        _check_tensor(name, vector, input.device)
        _check_vector(name, vector, weight.shape[0])
        if vector.dtype not in accepted:
            raise TypeError(f"{name}: got {vector.dtype}, accepted beside activations of {dtype}: {_names(accepted)}")
        first = next(iter(given))
        if vector.dtype != given[first].dtype:
            raise TypeError(f"{name}: got {vector.dtype}, accepted is the dtype of {first}, {given[first].dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: got only one of them, accepted are both or none")
    if not training and running_mean is None:
        raise ValueError("running_mean: got None, which is accepted only with training=True")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: got {type(number).__name__}, a float is accepted")
        if not math.isfinite(number):
            raise ValueError(f"{name}: got {number}, finite values are accepted")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps: got {eps}, accepted are values above 0, and 0 with training=False")


def _check_activation(name: str, x: Tensor) -> None:
    _check_tensor(name, x, None)
    if x.ndim != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is [N, C, H, W]")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, accepted are {_names(DTYPES)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, at least one channel is accepted")


def _check_tensor(name: str, x: Tensor, device: torch.device | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, a torch.Tensor is accepted")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, accepted is torch.strided")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: is on {x.device}, accepted is the device of the input, {device}")


def _check_vector(name: str, x: Tensor | None, channels: int) -> None:
    if x is not None and tuple(x.shape) != (channels,):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is [{channels}]")


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
