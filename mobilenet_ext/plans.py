"""What a frozen module keeps between calls: which of its modules run as a chain, and the kernels' packed weights.

The modules themselves stay where they are, with their parameters, so everything that looks into a frozen model (a
backbone that iterates and slices, a hook, ``state_dict``) finds what it found in the model. A plan is only a faster way
to compute what they compute, and holds as long as they are the same modules with the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain as concatenated
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mobilenet_ext import _host, backends, fusion
from mobilenet_ext.backends.cpu import PlanBuilder
from mobilenet_ext.contract import DTYPES, NO_PADDING, Act, Padding, acc_dtype
from mobilenet_ext.frozen_graphs import Graphs, TensorsState
from mobilenet_ext.inference_steps import Pack, Step, as_input, execute, is_as_input, pooling, steps_of
from mobilenet_ext.memory_format import gives_channels_last, is_channels_last, match_memory_format
from mobilenet_ext.seams import Seams
from mobilenet_ext.unit_tensors import InferenceUnit, bias_bn, compute_dtype, fold, is_autocast
from mobilenet_ext.units import TENSORS, UnitModules, act_of, as_tensors, has_its_shapes, has_its_tensors
from mobilenet_ext.untouched import forwards_are_original, is_exactly

_KEPT = 8

Part = Callable[[Tensor], Tensor]  # a module, a FoldedChain, or a unit that is fused and not folded
Output = Tensor | tuple[Tensor, Tensor]  # with its mean over each image, where a gate follows
Runner = Callable[[Tensor, Tensor | None, Tensor | None], Output]  # of an input, its gate and a residual


class Fit(NamedTuple):
    """How the kernels run a chain on inputs of one layout."""

    dtype: torch.dtype
    joins: bool  # a residual is added by the last of them
    channels_last: bool  # the format of the output
    size: tuple[int, ...]  # of the output
    paddings: tuple[Padding, ...]  # of each unit


class Plans:
    """Runs a frozen :class:`~mobilenet_ext.fusion.Staged` module as its parts; copies and pickles of it start empty.

    Args:
        cuda_graph: whether to do so from CUDA graphs, on a GPU.
    """

    def __init__(self, cuda_graph: bool = False) -> None:
        self._decision: _Decision | None = None
        self._graphs = Graphs() if cuda_graph else None

    def __reduce__(self) -> tuple[object, ...]:
        # Another machine may want other plans, and a copy has modules of its own.
        return Plans, (self._graphs is not None,)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        decision = self._decision
        if decision is None or not decision.holds(module):
            before = () if decision is None else decision.chains()
            decision = self._decision = _Decision(module, lambda: [_known(part, before) for part in parts_of(module)])
        if self._graphs is not None:
            return self._graphs.run(decision, x)
        return decision.run(x)

    def convert(self, module: nn.Module, apply: Callable[..., nn.Module], fn: Callable[[Tensor], Tensor]) -> nn.Module:
        """``module._apply``: the weights follow ``fn``, BatchNorm's vectors stay in the accumulation dtype."""
        if self._graphs is not None:
            self._graphs = Graphs()  # the others are of no use any more, but have memory
        with torch.inference_mode(False):  # tensors made in inference mode would not tell when they are changed
            return apply(exact_batch_norms(module, fn))


def _known(part: Part, chains: Iterable[FoldedChain]) -> Part:
    """``part``, or the same chain that there was before, with its plans."""
    return next((each for each in chains if isinstance(part, FoldedChain) and each.is_same(part)), part)


