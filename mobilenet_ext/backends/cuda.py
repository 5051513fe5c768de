"""The CUDA backend: C++ kernels (``csrc/cuda``) for NVIDIA GPUs of compute capability 7.5 and newer, without Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mobilenet_ext import _host
from mobilenet_ext.backends import gpus

LIBRARY = Path(__file__).parent.parent / "_cuda.abi3.so"
CAPABILITY = (7, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

device_type = "cuda"


class Kernels:
    """The ops of a library of the CUDA kernels, in its namespace; loaded when the first of them is called."""

    def __init__(self, library: Path, namespace: str) -> None:
        self._path = library
        self._namespace = namespace

    def __getattr__(self, op: str) -> Callable[..., Any]:
        torch.ops.load_library(str(self._path))
        kernel = getattr(getattr(torch.ops, self._namespace), op).default
        allow_tf32 = ctypes.CDLL(str(self._path)).mx_cuda_allow_tf32

        def checked(first: torch.Tensor, *rest: Any) -> Any:
            if first.dtype not in DTYPES:
                raise TypeError(f"{first.dtype}: the cuda backend has kernels for float32, bfloat16 and float16")
            if first.dtype == torch.float32:  # its products follow PyTorch's setting, as it is at this call
                allow_tf32(torch.backends.cudnn.conv.fp32_precision == "tf32")
            return kernel(first, *rest)

        self.__dict__[op] = checked
        return checked


kernels = Kernels(LIBRARY, "mobilenet_ext_cuda")


def why_not() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not LIBRARY.exists():
        return _host.build_info()["cuda"]
    if reason := gpus.why_not(CAPABILITY):
        return reason
    architectures = _host.build_info()["cuda_architectures"]
    for capability in gpus.capabilities():
        if not runs_on(architectures, capability):
            return f"a GPU's compute capability is {gpus.text(capability)}, the kernels were built for {architectures}"
    return _load_error()


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` (as in TORCH_CUDA_ARCH_LIST: ``"8.0;9.0+PTX"``) runs on such a GPU.

    Machine code runs on its own generation, from its own revision on; PTX on all that is newer.
    """
    for architecture in architectures.replace(" ", ";").split(";"):
        number, _, ptx = architecture.partition("+")
        major, minor = (int(part.rstrip("af")) for part in number.split("."))
        if capability >= (major, minor) and (ptx or capability[0] == major):
            return True
    return False


@cache
def _load_error() -> str | None:
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}".splitlines()[0]
    return None
