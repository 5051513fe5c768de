"""A module's forward with its chains on the kernels: found in the graph of its calls, and run in the graph's place.

A plan holds for one state of the modules that it was made of: which they are, their settings, and who watches; and for
one mode of PyTorch and the module, of which each has its plans, so that training and evaluation may take turns.

Nothing in a plan refers to the module that it is of, which has it: both are freed with the module's last name.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain as concatenated
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from mobilenet_ext import _host, fusion
from mobilenet_ext.chain import Normalised
from mobilenet_ext.composite_activations import composite_at
from mobilenet_ext.forward_code import CannotLook, NotKnown
from mobilenet_ext.forward_graph import PLANS, ForwardGraph, attributes_of
from mobilenet_ext.graph_code import Call, function_of
from mobilenet_ext.plain_data import is_data
from mobilenet_ext.plans import FoldedChain, leading_folded_chain
from mobilenet_ext.regions import regions_of
from mobilenet_ext.seams import Found, Seams, close_seams, gives
from mobilenet_ext.units import UnitModules, does_nothing, is_layer
from mobilenet_ext.untouched import forwards_are_original

_KEPT = 4  # plans of a module in each mode
PATIENCE = 8  # with a module that is another one at each call: then its own forward runs for good


class Step(NamedTuple):
    """A layer on a path."""

    nodes: list[fx.Node]  # its call or operations, and after them calls of modules that do nothing
    module: nn.Module  # the one that is called, or one that computes what is called


class FusedChain:
    """Layers that run as a chain of units, where the kernels take the input."""

    def __init__(self, modules: list[nn.Module], units: list[UnitModules], pool: bool) -> None:
        self.modules, self.units, self.pool, self.seams = modules, units, pool, Seams()

    def __call__(
        self, x: Tensor | Normalised, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor | Normalised, Tensor]:
        multiply, mean, add = self.seams
        u = x.y if isinstance(x, Normalised) else x
        accepted = fusion.accepts(u, self.units)
        if gate is not None and not (accepted and fusion.gate_fits(gate, u)):
            x, gate = multiply(x.stored() if isinstance(x, Normalised) else x, gate), None
            accepted = fusion.accepts(x, self.units)
        if accepted:
            return fusion.run_chain(self.units, x, gives(self.pool, self.seams), gate, add, residual)
        for module in self.modules:
            x = module(x)
        if residual is not None:
            x = add(x, residual)
        return x if mean is None else (x, mean(x))


class Plans:
    """Finds how the forward of a fused module runs; copies and pickles of it start empty.

    Args:
        folds: whether the module is in eval mode for good, so that BatchNorm can be folded and weights packed.
    """

    def __init__(self, folds: bool = False) -> None:
        self.folds = folds
        self._kept: dict[object, _Kept] = {}  # by mode

    def __reduce__(self) -> tuple[object, ...]:
        return Plans, (self.folds,)

    def find(self, module: nn.Module) -> Callable[[Tensor], object] | None:
        """What runs the module's forward of one tensor; None: the forward itself."""
        mode = _mode(module)
        kept = self._kept.get(mode)
        if (kept is not None and kept.wasted > PATIENCE) or (self.folds and fusion.is_observed()):
            return None
        try:
            return self._of(module, mode).run
        except CannotLook:
            return None

    def of(self, module: nn.Module) -> Plan:
        """The plan for the module's present state.

        Raises:
            CannotLook: there is none yet, and now none can be made.
        """
        return self._of(module, _mode(module))

    def _of(self, module: nn.Module, mode: object) -> Plan:
        kept = self._kept.get(mode, _Kept((), 0))
        for plan in kept.plans:
            if plan.holds(module):
                if plan is not kept.plans[0] or kept.wasted:
                    self._kept[mode] = kept.with_first(plan, wasted=0)
                return plan
        same = next((plan for plan in kept.plans if plan.has_same_structure(module)), None)
        plan = Plan(module, self.folds, same)
        if same is None:
            self._kept[mode] = kept.with_first(plan, wasted=kept.wasted + bool(kept.plans))
        else:
            self._kept[mode] = kept.without(same).with_first(plan, wasted=kept.wasted)
            for each in concatenated.from_iterable(other.plans for other in list(self._kept.values())):
                each.let_go_of_replaced_tensors()
        return plan


class _Kept(NamedTuple):
    """Of one mode."""

    plans: tuple[Plan, ...]  # the last one first
    wasted: int  # plans in a row that held for one call

    def with_first(self, plan: Plan, wasted: int) -> _Kept:
        return _Kept((plan, *self.without(plan).plans)[:_KEPT], wasted)

    def without(self, plan: Plan) -> _Kept:
        return self._replace(plans=tuple(each for each in self.plans if each is not plan))


