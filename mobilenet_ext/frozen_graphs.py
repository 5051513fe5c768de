"""The CUDA graphs that a frozen module keeps, one for each kind of input, and when they take the place of its parts."""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from mobilenet_ext import _host, cuda_graph, fusion

KEPT = 8  # graphs of a module: each has the memory of its activations
COUNTED = 256  # kinds of input that calls are counted of

_requires_grad = attrgetter("requires_grad")


class Decision(Protocol):
    """What a module is run as, until another object takes its place (``plans.py``)."""

    tensors: tuple[Tensor, ...]  # all parameters and buffers

    def run(self, x: Tensor) -> Tensor: ...

    def in_use(self) -> object:
        """What a run with the tensors' present values reads besides them."""


class Graphs:
    """Runs decisions, from a CUDA graph where inputs like the present one have come before.

    A graph belongs to a shape, strides, dtype, device and stream of the input, to autocast and to the settings that
    kernels are chosen by. The call that finds none runs the decision, the next one like it captures it. A thread that
    comes while another one is here runs the decision, too: the graphs' tensors are in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, _Captured] = OrderedDict()  # the one used last at the end
        self._calls: Counter[object] = Counter()  # since the last graph of that kind was dropped, if there was one
        self._patience = 1  # calls in front of a capture; twice as many after a graph that was dropped
        self._broken = False

    def run(self, decision: Decision, x: Tensor) -> Tensor:
        """``decision.run(x)``, as a tensor that later calls leave alone."""
        if not self._takes(decision, x) or not self._lock.acquire(blocking=False):
            return decision.run(x)
        try:
            kind = _kind(x)
            captured = self._kept.get(kind)
            if captured is not None and captured.holds(decision):
                self._kept.move_to_end(kind)
                return captured.replay(x)
            if captured is not None:
                self._drop(kind)
            if self._calls[kind] < self._patience:
                if len(self._calls) >= COUNTED:
                    self._calls.clear()
                self._calls[kind] += 1
                return decision.run(x)
            captured = self._capture(decision, x)
            if captured is None:
                return decision.run(x)
            if len(self._kept) >= KEPT:
                self._drop(next(iter(self._kept)))
            self._kept[kind] = captured
            return captured.replay(x)
        finally:
            self._lock.release()

    def _takes(self, decision: Decision, x: Tensor) -> bool:
        return (
            not self._broken
            and fusion.is_ordinary(x)
            and cuda_graph.is_for(x.device)
            and x.numel() > 0
            and not (torch.is_grad_enabled() and (x.requires_grad or any(map(_requires_grad, decision.tensors))))
            and cuda_graph.why_not_now() is None
        )

    def _drop(self, kind: object) -> None:
        del self._kept[kind], self._calls[kind]
        self._patience *= 2

    def _capture(self, decision: Decision, x: Tensor) -> _Captured | None:
        if any(t.is_inference() for t in decision.tensors) or torch.empty_like(x).stride() != x.stride():
            return None  # tensors that do not say when they are changed; an input whose elements share memory
        try:
            return _Captured(decision, x)
        except (RuntimeError, TypeError) as error:
            self._broken = True
            reason = str(error).partition("\n")[0]
            warnings.warn(f"a frozen model runs without CUDA graphs: {reason}", stacklevel=2)
            return None


class TensorsState:
    """The values and addresses of tensors at one moment.

    Changes that leave no version are not noticed: through ``.data``, NumPy or another process. Another address is:
    ``module.to()`` goes through ``.data``.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors
        self._state = tuple(answer for t in tensors for answer in (t._version, t.data_ptr()))

    def hold(self) -> bool:
        return _host.tensors_answer(self._tensors, Tensor._version, Tensor.data_ptr, self._state)


class _Captured:
    """A captured run of a decision."""

    def __init__(self, decision: Decision, x: Tensor) -> None:
        self._decision, self._state = decision, TensorsState(decision.tensors)
        device = x.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # Whoever comes first may be in inference mode, others not. Autocast would hand out casts of its own keeping.
        with torch.inference_mode(False), torch.no_grad():
            self._input = torch.empty_like(x).copy_(x)
            with torch.autocast(device, dtype, enabled, cache_enabled=False):
                self._graph, self._output = cuda_graph.capture(x.device, lambda: decision.run(self._input))
        self._in_use = decision.in_use()
        if type(self._output) is not Tensor:
            raise TypeError(f"it gives no tensor, but {type(self._output).__name__}")

    def holds(self, decision: Decision) -> bool:
        return self._decision is decision and self._state.hold()

    def replay(self, x: Tensor) -> Tensor:
        self._input.copy_(x)
        self._graph.replay()
        return self._output.clone()


def _kind(x: Tensor) -> object:
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = cuda_graph.stream_of(device)
    return x.shape, x.stride(), x.dtype, device, stream, autocast, cuda_graph.settings()
