"""The reference itself: it takes the ReLU signs of a run within rounding of the corner, and refuses any others."""

from __future__ import annotations

from collections.abc import Callable

import plain
import pytest
import torch
from torch import Tensor, nn

import mobilenet_ext as mx

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def invert_a_channel(out: Tensor) -> Tensor:
    """Let one channel pass where it should not, and not where it should."""
    wrong = out.clone()
    wrong[:, 3] = (out[:, 3] <= 0).to(out.dtype)
    return wrong


# What a wrong ReLU makes of the right output: faults that are the same in forward and backward.
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all zero": torch.zeros_like,
    "threshold 0.1": lambda out: torch.where(out > 0.1, out, 0),
    "one zero too many": lambda out: torch.where(out == out.max(), 0, out),
    "nothing is zero": lambda out: out.clamp(min=1e-3),
    "a channel is inverted": invert_a_channel,
    "a channel is zero": lambda out: out * (torch.arange(out.shape[1]) != 3).view(1, -1, 1, 1),
}


def run(dtype: torch.dtype, training: bool) -> tuple[Tensor, nn.Module, Tensor]:
    """The output of a unit, its float64 reference, and the input."""
    torch.manual_seed(5)
    unit = plain.randomise_(plain.unit("depthwise", 16, 16)).to(dtype).train(training)
    expected = plain.in_float64(unit, plain.unit("depthwise", 16, 16).train(training))
    x = torch.randn(2, 16, 24, 24).to(dtype)
    return unit(x).detach(), expected, x.double()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_signs_of_a_right_run_are_taken(dtype: torch.dtype, training: bool) -> None:
    out, expected, x = run(dtype, training)
    mask = out > 0
    plain.impose(expected, [mask], plain.corner(dtype))
    assert torch.equal(expected(x) != 0, mask)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_signs_of_a_wrong_run_are_refused(dtype: torch.dtype, training: bool, fault: str) -> None:
    out, expected, x = run(dtype, training)
    plain.impose(expected, [FAULTS[fault](out) > 0], plain.corner(dtype))
    with pytest.raises(AssertionError, match="ReLU: wrong side of the corner"):
        expected(x)


def test_few_signs_may_differ_within_rounding() -> None:
    z = torch.randn(4, 8, 40, 40, dtype=torch.float64)
    allowed = int(plain.FLIPPED_IN_ANY + plain.FLIPPED_SHARE * z.numel())
    z.view(-1)[: allowed + 1] = 1e-6
    mask = z > 0
    mask.view(-1)[:allowed] = False
    plain.assert_signs(z, mask, plain.FORWARD)
    mask.view(-1)[allowed] = False
    with pytest.raises(AssertionError, match=f"ReLU: {allowed + 1} of {z.numel()} signs differ"):
        plain.assert_signs(z, mask, plain.FORWARD)


def test_a_channel_of_zeros_has_no_room_for_signs() -> None:
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    z[:, 1] = 0
    plain.assert_signs(z, z > 0, plain.FORWARD)
    mask = z > 0
    mask[0, 1, 0, 0] = True
    with pytest.raises(AssertionError, match="ReLU: wrong side of the corner"):
        plain.assert_signs(z, mask, plain.FORWARD)


@pytest.mark.parametrize("layer", [0, 4, 26])
def test_a_network_whose_relu_is_wrong_in_forward_and_backward_is_refused(layer: int) -> None:
    """Masks as ``ReluMasks`` reads them off a fused network, one of them with a threshold of 0.1."""
    fused = plain.randomise_(mx.MobileNetV1(10, 0.25))
    expected = plain.in_float64(fused, plain.Network(10, 0.25))
    x = torch.randn(4, 3, 64, 64)
    with plain.ReluMasks() as recorded:
        fused(x)
    plain.impose(expected, recorded.masks, plain.TRAINING_FORWARD)
    with plain.one_thread():
        relu = [child for child in expected.modules() if isinstance(child, plain.Relu)][layer]
        seen: list[Tensor] = []
        handle = relu.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        expected(x.double())
        handle.remove()
        relu.mask = relu.mask & (seen[0] > 0.1)
        with pytest.raises(AssertionError, match="ReLU: wrong side of the corner"):
            expected(x.double())


@pytest.mark.parametrize("width", [0.125, 1.0])
def test_a_random_networks_output_depends_on_its_input_and_its_first_layer(width: float) -> None:
    """A whole network in eval mode is compared with another in many tests, which else would compare constants."""
    model = plain.randomise_(mx.MobileNetV1(5, width)).eval()
    x = torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        out = model(x)
        model.feature[0][0].weight.mul_(1.5)
        changed = model(x)
    scale = out.abs().max()
    assert (out[0] - out[1]).abs().max() > 0.01 * scale
    assert (out - changed).abs().max() > 0.005 * scale
