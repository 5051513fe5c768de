"""The GPUs that PyTorch sees, for the backends that need one."""

from __future__ import annotations

import torch


def capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the visible GPUs, lowest first; a backend is chosen for all of them."""
    return sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})


def why_not(needed: tuple[int, int]) -> str | None:
    """Why kernels for GPUs of this compute capability and newer cannot run here, or None."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    lowest = capabilities()[0]
    if lowest < needed:
        return f"a GPU's compute capability is {text(lowest)}, {text(needed)} is needed"
    return None


def text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
