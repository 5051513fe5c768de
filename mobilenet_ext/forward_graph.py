"""What a module's forward does with its children, as a graph of calls, or nothing where that cannot be known.

The forward is run once with stand-ins: for its input, a ``torch.fx`` proxy that passes for a tensor; for the module and
those in it, objects of the same classes with the same attributes, which write down that they were called. Nothing
global is replaced, so other threads go on meanwhile, and nothing of the model is changed. A module whose forward asks
for a value, leaves something behind, draws a random number or changes autograd's mode is *opaque*: a call of it is one
node, and what it does is left to it. So is one that holds what cannot be compared later, in its attributes, one whose
code stand-ins cannot be handed to (``forward_code.py``), and one with convolutions that is called more than once.
"""

from __future__ import annotations

import copy
import dis
import functools
import operator
import sys
import types
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from mobilenet_ext.forward_code import CannotLook, ClassAttributes, Interrupted, NotKnown, every_call_followed
from mobilenet_ext.plain_data import is_data
from mobilenet_ext.tracing import analysing
from mobilenet_ext.units import is_norm
from mobilenet_ext.untouched import is_untouched, plain_class

# What a tensor of the model is asked for without a node: the answers are settings, as its module's attributes are.
_SETTINGS = {"shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "is_sparse", "is_quantized"}
_SETTING_CALLS = {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point, Tensor.stride}

_PATIENCE = 3  # with what interrupts a forward that is followed

PLANS = "_fused_plans"  # an attribute of a fused module
MODULE_ATTRIBUTES = vars(nn.Module()).keys()


class ForwardGraph:
    """A forward as calls.

    Attributes:
        graph: ``torch.fx`` graph with one placeholder. A ``call_module`` or ``get_attr`` node's target is a name in
            ``objects``; the values of a ``get_attr`` node are read from its module when the node is run.
        objects: the modules that are called, and those that parameters are read from, by name; the module itself, which
            has its graph, by a weak reference.
        containers: the modules in it whose forward the graph repeats too.
        read: the modules in it that parameters or buffers are read from beside their call.
        class_attributes: what the forwards read of their modules' classes.

    Raises:
        NotKnown: a graph cannot repeat the forward.
        CannotLook: it cannot be followed now.
    """

    def __init__(self, root: nn.Module) -> None:
        opaque: set[nn.Module] = set()
        interruptions = 0
        while True:
            attempt = _Attempt(root, opaque)
            try:
                self.graph = attempt.trace()
                break
            except CannotLook:
                raise
            except Interrupted as error:
                interruptions += 1
                if interruptions == _PATIENCE:
                    raise NotKnown(str(error)) from None
            except Exception as error:  # whatever a forward makes of a stand-in
                culprit = attempt.running[-1]
                opaque.add(culprit)
                if culprit is root:
                    reason = str(error) if isinstance(error, NotKnown) else f"{type(error).__name__}: {error}"
                    raise NotKnown(reason.splitlines()[0]) from None
            finally:
                attempt.end()
        self.objects = {name: weakref.proxy(root) if m is root else m for name, m in attempt.objects.items()}
        self.read, self.class_attributes = attempt.read_from - {root}, attempt.class_attributes
        self.containers = [module for module in attempt.containers if module not in {root, *opaque}]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.objects[node.target] if node.op == "call_module" else None


def is_container(module: nn.Module) -> bool:
    """Whether the graph may look into ``module``: Python code of somebody's own, or a sequence, that nobody watches."""
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule, nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
        return False
    if is_norm(module) or module.__dict__.get("plans") is not None:  # a frozen module has a plan of its own
        return False
    forward = plain_class(kind).forward
    if (forward.__module__ or "").startswith("torch.") and forward is not nn.Sequential.forward:
        return False
    return is_untouched(module) and all(map(is_data, attributes_of(module).values()))


_NOT_OF_ITS_CLASS = MODULE_ATTRIBUTES | {PLANS, "train"}  # every module's, and what fuse() and freeze() put there


def attributes_of(module: nn.Module) -> dict[str, object]:
    """What the module's own class, or its user, keeps in it besides parameters, buffers and modules."""
    return {name: value for name, value in module.__dict__.items() if name not in _NOT_OF_ITS_CLASS}


class _Guarded:
    """A proxy that refuses what it would answer with something of its own, and changes in place what a tensor would."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        if name in ("dtype", "device", "layout", "grad", "grad_fn") and not _is_library(sys._getframe(1)):
            raise NotKnown(f"it asks for {name}")  # and may compare it in a way that leaves no trace
        return _Attribute(self, name)

    def __hash__(self) -> int:
        raise NotKnown("it looks a value up")

    def __repr__(self) -> str:
        raise NotKnown("it prints a value")

    def __format__(self, _: str) -> str:
        raise NotKnown("it prints a value")

    def __iter__(self) -> Any:
        caller = sys._getframe(1)
        here = next(each for each in dis.get_instructions(caller.f_code) if each.offset == caller.f_lasti)
        if here.opname != "UNPACK_SEQUENCE":
            raise NotKnown("it iterates over a value")
        values = self.tracer.create_proxy("call_function", unpacked, (self, here.argval), {})
        return (values[i] for i in range(here.argval))

    def _in_place(name: str) -> Any:
        function = getattr(operator, name)

        def change(self: fx.Proxy, other: object) -> fx.Proxy:
            return self.tracer.create_proxy("call_function", function, (self, other), {})

        return change

    for _name in "add sub mul truediv floordiv mod pow and or xor matmul lshift rshift".split():
        locals()[f"__i{_name}__"] = _in_place(f"i{_name}")
    del _name, _in_place


def unpacked(values: Any, count: int) -> tuple[Any, ...]:
    """``a, b = values``, for two or any other number of names."""
    values = tuple(values)
    if len(values) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    if len(values) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(values)})")
    return values


class _StandIn(_Guarded, fx.Proxy):
    """Of a tensor, or of what is computed of one."""


class _Attribute(_Guarded, fx.proxy.Attribute):
    """Of a tensor's attribute, which may be a method."""


def _is_library(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "torchvision", "timm")


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Makes nodes; a parameter among their arguments is read when the graph runs."""

    def __init__(self, attempt: _Attempt) -> None:
        super().__init__(fx.Graph())
        self.attempt: _Attempt | None = attempt

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.attempt.read(a)
        if isinstance(a, nn.Module):
            raise NotKnown("a module is an argument")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.attempt.check_mode()
        return super().create_node(*args, **kwargs)


class _Recorder(TorchFunctionMode):
    """Makes a node of each function of PyTorch that is called, and not only of those of a stand-in: what is computed of
    parameters, and random numbers, are other ones at each run."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.startswith(("set_", "_set_")) and not types:
            raise NotKnown("it changes the mode of autograd or autocast")
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            if (name == "__get__" and func.__self__.__name__ in _SETTINGS) or func in _SETTING_CALLS:
                return func(*args, **kwargs)
            if name in ("__get__", "__set__"):
                raise NotKnown(f"Tensor.{func.__self__.__name__} of a parameter")
        if is_tensor_method_or_property(func):
            if name == "__get__":
                return _Attribute(args[0], func.__self__.__name__)
            return self._tracer.create_proxy("call_method", name, args, kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs)


class _Attempt:
    """One run of a forward, with these modules opaque."""

    def __init__(self, root: nn.Module, opaque: set[nn.Module]) -> None:
        self._root, self._opaque = root, opaque
        self.objects: dict[str, nn.Module] = {}
        self.containers: list[nn.Module] = []
        self.read_from: set[nn.Module] = set()
        self.running: list[nn.Module] = [root]  # the containers whose forward is being run, the innermost last
        self._names: dict[nn.Module, str] = {}
        self._stand_ins: dict[nn.Module, nn.Module] = {}
        self._owners: dict[int, tuple[nn.Module, str]] = {}
        for module in root.modules():
            for slots in (module._parameters, module._buffers):
                self._owners.update({id(t): (module, name) for name, t in slots.items() if t is not None})
        self.class_attributes: ClassAttributes = {}
        self._mode = _autograd_mode()
        self._tracer = _Tracer(self)

    def trace(self) -> fx.Graph:
        if not all(map(is_data, attributes_of(self._root).values())):
            raise NotKnown("an attribute may have a state of its own")
        placeholder = self._tracer.create_proxy("placeholder", "x", (), {})
        with analysing(), _Recorder(self._tracer), every_call_followed(self.class_attributes):
            out = self._stand_in(self._root)(placeholder)
        if not _can_be_returned(out):
            raise NotKnown(f"it returns a {type(out).__name__}")
        self._tracer.create_proxy("output", "output", (out,), {})
        return self._tracer.graph

    def end(self) -> None:
        """Let go of what refers to one another, which would be freed by the garbage collector only."""
        self._stand_ins.clear()
        self._tracer.attempt = None

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
        self.read_from.add(module)
        node = self._tracer.create_node("get_attr", self.name_of(module), (), {})
        return self._tracer.create_node("call_function", getattr, (node, name), {})

    def _stand_in(self, module: nn.Module) -> nn.Module:
        """An object of the module's class, with copies of what its attributes hold, that writes down its call."""
        if module in self._stand_ins:
            return self._stand_ins[module]
        looks_into = module is self._root or (module not in self._opaque and is_container(module))
        called = functools.partial(self._run if looks_into else self._call, module)
        if type(module).__call__ is not nn.Module.__call__ or isinstance(module, torch.jit.ScriptModule):
            stand_in = self._stand_ins[module] = nn.Module()
            stand_in.__dict__["_compiled_call_impl"] = called
            return stand_in
        stand_in = self._stand_ins[module] = object.__new__(type(module))
        state = dict(module.__dict__)
        state |= {name: _copy(value) for name, value in attributes_of(module).items()}
        state |= {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers")}
        state["_modules"] = {
            name: None if child is None else self._stand_in(child) for name, child in module._modules.items()
        }
        # Where nn.Module.__call__ goes first, if it is there.
        stand_in.__dict__ = {**state, "_compiled_call_impl": called}
        return stand_in

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._check_unchanged(module)
        return self._tracer.create_proxy("call_module", self.name_of(module), args, kwargs)

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.running.append(module)
        if module in self.containers and any(isinstance(each, nn.Conv2d) for each in module.modules()):
            raise NotKnown("it is called again")  # as one node it has chains, of layers that are called once in it
        self.containers.append(module)
        self._check_unchanged(module)
        out = plain_class(type(module)).forward(self._stand_ins[module], *args, **kwargs)
        for each in module.modules() if module is self._root else (module,):
            self._check_unchanged(each)
        self.running.pop()
        return out

    def _check_unchanged(self, module: nn.Module) -> None:
        """A forward that changes a module, and be it for a moment, is not known."""
        if module not in self._stand_ins or type(self._stand_ins[module]) is not type(module):
            return
        state, real = self._stand_ins[module].__dict__, module.__dict__
        if state.keys() - {"_compiled_call_impl"} != real.keys() - {"_compiled_call_impl"}:
            raise NotKnown("it adds or removes an attribute")
        for name, value in real.items():
            if name == "_compiled_call_impl":
                continue
            now = state[name]
            if name == "_modules":
                same = list(now.items()) == [(key, self._stand_ins.get(each)) for key, each in value.items()]
            elif name in ("_parameters", "_buffers"):
                same = now.keys() == value.keys() and all(now[key] is value[key] for key in value)
            else:
                same = now is value or (is_data(value) and is_data(now) and now == value)
            if not same:
                raise NotKnown(f"it changes {name}")


def _copy(value: object) -> object:
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) and is_data(value) else value


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
    return type(out) is _StandIn or out is None or type(out) in (int, float, str, bool)
