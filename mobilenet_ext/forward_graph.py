"""What a module's forward does with its children, as a graph of calls, or nothing where that cannot be known.

The forward is run once with stand-ins for its input (``torch.fx`` proxies), for the module and for the modules in it,
which share their attributes but write down that they were called. Nothing global is replaced, so other threads go on
meanwhile, and nothing of the model is changed. A module whose forward asks for a value, leaves something behind, draws
a random number or changes autograd's mode is *opaque*: a call of it is one node, and what it does is left to it.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from mobilenet_ext.tracing import analysing
from mobilenet_ext.units import is_norm, is_untouched

# What a tensor of the model is asked for without a node: the answers are settings, as its module's attributes are.
_SETTINGS = {"shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "is_sparse", "is_quantized"}
_SETTING_CALLS = {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point, Tensor.stride}


PLAIN = "_plain_class"  # of a class that fuse() made: the one that it stands for


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    return vars(kind).get(PLAIN, kind)


class NotKnown(Exception):
    """A forward did something that a graph cannot repeat."""


class ForwardGraph:
    """A forward as calls.

    Attributes:
        graph: ``torch.fx`` graph with one placeholder. A ``call_module`` or ``get_attr`` node's target is a name in
            ``objects``; the values of a ``get_attr`` node are read from its module when the node is run.
        objects: the modules that are called, and those that parameters are read from, by name.
        containers: the modules whose forward the graph repeats.
        opaque: the modules whose forward it leaves to them, and why.
    """

    def __init__(self, root: nn.Module) -> None:
        self.opaque: dict[nn.Module, str] = {}
        while True:
            attempt = _Attempt(root, self.opaque)
            try:
                self.graph = attempt.trace()
                break
            except Exception as error:  # whatever a forward makes of a stand-in
                culprit = attempt.running[-1]
                self.opaque[culprit] = f"{type(error).__name__}: {error}".splitlines()[0]
                if culprit is root:
                    raise NotKnown(self.opaque[culprit]) from error
        self.objects = attempt.objects
        self.containers = [stands_for for stands_for in attempt.containers if stands_for not in self.opaque]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.objects[node.target] if node.op == "call_module" else None


def is_container(module: nn.Module) -> bool:
    """Whether the graph may look into ``module``: Python code of somebody's own, or a sequence, that nobody watches."""
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or kind.__call__ is not nn.Module.__call__:
        return False
    if isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)) or is_norm(module):
        return False
    forward = plain_class(kind).forward
    if forward.__module__.startswith("torch.") and forward is not nn.Sequential.forward:
        return False
    held = (value for name, value in module.__dict__.items() if name != "_modules")
    return is_untouched(module) and not any(map(_holds_modules, held))


def _holds_modules(value: object) -> bool:
    """Modules in attributes would be called themselves, and not their stand-ins."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, nn.Module) or (
        isinstance(value, (list, tuple)) and any(isinstance(each, nn.Module) for each in value)
    )


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Makes nodes; a parameter among their arguments is read when the graph runs."""

    def __init__(self, attempt: _Attempt) -> None:
        super().__init__(fx.Graph())
        self._attempt = attempt

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._attempt.read(a)
        if isinstance(a, nn.Module):
            raise NotKnown("a module is an argument")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._attempt.check_mode()
        return super().create_node(*args, **kwargs)


