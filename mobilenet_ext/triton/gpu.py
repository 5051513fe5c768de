"""What the launch parameters depend on beside the shapes: the GPU, and PyTorch's float32 precision setting."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    multiprocessors: int
    shared_memory: int  # bytes a program can have
    capability: int  # 90 for sm_90

    @property
    def is_hopper(self) -> bool:
        """Launch parameters have been measured on an H200; other GPUs' are reasoned from their machine code."""
        return self.capability == 90


H100 = Gpu(132, 227 * 1024, 90)


def of(tensor: torch.Tensor) -> Gpu:
    """The GPU that ``tensor`` lies on; an H100 where there is none (interpreted kernels, meta tensors)."""
    return _properties(tensor.device.index) if tensor.is_cuda else H100


@cache
def _properties(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def product_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for these operands: float32 follows the setting that ``nn.Conv2d`` obeys."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"
