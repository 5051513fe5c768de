"""Tensors whose storage is not what their sizes say: freed or shrunk, as FSDP does to a sharded parameter.

``F.conv2d`` and the kernels in C++ look at what they are given. PyTorch's copies and element-wise operations do not,
and read past its end: what they are to read is looked at here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Others (fake tensors, DTensor) have no memory, or not this kind of it.
_WITH_MEMORY = (Tensor, nn.Parameter, nn.Buffer)


def check(*arguments: object) -> None:
    """Raise RuntimeError if the memory of a tensor among the arguments is not there."""
    # Who traces sees no memory, but would see the questions.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return
    for t in arguments:
        if type(t) in _WITH_MEMORY and t.storage_offset() * t.itemsize + t.nbytes > t.untyped_storage().nbytes():
            _check_strides(t)


def _check_strides(t: Tensor) -> None:
    """``check`` for a tensor that has fewer bytes than elements, which may be what an expanded one needs."""
    if t.numel() == 0:
        return
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    needed, there = (last + 1) * t.itemsize, t.untyped_storage().nbytes()
    if needed > there:
        raise RuntimeError(
            f"tensor of shape {tuple(t.shape)}: expected a storage of at least {needed} bytes, got one of {there} "
            "(freed or resized after the tensor was made)"
        )
