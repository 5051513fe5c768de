"""Whether somebody records what a model does, to run it elsewhere or to look at it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_CALL = nn.Module.__call__
_thread = threading.local()


@contextlib.contextmanager
def analysing() -> Iterator[None]:
    """This thread follows modules itself meanwhile, to see what their plain forward does (``forward_graph.py``)."""
    _thread.analyses = True
    try:
        yield
    finally:
        _thread.analyses = False


def is_traced() -> bool:
    """Whether a tool follows the modules or operations at this moment and keeps what it sees: ``torch.fx``,
    ``torch.jit.trace``, ``make_fx``, ``torch.export``, the ONNX exporters, and whatever is built on them.

    Such a tool gets the plain modules and operations, which run everywhere and which it knows. The answer reads nothing
    of the model: reading a parameter, or comparing a shape, would leave a trace already. ``torch.compile`` is no such
    tool: it compiles for this process, kernels included.
    """
    if torch.compiler.is_compiling():
        # Not torch.compiler.is_exporting(): to Dynamo of torch 2.11 it is always true.
        return torch.compiler._is_exporting_flag
    return is_followed()


def is_followed() -> bool:
    """:func:`is_traced` where nothing is compiled."""
    # torch.fx replaces the calls of all modules while it traces; whoever else does so wants to see them all too.
    replaced = nn.Module.__call__ is not _CALL or getattr(_thread, "analyses", False)
    return replaced or torch.jit.is_tracing() or get_proxy_mode() is not None
