"""Backends: which implementation of the kernel ops runs, and how to choose one.

Every backend implements the op set of ``csrc/ops.h``:

========== ============================ ==========================================
name       runs on                      written in
========== ============================ ==========================================
cpu        any CPU                      C++ (``csrc/cpu``), vectorised at run time
triton     NVIDIA GPUs, 8.0 and newer   Triton (``mobilenet_ext/triton``)
cuda       NVIDIA GPUs, 7.5 and newer   C++/CUDA (``csrc/cuda``)
reference  anything PyTorch runs on     plain PyTorch (``backends/reference.py``)
========== ============================ ==========================================

``auto``, the default, picks the fastest usable backend for the device of the tensors. The choice is made for the whole
process (backward runs on threads of its own) and is read at every call, by compiled graphs too.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mobilenet_ext import storage
from mobilenet_ext.backends import cpu, cuda, reference, triton

__all__ = ["available", "current", "device_type", "empty_cache", "kernel", "set", "use"]

AUTO = "auto"


class Backend(NamedTuple):
    kernels: Any  # an attribute for each kernel op
    device_type: str | None  # None: any
    why_not: Callable[[], str | None]


class _Checked:
    """Kernels in Python, which look at the memory of their tensors first, as those in C++ do themselves."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def __getattr__(self, op: str) -> Callable[..., Any]:
        getattr(self._kernels, op)  # AttributeError where there is none

        def checked(*args: Any) -> Any:
            storage.check(*args)
            return getattr(self._kernels, op)(*args)

        setattr(self, op, checked)
        return checked


_BACKENDS = {  # where several run on a device, `auto` picks the first
    "cpu": Backend(cpu.kernels, "cpu", cpu.why_not),
    "triton": Backend(_Checked(triton.kernels), triton.device_type, triton.why_not),
    "cuda": Backend(cuda.kernels, cuda.device_type, cuda.why_not),
    "reference": Backend(_Checked(reference), None, lambda: None),
}


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it is usable here, else one line that says why it is not."""
    return {name: backend.why_not() for name, backend in _BACKENDS.items()}


def set(name: str) -> None:
    """Choose the backend for the whole process: a name from :func:`available`, or ``"auto"``.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is not usable here; the message says why.
    """
    global _chosen
    _chosen = _checked(name)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run the body of a ``with`` statement on one backend; errors as in :func:`set`.

    The choice holds for the whole process while the body runs, not for one thread alone.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name)
    try:
        yield
    finally:
        _chosen = before


def current(device_type: str) -> str:
    """The name of the backend that runs ops on tensors of ``device_type`` (``"cpu"``, ``"cuda"``, ...) now.

    Raises:
        RuntimeError: the backend chosen with :func:`set` or :func:`use` does not run on this device.
    """
    if _chosen != AUTO:
        wanted = _BACKENDS[_chosen].device_type
        if wanted not in (None, device_type):
            raise RuntimeError(f"backend {_chosen!r} runs on {wanted} tensors, not on {device_type} tensors")
        return _chosen
    name = _auto.get(device_type)
    if name is None:
        name = _auto[device_type] = _pick(device_type)
    return name


def chosen() -> str:
    """What was chosen with :func:`set` or :func:`use`: a backend's name, or ``"auto"``."""
    return _chosen


def device_type(name: str) -> str | None:
    """The type of device that a backend's tensors live on (``"cpu"``, ``"cuda"``); None if any will do."""
    return _BACKENDS[name].device_type


def empty_cache() -> None:
    """Give the memory that backends keep for later calls back to the system, as ``torch.cuda.empty_cache`` does.

    Only the ``cpu`` backend keeps any: the memory of activations that nobody uses any more, and workspaces. What
    tensors use stays, and the next calls are slower by the memory that they have to ask for anew.

    Memory also goes back by itself: where this library finds none otherwise, and in calls after it was not used for a
    minute or for 512 activations. This function is for the memory that somebody else needs when no such call comes:
    PyTorch's own tensors under a limit on the address space, another process. GPU backends take theirs from PyTorch.
    """
    cpu.empty_cache()


def kernel(op: str, device_type: str) -> Callable[..., Any]:
    """The current backend's implementation of a kernel op for tensors of ``device_type``."""
    return getattr(_BACKENDS[current(device_type)].kernels, op)


def _checked(name: str) -> str:
    names = available()
    if not isinstance(name, str) or name not in (AUTO, *names):
        raise ValueError(f"backend {name!r} is not known; accepted are {', '.join([AUTO, *names])}")
    if names.get(name) is not None:
        raise RuntimeError(f"backend {name!r} is not usable here: {names[name]}")
    return name


def _pick(device_type: str) -> str:
    for name, backend in _BACKENDS.items():
        if backend.device_type == device_type and backend.why_not() is None:
            return name
    if device_type != "meta":
        reasons = "; ".join(f"{name}: {why}" for name, why in available().items() if why)
        warnings.warn(
            f"mobilenet_ext has no kernels for {device_type} tensors here: its slow reference backend runs ({reasons})",
            stacklevel=2,
        )
    return "reference"


_auto: dict[str, str] = {}  # device type -> what `auto` picked
try:
    _chosen = _checked(os.environ.get("MOBILENET_EXT_BACKEND", AUTO))
except (ValueError, RuntimeError) as error:
    raise type(error)(f"environment variable MOBILENET_EXT_BACKEND: {error}") from None
