"""Fixtures: a test that takes ``backend`` runs once on every usable backend, with tensors on its ``device``."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before PyTorch is imported: its threads spin while they wait, and those of all workers want the same processors.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import pytest
import torch
from plain import randomise_
from torch import Tensor, nn

import mobilenet_ext as mx

USABLE = [name for name, why_not in mx.backends.available().items() if why_not is None]
# Of the backends that run on the CPU, the quick ones: not interpreted Triton kernels.
ON_CPU = ("cpu", "reference")


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a usable backend, in use while the test runs."""
    with mx.backends.use(request.param):
        yield request.param


@pytest.fixture(params=[name for name in USABLE if name in ON_CPU])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, for tests whose tensors are on the CPU."""
    with mx.backends.use(request.param):
        yield request.param


@pytest.fixture
def backend64(cpu_backend: str) -> str:
    """As ``backend``, for the backends that have float64; all of them run on the CPU."""
    return cpu_backend


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a test on ``backend`` live."""
    return mx.backends.device_type(backend) or "cpu"


@pytest.fixture
def model(backend64: str) -> nn.Module:
    """A narrow network for the tests of frozen models; what tests other things has a ``model`` of its own."""
    torch.manual_seed(11)
    return randomise_(mx.MobileNetV1(10, 0.25, dropout=0.3)).double()


@pytest.fixture
def x() -> Tensor:
    """Images for ``model``."""
    torch.manual_seed(12)
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed, float32 products in full precision, and leaves the settings as they were."""
    precision = torch.backends.cudnn.conv.fp32_precision
    threads = torch.get_num_threads()
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.set_num_threads(threads)
