"""The CPU backend: C++ kernels (``csrc/cpu``), one build for every instruction set and every torch from 2.11 on."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilenet_ext.backends import reference

LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"

if not LIBRARY.exists():
    raise ImportError(
        f"{LIBRARY} is missing: mobilenet_ext is imported from a source tree whose kernels were not built; "
        "run `pip install -e .` there"
    )
torch.ops.load_library(str(LIBRARY))  # also defines the schemas of the op set

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/args.h

kernels = torch.ops.mobilenet_ext_cpu


def isa() -> str:
    """The instruction set that the kernels chose for this machine."""
    chosen = ctypes.CDLL(str(LIBRARY)).mx_cpu_isa
    chosen.restype = ctypes.c_char_p
    return chosen().decode()


def pack_weight(weight: Tensor) -> Tensor:
    """A pointwise weight ``[N, K, 1, 1]`` as the product of the kernels reads it (``PackedLayout`` in ``kernels.h``),
    one-dimensional: what ``block_inference`` otherwise makes at each call."""
    library = ctypes.CDLL(str(LIBRARY))
    columns, group, depth = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.mx_cpu_packed_layout(_DTYPES.index(weight.dtype), *map(ctypes.byref, (columns, group, depth)))
    dtype = weight.dtype if group.value > 1 else reference.acc_dtype(weight.dtype)
    n, k = weight.shape[:2]
    padded = F.pad(weight.view(n, k).to(dtype), (0, -k % depth.value, 0, -n % columns.value))
    panels = padded.view(-1, columns.value, padded.shape[1] // group.value, group.value)
    return panels.transpose(1, 2).contiguous().view(-1)


def why_not() -> str | None:
    """None: the kernels run on every CPU."""
    return None
