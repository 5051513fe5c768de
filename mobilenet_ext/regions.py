"""Parts of a frozen network that are nothing but chains and the gates between them: on the CPU, one call each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from mobilenet_ext import backends, fusion
from mobilenet_ext.composite_activations import operation
from mobilenet_ext.forward_graph import ForwardGraph
from mobilenet_ext.frozen_graphs import TensorsState
from mobilenet_ext.graph_code import Call
from mobilenet_ext.inference_steps import as_input
from mobilenet_ext.memory_format import match_memory_format
from mobilenet_ext.plans import Fit, FoldedChain, keep_few, layout_of
from mobilenet_ext.seams import Found
from mobilenet_ext.unit_tensors import compute_dtype

GATES = ("sigmoid", "hardsigmoid")


class Member(NamedTuple):
    """A chain, or what makes a gate. Values are numbered: the region's inputs, then what its members give: a chain that
    takes the mean of its output gives that too."""

    function: FoldedChain | Callable[[Tensor], Tensor]
    gate_op: str | None  # of what makes a gate
    source: int
    gate: int | None = None
    residual: int | None = None


class Region:
    """Members that run one after the other, or where the CPU's kernels take all of it, as one plan.

    Attributes:
        chains: those among the members.

    Args:
        members: in order; at least one is a chain.
        inputs: how many values the region is given.
        outputs: the numbers of the values that it gives: one tensor, or of several a tuple.
    """

    def __init__(self, members: list[Member], inputs: int, outputs: list[int]) -> None:
        self.members, self.inputs, self.outputs = members, inputs, outputs
        self.chains = [each.function for each in members if each.gate_op is None]
        self._tensors = tuple(dict.fromkeys(t for chain in self.chains for t in chain.tensors))
        self._inference = any(t.is_inference() for t in self._tensors)  # these do not say when they are changed
        self._prepared: _Prepared | None = None

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        grad = torch.is_grad_enabled()
        if self._inference or any(not fusion.is_ordinary(x) or (grad and x.requires_grad) for x in inputs):
            return self._run_members(*inputs)
        prepared = self._prepared
        if prepared is None or not prepared.hold():
            prepared = self._prepared = _Prepared(self._tensors)
        autocast = torch._C._is_any_autocast_enabled()
        cast_to = tuple(map(compute_dtype, inputs)) if autocast else None
        layout = (backends.chosen(), cast_to, *map(layout_of, inputs))
        run = prepared.runners.get(layout)
        if run is None:
            run = self._runner(prepared, inputs)
            keep_few(prepared.runners)
            prepared.runners[layout] = run
        return run(*inputs)

    def _run_members(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: list[Tensor] = list(inputs)
        for function, gate_op, source, gate, residual in self.members:
            if gate_op is not None:
                values.append(function(values[source]))
                continue
            seams = (None if i is None else values[i] for i in (gate, residual))
            out = function(values[source], *seams)
            values += out if function.seams.mean is not None else (out,)
        outputs = tuple(values[i] for i in self.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _runner(self, prepared: _Prepared, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """What runs inputs that are laid out as these."""
        dtype = compute_dtype(inputs[0])
        if inputs[0].device.type != "cpu" or backends.current("cpu") != "cpu":
            return self._run_members
        fitting = self._fit(inputs, dtype)
        if fitting is None:
            return self._run_members
        fits, finish = fitting
        key = (dtype, *(fit.paddings for fit in fits))
        if key not in prepared.plans:
            keep_few(prepared.plans)
            prepared.plans[key] = self._plan(fits)
        plan = prepared.plans[key]

        def run(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            outputs = plan([as_input(x, dtype) for x in inputs])
            if len(finish) == 1:
                return finish[0](outputs[0])
            return tuple(each(out) for each, out in zip(finish, outputs, strict=True))

        return run

    def _fit(
        self, inputs: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[list[Fit], list[Callable[[Tensor], Tensor]]] | None:
        """How the kernels run each chain, and what gives the plan's outputs the shape and memory format of the
        members'; None where there can be no plan.

        It is found with single images that have the layout of those that the members give, and no values.
        """
        if any(x.ndim != 4 or len(x) != len(inputs[0]) for x in inputs):
            return None
        values = [x[:1] for x in inputs]
        fits: list[Fit] = []
        finish: dict[int, Callable[[Tensor], Tensor]] = {}
        for function, gate_op, source, gate, residual in self.members:
            x = values[source]
            if gate_op is not None:
                if x.dtype != dtype or x.shape[2:] != (1, 1):
                    return None
                values.append(torch.empty(x.shape, dtype=dtype))
                continue
            fit = function.fit(x, *(None if i is None else values[i] for i in (gate, residual)))
            if fit is None or fit.dtype != dtype or fit.joins != (residual is not None):
                return None
            fits.append(fit)
            out = torch.empty(fit.size, dtype=dtype)
            if len(fit.size) == 2:
                finish[len(values)] = _flat
            else:
                out = out.contiguous(memory_format=torch.channels_last)
                out = match_memory_format(out, fit.channels_last)
                finish[len(values)] = _like(fit.channels_last)
            values.append(out)
            if function.seams.mean is not None:
                values.append(torch.empty((*fit.size[:2], 1, 1), dtype=dtype))
        if any(i not in finish for i in self.outputs):
            return None
        return fits, [finish[i] for i in self.outputs]

    def _plan(self, fits: list[Fit]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        fit_of = dict(zip(self.chains, fits, strict=True))
        builder = backends.cpu.PlanBuilder(self.inputs)
        numbers = list(range(self.inputs))  # in the plan, of each value here
        for function, gate_op, source, gate, residual in self.members:
            if gate_op is not None:
                numbers.append(builder.add(gate_op, (), numbers[source]))
            else:
                seams = (None if i is None else numbers[i] for i in (gate, residual))
                numbers += function.add_to(builder, fit_of[function], numbers[source], *seams)
                function.prepared = None  # it has weights of its own, which are not needed any more
        return builder.build([numbers[i] for i in self.outputs])


class _Prepared(TensorsState):
    """What was made for one state of a region's tensors."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__(tensors)
        self.plans: dict[object, Callable[[Sequence[Tensor]], list[Tensor]]] = {}
        self.runners: dict[object, Callable[..., Tensor | tuple[Tensor, ...]]] = {}


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _like(channels_last: bool) -> Callable[[Tensor], Tensor]:
    return lambda x: match_memory_format(x, channels_last)


