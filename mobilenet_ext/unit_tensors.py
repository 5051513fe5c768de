"""Units as tensors and settings: what the kernels are given of a convolution, its BatchNorm and its activation."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mobilenet_ext import ops, storage
from mobilenet_ext.contract import BN_ROWS, BN_SCALE, BN_SHIFT, Act, Padding, acc_dtype, conv_output_size

Kind = Literal["dense", "depthwise", "pointwise"]


class Unit(NamedTuple):
    """A convolution, BatchNorm and activation."""

    kind: Kind
    stride: int
    padding: Padding
    weight: Tensor
    conv_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch_stats: bool  # normalise by the batch's statistics, otherwise by the running ones
    momentum: float | None  # the share of the batch's statistics in the new running ones; None: leave them
    eps: float
    act: int = Act.RELU.value
    slope: float = 0.0  # of a leaky ReLU

    def output_size(self, n: int, h: int, w: int) -> tuple[int, int, int, int]:
        h, w = conv_output_size(h, w, self.weight.shape[2], self.stride, self.padding)
        return n, self.weight.shape[0], h, w


class InferenceUnit(NamedTuple):
    """A unit with its BatchNorm folded into ``bn``, acc [5, C] (``csrc/ops.h``)."""

    kind: Kind
    stride: int
    padding: Padding
    weight: Tensor
    bn: Tensor
    act: int = Act.RELU.value
    slope: float = 0.0


def fold(unit: Unit) -> InferenceUnit:
    """The unit with its running statistics, BatchNorm parameters and convolution bias in one normalisation."""
    bn = running_bn(unit, unit.conv_bias)
    return InferenceUnit(unit.kind, unit.stride, unit.padding, unit.weight.detach(), bn, unit.act, unit.slope)


def running_bn(unit: Unit, conv_bias: Tensor | None) -> Tensor:
    """The normalisation by running statistics, if there are any, of a convolution that has left out ``conv_bias``."""
    if unit.running_mean is None:
        return bias_bn(unit.weight, conv_bias)
    vectors = (unit.running_mean, unit.running_var, unit.gamma, unit.beta, conv_bias)
    with torch.no_grad():
        mean, *rest = (as_acc(v, unit.running_mean.dtype) for v in vectors)
        return ops.bn_from_running(mean, *rest, unit.eps)


def bias_bn(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The normalisation that does nothing but add ``bias`` to what a layer with ``weight`` gives."""
    bn = torch.zeros((BN_ROWS, len(weight)), dtype=acc_dtype(weight.dtype), device=weight.device)
    bn[BN_SCALE] = 1
    if bias is not None:
        bn[BN_SHIFT] = bias.detach()
    return bn


def as_parameter(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight or vector as the kernels take it."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        storage.check(tensor)  # before a copy
    return tensor.to(dtype).contiguous()


def as_acc(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A vector in the dtype in which activations of ``dtype`` are accumulated."""
    return None if vector is None else as_parameter(vector, acc_dtype(dtype))


def is_autocast(x: Tensor) -> bool:
    """Whether autocast casts ``x`` for a convolution; it leaves float64 alone."""
    device = x.device.type
    # Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available; meta is the device that has no autocast.
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: its own, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype
