"""The network's chain: convolution, BatchNorm and activation units in a row, as one autograd node over the kernel ops.

Between two convolutions of a chain nothing but the raw convolution output is stored: the next convolution normalises
and activates it on load, in the backward pass too. One node for the whole chain, because an autograd node a layer
costs more host time than the kernels of the small layers take.

Squeeze-excite (arXiv:1709.01507) lies between two chains: the first gives the mean of its last activation, from which
the network makes the gate, and that activation itself as a :class:`Normalised`; the second begins with a pointwise
convolution that takes both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mobilenet_ext import ops, storage
from mobilenet_ext.autograd import as_gradient_of, first_order
from mobilenet_ext.contract import (
    BN_MEAN,
    BN_VAR,
    GRAD_BETA,
    GRAD_DZ_COEFFICIENT,
    GRAD_GAMMA,
    Act,
    Padding,
)
from mobilenet_ext.inference_steps import as_input, execute, pooling, steps_of
from mobilenet_ext.memory_format import match_memory_format
from mobilenet_ext.running_stats import update_running_stats_
from mobilenet_ext.unit_tensors import Kind, Unit, as_acc, as_parameter, compute_dtype, fold, running_bn

Gives = Literal["activation", "mean", "both"]  # mean: of the activation over each image, [N, C, 1, 1]


class Normalised(NamedTuple):
    """An activation that is not stored: ``act(norm(y))``. To autograd ``y`` stands for it: the gradient that goes in
    there is the activation's."""

    y: Tensor
    bn: Tensor
    act: int
    slope: float
    channels_last: bool = True  # the format that it is stored in, if it is

    def stored(self) -> Tensor:
        """The activation as a tensor."""
        *normalised, channels_last = self
        return match_memory_format(_Store.apply(*normalised), channels_last)


class _Settings(NamedTuple):
    kind: Kind
    stride: int
    padding: Padding
    batch_stats: bool
    eps: float
    act: int
    slope: float


def run(
    x: Tensor | Normalised,
    units: list[Unit],
    gives: Gives,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor | Normalised, Tensor]:
    """Run a chain of units over ``x``, as the plain modules would, statistics and all.

    Args:
        x: activation ``[N, C, H, W]``, any memory format, not empty; a :class:`Normalised` one only with a gate.
        units: at least one; a dense convolution only as the first.
        gives: the last unit's activation, its mean over each image ``[N, C, 1, 1]``, or both.
        gate: ``[N, C, 1, 1]`` in the dtype the chain runs in: what ``x`` is multiplied by. The first unit is pointwise.
        residual: what is added to the activation, of its shape and dtype.

    Returns:
        Channels_last tensors in the dtype of ``x``, or autocast's where that is on.

    Raises:
        ValueError: batch statistics over one value a channel.
    """
    u, *norm_u = x[:4] if isinstance(x, Normalised) else (x, None, Act.LINEAR.value, 0.0)
    dtype = compute_dtype(u)
    counts = _values_per_channel(u, units)
    inferred = 0 if isinstance(x, Normalised) else _leading_inference_units((u, gate), units)
    if inferred == len(units):
        return _infer(u, units, gives, gate, residual)
    if inferred:
        u, gate = _infer(u, units[:inferred], "activation", gate, None), None
        units = units[inferred:]

    storage.check(u, *(t for unit in units for t in (unit.running_mean, unit.running_var)))
    settings = tuple(_Settings(u.kind, u.stride, u.padding, u.batch_stats, u.eps, u.act, u.slope) for u in units)
    params: list[Tensor | None] = []
    for unit in units:
        norm = None if unit.batch_stats else running_bn(unit, None)
        params += [unit.weight, unit.conv_bias, unit.gamma, unit.beta, norm]
    # Converted in front of the node, so that what it saves is its own input: through it a second derivative finds it.
    u, gate, residual = (None if t is None else _converted(t, dtype) for t in (u, gate, residual))
    first = _first_to_learn((u, gate), units)
    out, *rest = _Chain.apply(settings, gives, dtype, first, *norm_u, u, gate, residual, *params)
    mean = rest.pop(0) if gives == "both" else None

    batch_units = [unit for unit in units if unit.batch_stats]
    tracked = [row for row in zip(batch_units, rest, counts, strict=True) if row[0].momentum is not None]
    if tracked:
        update_running_stats_(
            [unit.running_mean for unit, _, _ in tracked],
            [unit.running_var for unit, _, _ in tracked],
            [bn[BN_MEAN] for _, bn, _ in tracked],
            [bn[BN_VAR] for _, bn, _ in tracked],
            [count for _, _, count in tracked],
            [unit.momentum for unit, _, _ in tracked],
        )
    if mean is None:
        return out
    return Normalised(out, rest[-1] if units[-1].batch_stats else params[-1], units[-1].act, units[-1].slope), mean