def regions_of(known: ForwardGraph, found: list[Found]) -> tuple[list[Call], list[Found]]:
    """The regions of a graph with these folded chains, of more than one chain each; and the chains in none."""
    runs = [_trimmed(run) for run in _runs(known, found)]
    runs = [run for run in runs if sum(isinstance(each, Found) for each in run) > 1]
    inside = {id(each) for run in runs for each in run}
    return [_as_call(known, run) for run in runs], [each for each in found if id(each) not in inside]


def _runs(known: ForwardGraph, found: list[Found]) -> list[list[Found | fx.Node]]:
    """Chains, and nodes that make a gate, with nothing else between them."""
    first = {each.nodes[0]: each for each in found}
    inside = {node for each in found for node in each.inside}
    runs: list[list[Found | fx.Node]] = [[]]
    for node in known.graph.nodes:
        if node in first:
            runs[-1].append(first[node])
        elif node not in inside:
            if operation(known, node)[0] in GATES:
                runs[-1].append(node)
            else:
                runs.append([])
    return runs


def _trimmed(run: list[Found | fx.Node]) -> list[Found | fx.Node]:
    """Without nodes at its ends."""
    while run and isinstance(run[0], fx.Node):
        run = run[1:]
    while run and isinstance(run[-1], fx.Node):
        run = run[:-1]
    return run


def _as_call(known: ForwardGraph, run: list[Found | fx.Node]) -> Call:
    inside = [node for each in run for node in ([each] if isinstance(each, fx.Node) else each.inside)]
    given = {node for each in run for node in ([each] if isinstance(each, fx.Node) else each.outputs)}
    inputs = list(dict.fromkeys(node for each in run for node in _read_by(each) if node not in given))
    numbers = {node: i for i, node in enumerate(inputs)}
    members = []
    for each in run:
        source, *seams = (None if node is None else numbers[node] for node in _roles(each))
        if isinstance(each, fx.Node):
            members.append(Member(_as_function(known, each), operation(known, each)[0], source))
            numbers[each] = len(numbers)
        else:
            members.append(Member(each.chain, None, source, *seams))
            for node in each.outputs:
                numbers[node] = len(numbers)
    all_inside = set(inside)
    outputs = [node for node in numbers if node in given and not node.users.keys() <= all_inside]
    region = Region(members, len(inputs), [numbers[node] for node in outputs])
    return Call(region, inside, inputs, {}, outputs)


def _roles(each: Found | fx.Node) -> tuple[fx.Node | None, ...]:
    if isinstance(each, fx.Node):
        return (each.all_input_nodes[0],)
    return each.source, each.gate, each.residual


def _read_by(each: Found | fx.Node) -> list[fx.Node]:
    return [node for node in _roles(each) if node is not None]


def _as_function(known: ForwardGraph, node: fx.Node) -> Callable[[Tensor], Tensor]:
    module = known.module_of(node)
    if module is not None:
        return module
    target = getattr(Tensor, node.target) if node.op == "call_method" else node.target
    return lambda x: target(x, **node.kwargs)
