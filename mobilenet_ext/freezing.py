"""``freeze``: the inference copy of a model, its BatchNorms folded and its blocks in one kernel each."""

from __future__ import annotations

import copy
import sys
import warnings
import weakref

import torch
from torch import nn

from mobilenet_ext import fusing, fusion, storage
from mobilenet_ext.forward_code import CannotLook
from mobilenet_ext.plans import FoldedChain, Plans, parts_of


def freeze(model: nn.Module, *, cuda_graph: bool = False) -> nn.Module:
    """An inference copy of ``model``: BatchNorm folded, a depthwise and a pointwise unit in one kernel; on a CPU what
    follows each other, residuals and gates among it, in one call.

    The copy shares nothing with ``model`` and is in eval mode for good: ``.train()``, its own or that of a model that
    contains it, leaves it as it is. Its modules, parameters and ``state_dict`` keys are those of ``model``, each in its
    place; a container from :mod:`mobilenet_ext.nn` that is called runs in one go, and gives what its modules would
    give one after the other. Units that cannot be fused (hooked, swapped, without running statistics) run as the
    modules they are. An input that needs gradients gets them; the parameters need none.

    Tensors may be changed or replaced and hooks registered afterwards. Not noticed are a module's class and settings
    (``stride``, ``eps``), which are read once, and what is written through ``.data`` or NumPy, which leaves no version.
    ``.to(dtype)`` afterwards rounds the weights, not BatchNorm's vectors.

    Args:
        model: any ``nn.Module``. What :func:`~mobilenet_ext.fuse` finds in it is folded.
        cuda_graph: on a GPU, launch a :class:`~mobilenet_ext.MobileNetV1` or a container from :mod:`mobilenet_ext.nn`
            (the outermost, where they are nested) as one CUDA graph, and not kernel by kernel, which at small batches
            takes most of the time. The second call with a kind of input (shape, strides, dtype, autocast, stream)
            captures it; the last 8 kinds are kept, with the memory of their activations. The output is a tensor of its
            own, as without. Where gradients are wanted, somebody traces or captures, or another thread is in the same
            container, a call runs as without; after a change of a tensor or module, until it is captured anew. Python
            code of your own modules does not run in a replay. While a call captures, which takes some milliseconds, no
            other thread may wait for the whole device (``torch.cuda.synchronize()``).

    Returns:
        A module with the outputs of ``model.eval()``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or ``cuda_graph`` neither True nor False.
        RuntimeError: the storage of one of its tensors was freed (as FSDP does to a sharded parameter).

    Warns:
        UserWarning: nothing in ``model`` could be folded, so the copy is no faster. At a later call: something in it
            cannot be captured in a CUDA graph, so it goes on without.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph: expected True or False, got {cuda_graph!r}")
    storage.check(*model.parameters(), *model.buffers())  # PyTorch's copy would read memory that is gone
    with torch.inference_mode(False):  # tensors made in inference mode would not tell when they are changed
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
    folds = False
    staged = [module for module in frozen.modules() if fusion.calls_its_stages(module)]
    inner = {child for module in staged for child in module.modules() if child is not module}
    for module in frozen.modules():
        if fusion.calls_its_stages(module):
            module.plans = Plans(cuda_graph and module not in inner)
            folds = folds or any(isinstance(part, FoldedChain) for part in parts_of(module))
    fusing.put_plans_in(frozen, folds=True)
    for module in frozen.modules():  # each: dropout in a parent must not come back either
        has_plan = fusing.is_fused(module) or fusion.calls_its_stages(module)
        if not has_plan and not isinstance(module, torch.jit.ScriptModule):
            module.train = _StayInEval(module)
    folds = folds or any(_folds(module) for module in frozen.modules() if fusing.is_fused(module))
    if not folds:
        warnings.warn(f"freeze found nothing to fold in this {type(model).__name__}", stacklevel=2)
    return frozen


def _folds(module: nn.Module) -> bool:
    try:
        with torch.no_grad():
            return bool(fusing.plans_of(module).of(module).chains)
    except CannotLook:
        return True  # as far as is known


class _StayInEval:
    """``train`` of a module without a plan in a frozen model: gives the module back as it is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # a module that its attributes refer to is not freed with its last name

    def __call__(self, mode: bool = True) -> nn.Module:
        caller = sys._getframe(1)
        if caller.f_code is nn.Module.eval.__code__:  # perhaps of a shallow copy, which has this attribute too
            return caller.f_locals["self"]
        return self._module()

    def __reduce__(self) -> tuple[object, ...]:
        return _StayInEval, (self._module(),)  # of a copied module: the copy
