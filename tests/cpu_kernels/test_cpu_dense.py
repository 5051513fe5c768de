"""The dense 3x3 kernels in C++ for CPUs, forward, backward and inference, against the oracle."""

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
    assert_same_specials,
    assert_statistics,
    cases,
    check_threads,
    expected_backward,
    is_channels_last_dense,
    ops,
    random_bn,
    random_grad_bn,
    same_bits,
    shapes,
    weight_tolerance,
)
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act, conv_output_size

ALL = (1, 1, 1, 1)
SAME = (0, 1, 0, 1)  # TensorFlow's padding of even sides at stride 2

# (n, c_in, h, w, c_out, stride, padding)
SHAPES = shapes(
    [
        (2, 3, 33, 32, 32, 2, ALL),
        (3, 1, 9, 11, 5, 1, NO_PADDING),
        (2, 4, 12, 9, 17, 2, (2, 0, 1, 2)),
        (1, 40, 14, 12, 33, 2, SAME),
    ],
    (2, 3, 32, 33, 8, 1, ALL),
    (9, 3, 1, 1, 32, 2, ALL),
    (2, 2, 1, 2, 9, 1, (2, 2, 2, 2)),
    (1, 2, 3, 130, 6, 1, (0, 2, 2, 0)),
    (0, 3, 8, 8, 16, 2, ALL),
)


def dense_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, and for the backward dz, y, grad_bn_y."""
    n, c_in, h, w, c_out, stride, padding = shape
    out = conv_output_size(h, w, 3, stride, padding)
    weight = torch.randn(c_out, c_in, 3, 3, dtype=torch.float64) / (9 * c_in) ** 0.5
    gradients = [activation(n, c_out, *out, dtype=dtype) for _ in range(2)]
    return activation(n, c_in, h, w, dtype=dtype), weight.to(dtype), *gradients, random_grad_bn(c_out, dtype)


@combinations("shape, dtype", SHAPES, DTYPES)
def test_dense_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, dz, y_before, grad_bn_y = dense_inputs(shape, dtype)
    gamma, beta, bias = grad_bn_y[:3]
    args = (x, None, Act.LINEAR, weight, *shape[5:], gamma, beta, 1e-3, True, bias)
    y, bn_y = ops.dense_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.dense_forward(*args)[0], TOLERANCE[dtype], "y")
    assert_statistics(bn_y, y, gamma, beta, 1e-3)

    for normalised in (True, False):
        before = (dz, y_before, grad_bn_y) if normalised else (dz, None, None)
        backward = (*before, x, None, Act.LINEAR, False, weight, *shape[5:])
        grad_x, grad_weight, _ = ops.dense_backward(*backward, True, True)
        expected_x, expected_weight = expected_backward(backward)
        assert grad_x.dtype == dtype and is_channels_last_dense(grad_x)
        assert_close(grad_x, expected_x, TOLERANCE[dtype], "grad_x")
        assert_close(grad_weight, expected_weight, weight_tolerance(dtype), "grad_weight")
        no_input, only_weight, _ = ops.dense_backward(*backward, False, True)
        assert no_input.shape == (0,) and same_bits(only_weight, grad_weight)
        only_input, no_weight, _ = ops.dense_backward(*backward, True, False)
        assert no_weight.shape == (0,) and same_bits(only_input, grad_x)


@combinations("shape, dtype, with_bn, act", SHAPES, DTYPES, [True, False], Act)
def test_dense_inference(shape: tuple[int, ...], dtype: torch.dtype, with_bn: bool, act: Act) -> None:
    x, weight, *_ = dense_inputs(shape, dtype)
    args = (x, random_bn(shape[4], dtype) if with_bn else None, act, weight, *shape[5:])
    assert_close(ops.dense_inference(*args), oracle.dense_inference(*args), TOLERANCE[dtype])


@pytest.mark.cover
@pytest.mark.parametrize("where", ["x", "dz", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(where: str, value: float) -> None:
    x, weight, dz, y, grad_bn_y = dense_inputs((2, 3, 9, 8, 17, 2, ALL), torch.float32)
    # Corners: what lies outside the image is multiplied as 0, forward and in the gradient of the weight, as in PyTorch
    # with float64. In float32, whether PyTorch does so depends on the shape.
    {"x": x[1, 2, 0], "dz": dz[0, 5, 0], "weight": weight[7, 1, 0]}[where][0] = value
    args = (x, None, Act.LINEAR, weight, 2, ALL, None, None, 1e-5, True)
    assert_same_specials(ops.dense_forward(*args)[0], oracle.dense_forward(*args)[0])
    args = (dz, y, grad_bn_y, x, None, Act.LINEAR, False, weight, 2, ALL, True, True)
    for actual, expected in zip(ops.dense_backward(*args), oracle.dense_backward(*args), strict=True):
        assert_same_specials(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases([(2, 3, 40, 40, 24, 2, ALL)])
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, dz, y, grad_bn_y = dense_inputs(shape, dtype)
    check_threads(ops.dense_forward, (x, None, Act.LINEAR, weight, *shape[5:], None, None, 1e-5, True))
    backward = (dz, y, grad_bn_y, x, None, Act.LINEAR, False, weight, *shape[5:], True, True)
    check_threads(ops.dense_backward, backward)


def test_a_normalised_input_is_refused() -> None:
    x, weight, *_ = dense_inputs((2, 3, 8, 8, 16, 1, ALL), torch.float32)
    with pytest.raises(RuntimeError, match="bn_u: expected none of a dense convolution"):
        ops.dense_forward(x, random_bn(3, torch.float32), Act.RELU, weight, 1, ALL, None, None, 1e-5, True)
