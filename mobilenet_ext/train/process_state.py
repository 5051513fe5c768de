"""What belongs to the whole process, taken for a while and given back: defaults, random numbers, choice of kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mobilenet_ext import backends
from mobilenet_ext.train.errors import TrainError


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """What PyTorch starts with, while the body of a ``with`` statement runs: gradients, float32, tensors on the CPU."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        with torch.enable_grad(), torch.device("cpu") if elsewhere else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def random_state(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seeds the random numbers of the CPU and of ``device`` while the body of a ``with`` statement runs.

    After it, those of the program go on as if nothing had been.
    """
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Selects the kernels while the body of a ``with`` statement runs; None leaves them as they are.

    Raises:
        TrainError: there is no such backend, or it cannot be used here.
    """
    with contextlib.ExitStack() as stack:
        if name is not None:
            try:
                stack.enter_context(backends.use(name))
            except (ValueError, RuntimeError, TypeError) as error:
                raise TrainError(f"--backend {name}: {error}") from error
        yield
