"""The kernel ops in Triton: one file an op; ``backends/reference.py`` specifies them, ``csrc/ops.h`` has their schemas.

Every op takes and returns what the reference does, in float32, bfloat16 and float16. It launches on the current stream
of the tensors' device, and neither synchronises nor reads a tensor's values on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mobilenet_ext.triton import (
    block_inference,
    dense_backward,
    dense_forward,
    depthwise_backward,
    depthwise_forward,
    merge,
    norm_act,
    pointwise_backward,
    pointwise_forward,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _op(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with its first argument's dtype checked and its GPU made the current one: Triton launches there."""

    @wraps(function)
    def checked(first: Tensor, *rest: Any) -> Any:
        if first.dtype not in DTYPES:
            raise TypeError(f"{first.dtype}: the triton backend has kernels for float32, bfloat16 and float16")
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return checked


ops: dict[str, Callable[..., Any]] = {
    function.__name__: _op(function)
    for function in (
        depthwise_forward.depthwise_forward,
        depthwise_forward.depthwise_inference,
        depthwise_backward.depthwise_backward,
        pointwise_forward.pointwise_forward,
        pointwise_forward.pointwise_inference,
        pointwise_backward.pointwise_backward,
        pointwise_forward.gated_pointwise_forward,
        pointwise_forward.gated_pointwise_inference,
        pointwise_backward.gated_pointwise_backward,
        dense_forward.dense_forward,
        dense_forward.dense_inference,
        dense_backward.dense_backward,
        norm_act.norm_act_forward,
        norm_act.norm_act_backward,
        block_inference.block_inference,
        merge.bn_from_running,
    )
}
