"""The CUDA backend as a whole, on the emulated device: the library's own path to the kernels, and the network."""

from __future__ import annotations

from collections.abc import Callable

import every_op
import plain
import pytest
import torch
from plain import FORWARD, TRAINING_FORWARD, relative_error
from test_network import backward, check_gradients, check_running_statistics, forward_with_masks, pair

import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.contract import Act

pytestmark = pytest.mark.usefixtures("emulated")

# Both round operands and results once; the sum of a product's terms is what differs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GPUS = [(80, 80), (75, 75), (90, 75)]  # compute capabilities: of the GPU, and of what it was compiled for


@pytest.mark.parametrize(
    ("dtype", "gpu"),
    [
        pytest.param(dtype, gpu, marks=[] if gpu == plain else [pytest.mark.slow])
        for dtype, plain in zip(every_op.DTYPES, GPUS, strict=True)
        for gpu in GPUS
    ],
    ids=str,
)
def test_every_op(device: Callable[..., None], dtype: torch.dtype, gpu: tuple[int, int]) -> None:
    """The last GPU runs code that its driver made of PTX for an older one: the emulator lets it have no more than that
    one has."""
    capability, compiled_for = gpu
    if dtype == torch.float32 and compiled_for < 80:
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # allowed, but there is none
    device(capability=capability, compiled_for=compiled_for)
    seen = set()
    for call in every_op.calls("cpu", (dtype,)):
        with mx.backends.use("reference"):
            expected = call.run()
        for i, (ours, theirs) in enumerate(zip(call.run(), expected, strict=True)):
            assert ours.dtype == theirs.dtype and steps(ours) == steps(theirs), (str(call), i)
            if theirs.numel():
                assert relative_error(ours, theirs) <= TOLERANCE[dtype], (str(call), i)
        seen.add(call.op)
    assert seen == every_op.kernel_ops()


def steps(x: torch.Tensor) -> list[int]:
    """The strides; that of a dimension of one says nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


@pytest.mark.parametrize(
    "op", [f"{conv}_{pass_}" for conv in ("pointwise", "gated_pointwise", "dense") for pass_ in ("forward", "backward")]
)
def test_precision_is_read_at_each_call(op: str) -> None:
    """Whatever op was called before: the setting of the last one must not stick."""
    call = next(call for call in every_op.calls("cpu", (torch.float32,)) if call.op == op)
    with mx.backends.use("reference"):
        expected = call.run()
    output = 1 if op.endswith("backward") else 0  # the weight's gradient, or y
    errors = []
    for precision in ("ieee", "tf32", "ieee"):
        torch.backends.cudnn.conv.fp32_precision = precision
        errors.append(relative_error(call.run()[output], expected[output]))
    assert errors[0] == errors[2] <= 1e-5 < errors[1] <= 1e-3


def test_training_step_of_the_network() -> None:
    fused, expected = pair(0.25, "cpu")
    out, wanted = forward_with_masks(fused, expected, torch.randn(4, 3, 64, 64), "cpu", TRAINING_FORWARD)
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
        ops.depthwise_inference(x, None, Act.LINEAR, torch.randn(8, 1, 3, 3).double(), 1, 1)


def test_wrong_shapes_are_refused() -> None:
    """What Python checks before it comes here, and an op called by hand does not."""
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        ops.depthwise_inference(x, None, Act.LINEAR, torch.randn(4, 1, 3, 3), 1, 1)
    with pytest.raises(RuntimeError, match="channels_last"):
        ops.norm_act_forward(torch.randn(2, 8, 4, 4), torch.randn(5, 8), Act.RELU, False)
