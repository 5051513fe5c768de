"""CUDA graphs on the CPU: a capture records the operations instead of launching them, a replay runs them again.

As on a GPU nothing is computed in a capture, a replay calls no Python code of the model, reads and writes the tensors
that there were in the capture, and what waits for the device cannot be captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mobilenet_ext import cuda_graph


class Graph:
    def __init__(self) -> None:
        self.operations: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, outputs in self.operations:
            again = tree_leaves(function(*args, **kwargs))
            for out, new in zip(outputs, again, strict=True):
                if isinstance(out, Tensor) and not out.is_meta and new.data_ptr() != out.data_ptr():
                    out.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()  # storages of the capture's own
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written to that was there before

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        for argument in tree_leaves((args, kwargs)):
            if isinstance(argument, Tensor) and not argument.is_meta:
                key = argument.untyped_storage()._cdata
                if key not in self.made and key not in self.before:
                    memory = torch.empty(0, dtype=torch.uint8).set_(argument.untyped_storage())  # has its own version
                    self.before[key] = memory, memory.clone()
        out = function(*args, **kwargs)
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self.before:
                self.made.add(each.untyped_storage()._cdata)
        # Aliases: what is done to the tensors of the capture afterwards (`set_`, a gradient) is not done to these.
        args, kwargs, outputs = tree_map_only(Tensor, Tensor.detach, (args, kwargs, tree_leaves(out)))
        self.graph.operations.append((function, args, kwargs, outputs))
        return out


def capture(device: torch.device, function: Callable[[], Any]) -> tuple[Graph, Any]:
    """In place of ``cuda_graph.capture``."""
    graph = Graph()
    state = torch.get_rng_state()
    recorder = _Recorder(graph)
    try:
        with recorder:
            result = function()
    finally:
        torch.set_rng_state(state)
        for memory, before in recorder.before.values():
            memory.copy_(before)
    for *_, outputs in graph.operations:
        for out in outputs:
            if isinstance(out, Tensor) and not out.is_meta and out.untyped_storage()._cdata in recorder.made:
                out.untyped_storage().fill_(0xFF)  # NaN, and no class
    return graph, result


@contextlib.contextmanager
def recorded() -> Iterator[list[Graph]]:
    """While the body runs, tensors on the CPU have CUDA graphs; gives those captured so far."""
    graphs: list[Graph] = []

    def capture_one(device: torch.device, function: Callable[[], Any]) -> tuple[Graph, Any]:
        graph, result = capture(device, function)
        graphs.append(graph)
        return graph, result

    names = ("capture", "is_for", "stream_of", "is_capturing")
    before = [getattr(cuda_graph, name) for name in names]
    fakes = (capture_one, lambda device: True, lambda device: 0, lambda: False)
    for name, fake in zip(names, fakes, strict=True):
        setattr(cuda_graph, name, fake)
    try:
        yield graphs
    finally:
        for name, original in zip(names, before, strict=True):
            setattr(cuda_graph, name, original)