def _infer(
    x: Tensor, units: list[Unit], gives: Gives, gate: Tensor | None, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`run`, where no unit has batch statistics to take or a gradient to give."""
    dtype = compute_dtype(x)
    folded = [fold(unit) for unit in units]
    steps = steps_of(folded, dtype, gated=gate is not None)
    x, gate, added = (None if t is None else as_input(t, dtype) for t in (x, gate, residual))
    if residual is not None and residual.requires_grad and torch.is_grad_enabled():
        return execute(x, steps, gate) + residual
    out = execute(x, steps, gate, added)
    if gives == "activation":
        return out
    mean = execute(out, [pooling(folded[-1], dtype)])
    return mean if gives == "mean" else (out, mean)


def _first_to_learn(inputs: tuple[Tensor | None, ...], units: list[Unit]) -> int | None:
    """The unit where backward ends: the first one that gives a gradient, be it to an input. None: no unit does."""
    if not torch.is_grad_enabled():
        return None
    if any(t is not None and t.requires_grad for t in inputs):
        return 0
    learns = (any(p is not None and p.requires_grad for p in _parameters(unit)) for unit in units)
    return next((i for i, learning in enumerate(learns) if learning), None)


def _parameters(unit: Unit) -> tuple[Tensor | None, ...]:
    return unit.weight, unit.conv_bias, unit.gamma, unit.beta


def _leading_inference_units(inputs: tuple[Tensor | None, ...], units: list[Unit]) -> int:
    """How many units in front have no batch statistics to take and no gradient to give."""
    first = _first_to_learn(inputs, units)
    units = units[:first]
    return next((i for i, unit in enumerate(units) if unit.batch_stats), len(units))


def _values_per_channel(x: Tensor, units: list[Unit]) -> list[int]:
    """How many values the statistics of each unit with batch statistics are taken over."""
    n, _, h, w = x.shape
    counts = []
    for unit in units:
        size = unit.output_size(n, h, w)
        _, _, h, w = size
        if unit.batch_stats:
            counts.append(n * h * w)
            if counts[-1] == 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}"
                )
    return counts


_NAME = "mobilenet_ext: chain of convolution, BatchNorm and ReLU"


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return _AsInput.apply(x, dtype)


class _AsInput(torch.autograd.Function):
    """``apply(x, dtype)``: ``x`` in ``dtype`` and channels_last; its gradient has the dtype and strides of ``x``."""

    @staticmethod
    def forward(ctx, x, dtype):
        # Without values: the strides, also where they are symbols of a traced graph.
        ctx.like = x.detach().to("meta")
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    @staticmethod
    @first_order(_NAME)
    def backward(ctx, saved, grad):
        return as_gradient_of(ctx.like, grad), None


class _Store(torch.autograd.Function):
    """``apply(y, bn, act, slope)``: the activation, whose gradient is that of the tensor that stands for it."""

    @staticmethod
    def forward(ctx, y, bn, act, slope):
        return ops.norm_act_forward(y, bn, act, False, None, slope)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


# Places among the arguments of _Chain: what may get a gradient, and where the units' parameters begin.
_U, _GATE, _RESIDUAL, _PARAMS = 7, 8, 9, 10
_PER_UNIT = 5


class _Chain(torch.autograd.Function):
    """``apply(settings, gives, dtype, first, bn_u, act_u, slope_u, u, gate, residual, *params)`` with activations
    channels_last in ``dtype`` and (weight, conv_bias, gamma, beta, running_bn) a unit in ``params``, the last of them
    None where batch statistics are wanted. Backward ends at the unit ``first``, and nothing is kept of those before it.
    Returns what ``gives`` says, of ``"both"`` the raw output in the activation's place, and the ``bn`` of every unit
    with batch statistics."""

    @staticmethod
    def forward(ctx, settings, gives, dtype, first, bn_u, act_u, slope_u, u, gate, residual, *params):
        bn, act, slope = bn_u, act_u, slope_u
        inputs, weights, bns, batch_bns = [], [], [], []
        for i, (kind, stride, padding, batch_stats, eps, *act_y) in enumerate(settings):
            weight, conv_bias, gamma, beta, running = params[_PER_UNIT * i : _PER_UNIT * (i + 1)]
            weight = as_parameter(weight, dtype)
            vectors = (as_acc(gamma, dtype), as_acc(beta, dtype), eps, batch_stats, as_acc(conv_bias, dtype))
            if first is not None and i >= first:
                # Of the first unit, what it computes from is kept only for a gradient that depends on it.
                used = i > first or any(ctx.needs_input_grad[j] for j in (_U, _GATE, _PARAMS + _PER_UNIT * i))
                inputs.append(u if used else None)
                weights.append(weight if used else None)
                bns.append(bn if used else None)
            if i == 0 and gate is not None:
                u, batch_bn = ops.gated_pointwise_forward(u, bn, act, gate, weight, *vectors, slope)
            else:
                u, batch_bn = ops.FORWARD[kind](u, bn, act, weight, stride, padding, *vectors, slope)
            bn, (act, slope) = running, act_y
            if batch_stats:
                bn = batch_bn
                batch_bns.append(batch_bn)
        if gives == "both":
            out = (u, ops.norm_act_forward(u, bn, act, True, None, slope))
        else:
            out = (ops.norm_act_forward(u, bn, act, gives == "mean", residual, slope),)

        ctx.first, ctx.gives = first, gives
        if first is not None:
            ctx.save_for_backward(*inputs, u, *weights, *bns, bn, gate if first == 0 else None)
            ctx.settings, ctx.parameters = settings[first:], params
            # Of the first input that is kept.
            ctx.act = settings[first - 1][-2:] if first else (act_u, slope_u)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*batch_bns)
        return *out, *batch_bns

    @staticmethod
    @first_order(_NAME)
    def backward(ctx, saved, grad, *others):
        grad_mean = others[0] if ctx.gives == "both" else None
        all_grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[_RESIDUAL]:
            all_grads[_RESIDUAL] = grad
        if ctx.first is None or (grad is None and grad_mean is None):
            return tuple(all_grads)
        begin = _PARAMS + _PER_UNIT * ctx.first
        settings, needs_u, needs = ctx.settings, ctx.needs_input_grad[_U], ctx.needs_input_grad[begin:]
        grads: list[Tensor | None] = [None] * len(needs)
        n = len(settings)
        rows: dict[int, Tensor] = {}
        # activations[i] and bns[i] are the input of unit i and how it is normalised, those at i + 1 its output.
        activations, weights, (*bns, gate) = saved[: n + 1], saved[n + 1 : 2 * n + 1], saved[2 * n + 1 :]
        acts = [ctx.act, *((each.act, each.slope) for each in settings)]  # like bns

        dz, grad_bn = _backward_of_output(ctx.gives, grad, grad_mean, activations[n], bns[n], settings[-1])
        for i in range(n - 1, -1, -1):
            kind, stride, padding, batch_stats, *_ = settings[i]
            weight_grad, bias_grad, gamma_grad, beta_grad = range(_PER_UNIT * i, _PER_UNIT * i + 4)
            for which, row in ((gamma_grad, GRAD_GAMMA), (beta_grad, GRAD_BETA)):
                if needs[which]:
                    rows[which] = grad_bn[row]
            if needs[bias_grad]:
                # DistributedDataParallel waits for a gradient, so it is zero and not None under batch statistics.
                grads[bias_grad] = (
                    torch.zeros_like(grad_bn[GRAD_BETA])
                    if batch_stats
                    else grad_bn[GRAD_DZ_COEFFICIENT] * grad_bn[GRAD_BETA]
                )
            need_input = i > 0 or needs_u or ctx.needs_input_grad[_GATE]
            if not (need_input or needs[weight_grad]):
                break
            of_output = (dz, activations[i + 1] if batch_stats else None, grad_bn)
            act, slope = acts[i]
            if i == 0 and gate is not None:
                dz, grad_weight, grad_gate = ops.gated_pointwise_backward(
                    *of_output, activations[0], bns[0], act, gate, weights[0], need_input, needs[weight_grad], slope
                )
                if ctx.needs_input_grad[_GATE]:
                    all_grads[_GATE] = as_gradient_of(gate, grad_gate)
            else:
                dz, grad_weight, grad_bn = ops.BACKWARD[kind](
                    *of_output, activations[i], bns[i], act, i > 0 and settings[i - 1].batch_stats, weights[i], stride,
                    padding, need_input, needs[weight_grad], slope,
                )  # fmt: skip
            if needs[weight_grad]:
                grads[weight_grad] = grad_weight
        if rows:
            # Tensors of their own, as every other gradient, in as few kernels as there can be.
            for which, grad in zip(rows, torch._foreach_mul(list(rows.values()), 1.0), strict=True):
                grads[which] = grad
        params = ctx.parameters[_PER_UNIT * ctx.first :]
        all_grads[begin:] = [None if g is None else as_gradient_of(p, g) for p, g in zip(params, grads, strict=True)]
        if needs_u:
            all_grads[_U] = as_gradient_of(activations[0], dz)
        return tuple(all_grads)


def _backward_of_output(
    gives: Gives, grad: Tensor | None, grad_mean: Tensor | None, y: Tensor, bn: Tensor, unit: _Settings
) -> tuple[Tensor, Tensor]:
    """``dz`` and ``grad_bn`` of a chain's last unit."""
    pool = gives == "mean"
    if grad is None:
        grad, grad_mean, pool = grad_mean, None, True
    grad, grad_mean = (
        None if g is None else g.to(y.dtype).contiguous(memory_format=torch.channels_last) for g in (grad, grad_mean)
    )
    is_dz = unit.act == Act.LINEAR and not pool and grad_mean is None
    dz, grad_bn = ops.norm_act_backward(grad, y, bn, unit.act, unit.batch_stats, pool, grad_mean, not is_dz, unit.slope)
    return grad if is_dz else dz, grad_bn