class _Recorder(TorchFunctionMode):
    """Makes a node of each function of PyTorch that is called, and not only of those of a stand-in: what is computed of
    parameters, and random numbers, are other ones at each run."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith(("set_", "_set_")) and not types:
            raise NotKnown("it changes the mode of autograd or autocast")
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            name = getattr(func, "__name__", "")
            if name == "__get__" and func.__self__.__name__ in _SETTINGS or func in _SETTING_CALLS:
                return func(*args, **kwargs)
            if name in ("__get__", "__set__"):
                raise NotKnown(f"Tensor.{func.__self__.__name__} of a parameter")
        if name_of_method := is_tensor_method_or_property(func) and getattr(func, "__name__", ""):
            if name_of_method == "__get__":
                return fx.proxy.Attribute(args[0], func.__self__.__name__)
            return self._tracer.create_proxy("call_method", name_of_method, args, kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs)


class _Attempt:
    """One run of a forward, with these modules opaque."""

    def __init__(self, root: nn.Module, opaque: dict[nn.Module, str]) -> None:
        self._root, self._opaque = root, opaque
        self.objects: dict[str, nn.Module] = {}
        self.containers: list[nn.Module] = []
        self.running: list[nn.Module] = [root]  # the containers whose forward is being run, the innermost last
        self._names: dict[nn.Module, str] = {}
        self._stand_ins: dict[nn.Module, nn.Module] = {}
        self._owners: dict[int, tuple[nn.Module, str]] = {}
        for module in root.modules():
            for slots in (module._parameters, module._buffers):
                self._owners.update({id(t): (module, name) for name, t in slots.items() if t is not None})
        self._mode = _autograd_mode()
        self._tracer = _Tracer(self)

    def trace(self) -> fx.Graph:
        placeholder = self._tracer.create_proxy("placeholder", "x", (), {})
        with _same_random_numbers(), analysing(), _Recorder(self._tracer):
            out = self._stand_in(self._root)(placeholder)
        if not _can_be_returned(out):
            raise NotKnown(f"it returns a {type(out).__name__}")
        self._tracer.create_proxy("output", "output", (out,), {})
        return self._tracer.graph

    def check_mode(self) -> None:
        if _autograd_mode() != self._mode:
            raise NotKnown("it changes the mode of autograd or autocast")

    def name_of(self, module: nn.Module) -> str:
        name = self._names.setdefault(module, f"m{len(self._names)}")
        self.objects[name] = module
        return name

    def read(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._owners:
            raise NotKnown("a tensor that is no parameter or buffer")
        module, name = self._owners[id(tensor)]
        node = self._tracer.create_node("get_attr", self.name_of(module), (), {})
        return self._tracer.create_node("call_function", getattr, (node, name), {})

    def _stand_in(self, module: nn.Module) -> nn.Module:
        if module not in self._stand_ins:
            opaque = module in self._opaque or not (is_container(module) or module is self._root)
            make = self._stand_in_of_leaf if opaque else self._stand_in_of_container
            self._stand_ins[module] = make(module)
        return self._stand_ins[module]

    def _stand_in_of_leaf(self, module: nn.Module) -> nn.Module:
        def call(_: nn.Module, *args: Any, **kwargs: Any) -> fx.Proxy:
            return self._tracer.create_proxy("call_module", self.name_of(module), args, kwargs)

        return _sharing(module, {"__call__": call})

    def _stand_in_of_container(self, module: nn.Module) -> nn.Module:
        def call(stand_in: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.containers.append(module)
            before = dict(stand_in.__dict__)
            self.running.append(module)
            out = type(module).forward(stand_in, *args, **kwargs)
            if before.keys() != stand_in.__dict__.keys() or any(
                before[name] is not value for name, value in stand_in.__dict__.items()
            ):
                raise NotKnown("it changes its attributes")
            if any(stand_in.__dict__[name] != module.__dict__[name] for name in copied):
                raise NotKnown("it changes a list or dictionary")
            self.running.pop()
            return out

        stand_in = _sharing(module, {"__call__": call})
        copied = [name for name, value in module.__dict__.items() if type(value) in (list, dict, set)]
        copied = [name for name in copied if not name.startswith("_") or name not in nn.Module().__dict__]
        attributes = dict(module.__dict__)
        attributes |= {name: copy.copy(attributes[name]) for name in copied}
        attributes["_modules"] = {
            name: None if child is None else self._stand_in(child) for name, child in module._modules.items()
        }
        stand_in.__dict__ = attributes
        return stand_in


def _sharing(module: nn.Module, members: dict[str, Any]) -> nn.Module:
    """An object of a class that differs from the module's in these members, with the same attributes."""
    kind = type(module)
    stand_in = object.__new__(type(kind.__name__, (kind,), {**members, "__module__": kind.__module__}))
    stand_in.__dict__ = module.__dict__
    return stand_in


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whoever draws numbers of Python's or NumPy's meanwhile is not known; afterwards the same are drawn as before.
    (Those of PyTorch's are drawn when the graph runs.)"""
    python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    before = pickle.dumps((python, of_numpy))
    try:
        yield
        drawn = pickle.dumps((random.getstate(), np.random.get_state(legacy=False))) != before
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
    if drawn:
        raise NotKnown("it draws random numbers")


def _autograd_mode() -> tuple[object, ...]:
    """What the operations of a forward depend on besides their arguments, and a graph of them does not repeat."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_any_autocast_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    )


def _can_be_returned(out: object) -> bool:
    """Whether the graph gives back an object of the same kind."""
    if type(out) in (tuple, list):
        return all(map(_can_be_returned, out))
    if type(out) is dict:
        return all(map(_can_be_returned, out.values()))
    return isinstance(out, fx.Proxy) or out is None or isinstance(out, (int, float, str, bool))
