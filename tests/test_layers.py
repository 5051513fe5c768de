"""The layer ops in float64: ``gradcheck``, and ``opcheck`` of every op of ``csrc/ops.h`` in every dtype of its kernels.

What the kernel ops compute is tested through the layers here, and through ``mx.functional`` and the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_op import kernel_ops
from torch import Tensor

import mobilenet_ext as mx
from mobilenet_ext.contract import Act

OPS = torch.ops.mobilenet_ext
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPE_IDS = ["fp32", "bf16", "fp16", "fp64"]
N, C, C_OUT, H, W = 2, 3, 2, 4, 3


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def image(dtype: torch.dtype, c: int = C, h: int = H, w: int = W) -> Tensor:
    return torch.randn(N, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)


def vector(dtype: torch.dtype, c: int = C) -> Tensor:
    return (torch.rand(c) + 0.5).to(acc(dtype))


def bn(dtype: torch.dtype, c: int = C) -> Tensor:
    return (torch.rand(5, c) + 0.5).to(acc(dtype))


def grad_bn(dtype: torch.dtype, c: int = C) -> Tensor:
    return torch.randn(6, c).to(acc(dtype))


def weight(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def halved(dtype: torch.dtype, c: int = C) -> Tensor:
    return image(dtype, c, (H + 1) // 2, (W + 1) // 2)


def pointwise(dtype: torch.dtype) -> Tensor:
    return weight(dtype, C_OUT, C, 1, 1)


def gate(dtype: torch.dtype) -> Tensor:
    return torch.rand(N, C, 1, 1).to(dtype)


def dense(dtype: torch.dtype) -> Tensor:
    return weight(dtype, C_OUT, C, 3, 3)


LINEAR, RELU, LEAKY = Act.LINEAR, Act.RELU, Act.LEAKY_RELU

# Every op's arguments, for a dtype: plain inputs and normalised ones, with and without each optional result.
KERNEL_CASES: dict[str, Callable[[torch.dtype], list[tuple[Any, ...]]]] = {
    "depthwise_forward": lambda d: [
        (image(d), None, LINEAR, weight(d, C, 1, 3, 3), 1, 0, None, None, 1e-5, False),
        (image(d), bn(d), RELU, weight(d, C, 1, 3, 3), 2, 1, vector(d), vector(d), 1e-5, True, vector(d)),
    ],
    "depthwise_backward": lambda d: [
        (halved(d), None, None, image(d), None, LINEAR, False, weight(d, C, 1, 3, 3), 2, 1, True, False),
        (image(d), image(d), grad_bn(d), image(d), bn(d), RELU, True, weight(d, C, 1, 3, 3), 1, 1, True, True),
        (image(d), None, grad_bn(d), image(d), bn(d), RELU, False, weight(d, C, 1, 3, 3), 1, 1, False, True),
    ],
    "pointwise_forward": lambda d: [
        (image(d), None, LINEAR, pointwise(d), 1, 0, None, None, 1e-5, False),
        (image(d), bn(d), RELU, pointwise(d), 1, 0, vector(d, C_OUT), vector(d, C_OUT), 1e-5, True, vector(d, C_OUT)),
    ],
    "pointwise_backward": lambda d: [
        (image(d, C_OUT), None, None, image(d), None, LINEAR, False, pointwise(d), 1, 0, True, False),
        (
            *(image(d, C_OUT), image(d, C_OUT), grad_bn(d, C_OUT)),
            *(image(d), bn(d), RELU, True, pointwise(d), 1, 0, True, True),
        ),
        (image(d, C_OUT), None, grad_bn(d, C_OUT), image(d), bn(d), RELU, False, pointwise(d), 1, 0, False, True),
    ],
    "dense_forward": lambda d: [
        (image(d), None, LINEAR, dense(d), 1, 0, None, None, 1e-5, False),
        (image(d), None, LINEAR, dense(d), 2, 1, vector(d, C_OUT), vector(d, C_OUT), 1e-5, True, vector(d, C_OUT)),
    ],
    "dense_backward": lambda d: [
        (halved(d, C_OUT), None, None, image(d), None, LINEAR, False, dense(d), 2, 1, True, True),
        (
            *(image(d, C_OUT), image(d, C_OUT), grad_bn(d, C_OUT)),
            *(image(d), None, LINEAR, False, dense(d), 1, 1, False, True),
        ),
    ],
    "gated_pointwise_forward": lambda d: [
        (image(d), None, LINEAR, gate(d), pointwise(d), None, None, 1e-5, False),
        (image(d), bn(d), LEAKY, gate(d), pointwise(d), vector(d, C_OUT), None, 1e-5, True, vector(d, C_OUT), 0.1),
    ],
    "gated_pointwise_backward": lambda d: [
        (image(d, C_OUT), None, None, image(d), None, LINEAR, gate(d), pointwise(d), True, False),
        (
            *(image(d, C_OUT), image(d, C_OUT), grad_bn(d, C_OUT)),
            *(image(d), bn(d), LEAKY, gate(d), pointwise(d), True, True, 0.1),
        ),
        (image(d, C_OUT), None, grad_bn(d, C_OUT), image(d), bn(d), RELU, gate(d), pointwise(d), False, True),
    ],
    "gated_pointwise_inference": lambda d: [
        (image(d), gate(d), None, LINEAR, pointwise(d)),
        (image(d), gate(d), bn(d, C_OUT), LEAKY, pointwise(d), None, image(d, C_OUT), 0.1),
    ],
    "norm_act_forward": lambda d: [
        # Linear, which may hand a tensor on, and one that cannot: shapes and strides do not depend on which.
        *((image(d), bn(d), act, pool) for act in (LINEAR, RELU) for pool in (True, False)),
        (image(d), bn(d), LEAKY, False, image(d), 0.1),
    ],
    "norm_act_backward": lambda d: (
        [
            (image(d, C, 1, 1) if pool else image(d), image(d), bn(d), act, stats, pool)
            for act in (LINEAR, RELU)
            for stats, pool in ((True, False), (False, False), (True, True), (False, True))
        ]
        + [
            (image(d), image(d), bn(d), LEAKY, True, False, gate(d), True, 0.1),
            (image(d), image(d), bn(d), LINEAR, True, False, None, False),
        ]
    ),
    "bn_from_running": lambda d: [
        (vector(d), vector(d), None, None, None, 1e-5),
        (vector(d), vector(d), vector(d), vector(d), vector(d), 1e-3),
    ],
    "depthwise_inference": lambda d: [
        (image(d), None, LINEAR, weight(d, C, 1, 3, 3), 1, 0),
        (image(d), bn(d), RELU, weight(d, C, 1, 3, 3), 2, 1),
        (image(d), bn(d), LEAKY, weight(d, C, 1, 3, 3), 1, 1, None, image(d), 0.1),
    ],
    "pointwise_inference": lambda d: [
        (image(d), None, LINEAR, pointwise(d), 1, 0),
        (image(d), bn(d, C_OUT), RELU, pointwise(d), 1, 0),
        (image(d), bn(d, C_OUT), LEAKY, pointwise(d), 1, 0, None, image(d, C_OUT), 0.1),
    ],
    "dense_inference": lambda d: [
        (image(d), None, LINEAR, dense(d), 1, 0),
        (image(d), bn(d, C_OUT), RELU, dense(d), 2, 1),
        (image(d), bn(d, C_OUT), LEAKY, dense(d), 1, 1, None, image(d, C_OUT), 0.1),
    ],
    "block_inference": lambda d: (
        [
            (image(d), bn(d), RELU, weight(d, C, 1, 3, 3), stride, [1, 0, 0, 1], bn(d, C_OUT), RELU, pointwise(d))
            for stride in (1, 2)
        ]
        + [
            (
                *(image(d), bn(d), LEAKY, weight(d, C, 1, 3, 3), 1, 1, bn(d, C_OUT), LEAKY, pointwise(d)),
                *(None, image(d, C_OUT), 0.1, 0.2),
            )
        ]
    ),
}


def away_from_zero(u: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``u`` changed so that no ``(u - mean)*scale + shift`` lies where ReLU has no derivative."""
    mean, scale, shift = (v.view(1, -1, 1, 1) for v in (mean, scale, shift))
    z = (u - mean) * scale + shift
    z = z + 0.1 * torch.where(z > 0, 1.0, -1.0)
    return ((z - shift) / scale + mean).to(u.dtype).contiguous(memory_format=torch.channels_last)


