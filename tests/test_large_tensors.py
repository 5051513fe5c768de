"""Tensors of more than 2^31 elements: offsets are 64 bits wide."""

import pytest
import torch
import torch.nn.functional as F

from mobilenet_ext import ops
from mobilenet_ext.contract import Act

SIDE, CHANNELS = 16_400, 8  # 2.15e9 elements; with a tail of rows that is compared
TAIL = 6


def memory_gib() -> float:
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) / 2**20


pytestmark = [pytest.mark.large, pytest.mark.skipif(memory_gib() < 16, reason="needs 12 GiB of memory")]


@pytest.fixture
def image() -> torch.Tensor:
    """Zeros but for the last rows, so that most of it is the operating system's one page of zeros."""
    image = torch.zeros(1, SIDE, SIDE, CHANNELS, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert image.numel() > 2**31 and image.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    image[:, :, -TAIL:] = torch.randn(1, CHANNELS, TAIL, SIDE)
    return image


def test_depthwise(image: torch.Tensor) -> None:
    weight = torch.randn(CHANNELS, 1, 3, 3, dtype=torch.bfloat16)
    y = ops.depthwise_inference(image, None, Act.LINEAR, weight, 2, 1)
    expected = F.conv2d(image[:, :, -TAIL:].double(), weight.double(), None, 2, 1, groups=CHANNELS)
    # The first of these rows sees a row above the tail, which the expectation takes for padding: both are zeros.
    torch.testing.assert_close(y[:, :, -TAIL // 2 :].double(), expected, rtol=1e-2, atol=1e-2)
    assert not y[:, :, : -TAIL // 2].any()


def test_pointwise_forward_and_backward(image: torch.Tensor) -> None:
    weight = torch.randn(1, CHANNELS, 1, 1, dtype=torch.bfloat16)
    y, _ = ops.pointwise_forward(image, None, Act.LINEAR, weight, 1, 0, None, None, 1e-5, False)
    tail = image[:, :, -TAIL:].double()
    torch.testing.assert_close(y[:, :, -TAIL:].double(), F.conv2d(tail, weight.double()), rtol=1e-2, atol=1e-2)

    h = torch.ones_like(y)
    grad_image, grad_weight, _ = ops.pointwise_backward(
        h, None, None, image, None, Act.LINEAR, False, weight, 1, 0, True, True
    )
    expected = weight.view(1, CHANNELS, 1, 1).expand(1, CHANNELS, TAIL, SIDE)
    torch.testing.assert_close(grad_image[:, :, -TAIL:], expected)
    torch.testing.assert_close(grad_weight.flatten().double(), tail.sum((0, 2, 3)), rtol=1e-4, atol=1e-2)
