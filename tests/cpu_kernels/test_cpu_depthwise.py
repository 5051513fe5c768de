"""The depthwise kernels in C++ for CPUs, forward, backward and inference, against the oracle."""

from __future__ import annotations

from itertools import product
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from combinations import combinations
from cpu_ops import (
    ACC_TOLERANCE,
    DTYPES,
    GRADIENTS,
    INPUTS,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    assert_statistics,
    cases,
    channels_last,
    check_conv_backward,
    check_threads,
    is_channels_last_dense,
    norm_act_of,
    ops,
    random_bn,
    random_grad_bn,
    relative_error,
    same_bits,
    shapes,
)
from torch import Tensor

from mobilenet_ext.contract import Act, conv_output_size

# (n, c, h, w, kernel, stride, padding): every special case of the tiling. 8, 24 and 40 channels end in part of a
# vector, 1, 3 and 33 in one lane of it; widths of 57 and above take several column tiles, heights of 28 and above
# several bands.
SHAPES = shapes(
    [
        (2, 32, 12, 12, 3, 1, 1),
        (2, 32, 12, 12, 3, 2, 1),
        (1, 24, 7, 9, 3, 2, 1),
        (2, 33, 9, 9, 3, 2, 0),
        (1, 20, 57, 113, 3, 1, 1),
    ],
    (2, 16, 1, 1, 3, 1, 1),
    (1, 8, 9, 7, 3, 1, 1),
    (2, 3, 8, 8, 3, 1, 0),
    (1, 40, 8, 9, 3, 2, 0),
    (3, 1, 5, 6, 3, 1, 1),
    (2, 16, 1, 1, 3, 2, 1),
    (5, 16, 2, 2, 3, 2, 1),
    (1, 16, 2, 2, 3, 1, 1),
    (1, 16, 3, 3, 3, 1, 0),
    (1, 16, 4, 4, 3, 2, 0),
    (1, 5, 1, 200, 3, 1, 1),
    (1, 5, 200, 1, 3, 2, 1),
    (1, 20, 57, 114, 3, 2, 1),
    (1, 20, 58, 115, 3, 2, 0),
    (1, 1100, 4, 5, 3, 1, 1),
    (0, 16, 8, 8, 3, 1, 1),
)
# The same for 5x5, and for padding that differs from side to side or leaves rows and columns that no output reads. Each
# side has each width; in some images no pixel is an inner one; 40 channels take two column tiles.
each_other_shape = cases(
    [
        (2, 32, 12, 13, 5, 1, 2),
        (2, 33, 11, 12, 5, 2, 2),
        (1, 24, 9, 10, 5, 2, (1, 2, 1, 2)),
        (2, 40, 8, 9, 3, 2, (0, 1, 0, 1)),
        (2, 12, 7, 9, 3, 1, (2, 0, 1, 2)),
        (1, 40, 4, 110, 5, 1, (2, 1, 0, 2)),
    ],
    (1, 16, 1, 1, 5, 1, 2),
    (2, 5, 1, 1, 5, 2, 2),
    (1, 16, 1, 1, 3, 1, 2),
    (1, 5, 1, 9, 5, 1, 2),
    (1, 5, 9, 1, 5, 2, 2),
    (2, 16, 2, 2, 5, 1, (2, 2, 1, 2)),
    (1, 8, 2, 3, 5, 2, 2),
    (1, 8, 3, 2, 3, 2, 2),
    (1, 16, 5, 5, 5, 1, 0),
    (3, 1, 6, 5, 5, 2, 0),
    (1, 8, 10, 10, 5, 2, 0),
    (1, 17, 6, 7, 5, 1, (0, 2, 1, 0)),
    (2, 3, 7, 6, 5, 2, (2, 0, 0, 1)),
    (1, 8, 9, 11, 3, 2, (2, 1, 2, 0)),
    (1, 40, 5, 104, 5, 2, (1, 2, 2, 1)),
    (1, 8, 30, 7, 5, 1, (1, 1, 2, 1)),
    (1, 8, 58, 6, 3, 2, (0, 2, 1, 2)),
    (1, 40, 5, 104, 3, 1, (2, 1, 2, 0)),
    (1, 1100, 4, 5, 5, 1, 2),
    (0, 16, 8, 8, 5, 1, 2),
)