class Plan:
    """How a module's forward runs in one mode, and one state of its modules.

    Args:
        same: a plan from when all was the same but for parameters and buffers.

    Attributes:
        run: the forward, of one tensor; None where there is nothing in it to fuse.
        chains: what runs on the kernels.
        graph: what the forward calls; None where that is not known.
        why_not: why it is not known, or None.
    """

    run: Callable[[Tensor], object] | None = None

    def __init__(self, module: nn.Module, folds: bool, same: Plan | None = None) -> None:
        self._folds = folds
        self.chains: list[FusedChain | FoldedChain] = []
        self.graph: ForwardGraph | None = None
        self.why_not: str | None = None
        if same is not None:
            self.graph, self.why_not = same.graph, same.why_not
        else:
            try:
                self.graph = ForwardGraph(module)
            except NotKnown as error:
                self.why_not = str(error)
        self._guard(module)
        if self.graph is not None:
            found = list(_find_chains(self.graph, leading_folded_chain if folds else _leading_fused_chain))
            close_seams(self.graph, found)
            self.chains = [each.chain for each in found]
            if found:
                self.run = function_of(self.graph, _calls(self.graph, found, folds))

    def has_same_structure(self, module: nn.Module) -> bool:
        """Whether all is as it was but for which parameters and buffers there are."""
        return (
            self._children is module._modules
            and type(module) is self._kind
            and (self.graph is None or _host.dicts_are((), (), (_attributes(module),), self._attributes))
            and _host.dicts_are(self._counted, self._counts, self._slots, self._contents)
            and forwards_are_original()
            and all(map(operator.is_, map(type, self._modules), self._kinds))
            and all(getattr(kind, name) is value for (kind, name), value in self._class_attributes)
            and all(held == copied for held, copied in self._data)
        )

    def holds(self, module: nn.Module) -> bool:
        return self.has_same_structure(module) and self._has_its_tensors()

    def _has_its_tensors(self) -> bool:
        # Whoever gives a parameter other `data` may give it another shape.
        return _host.dicts_are((), (), self._tensor_slots, self._tensors) and all(
            map(operator.eq, map(_shape_of, self._shaped), self._shapes)
        )

    def let_go_of_replaced_tensors(self) -> None:
        """Free them, if there are such; what is known of the forward stays."""
        if not self._has_its_tensors():
            self.run, self.chains, self._tensors, self._shaped = None, [], (None,), ()

    def _guard(self, module: nn.Module) -> None:
        self._children, self._kind, self._attributes = module._modules, type(module), ()
        # A forward that is not known runs itself, whatever changes: what it leaves in its attributes is no news.
        graph = self.graph
        known, opaque, containers = [], set(), []
        if graph is not None:
            self._attributes = tuple(_attributes(module).values())
            containers = graph.containers
            called = [graph.module_of(node) for node in graph.graph.nodes]
            opaque = {each for each in called if each is not None and not is_layer(each)}
            inside = {part for each in opaque for part in each.modules()} - {module, *containers}
            known = [each for each in module.modules() if each not in inside]
        below = [each for each in known if each is not module]
        self._modules = (*below, *opaque)
        self._kinds = tuple(map(type, self._modules))
        attributes = {(kind, "forward"): kind.forward for kind in map(type, (module, *containers))}
        attributes |= {} if graph is None else graph.class_attributes
        self._class_attributes = tuple(attributes.items())
        hooks = [getattr(nn_module, f"_global_{kind}") for kind in _HOOKS]
        hooks += [getattr(each, f"_{kind}") for each in (*known, *opaque) for kind in _HOOKS]
        self._counted = (*hooks, *(each.__dict__ for each in below))
        self._counts = tuple(map(len, self._counted))
        read_once = set(filter(is_layer, below)) if self._folds else ()  # settings, as `freeze` says
        slots = [each._modules for each in (module, *below)]
        slots += [each.__dict__ for each in below if each not in read_once]
        self._slots = tuple(filter(None, slots if graph is not None else ()))
        self._contents = _values(self._slots)
        self._tensor_slots = tuple(filter(None, (s for each in known for s in (each._parameters, each._buffers))))
        self._tensors = _values(self._tensor_slots)
        # Folded chains ask for the addresses of theirs, which have another one then.
        self._shaped = tuple(each for each in self._tensors if each is not None and not self._folds)
        self._shapes = tuple(map(_shape_of, self._shaped))
        held = [value for each in known for value in attributes_of(each).values()] + list(attributes.values())
        mutable = [value for value in held if isinstance(value, (list, dict, set)) and is_data(value)]
        self._data = [(value, copy.deepcopy(value)) for value in mutable]


_shape_of = operator.attrgetter("shape")


def _attributes(module: nn.Module) -> dict[str, object]:
    """All but its plans."""
    attributes = module.__dict__.copy()
    attributes.pop(PLANS, None)
    return attributes


