"""Whether a value has no state but what comparing it shows."""

from __future__ import annotations

import enum
import functools
import types

import torch

_DATA = (
    int, float, complex, str, bytes, type, types.NoneType, torch.dtype, torch.device, torch.layout, torch.memory_format,
    enum.Enum,
)  # fmt: skip


def is_data(value: object) -> bool:
    """Whether a value is one of Python's or PyTorch's plain ones, a function that keeps nothing, or made of such."""
    if isinstance(value, functools.partial):
        return all(map(is_data, (value.func, value.args, value.keywords)))
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    if isinstance(value, types.BuiltinFunctionType):  # a method of what may have a state, or belongs to nobody
        return isinstance(value.__self__, (types.ModuleType, type, types.NoneType))
    if isinstance(value, dict):
        return type(value).__module__ in ("builtins", "collections") and all(map(is_data, (*value, *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(is_data, value))
    return isinstance(value, _DATA)
