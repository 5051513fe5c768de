"""Where a chain meets what is around it: a residual that is added to its output, and a squeeze-excite gate
(arXiv:1709.01507) between two chains.

::

    a = chain(x); out = a + r                        the sum is part of the chain's last pass
    a = chain(x); g = gate(mean(a)); chain2(a * g)   the mean is taken by the first chain, which stores no activation
                                                     in training, and the second multiplies by g what it reads

What the gate is made of in between stays as it is. Where the kernels do not take a gate or a residual, the plain
operations run that the forward has there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mobilenet_ext.chain import Gives
from mobilenet_ext.forward_graph import ForwardGraph
from mobilenet_ext.units import UnitModules, pools_to_one
from mobilenet_ext.untouched import is_exactly

Binary = Callable[[Tensor, Tensor], Tensor]


class Seams(NamedTuple):
    """Plain operations that a chain takes over."""

    multiply: Binary | None = None  # of its input, and a gate
    mean: Callable[[Tensor], Tensor] | None = None  # of its output over each image; the chain gives both
    add: Binary | None = None  # of its output, and a residual


class Chain(Protocol):
    units: list[UnitModules]
    pool: bool
    seams: Seams


class Found:
    """A chain in a graph.

    Attributes:
        nodes: in whose place it runs, in order; the first one's place is the chain's.
        chain: called with the first node's input and, where they are not None, with ``gate`` and ``residual``.
        mean: the node that the second output of the chain stands for.
    """

    def __init__(self, nodes: list[fx.Node], chain: Chain) -> None:
        self.nodes, self.chain = nodes, chain
        (self.source,) = nodes[0].all_input_nodes
        self.mean: fx.Node | None = None
        self.gate: fx.Node | None = None
        self.residual: fx.Node | None = None

    @property
    def inside(self) -> list[fx.Node]:
        """All nodes that it stands for."""
        return self.nodes if self.mean is None else [*self.nodes, self.mean]

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that the values of the chain stand for."""
        return self.nodes[-1:] if self.mean is None else [self.nodes[-1], self.mean]


def gives(pool: bool, seams: Seams) -> Gives:
    """What a chain with a global pooling at its end, or without, gives."""
    return "both" if seams.mean is not None else "mean" if pool else "activation"


def close_seams(known: ForwardGraph, found: list[Found]) -> None:
    """Let the chains take over the gates and residuals next to them."""
    places = {node: i for i, node in enumerate(known.graph.nodes)}
    starting = {each.nodes[0]: each for each in found}
    for each in found:
        if not each.chain.pool:
            _take_gate(known, each, starting, places)
    for each in found:
        if not each.chain.pool and each.mean is None:
            _take_residual(each, places)


def _take_gate(known: ForwardGraph, before: Found, starting: dict[fx.Node, Found], places: dict[fx.Node, int]) -> None:
    """``before`` and the chain after it, if they have nothing but a gate between them."""
    activation = before.nodes[-1]
    readers = sorted(activation.users, key=places.__getitem__)
    if len(readers) != 2:
        return
    pooling, product = readers
    mean, multiplied = _mean_over_image(known, pooling), _with_another(product, activation, _PRODUCTS, _IN_PLACE)
    if mean is None or multiplied is None or len(product.users) != 1:
        return
    after = starting.get(next(iter(product.users)))
    if after is None or after.chain.units[0].convolution.kind != "pointwise" or after.chain.units[0].bn is None:
        return
    before.mean = pooling
    before.chain.seams = before.chain.seams._replace(mean=mean)
    after.gate, multiply = multiplied
    after.nodes.insert(0, product)
    after.source = activation
    after.chain.seams = after.chain.seams._replace(multiply=multiply)


def _take_residual(found: Found, places: dict[fx.Node, int]) -> None:
    """The addition to the chain's output, if nothing happens while the chain runs, and what is added is there."""
    output = found.nodes[-1]
    if len(output.users) != 1:
        return
    (sum_node,) = output.users
    added = _with_another(sum_node, output, _SUMS, _IN_PLACE)
    begin = places[found.nodes[0]]
    if added is None or places[added[0]] > begin or places[sum_node] != begin + len(found.nodes):
        return
    found.residual, add = added
    found.nodes.append(sum_node)
    found.chain.seams = found.chain.seams._replace(add=add)


_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_IN_PLACE = (operator.iadd, operator.imul, "add_", "mul_")  # these change their first argument


def _with_another(
    node: fx.Node, operand: fx.Node, targets: tuple[object, ...], in_place: tuple[object, ...]
) -> tuple[fx.Node, Binary] | None:
    """The other operand of ``node``, and the operation as a function of ``operand`` and that one."""
    if node.op not in ("call_function", "call_method") or node.target not in targets or node.kwargs:
        return None
    if len(node.args) != 2 or not all(isinstance(each, fx.Node) for each in node.args):
        return None
    left, right = node.args
    if left is right or (left is not operand and node.target in in_place):
        return None
    function = getattr(Tensor, node.target) if node.op == "call_method" else node.target
    return (right, function) if left is operand else (left, lambda a, b: function(b, a))


def _mean_over_image(known: ForwardGraph, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The operation, if it is the mean over each image, ``[N, C, 1, 1]``."""
    module = known.module_of(node)
    if module is not None:
        is_pooling = is_exactly(module, nn.AdaptiveAvgPool2d) and pools_to_one(module)
        return module if is_pooling and len(node.args) == 1 and not node.kwargs else None
    settings = dict(node.kwargs)
    args = (*node.args[1:],)
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        size = args[0] if len(args) == 1 and not settings else settings.get("output_size") if not args else None
        return (lambda x: F.adaptive_avg_pool2d(x, size)) if size in (1, (1, 1), [1, 1]) else None
    if (node.op, node.target) not in (("call_method", "mean"), ("call_function", torch.mean)):
        return None
    dims = args[0] if args else settings.pop("dim", None)
    keeps = args[1] if len(args) == 2 else settings.pop("keepdim", False)
    if len(args) > 2 or settings or keeps is not True or not isinstance(dims, (tuple, list)):
        return None
    if sorted(dim % 4 if type(dim) is int else -1 for dim in dims) != [2, 3]:
        return None
    return lambda x: x.mean((2, 3), keepdim=True)
