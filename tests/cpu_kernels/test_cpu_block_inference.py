"""The block_inference kernel in C++ for CPUs, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from combinations import combinations
from cpu_ops import (
    DTYPES,
    TOLERANCE,
    activation,
    assert_close,
    cases,
    check_threads,
    is_channels_last_dense,
    ops,
    random_bn,
    rounds_operands,
    shapes,
)

from mobilenet_ext.contract import NO_PADDING, Act

ALL = (1, 1, 1, 1)

# (n, c, h, w, c_out, stride, padding)
SHAPES = shapes(
    [
        (2, 32, 28, 28, 64, 1, ALL),
        (2, 32, 28, 28, 64, 2, (0, 1, 0, 1)),
        (3, 33, 9, 11, 17, 1, (1, 0, 0, 1)),
        (1, 3, 8, 7, 5, 2, ALL),
    ],
    (9, 16, 1, 1, 8, 2, ALL),
    (3, 16, 2, 3, 8, 1, ALL),
    (1, 520, 7, 7, 300, 1, ALL),
    (0, 16, 7, 7, 8, 1, ALL),
)


@combinations(
    "shape, dtype, acts",
    SHAPES,
    DTYPES,
    [*zip(Act, Act, strict=True), (Act.LINEAR, Act.RELU), (Act.RELU, Act.LINEAR)],
)
def test_block_inference(shape: tuple[int, ...], dtype: torch.dtype, acts: tuple[Act, Act]) -> None:
    n, c, h, w, c_out, stride, padding = shape
    x, depthwise_bn, pointwise_bn = activation(n, c, h, w, dtype=dtype), random_bn(c, dtype), random_bn(c_out, dtype)
    depthwise_weight = torch.randn(c, 1, 3, 3, dtype=torch.float64).to(dtype)
    pointwise_weight = (torch.randn(c_out, c, 1, 1, dtype=torch.float64) / c**0.5).to(dtype)
    args = (x, depthwise_bn, acts[0], depthwise_weight, stride, padding, pointwise_bn, acts[1], pointwise_weight)
    y = ops.block_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    if rounds_operands(dtype):
        inside = oracle.depthwise_inference(x, depthwise_bn, acts[0], depthwise_weight, stride, padding).to(dtype)
        exact = oracle.pointwise_inference(inside, pointwise_bn, acts[1], pointwise_weight, 1, NO_PADDING)
        assert_close(y, exact, TOLERANCE[dtype])
    else:
        assert_close(y, oracle.block_inference(*args), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases([(1, 300, 7, 7, 520)], (3, 40, 57, 60, 72))
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w, c_out = shape
    x, depthwise_bn, pointwise_bn = activation(n, c, h, w, dtype=dtype), random_bn(c, dtype), random_bn(c_out, dtype)
    depthwise_weight, pointwise_weight = torch.randn(c, 1, 3, 3).to(dtype), torch.randn(c_out, c, 1, 1).to(dtype)
    check_threads(
        ops.block_inference,
        (x, depthwise_bn, Act.RELU, depthwise_weight, 1, ALL, pointwise_bn, Act.RELU, pointwise_weight),
    )


def test_what_the_depthwise_half_may_be() -> None:
    x, bn, pointwise = activation(1, 8, 9, 9, dtype=torch.float32), random_bn(8, torch.float32), torch.randn(8, 8, 1, 1)
    for kernel, padding, message in (
        (5, ALL, "expected a kernel of 3x3"),
        (3, (1, 2, 1, 1), "padding: expected 0 or 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.block_inference(x, bn, Act.RELU, torch.randn(8, 1, kernel, kernel), 1, padding, bn, Act.RELU, pointwise)
