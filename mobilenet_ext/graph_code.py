"""A graph as a function, with calls in the place of some of its nodes."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import NamedTuple

from torch import fx

from mobilenet_ext.forward_graph import ForwardGraph


class Call(NamedTuple):
    """What runs in the place of nodes."""

    function: Callable[..., object]
    inside: list[fx.Node]  # the nodes, in order; the first one's place is the call's
    args: list[fx.Node]
    kwargs: dict[str, fx.Node]
    outputs: list[fx.Node]  # what it gives: a value, or of several a sequence


def function_of(known: ForwardGraph, calls: list[Call]) -> Callable[..., object]:
    """The graph as a function."""
    objects: dict[str, object] = dict(known.objects)
    first = {call.inside[0]: (f"call{i}", call) for i, call in enumerate(calls)}
    inside = {node for call in calls for node in call.inside}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in known.graph.nodes:
        if node in first:
            name, call = first[node]
            objects[name] = call.function
            args = tuple(new[each] for each in call.args)
            out = graph.create_node("call_module", name, args, {role: new[each] for role, each in call.kwargs.items()})
            if len(call.outputs) == 1:
                new[call.outputs[0]] = out
            else:
                for i, each in enumerate(call.outputs):
                    new[each] = graph.create_node("call_function", operator.getitem, (out, i), {})
        elif node not in inside:
            new[node] = graph.node_copy(node, new.__getitem__)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<fused forward>", "exec"), scope)
    return types.MethodType(scope["forward"], types.SimpleNamespace(**objects))
