"""``fuse``: a network that is there already, run on the kernels."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mobilenet_ext import fusion
from mobilenet_ext.forward_graph import PLANS
from mobilenet_ext.fused_forward import Plans
from mobilenet_ext.plans import exact_batch_norms
from mobilenet_ext.tracing import is_traced
from mobilenet_ext.untouched import PLAIN, plain_class


def fuse(model: nn.Module) -> nn.Module:
    """Run a network on the fused kernels, in place, in training and in eval mode.

    Its modules, parameters, ``state_dict`` keys, hooks and results are what they were: an optimizer made before, a
    copy, a pickle, DistributedDataParallel and ``isinstance`` notice nothing. What a forward does with its layers is
    found by running it once with stand-ins for its input (as ``torch.fx`` does), for each mode; convolution, BatchNorm
    and activation units of which each is read by the next alone run as chains. What is not proven to be such a unit
    runs as it did, and :func:`fusion_report` says why.

    Modules may be replaced, settings changed and hooks registered afterwards: it is looked at again. Not noticed is
    what a ``forward`` reads besides its modules' attributes and its inputs (a global variable, a file, the time).

    Args:
        model: any ``nn.Module``. A forward of one tensor can be looked at; of another module its children can.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or has no Python code to look at (scripted, compiled, a GraphModule).
    """
    _check_module(model)
    for kind, instead in {
        "ScriptModule": "fuse it before torch.jit.script or torch.jit.trace",
        "OptimizedModule": "fuse it before torch.compile",
        "GraphModule": "fuse the module that it was traced from",
    }.items():
        if any(each.__name__ == kind for each in type(model).__mro__):  # by name: importing Dynamo takes seconds
            raise TypeError(f"model: expected a module with a forward of its own, got {kind}; {instead}")
    put_plans_in(model, folds=False)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place: the modules have the classes again that they had before.

    Args:
        model: any ``nn.Module``; in one that was not fused, or is frozen, nothing changes.

    Returns:
        The same object.
    """
    _check_module(model)
    for module in model.modules():
        if is_fused(module) and not plans_of(module).folds:
            _give_class_back(module)
    return model


def _give_class_back(module: nn.Module) -> None:
    module.__class__ = plain_class(type(module))
    module.__dict__.pop(PLANS, None)


def plain(model: nn.Module) -> nn.Module:
    """A twin of ``model`` on PyTorch's own operations alone, for tools that want to see nothing else.

    ``torch.export``, ONNX exporters, ``torch.fx`` and ``torch.jit`` are shown the plain operations of a fused or frozen
    model in any case; the twin is for those that look at classes, and to compare with.

    Args:
        model: any ``nn.Module``: fused, frozen, of :mod:`mobilenet_ext.nn`, or plain already.

    Returns:
        A copy with the same keys and values, in the same mode: containers of :mod:`mobilenet_ext.nn` are
        ``nn.Sequential``, fused modules have their own classes. What was frozen follows ``train()`` again.
    """
    _check_module(model)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if is_fused(module):
            _give_class_back(module)
        if isinstance(module, fusion.Staged):
            module.__dict__.pop("plans", None)
        if isinstance(module, fusion.FusedSequential) and type(module).forward is fusion.FusedSequential.forward:
            module.__class__ = nn.Sequential
        module.__dict__.pop("train", None)  # of a frozen model
    return twin


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def is_fused(module: nn.Module) -> bool:
    return PLAIN in vars(type(module))


def plans_of(module: nn.Module) -> Plans:
    """Of a fused module; one that its class has made since, a slice of a sequence for instance, gets its own."""
    plans = module.__dict__.get(PLANS)
    if plans is None:
        plans = module.__dict__[PLANS] = Plans()
    return plans


def put_plans_in(model: nn.Module, folds: bool) -> None:
    """Make every container with a convolution in it run its forward from a plan; those that do already if ``folds``."""
    for module in model.modules():
        if _may_be_fused(module):
            module.__class__ = _fused_class(type(module))
            module.__dict__[PLANS] = Plans(folds)
        elif is_fused(module) and folds:
            module.__dict__[PLANS] = Plans(folds)


def _may_be_fused(module: nn.Module) -> bool:
    kind = type(module)
    if is_fused(module) or isinstance(module, (fusion.Staged, torch.jit.ScriptModule, fx.GraphModule, nn.Conv2d)):
        return False
    if (kind.forward.__module__ or "").startswith("torch.") and kind.forward is not nn.Sequential.forward:
        return False
    return any(isinstance(child, nn.Conv2d) for child in module.modules())


@functools.cache
def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``kind`` that passes for it, and runs its forward from a plan where there is one."""
    plain_forward = kind.forward

    @functools.wraps(plain_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not is_traced():
            if torch.compiler.is_compiling():
                if plain_forward is nn.Sequential.forward:
                    return fusion.run_modules(self, args[0])
            else:
                run = plans_of(self).find(self)
                if run is not None:
                    return run(args[0])
        return plain_forward(self, *args, **kwargs)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        return self if plans_of(self).folds else kind.train(self, mode)

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if plans_of(self).folds:
            with torch.inference_mode(False):  # tensors made in inference mode would not tell when they are changed
                return kind._apply(self, exact_batch_norms(self, fn), recurse)
        return kind._apply(self, fn, recurse)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        make, args, *rest = kind.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__:
            return _new_fused, (kind, *args[1:]), *rest
        return make, args, *rest

    members = {
        PLAIN: kind,
        "forward": forward,
        "train": train,
        "_apply": apply,
        "__reduce_ex__": reduce,
        **{name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    return type(kind)(kind.__name__, (kind,), members)


def _new_fused(kind: type[nn.Module], *args: Any) -> nn.Module:
    """An object of the fused class of ``kind``; a pickle names ``kind``, which other processes have too."""
    fused = _fused_class(kind)
    return fused.__new__(fused, *args)
