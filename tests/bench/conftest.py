"""The benchmarks are a package of the checkout, not of the library."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))


@pytest.fixture(autouse=True)
def one_precision() -> Iterator[None]:
    """torch's ONNX export refuses a setting of cuDNN's convolutions alone, which the other tests make."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision
    yield
    conv.fp32_precision = before
