"""Running statistics: their update, which tensors can be such, and whether they share memory with another tensor."""

from __future__ import annotations

import torch
from torch import Tensor

import mobilenet_ext.backends  # noqa: F401  (loads the library that defines the op)


def why_unusable(buffer: Tensor, updated: bool) -> str | None:
    """What is wrong with a running mean or variance, ``updated`` in place or only read; None: nothing."""
    if buffer.requires_grad and torch.is_grad_enabled():
        return "one that requires a gradient"
    if not updated:
        return None
    if any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)):
        return "one whose elements share memory, as those of expand do"
    if not torch.compiler.is_compiling() and buffer.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor, which only inference mode can update"
    return None


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some byte belongs to an element of ``a`` and to one of ``b``. Interleaved tensors do not overlap."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or 0 in (a.numel(), b.numel()):
        return False
    (first_a, last_a), (first_b, last_b) = _span(a), _span(b)
    if last_a < first_b or last_b < first_a:
        return False
    covered = torch.zeros(max(last_a, last_b) + 1, dtype=torch.bool)
    _bytes_of(a, covered).fill_(True)
    return bool(_bytes_of(b, covered).any())


def share_memory(tensors: list[Tensor]) -> bool:
    """Whether two of the tensors overlap."""
    if torch.compiler.is_compiling():  # what it traces has no memory yet; their id() would be guarded
        return len(set(tensors)) < len(tensors)
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    if len(set(storages)) == len(storages):
        return False
    by_storage: dict[int, list[Tensor]] = {}
    for storage, tensor in zip(storages, tensors, strict=True):
        by_storage.setdefault(storage, []).append(tensor)
    for group in by_storage.values():
        reached: list[Tensor] = []  # those that end last, of what begins earlier
        for tensor in sorted(group, key=lambda each: _span(each)[0]):
            first, last = _span(tensor)
            reached = [each for each in reached if _span(each)[1] >= first]
            if any(overlap(tensor, each) for each in reached):
                return True
            reached.append(tensor)
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first and the last byte of ``tensor`` in its storage."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.element_size()
    return first, first + (reach + 1) * tensor.element_size() - 1


def _bytes_of(tensor: Tensor, storage: Tensor) -> Tensor:
    """A view of ``storage``, which has an element for each byte, as ``tensor`` is one of its own storage."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return storage.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size)


@torch.no_grad()
def _update_running_stats(running_mean, running_var, mean, var, count, momentum):
    """running = (1 - momentum)*running + momentum*batch, one entry a BatchNorm: with the unbiased variance of ``count``
    values a channel."""
    unbiased = torch._foreach_mul(var, [n / max(n - 1, 1) for n in count])
    batch = torch._foreach_mul([*mean, *unbiased], momentum + momentum)
    running = [*running_mean, *running_var]
    # In the accumulation dtype and rounded once, also for buffers of 16 bits.
    kept = [r.to(b.dtype) for r, b in zip(running, batch, strict=True)]
    kept = torch._foreach_mul(kept, [1 - m for m in momentum + momentum])
    torch._foreach_copy_(running, torch._foreach_add(kept, batch))


_library = torch.library.Library("mobilenet_ext", "FRAGMENT")
_library.impl("update_running_stats_", _update_running_stats, "CompositeExplicitAutograd")
torch.library.register_fake("mobilenet_ext::update_running_stats_", lambda *args: None, lib=_library)
update_running_stats_ = torch.ops.mobilenet_ext.update_running_stats_.default
