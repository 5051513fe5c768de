"""What the differentiable ops and the chain share about autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

Gradients = tuple[Tensor | None, ...]


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: the kernels know neither."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Gradients(torch.autograd.Function):
    """``apply(compute, message, count, *tensors)`` returns ``compute(*tensors[:count])``, gradients of which no
    derivative is known. The other tensors are what they depend on besides: through them, too, whoever differentiates
    the gradients finds his way to this node, where it would otherwise be a silent zero."""

    @staticmethod
    def forward(compute, message, count, *tensors):
        return compute(*tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)

    @staticmethod
    def vmap(info, in_dims, compute, message, count, *tensors):
        # Through apply, because the entries may be batched by an outer vmap again.
        call = partial(_Gradients.apply, compute, message, count)
        out = _by_entry(call, tensors, in_dims[3:], info.batch_size)
        return out, tuple(None if t is None else 0 for t in out)


def _by_entry(call: Callable[..., Gradients], tensors: Gradients, dims: tuple[int | None, ...], size: int) -> Gradients:
    """``call`` of each of the ``size`` entries of a batch, stacked: the kernels have no dimension for one."""
    results = []
    for i in range(size):
        entry = (t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True))
        results.append(call(*entry))
    return tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))


# Of torch.autograd.grad(is_grads_batched=True), which has a vmap of its own, older than torch.func's: it has no rules
# for autograd functions. It is not nested, because gradients of gradients are refused.
_LEGACY_LEVEL = 1


def _is_legacy_batch(grad: Tensor | None) -> bool:
    return grad is not None and is_legacy_batchedtensor(grad)


def _by_entry_of_legacy_batch(call: Callable[..., Gradients], grads: Gradients) -> Gradients:
    dims = tuple(0 if _is_legacy_batch(g) else None for g in grads)
    # The 1 is the size for tensors without that level, of which there are none here.
    tensors = tuple(torch._remove_batch_dim(g, _LEGACY_LEVEL, 1, 0) if _is_legacy_batch(g) else g for g in grads)
    size = next(len(t) for t, dim in zip(tensors, dims, strict=True) if dim is not None)
    out = _by_entry(call, tensors, dims, size)
    return tuple(None if t is None else torch._add_batch_dim(t, 0, _LEGACY_LEVEL) for t in out)


def first_order(name: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Make ``backward(ctx, saved, *grads)``, which calls kernels, a backward function for autograd.

    The result takes ``(ctx, *grads)``. It has no derivative of its own: under ``create_graph=True`` the gradients come
    attached to a node that raises, naming ``name``, when somebody differentiates them; without it a wrong number would
    come out. Under vmap (``is_grads_batched=True``) it runs once per gradient of the batch.

    What the gradients depend on beyond ``grads`` and the saved tensors stands in ``ctx.parameters``, if there is more.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def wrapper(ctx, *grads):
            saved = ctx.saved_tensors
            legacy = not torch.compiler.is_compiling() and any(
                g is not None and is_legacy_batchedtensor(g) for g in grads
            )
            if not (legacy or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()):
                return backward(ctx, saved, *grads)
            message = f"{name}: double backward (differentiating a gradient) is not supported"
            depends_on = (*saved, *getattr(ctx, "parameters", ()))

            def call(*grads: Tensor | None) -> Gradients:
                return _Gradients.apply(partial(backward, ctx, saved), message, len(grads), *grads, *depends_on)

            return _by_entry_of_legacy_batch(call, grads) if legacy else call(*grads)

        return wrapper

    return decorate


def as_gradient_of(tensor: Tensor, grad: Tensor) -> Tensor:
    """``grad`` in the dtype of ``tensor``, and where ``tensor`` is dense with its strides.

    That includes strides along dimensions of size 1. They address nothing and are compared all the same:
    DistributedDataParallel copies a gradient whose strides are not its parameter's, with a warning.
    """
    grad = grad.to(tensor.dtype)
    if grad.stride() == tensor.stride():
        return grad
    like = torch.empty_like(tensor, device=grad.device)
    if like.stride() != tensor.stride():
        return grad  # not dense: no gradient has strides like these
    if all(size == 1 or a == b for size, a, b in zip(grad.shape, grad.stride(), like.stride(), strict=True)):
        return grad.as_strided(like.shape, like.stride())
    return like.copy_(grad)
