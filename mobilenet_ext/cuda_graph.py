"""CUDA graphs: capturing one, and what it rests on besides tensors and modules.

PyTorch's notes on CUDA graphs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) say what a capture
may hold. Nothing here touches a GPU before :func:`capture` is called for one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from mobilenet_ext import backends, fusion

Result = TypeVar("Result")

_capturing = threading.Lock()  # a capture begins with waiting for the device, which would break another one


def is_for(device: torch.device) -> bool:
    """Whether there are CUDA graphs for tensors on ``device``."""
    return device.type == "cuda"


def stream_of(device: torch.device) -> int:
    """The current stream of a CUDA device, as a number."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def is_capturing() -> bool:
    """Whether the current stream is being captured."""
    return torch.cuda.is_current_stream_capturing()


def settings() -> tuple[object, ...]:
    """What operations look up when they are launched, and a replay does not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        backends.chosen(), matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.enabled, cudnn.deterministic,
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def why_not_now() -> str | None:
    """Why operations must run one by one at this moment; None: a graph may take their place."""
    if fusion.is_observed() or torch._C._len_torch_function_stack() > 0:
        return "somebody follows the operations"
    if torch.is_anomaly_enabled():
        return "anomaly detection looks at the gradients on the host"
    if is_capturing():
        return "the stream is being captured already"
    return None


def capture(device: torch.device, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Captures what ``function`` launches on ``device``.

    None of it runs: the tensors in the result hold nothing before the first replay, and each replay writes them anew.
    Whoever replays keeps alive what the function reads and writes, its result included.

    Args:
        device: a CUDA device.
        function: has run before, so that its kernels are compiled and its libraries at work. No tensor with the
            autograd graph of an earlier run is alive: its nodes would wait for the stream of that run.

    Raises:
        RuntimeError: it cannot be captured, for example because it waits for the device. Whatever ran on the host is
            done; on the device nothing is.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device.index]
    state = generator.clone_state()
    # The stream around it is restored even where the end of a broken capture raises. One of its own for each capture:
    # libraries keep a workspace for each stream, and two graphs may be replayed at once. Other threads go on with what
    # is forbidden while a stream is captured, such as pinning memory.
    with _capturing, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            with torch.cuda.graph(graph, pool, torch.cuda.Stream(device), capture_error_mode="thread_local"):
                result = function()
        except BaseException:
            # Where CUDA has broken the capture off, PyTorch leaves the memory and the random numbers as if it went on.
            with contextlib.suppress(RuntimeError):  # it has not
                torch._C._cuda_endAllocateToPool(device.index, pool)
                torch._C._cuda_releasePool(device.index, pool)
            generator.graphsafe_set_state(state)
            raise
    return graph, result