def _values(slots: tuple[dict, ...]) -> tuple[object, ...]:
    return tuple(concatenated.from_iterable(map(dict.values, slots)))


_DEVICE_KINDS = ("cpu", "cuda")
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def _mode(module: nn.Module) -> tuple[object, ...]:
    """What a forward may ask PyTorch for, besides its module, and that one's own mode."""
    autocast = ()
    if torch._C._is_any_autocast_enabled():
        kinds = (kind for kind in _DEVICE_KINDS if torch.is_autocast_enabled(kind))
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
    return module.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def _find_chains(
    known: ForwardGraph, leading_chain: Callable[[list[nn.Module]], FusedChain | FoldedChain | None]
) -> Iterator[Found]:
    """The longest chains on the paths of a graph."""
    for path in _paths(known):
        while path:
            chain = leading_chain([step.module for step in path])
            count = 1 if chain is None else len(chain.modules)
            if chain is not None:
                yield Found([node for step in path[:count] for node in step.nodes], chain)
            del path[:count]


def _leading_fused_chain(modules: list[nn.Module]) -> FusedChain | None:
    """The longest chain that the modules begin with."""
    units, pool = fusion.leading_chain(modules, inference=not torch.is_grad_enabled())
    return FusedChain(modules[: fusion.count_of(units) + pool], units, pool) if units else None


def _paths(known: ForwardGraph) -> list[list[Step]]:
    """Layers one after the other, of which each is called once and the next is all that reads its output."""
    calls = Counter(node.target for node in known.graph.nodes if node.op == "call_module")
    paths: dict[fx.Node, list[Step]] = {}  # by the last node
    for node in known.graph.nodes:
        composite = composite_at(known, node)
        if composite is not None:
            nodes, source, module = composite
        else:
            nodes, module = [node], _layer(known, node, calls)
            if module is None:
                continue
            (source,) = node.all_input_nodes
        path = paths.pop(source, []) if source.users.keys() <= set(nodes) else []
        if path and does_nothing(module):
            path[-1].nodes.append(node)
        else:
            path.append(Step(nodes, module))
        paths[node] = path
    return list(paths.values())


def _layer(known: ForwardGraph, node: fx.Node, calls: Counter) -> nn.Module | None:
    """The module that a call of one input is a call of, or is computed by."""
    if node.op == "call_module":
        module = known.module_of(node)
        if module in known.read:
            return None  # somebody looks at its tensors between two calls
        has_state = bool(module._parameters or module._buffers)
        if (
            len(node.args) != 1
            or node.kwargs
            or not isinstance(node.args[0], fx.Node)
            or (has_state and calls[node.target] > 1)
        ):
            return None
        return module
    return _module_of_function(node)


def _module_of_function(node: fx.Node) -> nn.Module | None:
    """A module that computes what an activation called as a function does."""
    make = _FUNCTIONS.get(node.target if node.op == "call_function" else f"Tensor.{node.target}")
    if make is None or node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
        return None
    x, *args = node.args
    if not isinstance(x, fx.Node):
        return None
    try:
        return make(*args, **node.kwargs)
    except TypeError:
        return None


def _without_settings(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    def make(inplace: bool = False) -> nn.Module:
        return kind(inplace)

    return make


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace)


def _zero_pad(pad: Sequence[int], mode: str = "constant", value: float | None = None) -> nn.Module:
    if mode != "constant" or value not in (None, 0) or len(pad) != 4:
        raise TypeError
    return nn.ZeroPad2d(tuple(pad))


_FUNCTIONS: dict[object, Callable[..., nn.Module]] = {
    F.relu: _without_settings(nn.ReLU),
    torch.relu: lambda: nn.ReLU(),
    torch.relu_: lambda: nn.ReLU(True),
    F.relu_: lambda: nn.ReLU(True),
    "Tensor.relu": lambda: nn.ReLU(),
    "Tensor.relu_": lambda: nn.ReLU(True),
    F.relu6: _without_settings(nn.ReLU6),
    F.hardswish: _without_settings(nn.Hardswish),
    F.silu: _without_settings(nn.SiLU),
    F.leaky_relu: _leaky_relu,
    F.pad: _zero_pad,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    torch.flatten: lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    "Tensor.flatten": lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
}


def _calls(known: ForwardGraph, found: list[Found], folds: bool) -> list[Call]:
    """The chains as calls in a graph; of a frozen network several may be one."""
    calls, found = regions_of(known, found) if folds else ([], found)
    for each in found:
        seams = {"gate": each.gate, "residual": each.residual}
        kwargs = {role: node for role, node in seams.items() if node is not None}
        calls.append(Call(each.chain, each.inside, [each.source], kwargs, each.outputs))
    return calls
