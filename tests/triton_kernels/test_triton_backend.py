"""The Triton backend as a whole, under the interpreter: the library's own path to the kernels, and the network."""

from __future__ import annotations

from collections.abc import Iterator

import every_op
import oracle
import plain
import pytest
import torch
from plain import FORWARD, TRAINING_FORWARD
from test_network import backward, check_gradients, check_running_statistics, forward_with_masks, pair

import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.contract import NO_PADDING, Act
from mobilenet_ext.triton import gpu


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Few multiprocessors make few programs, each with several tiles; the interpreter runs them one after the other.
    monkeypatch.setattr(gpu, "H100", gpu.Gpu(4, 227 * 1024, 90))
    with mx.backends.use("triton"):
        yield


def test_is_usable() -> None:
    assert mx.backends.available()["triton"] is None
    assert mx.backends.current("cpu") == "triton"


def test_every_op_is_there() -> None:
    for name in every_op.kernel_ops():
        assert callable(mx.backends.kernel(name, "cpu")), name


@pytest.mark.parametrize("units", [5, pytest.param(27, marks=pytest.mark.slow)])
def test_training_step_of_the_network(units: int) -> None:
    """Of its first units, one of each kind and stride, and the pooling; all of it is slow."""
    fused, expected = (network.feature for network in pair(0.25, "cpu"))
    for feature in (fused, expected):
        del feature[units:-1]
    x = torch.randn(2, 3, 24, 24) if units < 27 else torch.randn(4, 3, 64, 64)
    out, wanted = forward_with_masks(fused, expected, x, "cpu", TRAINING_FORWARD)
    plain.assert_close(out, wanted, TRAINING_FORWARD, "output")
    check_running_statistics(fused, expected)
    backward(out, wanted, torch.randn(out.shape))
    check_gradients(fused, expected)


def test_eval_and_frozen_network() -> None:
    fused, expected = (module.eval() for module in pair(0.25, "cpu"))
    x = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        wanted = expected(x.double())
        plain.assert_close(fused(x), wanted, FORWARD, "output")
        plain.assert_close(mx.freeze(fused)(x), wanted, FORWARD, "output of the frozen network")


def test_float64_is_refused() -> None:
    x = torch.randn(1, 8, 4, 4).double().contiguous(memory_format=torch.channels_last)
    with pytest.raises(TypeError, match="float64"):
        ops.depthwise_inference(x, None, Act.LINEAR, torch.randn(8, 1, 3, 3).double(), 1, (1, 1, 1, 1))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_empty_batch(training: bool) -> None:
    unit = mx.nn.DepthwiseSeparableConv(8, 16).train(training)
    x = torch.randn(0, 8, 6, 6, requires_grad=True)
    out = unit(x)
    out.sum().backward()
    assert out.shape == (0, 16, 6, 6) and x.grad.shape == x.shape
    assert not any(bn.running_mean.any() for bn in plain.batch_norms(unit))


@pytest.mark.parametrize("conv", ["depthwise", "pointwise", "dense"])
def test_empty_tensors_launch_nothing(conv: str) -> None:
    """Outputs and statistics of the raw ops are those of the oracle."""
    u = torch.randn(0, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    weight = torch.randn({"depthwise": (6, 1, 3, 3), "pointwise": (4, 6, 1, 1), "dense": (4, 6, 3, 3)}[conv])
    geometry = (1, NO_PADDING) if conv == "pointwise" else (2, (1, 1, 1, 1))
    source = (u, None, Act.LINEAR) if conv == "dense" else (u, torch.rand(5, 6), Act.RELU)
    args = (*source, weight, *geometry, None, None, 1e-5, True)
    actual, expected = ops.FORWARD[conv](*args), getattr(oracle, f"{conv}_forward")(*args)
    args = (torch.empty_like(actual[0]), None, None, *source, True, weight, *geometry, True, True)
    actual += ops.BACKWARD[conv](*args)
    expected += getattr(oracle, f"{conv}_backward")(*args)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b)
