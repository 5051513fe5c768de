"""Tests that need a GPU; each runs on every GPU backend, and is skipped where that one is not usable, saying why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import mobilenet_ext as mx


def backends() -> list:
    """The GPU backends as parameters, or one that says why there is none."""
    if not torch.cuda.is_available():
        return [pytest.param("gpu", marks=pytest.mark.skip(reason="PyTorch finds no CUDA GPU"))]
    reasons = {name: reason for name, reason in mx.backends.available().items() if name in ("triton", "cuda")}
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=f"backend {name}: {reason}") if reason else ())
        for name, reason in reasons.items()
    ]


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a GPU backend, in use while the test runs."""
    with mx.backends.use(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> str:
    return "cuda"
