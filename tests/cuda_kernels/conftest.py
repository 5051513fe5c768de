"""The CUDA kernels without a GPU: on an emulated device (``emulator/``), and as machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import emulation
import pytest
import torch

import mobilenet_ext as mx
from mobilenet_ext import backends
from mobilenet_ext.backends import cuda


@pytest.fixture(scope="session")
def library() -> Path:
    """The CUDA backend, built for the emulated device."""
    if reason := emulation.why_not():
        pytest.skip(reason)
    return emulation.build()


@pytest.fixture
def device(library: Path) -> Iterator[Callable[..., None]]:
    """Changes the emulated device; see ``emulation.set_device``."""

    def change(**settings: int) -> None:
        emulation.set_device(library, **settings)

    change()
    yield change
    change()


@pytest.fixture
def emulated(library: Path, device: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA backend in use, for CPU tensors."""
    backend = backends.Backend(cuda.Kernels(library, "mobilenet_ext_cuda_emulated"), "cpu", lambda: None)
    monkeypatch.setitem(backends._BACKENDS, "cuda", backend)
    with mx.backends.use("cuda"):
        yield


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may round their operands."""
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = precision
