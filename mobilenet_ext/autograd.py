"""What the differentiable ops and the chain share about autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def refuse_double_backward(name: str) -> Callable[[Callable], Callable]:
    """Decorate a backward function whose result has no derivative of its own.

    Under ``create_graph=True`` the gradients come back attached to a node that raises, naming ``name``, when somebody
    differentiates them; without it a wrong number would come out.
    """

    def decorate(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        @wraps(backward)
        def wrapper(*args):
            if not torch.is_grad_enabled():
                return backward(*args)
            with torch.no_grad():
                grads = backward(*args)
            message = f"{name}: double backward (differentiating a gradient) is not supported"
            refuse = torch._C._functions.DelayedError(message.encode(), len(grads))
            return refuse(*[None if g is None else g.detach().requires_grad_() for g in grads])

        return wrapper

    return decorate