def exact_batch_norms(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``convert`` (of ``module.half()`` and the like), but BatchNorm's vectors stay in the accumulation dtype."""
    batch_norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    vectors = {id(t) for bn in batch_norms for t in (*bn.parameters(), *bn.buffers()) if t.is_floating_point()}

    def convert_exactly(t: Tensor) -> Tensor:
        converted = convert(t)
        if id(t) not in vectors:
            return converted
        exact = converted if t.is_meta else t  # to_empty() makes tensors of those that have no values
        return exact.to(converted.device, acc_dtype(converted.dtype))

    return convert_exactly


class _Decision:
    """The parts of a module, and what the decision for them rests on: who watches, and which modules and tensors."""

    def __init__(self, module: nn.Module, decide: Callable[[], list[Part]]) -> None:
        # Not the module itself, which would be in a circle with its plans: to get here it was called, hooks and all.
        modules = list(module.modules())[1:]
        hooks = fusion.forward_hooks_around(modules)
        # A `forward` of its own, `compile()` and the like are one attribute more.
        attributes = [each.__dict__ for each in modules]
        self._counted = (*hooks, *attributes)
        self._counts = (*[0] * len(hooks), *map(len, attributes))  # nobody watches
        self._children = module._modules
        slots = [s for m in modules for s in (m._modules, m._parameters, m._buffers)]
        bounds = [m.__dict__ for m in modules if isinstance(m, nn.Hardtanh)]  # a ReLU6 is one, and can be given others
        self._slots = (self._children, *filter(None, slots), *bounds)
        self._contents = tuple(concatenated.from_iterable(map(dict.values, self._slots)))
        self.tensors = tuple(dict.fromkeys(each for each in self._contents if isinstance(each, Tensor)))
        self.parts = decide()  # last: what another thread changes meanwhile is then noticed at the next call

    def run(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def in_use(self) -> object:
        return [chain.prepared for chain in self.chains()]

    def chains(self) -> list[FoldedChain]:
        return [part for part in self.parts if isinstance(part, FoldedChain)]

    def holds(self, module: nn.Module) -> bool:
        """Whether all is as it was, and nobody watches: who does is asked at each call, as in a model not frozen."""
        return (
            self._children is module._modules  # the module is no replica of another
            and _host.dicts_are(self._counted, self._counts, self._slots, self._contents)
            and forwards_are_original()
        )


class _Prepared(TensorsState):
    """What was made for one state of a chain's tensors. A thread that is late adds to a state that has passed."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__(tensors)
        self.plans: dict[object, Callable[[Sequence[Tensor]], Sequence[Tensor]]] = {}
        # The last input's layout and settings, and what runs an input like it.
        self.last: tuple[object, Runner | None] = (None, None)


class LinearUnit(NamedTuple):
    """A linear layer, which nothing changes, and an activation."""

    layer: nn.Linear
    act: int
    slope: float

    def as_pointwise(self) -> InferenceUnit:
        """It as a pointwise convolution of images of one pixel."""
        weight = self.layer.weight.detach()
        bn = bias_bn(weight, self.layer.bias)
        return InferenceUnit("pointwise", 1, NO_PADDING, weight[:, :, None, None], bn, self.act, self.slope)

    def accepts(self, x: Tensor, dtype: torch.dtype, features: int) -> bool:
        """Whether the kernels take its tensors as they are now, after ``features`` features."""
        weight, bias = self.layer.weight, self.layer.bias
        tensors = [t for t in (weight, bias) if t is not None]
        dtypes = DTYPES if is_autocast(x) else (dtype,)
        return (
            all(type(t) in TENSORS and t.device == x.device and t.dtype in dtypes for t in tensors)
            and weight.shape == (self.layer.out_features, features)
            and (bias is None or bias.shape == (self.layer.out_features,))
        )


class FoldedChain:
    """Units, the global average pooling after them and linear layers after that, run from a plan for each dtype.

    Args:
        modules: all modules that it stands for, in order.
        units: the convolutions and BatchNorms among them, each BatchNorm with running statistics and in eval mode; a
            convolution may have none.
        pool: whether a global average pooling follows.
        linears: what follows pooling and flattening; with any, the output is ``[N, out_features]``.
    """

    def __init__(
        self, modules: list[nn.Module], units: list[UnitModules], pool: bool, linears: Sequence[LinearUnit] = ()
    ) -> None:
        self.modules, self.units, self.pool, self.seams = modules, units, pool, Seams()
        self._linears = linears
        layers = [layer for unit in units for layer in (unit.convolution.layer, unit.bn) if layer is not None]
        layers += [linear.layer for linear in linears]
        slots = [slot for layer in layers for slot in (layer._parameters, layer._buffers)]
        self.tensors = tuple(t for slot in slots for t in slot.values() if t is not None and t.is_floating_point())
        self._inference = any(t.is_inference() for t in self.tensors)  # these do not say when they are changed
        self.prepared: _Prepared | None = None

    def __call__(self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Output:
        # As few questions as there can be: after a run, whose weights push Python out of the cache, each takes ten
        # times as long as it does in a loop.
        others = () if gate is residual is None else tuple(t for t in (gate, residual) if t is not None)
        if (
            self._inference
            or not fusion.is_ordinary(x)
            or (torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in others)))
        ):
            return _run_modules(self.modules, self.seams, x, gate, residual)
        prepared = self.prepared
        if prepared is None or not prepared.hold():
            prepared = self.prepared = _Prepared(self.tensors)
        autocast = torch._C._is_any_autocast_enabled() and is_autocast(x)
        cast_to = compute_dtype(x) if autocast else None
        layout = (x.shape, x.stride(), x.dtype, x.device, cast_to, backends.chosen(), *map(layout_of, others))
        known, run = prepared.last
        if known != layout:
            run = self._runner(prepared, x, gate, residual)
            prepared.last = (layout, run)
        return run(x, gate, residual)

    def is_same(self, other: FoldedChain) -> bool:
        """Whether both stand for the same modules with the same tensors."""
        return self.modules == other.modules and list(map(id, self.tensors)) == list(map(id, other.tensors))

    def _runner(self, prepared: _Prepared, x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Runner:
        """What runs inputs that are laid out as these; nothing in it refers to this chain, which keeps it."""
        fit = self.fit(x, gate, residual)
        if fit is None:
            return partial(_run_modules, self.modules, self.seams)
        dtype, joins, channels_last, *_ = fit
        plan = self._plan(prepared, x.device, fit)
        is_input = all(t is None or is_as_input(t, dtype) for t in (x, gate, residual if joins else None))
        flat, gives_mean, add = bool(self._linears), self.seams.mean is not None, self.seams.add

        def run(x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Output:
            inputs = [t for t in (x, gate, residual if joins else None) if t is not None]
            out, *mean = plan(inputs if is_input else [as_input(t, dtype) for t in inputs])
            out = out.flatten(1) if flat else match_memory_format(out, channels_last)
            if residual is not None and not joins:
                out = add(out, residual)
            return (out, *mean) if gives_mean else out

        return run

    def fit(self, x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Fit | None:
        """How the kernels take inputs that are laid out as these; None where they do not."""
        dtype = compute_dtype(x)
        if not (
            all(has_its_shapes(unit.convolution.layer, unit.bn) for unit in self.units)
            and fusion.accepts(x, self.units)
            and (gate is None or fusion.gate_fits(gate, x))
            and self._accepts_linears(x, dtype)
        ):
            return None
        paddings = tuple(fusion.paddings(x.shape, self.units))
        units = list(map(as_tensors, self.units, paddings))
        size = fusion.output_size(x.shape, units)
        channels_last = gives_channels_last(x.shape, is_channels_last(x), units)
        joins = residual is not None and fusion.residual_fits(residual, size, dtype, x.device, channels_last)
        if self.pool:
            size = (*size[:2], 1, 1)
        if self._linears:
            size = (len(x), self._linears[-1].layer.out_features)
        return Fit(dtype, joins, channels_last, size, paddings)

    def _accepts_linears(self, x: Tensor, dtype: torch.dtype) -> bool:
        features = self.units[-1].convolution.layer.out_channels
        for each in self._linears:
            if not each.accepts(x, dtype, features):
                return False
            features = each.layer.out_features
        return True

    def _plan(
        self, prepared: _Prepared, device: torch.device, fit: Fit
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        """What runs the chain on an input, its gate and a residual, where there are such; it gives the output, and its
        mean over each image if that is wanted too."""
        packs = device.type == "cpu" and backends.current("cpu") == "cpu"
        joins = fit.joins
        key = (fit.dtype, packs, joins, fit.paddings)
        plan = prepared.plans.get(key)
        if plan is None:
            keep_few(prepared.plans)
            if packs:  # all in one call
                gated = self.seams.multiply is not None
                builder = backends.cpu.PlanBuilder(1 + gated + joins)
                out, *mean = self.add_to(builder, fit, 0, 1 if gated else None, 1 + gated if joins else None)
                plan = builder.build([out, *mean])
            else:
                steps, pool = self._steps(fit, None)
                plan = partial(_execute, steps, pool, joins)
            prepared.plans[key] = plan
        return plan

    def add_to(self, builder: PlanBuilder, fit: Fit, source: int, gate: int | None, residual: int | None) -> list[int]:
        """Add the chain to a plan of the CPU; the numbers of its output, and of its mean if that is wanted too."""
        steps, pool = self._steps(fit, backends.cpu.pack)
        out = builder.add_steps(steps, source, gate, residual)
        return [out] if pool is None else [out, builder.add_steps([pool], out)]

    def _steps(self, fit: Fit, pack: Pack | None) -> tuple[list[Step], Step | None]:
        """The ops of the chain, and the one that gives the mean of its output if that is wanted too."""
        # Whoever is the first to run it may be in inference mode, others not.
        dtype = fit.dtype
        with torch.inference_mode(False), torch.no_grad():
            units = list(map(fold, map(as_tensors, self.units, fit.paddings)))
            steps = steps_of(units, dtype, pack, self.seams.multiply is not None)
            pool = pooling(units[-1], dtype)
            if self.pool:
                steps.append(pool)
            steps += steps_of([linear.as_pointwise() for linear in self._linears], dtype, pack)
        return steps, None if self.seams.mean is None else pool


def keep_few(made: dict[object, object]) -> None:
    """Room for one more in what was made for layouts of inputs, of which there may be any number."""
    if len(made) >= _KEPT:
        made.clear()


def _execute(steps: list[Step], pool: Step | None, joins: bool, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    x, *seams = inputs
    residual = seams.pop() if joins else None
    out = execute(x, steps, seams[0] if seams else None, residual)
    return [out] if pool is None else [out, execute(out, [pool])]


def layout_of(t: Tensor) -> tuple[object, ...]:
    return type(t), t.shape, t.stride(), t.dtype, t.device


def _run_modules(
    modules: list[nn.Module], seams: Seams, x: Tensor, gate: Tensor | None, residual: Tensor | None
) -> Output:
    if gate is not None:
        x = seams.multiply(x, gate)
    x = fusion.run_modules(modules, x)
    if residual is not None:
        x = seams.add(x, residual)
    return x if seams.mean is None else (x, seams.mean(x))


def parts_of(module: fusion.Staged) -> list[Part]:
    """The chains among the stages of a module in eval mode, and the modules between them."""
    modules = list(fusion.flatten(module.stages()))
    parts: list[Part] = []
    while modules:
        folded = leading_folded_chain(modules)
        if folded is not None:
            parts.append(folded)
            count = len(folded.modules)
        else:
            units, _ = fusion.leading_chain(modules, inference=True)
            count = units[0].size if units else 1  # a unit without running statistics
            parts.append(partial(fusion.run_modules, modules[:count]) if units else modules[0])
        del modules[:count]
    return parts


def leading_folded_chain(modules: list[nn.Module]) -> FoldedChain | None:
    """The longest chain that modules in eval mode begin with."""
    units, pool = fusion.leading_chain(modules, inference=True)
    foldable = list(takewhile(lambda unit: unit.bn is None or unit.bn.running_mean is not None, units))
    if not foldable:
        return None
    pool = pool and len(foldable) == len(units)
    count = fusion.count_of(foldable) + pool
    linears, size = _linears_after_pooling(modules[count:]) if pool else ([], 0)
    return FoldedChain(modules[: count + size], foldable, pool, linears)


def _linears_after_pooling(modules: list[nn.Module]) -> tuple[list[LinearUnit], int]:
    """The linear layers after ``Flatten()``, each with its activation; how many modules all these are."""
    if not modules or not is_exactly(modules[0], nn.Flatten):
        return [], 0
    if (modules[0].start_dim, modules[0].end_dim) != (1, -1):
        return [], 0
    linears: list[LinearUnit] = []
    count = 1
    while count < len(modules) and is_exactly(modules[count], nn.Linear) and has_its_tensors(modules[count]):
        layer, activation = (*modules[count : count + 2], None)[:2]
        known = act_of(activation)
        linears.append(LinearUnit(layer, *(known or (Act.LINEAR.value, 0.0))))
        count += 1 if known is None else 2
    return linears, count if linears else 0
