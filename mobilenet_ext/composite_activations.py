"""Activations that a forward spells out: SiLU as ``x * sigmoid(x)``, Hardswish as ``x * relu6(x + 3) / 6``."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from mobilenet_ext.forward_graph import ForwardGraph
from mobilenet_ext.untouched import is_exactly


class Composite(NamedTuple):
    """An activation in a graph."""

    nodes: list[fx.Node]  # its operations, of which the last gives the result
    source: fx.Node
    module: nn.Module  # computes the same


def composite_at(known: ForwardGraph, node: fx.Node) -> Composite | None:
    """The activation whose last operation is ``node``, if nobody else reads what is inside of it."""
    # Its input is the input of its product, which is the last operation or the one before.
    near = dict.fromkeys(each for last in (node, *node.all_input_nodes) for each in last.all_input_nodes)
    for source in near:
        nodes: list[fx.Node] = []
        make = _ACTIVATIONS.get(_form(known, node, source, nodes))
        if make is not None:
            inside = set(nodes)
            if all(each.users.keys() <= inside for each in (source, *nodes[:-1])):
                return Composite(nodes, source, make())
    return None


def _form(known: ForwardGraph, node: fx.Node, source: fx.Node, nodes: list[fx.Node], depth: int = 4) -> str | None:
    """What ``node`` computes of ``source``, if that is a part of an activation, whose operations join ``nodes``."""
    if node is source:
        return "x"
    name, number, arguments = operation(known, node)
    if name is None or not depth:  # of the longest of the forms
        return None
    forms = sorted(str(_form(known, each, source, nodes, depth - 1)) for each in arguments)
    if node not in nodes:
        nodes.append(node)
    return _FORMS.get((name, number, *forms))


# Operation, number, forms of the arguments in alphabetical order; h is hardsigmoid(x).
_FORMS: dict[tuple[object, ...], str] = {
    ("sigmoid", None, "x"): "sigmoid",
    ("multiply", None, "sigmoid", "x"): "silu",
    ("add", 3.0, "x"): "x + 3",
    ("clip to 6", None, "x + 3"): "6h",
    ("divide", 6.0, "6h"): "h",
    ("hardsigmoid", None, "x"): "h",
    ("multiply", None, "6h", "x"): "6hx",
    ("multiply", None, "h", "x"): "hx",
    ("divide", 6.0, "6hx"): "hx",
}
_ACTIVATIONS = {"silu": nn.SiLU, "hx": nn.Hardswish}

# Operations that change their argument in place are here where nothing reads that after them: it is no input of the
# activation (clipping), or they are the product that reads it last.
_OPERATIONS: dict[object, str] = {
    operator.add: "add",
    torch.add: "add",
    "add": "add",
    operator.mul: "multiply",
    operator.imul: "multiply",
    torch.mul: "multiply",
    "mul": "multiply",
    "mul_": "multiply",
    operator.truediv: "divide",
    operator.itruediv: "divide",
    torch.div: "divide",
    "div": "divide",
    "div_": "divide",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    nn.Sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    F.relu6: "clip to 6",
    nn.ReLU6: "clip to 6",
    torch.clamp: "clip",
    F.hardtanh: "clip",
    "clamp": "clip",
    "clamp_": "clip",
}


def operation(known: ForwardGraph, node: fx.Node) -> tuple[str | None, float | None, list[fx.Node]]:
    """The name of an operation, a number that is its other argument, and the tensors that are its arguments."""
    nothing = None, None, []
    kind = node.target
    if node.op == "call_module":
        module = known.module_of(node)
        kind = type(module)
        if kind not in _OPERATIONS or not is_exactly(module, kind):
            return nothing
    elif node.op not in ("call_function", "call_method"):
        return nothing
    name = _OPERATIONS.get(kind)
    settings = dict(node.kwargs)
    settings.pop("inplace", None)
    tensors = [each for each in node.args if isinstance(each, fx.Node)]
    numbers = [each for each in node.args if type(each) in (int, float)]
    if name is None or len(tensors) + len(numbers) != len(node.args):
        return nothing
    if name == "clip":
        limits = numbers + [settings.pop(each) for each in ("min", "min_val", "max", "max_val") if each in settings]
        return nothing if settings or limits != [0, 6] else ("clip to 6", None, tensors)
    if settings or len(numbers) > 1:
        return nothing
    if name == "multiply" and numbers and abs(6 * numbers[0] - 1) < 1e-6:
        return "divide", 6.0, tensors
    if name == "divide" and not isinstance(node.args[0], fx.Node):
        return nothing  # a number divided by a tensor
    return name, float(numbers[0]) if numbers else None, tensors
