"""The CUDA kernels without a GPU: on an emulated device (``emulator/``), and as machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import background
import cubins
import emulation
import pytest
import torch

import mobilenet_ext as mx
from mobilenet_ext import backends
from mobilenet_ext.backends import cuda

BUILD = pytest.StashKey[Future]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Compilers start while other tests run."""
    if session.config.option.collectonly:
        return
    of_this_folder = [item for item in session.items if item.path.parent == Path(__file__).parent]
    if any("emulated" in item.fixturenames for item in of_this_folder) and not emulation.why_not():
        session.stash[BUILD] = background.start(emulation.build)
    for item in of_this_folder:
        if "kernels" in item.fixturenames and not cubins.why_not():
            cubins.start(item.callspec.params["architecture"])


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    """The CUDA backend, built for the emulated device."""
    if reason := emulation.why_not():
        pytest.skip(reason)
    return request.session.stash[BUILD].result()


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