def settings(shape: tuple[Any, ...]) -> tuple[int, tuple[int, ...]]:
    """The stride, and the padding on the left, right, top and bottom."""
    stride, padding = shape[5:]
    return stride, (padding,) * 4 if isinstance(padding, int) else padding


def depthwise_inputs(
    shape: tuple[Any, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, bn_u, weight, and for the backward dz, y, grad_bn_y."""
    n, c, h, w, kernel = shape[:5]
    out = conv_output_size(h, w, kernel, *settings(shape))
    return (
        activation(n, c, h, w, dtype=dtype),
        random_bn(c, dtype),
        torch.randn(c, 1, kernel, kernel, dtype=torch.float64).to(dtype),
        activation(n, c, *out, dtype=dtype),
        activation(n, c, *out, dtype=dtype),
        random_grad_bn(c, dtype),
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check_forward(shape: tuple[Any, ...], dtype: torch.dtype, act_u: Act | None) -> None:
    u, bn_u, weight, *_ = depthwise_inputs(shape, dtype)
    gamma, beta, bias = bn_u[1:4]
    args = (u, *norm_act_of(bn_u, act_u), weight, *settings(shape), gamma, beta, 1e-5, True, bias)
    y, bn_y = ops.depthwise_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    expected, _ = oracle.depthwise_forward(*args)
    assert_close(y, expected, TOLERANCE[dtype], "y")
    assert_statistics(bn_y, y, gamma, beta, 1e-5)


def check_inference(shape: tuple[Any, ...], dtype: torch.dtype, with_bn: bool, act: Act) -> None:
    u, bn, weight, *_ = depthwise_inputs(shape, dtype)
    args = (u, bn if with_bn else None, act, weight, *settings(shape))
    y = ops.depthwise_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.depthwise_inference(*args), TOLERANCE[dtype])


def check_backward(
    shape: tuple[Any, ...],
    dtype: torch.dtype,
    act_u: Act | None,
    with_grad_bn: bool,
    with_y: bool,
    batch_stats: bool,
) -> None:
    u, bn_u, weight, dz, y, grad_bn_y = depthwise_inputs(shape, dtype)
    output = (dz, y if with_y else None, grad_bn_y if with_grad_bn else None)
    source = (u, *norm_act_of(bn_u, act_u), batch_stats, weight, *settings(shape))
    check_conv_backward("depthwise_backward", output, source)


@combinations("shape, dtype, act_u", SHAPES, DTYPES, INPUTS)
def test_depthwise_forward(shape: tuple[Any, ...], dtype: torch.dtype, act_u: Act | None) -> None:
    check_forward(shape, dtype, act_u)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_forward_without_affine_or_statistics(dtype: torch.dtype) -> None:
    u, bn_u, weight, *_ = depthwise_inputs((2, 24, 9, 9, 3, 1, 1), dtype)
    y, bn_y = ops.depthwise_forward(u, bn_u, Act.RELU, weight, 1, 1, None, None, 1e-3, True)
    plain, empty = ops.depthwise_forward(u, bn_u, Act.RELU, weight, 1, 1, None, None, 1e-3, False)
    assert same_bits(y, plain)
    assert empty.shape == (0,) and empty.dtype == bn_y.dtype
    of_stored = oracle.batch_bn(y, None, None, 1e-3)
    assert_close(bn_y, of_stored, ACC_TOLERANCE[dtype])
    assert torch.equal(bn_y[1], bn_y[3]) and not bn_y[2].any()


@combinations("shape, dtype, gradient", SHAPES, DTYPES, GRADIENTS)
def test_depthwise_backward(
    shape: tuple[Any, ...], dtype: torch.dtype, gradient: tuple[Act | None, bool, bool, bool]
) -> None:
    check_backward(shape, dtype, *gradient)


@combinations("shape, dtype, with_bn, act", SHAPES, DTYPES, [True, False], Act)
def test_depthwise_inference(shape: tuple[Any, ...], dtype: torch.dtype, with_bn: bool, act: Act) -> None:
    check_inference(shape, dtype, with_bn, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_other_shape
def test_kernel_sizes_and_paddings(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    # The activations take turns: each dtype, and each kernel with each stride, meets all of them in some shape.
    turn = sum(shape[:3]) + DTYPES.index(dtype)
    check_forward(shape, dtype, INPUTS[turn % len(INPUTS)])
    check_backward(shape, dtype, INPUTS[(turn + 1) % len(INPUTS)], turn % 3 > 0, turn % 3 > 1, turn % 2 > 0)
    check_inference(shape, dtype, turn % 2 > 0, list(Act)[turn % len(Act)])


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [*product([3, 5], [1, 2])])
def test_constant_images_stay_constant(dtype: torch.dtype, kernel: int, stride: int) -> None:
    # Wherever no tap is outside of the image, however the pixel is made: sums are taken in one order.
    u, bn_u, weight, dz, *_ = depthwise_inputs((1, 20, 13, 15, kernel, stride, 2), dtype)
    u, dz = (t[:, :, :1, :1].expand(t.shape).contiguous(memory_format=torch.channels_last) for t in (u, dz))
    y, _ = ops.depthwise_forward(u, bn_u, Act.SILU, weight, stride, 2, None, None, 1e-5, False)
    inner = y[:, :, 2:-2, 2:-2]
    assert same_bits(inner, inner[:, :, :1, :1].expand(inner.shape))
    dz_u, *_ = ops.depthwise_backward(dz, None, None, u, bn_u, Act.SILU, True, weight, stride, 2, True, True)
    for row, column in product(range(stride), range(stride)):
        inner = dz_u[:, :, 2 + row : -2 : stride, 2 + column : -2 : stride]
        assert same_bits(inner, inner[:, :, :1, :1].expand(inner.shape))


@pytest.mark.parametrize(
    ("kernel", "stride", "act_u"),
    [*product([3], [1, 2], [Act.RELU, Act.SILU]), (5, 1, Act.RELU)],
)
def test_outputs_too_large_for_the_cache(kernel: int, stride: int, act_u: Act) -> None:
    # 8 MiB and more are written past the cache, other code than for the small shapes above.
    shape = (2 if kernel == 3 else 1, 48, 224, 224, kernel, stride, 1)
    u, bn_u, weight, dz, y, grad_bn_y = depthwise_inputs(shape, torch.float32)
    args = (u, bn_u, act_u, weight, *settings(shape), None, None, 1e-5, True)
    actual, bn_y = ops.depthwise_forward(*args)
    assert_close(actual, oracle.depthwise_forward(*args)[0], 1e-6)
    assert_close(bn_y, oracle.batch_bn(actual, None, None, 1e-5), 1e-5)
    args = (dz, y, grad_bn_y, u, bn_u, act_u, True, weight, *settings(shape), True, True)
    dz_u, grad_weight, grad_bn_u = ops.depthwise_backward(*args)
    expected = oracle.depthwise_backward(*args)
    assert_close(dz_u, expected[0], 1e-6)
    assert_close(grad_weight, expected[1], 1e-5)
    assert_close(grad_bn_u, oracle.grad_bn(dz_u, u, bn_u, True), 1e-5)


@pytest.mark.cover
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_statistics_survive_a_large_mean(mean: float) -> None:
    # A kernel whose only tap is its centre copies the input, so the statistics are those of the input.
    u = activation(4, 24, 56, 60, dtype=torch.float32, mean=mean)
    weight = torch.zeros(24, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    y, bn_y = ops.depthwise_forward(u, None, Act.LINEAR, weight, 1, 1, None, None, 1e-5, True)
    assert torch.equal(y, u)
    exact = u.double().var((0, 2, 3), correction=0)
    module = torch.nn.BatchNorm2d(24, momentum=1.0)
    module(u)
    theirs = relative_error(module.running_var * (1 - 1 / (u.numel() // 24)), exact)
    assert relative_error(bn_y[4], exact) <= max(theirs, 1e-6)


def special_inputs(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs of a backward in which channel c > 0 of 16 holds one special value each; channel 0 is ordinary."""
    inputs = depthwise_inputs(shape, dtype)
    u, bn_u, weight, dz, y, grad_bn_y = inputs
    for channel, value in enumerate([float("nan"), float("inf"), -float("inf")], start=1):
        u[0, channel, 4, 4] = value
        u[0, channel + 3, 0, 0] = value
        dz[0, channel + 6, 2, 2] = value
        dz[0, channel + 9, 0, -1] = value
        weight[channel + 12, 0, 0, 0] = value
    return inputs


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "padding", "act_u"),
    [
        *((3, 1, act) for act in Act),
        (3, (2, 0, 0, 1), Act.RELU6),
        (5, 2, Act.RELU),
        (5, (1, 2, 2, 0), Act.HARDSWISH),
    ],
)
def test_nan_and_inf_go_where_pytorch_sends_them(
    dtype: torch.dtype, stride: int, kernel: int, padding: Any, act_u: Act
) -> None:
    shape = (1, 16, 9, 9, kernel, stride, padding)
    _, padding = settings(shape)
    u, bn_u, weight, dz, y, grad_bn_y = special_inputs(shape, dtype)
    args = (u, bn_u, act_u, weight, stride, padding, None, None, 1e-5, True)
    ours, bn_y = ops.depthwise_forward(*args)
    # In float32: in float64 PyTorch multiplies the padding by infinite weights, in other dtypes it leaves it out. Of
    # all outputs with a padding of 2 on each side, ours are some.
    a = oracle.norm_act(u, bn_u, act_u)
    every = F.conv2d(a.float(), weight.float(), padding=2, groups=16)
    theirs = every[:, :, 2 - padding[2] :: stride, 2 - padding[0] :: stride][:, :, : dz.shape[2], : dz.shape[3]]
    assert_same_specials(ours, theirs.to(dtype).double())
    finite = torch.isfinite(ours).all(3).all(2)[0]
    assert torch.equal(torch.isfinite(bn_y[4]), finite) and finite[0]

    args = (dz, y, grad_bn_y, u, bn_u, act_u, True, weight, stride, padding, True, True)
    ours = ops.depthwise_backward(*args)
    theirs = oracle.depthwise_backward(*args)
    assert_same_specials(ours[0], theirs[0].double())
    # Products of infinities may be summed in another order: NaN and Inf stand for each other within one tap's sum.
    dy = oracle.output_grad(dz, y, grad_bn_y)
    _, grad_weight = oracle.depthwise_by_taps(dy, a, weight, stride, padding)
    assert torch.equal(torch.isfinite(ours[1]), torch.isfinite(grad_weight))
    assert torch.equal(torch.isfinite(ours[2]), torch.isfinite(theirs[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases(
    [(1, 264, 7, 7, 3, 1, 1), (1, 264, 7, 7, 5, 1, 2)],
    (3, 40, 57, 60, 3, 1, 1),
    (3, 40, 57, 60, 3, 2, 1),
    (3, 40, 57, 60, 5, 2, (1, 2, 2, 1)),
)
@pytest.mark.parametrize("act_u", [Act.RELU, Act.SILU])
def test_same_bits_on_any_number_of_threads(shape: tuple[Any, ...], dtype: torch.dtype, act_u: Act) -> None:
    u, bn_u, weight, dz, y, grad_bn_y = depthwise_inputs(shape, dtype)
    forward = (u, bn_u, act_u, weight, *settings(shape), bn_u[1], bn_u[2], 1e-5, True)
    check_threads(ops.depthwise_forward, forward)
    check_threads(
        ops.depthwise_backward, (dz, y, grad_bn_y, u, bn_u, act_u, True, weight, *settings(shape), True, True)
    )


def bad_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    u, bn_u, weight, dz, y, grad_bn_y = depthwise_inputs((2, 16, 8, 8, 3, 1, 1), torch.float32)
    forward, backward = ops.depthwise_forward, ops.depthwise_backward
    tail, rest = (None, None, 1e-5, True), (u, bn_u, Act.RELU, True, weight, 1, 1, True, True)
    return {
        "input: expected channels_last": (forward, (u.contiguous(), bn_u, Act.RELU, weight, 1, 1, *tail)),
        "input: expected 4 dimensions": (forward, (u[0], bn_u, Act.RELU, weight, 1, 1, *tail)),
        "input: expected float32": (forward, (u.int(), bn_u, Act.RELU, weight, 1, 1, *tail)),
        "input: expected at least one channel": (forward, (u[:, :0], bn_u, Act.RELU, weight, 1, 1, *tail)),
        "input: the padded image": (forward, (channels_last(u[:, :, :2]), bn_u, Act.RELU, weight, 1, 0, *tail)),
        "weight: expected scalar type": (forward, (u, bn_u, Act.RELU, weight.double(), 1, 1, *tail)),
        "weight: expected shape": (forward, (u, bn_u, Act.RELU, weight[:8], 1, 1, *tail)),
        "weight: expected a contiguous": (forward, (u, bn_u, Act.RELU, weight.transpose(2, 3), 1, 1, *tail)),
        "weight: expected 4": (forward, (u, bn_u, Act.RELU, weight.flatten(), 1, 1, *tail)),
        "stride: expected 1 or 2": (forward, (u, bn_u, Act.RELU, weight, 3, 1, *tail)),
        "padding: expected 0, 1 or 2": (forward, (u, bn_u, Act.RELU, weight, 1, [1, 1, 1, 3], *tail)),
        "padding: expected 4 sides": (forward, (u, bn_u, Act.RELU, weight, 1, [1, 1], *tail)),
        "bn_u: expected shape": (forward, (u, bn_u[:4], Act.RELU, weight, 1, 1, *tail)),
        "bn_u: expected a contiguous": (forward, (u, bn_u.t().contiguous().t(), Act.RELU, weight, 1, 1, *tail)),
        "bn_u: expected scalar type": (forward, (u, bn_u.double(), Act.RELU, weight, 1, 1, *tail)),
        "gamma: expected shape": (forward, (u, bn_u, Act.RELU, weight, 1, 1, bn_u[0, :3], None, 1e-5, True)),
        "beta: expected scalar type": (forward, (u, bn_u, Act.RELU, weight, 1, 1, None, bn_u[0].half(), 1e-5, True)),
        "dz: expected shape": (backward, (dz[:1], y, grad_bn_y, *rest)),
        "y: expected scalar type": (backward, (dz, y.double(), grad_bn_y, *rest)),
        "grad_bn_y: expected shape": (backward, (dz, y, grad_bn_y[:5], *rest)),
        "act_u: expected linear without bn_u": (forward, (u, None, Act.RELU, weight, 1, 1, *tail)),
        "act_u: expected an Act": (forward, (u, bn_u, 17, weight, 1, 1, *tail)),
        "packed: expected for a pointwise": (
            ops.depthwise_inference, (u, bn_u, Act.RELU, weight, 1, 1, torch.zeros(8, dtype=torch.uint8))
        ),
    }  # fmt: skip


@pytest.mark.parametrize("message", list(bad_calls()))
def test_bad_tensors_are_refused(message: str) -> None:
    op, args = bad_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        op(*args)
