"""The benchmarks are a package of the checkout, not of the library."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ONNX export refuses a setting of cuDNN's convolutions alone, which the other tests make."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", torch.backends.cudnn.rnn.fp32_precision)
