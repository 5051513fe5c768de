"""``fusion_report``: which convolutions of a model run on the kernels, and why the others do not."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import fx, nn

from mobilenet_ext import fusing, fusion
from mobilenet_ext.convolutions import is_class_of_convolutions, is_supported
from mobilenet_ext.forward_graph import ForwardGraph
from mobilenet_ext.fused_forward import Plan
from mobilenet_ext.units import UnitModules, is_norm
from mobilenet_ext.untouched import is_untouched


class Row(NamedTuple):
    """One convolution."""

    name: str  # as in ``model.named_modules()``
    convolution: str  # its kernel size, stride, groups and channels
    chain: int | None  # the number of the chain that it runs in
    why_not: str | None  # where it runs in none


class FusionReport(list[Row]):
    """A row for each convolution of a model, in its order; printed as a table of what is left, and why."""

    @property
    def fused(self) -> int:
        """How many of the convolutions run on the kernels."""
        return sum(row.why_not is None for row in self)

    def __str__(self) -> str:
        chains = len({row.chain for row in self if row.chain is not None})
        lines = [f"{self.fused} of {len(self)} convolutions run on the kernels, in {chains} chains"]
        left = [row for row in self if row.why_not is not None]
        widths = [max((len(row[i]) for row in left), default=0) for i in range(2)]
        lines += [f"{row.name:{widths[0]}}  {row.convolution:{widths[1]}}  {row.why_not}" for row in left]
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """Which convolutions of ``model`` run on the fused kernels in its present mode, and why the others do not.

    The kernels may still leave an input to the plain modules: one of a dtype that they have not, on another device than
    the weights, or with a wrong number of channels.

    Args:
        model: a module that was given to :func:`~mobilenet_ext.fuse` or made by :func:`~mobilenet_ext.freeze`, or one
            that contains modules of :mod:`mobilenet_ext.nn`.

    Returns:
        A list of rows (name, convolution, chain, why_not), one for each ``Conv2d``; ``print`` it for a table.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    seen = _Seen()
    seen.look_into(model)
    names = {module: name for name, module in model.named_modules()}
    rows = FusionReport()
    for conv, name in names.items():
        if isinstance(conv, nn.Conv2d):
            chain = seen.chains.get(conv)
            rows.append(Row(name, _describe(conv), chain, None if chain is not None else seen.why_not(conv)))
    return rows


class _Seen:
    """What is known of a model's convolutions: the chain that one is in, or why it is in none."""

    def __init__(self) -> None:
        self.chains: dict[nn.Module, int] = {}
        self._reasons: dict[nn.Module, str] = {}
        self._count = 0

    def look_into(self, module: nn.Module) -> None:
        if fusing.is_fused(module):
            plan = fusing.plans_of(module).of(module)
            if plan.graph is not None:
                self._add_plan(module, plan)
                return
            reason = f"not called, as far as is known of {type(module).__name__}.forward: {plan.why_not}"
            self._reasons.update({child: reason for child in module.modules() if child not in self._reasons})
        elif isinstance(module, fusion.FusedSequential):
            self._add_sequence(list(fusion.flatten(module)), module.training)
            return
        for child in module.children():
            self.look_into(child)

    def _add_plan(self, module: nn.Module, plan: Plan) -> None:
        for chain in plan.chains:
            self._add_chain(chain.units)
        graph = plan.graph
        calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
        self._reasons.update({child: "not called" for each in (module, *graph.containers) for child in each.children()})
        for node in graph.graph.nodes:
            called = graph.module_of(node)
            if isinstance(called, nn.Conv2d):
                several = f"called {calls[node.target]} times in a forward"
                self._reasons[called] = several if calls[node.target] > 1 else _why_no_unit(graph, node)
            elif called is not None:
                self.look_into(called)

    def _add_sequence(self, modules: list[nn.Module], training: bool) -> None:
        while modules:
            units, pool = fusion.leading_chain(modules, inference=not training)
            if units:
                self._add_chain(units)
            else:
                self.look_into(modules[0])
            del modules[: fusion.count_of(units) + pool if units else 1]

    def _add_chain(self, units: list[UnitModules]) -> None:
        self.chains.update({unit.convolution.layer: self._count for unit in units})
        self._count += 1

    def why_not(self, conv: nn.Conv2d) -> str:
        if not is_class_of_convolutions(type(conv)):
            return f"a {type(conv).__name__}, which may compute something else than Conv2d"
        if not is_supported(conv):
            return "the kernels have none like it"
        if not is_untouched(conv):
            return "a hook, or a forward of its own"
        return self._reasons.get(conv, "not in a module that fuse() was given")


def _why_no_unit(graph: ForwardGraph, node: fx.Node) -> str:
    readers = list(node.users)
    if len(readers) != 1:
        return f"its output is read {len(readers)} times"
    reader = graph.module_of(readers[0])
    name = type(reader).__name__ if reader is not None else getattr(readers[0].target, "__name__", readers[0].target)
    if reader is None or not is_norm(reader):
        return f"its output is read by {name}, not by a BatchNorm"
    return f"its {name} is called more than once, or its tensors are not what its settings say"


def _describe(conv: nn.Conv2d) -> str:
    sizes = "x".join(map(str, conv.kernel_size))
    strides = "" if set(conv.stride) == {1} else f" stride {conv.stride[0]}"
    groups = "" if conv.groups == 1 else f" groups {conv.groups}"
    return f"{sizes}{strides}{groups} {conv.in_channels}->{conv.out_channels}"