def normalised(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, mean, scale and shift."""
    vectors = (torch.randn(C).to(acc(dtype)), vector(dtype), torch.randn(C).to(acc(dtype)) * 0.5)
    return away_from_zero(image(dtype), *vectors), *vectors


LAYER_CASES: dict[str, Callable[[torch.dtype], list[tuple[Any, ...]]]] = {
    "depthwise": lambda d: [
        (image(d), None, None, None, weight(d, C, 1, 3, 3), 2, 1),
        (*normalised(d), weight(d, C, 1, 3, 3), 1, 1),
        (*normalised(d), weight(d, C, 1, 3, 3), 1, 0),
    ],
    "pointwise": lambda d: [
        (image(d), None, None, None, weight(d, C_OUT, C, 1, 1)),
        (*normalised(d), weight(d, C_OUT, C, 1, 1)),
    ],
    "norm_act": lambda d: [(*normalised(d), act, 0.1) for act in Act],
    "depthwise_conv2d": lambda d: [
        (image(d), weight(d, C, 1, 3, 3), None, 1, 0),
        (image(d), weight(d, C, 1, 3, 3), weight(d, C), 2, 1),
    ],
    "pointwise_conv2d": lambda d: [
        (image(d), weight(d, C_OUT, C, 1, 1), None),
        (image(d), weight(d, C_OUT, C, 1, 1), weight(d, C_OUT)),
    ],
}


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args)


def running_stats_args(dtype: torch.dtype) -> tuple[Any, ...]:
    """Two BatchNorms."""
    running = [[torch.rand(c).to(dtype) for c in (C, C_OUT)] for _ in range(2)]
    batch = [[vector(dtype, c) for c in (C, C_OUT)] for _ in range(2)]
    return *running, *batch, [10, 1], [0.1, 1.0]


def defined_ops() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in names if name.startswith("mobilenet_ext::")}


def test_every_op_is_tested() -> None:
    assert defined_ops() == {*KERNEL_CASES, *LAYER_CASES, "update_running_stats_"}
    assert kernel_ops() == set(KERNEL_CASES)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("op", KERNEL_CASES)
def test_opcheck_of_kernel_ops(backend64: str, op: str, dtype: torch.dtype) -> None:
    """In every dtype what they return and that it shares no memory; how they are traced, which no dtype changes, in
    one."""
    tracing = ["test_autograd_registration", "test_aot_dispatch_dynamic"] if dtype == torch.float32 else []
    for args in KERNEL_CASES[op](dtype):
        torch.library.opcheck(getattr(OPS, op).default, args, test_utils=["test_schema", "test_faketensor", *tracing])


@pytest.mark.parametrize("op", LAYER_CASES)
def test_opcheck_of_layer_ops(backend64: str, op: str) -> None:
    for args in LAYER_CASES[op](torch.float32):
        torch.library.opcheck(getattr(OPS, op).default, with_gradients(args))


@pytest.mark.parametrize("op", LAYER_CASES)
def test_opcheck_of_a_layer_op_that_is_given_nchw(backend64: str, op: str) -> None:
    """Layer ops take any strides; their fake kernels must give those of the real output."""
    for args in LAYER_CASES[op](torch.float32):
        given = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(getattr(OPS, op).default, with_gradients(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_opcheck_of_update_running_stats(dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS.update_running_stats_.default, running_stats_args(dtype))


@pytest.mark.parametrize("op", LAYER_CASES)
def test_gradcheck(backend64: str, op: str) -> None:
    """Every edge, those of the statistics too, carries the true derivative."""
    torch.set_num_threads(1)
    for args in LAYER_CASES[op](torch.float64):
        assert torch.autograd.gradcheck(getattr(OPS, op).default, with_gradients(args))


@pytest.mark.parametrize("op", LAYER_CASES)
def test_gradcheck_of_each_input_alone(backend64: str, op: str) -> None:
    """What the backward leaves out where nobody needs it must not change the rest."""
    torch.set_num_threads(1)
    for args in LAYER_CASES[op](torch.float64):
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                alone = tuple(
                    a.clone().requires_grad_(i == j) if isinstance(a, Tensor) else a for j, a in enumerate(args)
                )
                assert torch.autograd.gradcheck(getattr(OPS, op).default, alone)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_gradcheck_of_units(backend64: str, kind: str, training: bool) -> None:
    """Along one random direction (``fast_mode``): of the layers that they are made of, every element was checked."""
    torch.set_num_threads(1)
    torch.manual_seed(1)  # no value within gradcheck's step of a ReLU's corner
    double = torch.float64
    w = weight(double, *((C, 1, 3, 3) if kind == "depthwise" else (C_OUT, C, 1, 1)))
    c = w.shape[0]
    bias, running, affine = weight(double, c), [weight(double, c), vector(double, c)], [vector(double, c) for _ in "ab"]
    function = getattr(mx.functional, f"{kind}_bn_relu")

    def call(*args: Tensor) -> Tensor:
        statistics = [t.clone() for t in running]
        return function(*args[:3], *statistics, *args[3:], training=training)

    assert torch.autograd.gradcheck(call, with_gradients((image(double), w, bias, *affine)), fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck_of_a_chain(backend64: str, training: bool) -> None:
    """Stem, depthwise, pointwise and pooling as one autograd node, along one random direction."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = torch.nn.Sequential(
        mx.nn.StemConvBNReLU(3, 2, stride=2),
        mx.nn.DepthwiseSeparableConv(2, 3, stride=1),
        torch.nn.AdaptiveAvgPool2d(1),
    )
    module = mx.nn.FusedSequential(*module).double().train(training)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, {**dict(zip(names, parameters, strict=True)), **buffers}, x)

    parameters = [p.detach().clone() for p in module.parameters()]
    inputs = with_gradients((image(torch.float64, 3, 6, 5), *parameters))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
