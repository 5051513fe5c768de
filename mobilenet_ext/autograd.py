"""What the differentiable ops and the chain share about autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    """``apply(message, count, *tensors)`` gives the first ``count`` tensors back. The others are what they were made
    from: through them a derivative finds its way to this node, where it would otherwise be a silent zero."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        return tuple(None if t is None else t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def refuse_double_backward(name: str) -> Callable[[Callable], Callable]:
    """Decorate a backward function whose result has no derivative of its own.

    Under ``create_graph=True`` the gradients come back attached to a node that raises, naming ``name``, when somebody
    differentiates them; without it a wrong number would come out. The first argument of ``backward`` is the context.
    """

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        @wraps(backward)
        def wrapper(*args):
            if not torch.is_grad_enabled():
                return backward(*args)
            with torch.no_grad():
                grads = backward(*args)
            message = f"{name}: double backward (differentiating a gradient) is not supported"
            return _Refused.apply(message, len(grads), *grads, *args[1:], *args[0].saved_tensors)

        return wrapper

    return decorate
