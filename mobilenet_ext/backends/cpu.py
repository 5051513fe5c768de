"""The CPU backend: C++ kernels (``csrc/cpu``), one build for every instruction set and every torch from 2.11 on."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"

if not LIBRARY.exists():
    raise ImportError(
        f"{LIBRARY} is missing: mobilenet_ext is imported from a source tree whose kernels were not built; "
        "run `pip install -e .` there"
    )
torch.ops.load_library(str(LIBRARY))  # also defines the schemas of the op set

kernels = torch.ops.mobilenet_ext_cpu


def isa() -> str:
    """The instruction set that the kernels chose for this machine."""
    chosen = ctypes.CDLL(str(LIBRARY)).mx_cpu_isa
    chosen.restype = ctypes.c_char_p
    return chosen().decode()


def pack_block(depthwise_bn: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    """What ``block_inference`` otherwise makes of these at each call (``csrc/cpu/block.h``), uint8, one-dimensional."""
    return kernels.pack_block(depthwise_bn, depthwise_weight, pointwise_weight)


def why_not() -> str | None:
    """None: the kernels run on every CPU."""
    return None
