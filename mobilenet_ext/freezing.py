"""``freeze``: the inference copy of a model, its BatchNorms folded and its blocks in one kernel each."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilenet_ext import backends, chain, fusion, ops
from mobilenet_ext.backends.reference import BN_SCALE, BN_SHIFT
from mobilenet_ext.models import MobileNetV1
from mobilenet_ext.ops import acc_dtype


def freeze(model: nn.Module) -> nn.Module:
    """An inference copy of ``model``: BatchNorm folded, a depthwise and a pointwise unit in one kernel.

    The copy shares nothing with ``model``, is in eval mode for good and gives no gradients. Units that cannot be fused
    (hooked, swapped, without running statistics) stay the modules they are. ``.to(dtype)`` afterwards rounds the
    weights, not the folded BatchNorm.

    Args:
        model: a :class:`~mobilenet_ext.MobileNetV1`, a module of :mod:`mobilenet_ext.nn`, or a module containing some.

    Returns:
        A module with the outputs of ``model.eval()``; ``.train()`` on it raises RuntimeError.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Warns:
        UserWarning: nothing in ``model`` could be folded, so the copy is no faster.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, an nn.Module is accepted")
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(frozen.modules()):
        if isinstance(module, fusion.FusedSequential):
            _fold_units(module)
        elif isinstance(module, MobileNetV1):
            _fold_classifier(module)
            if type(module) is MobileNetV1:
                module.__class__ = FrozenMobileNetV1
    if not any(isinstance(module, FrozenChain) and module.end != "linear" for module in frozen.modules()):
        warnings.warn(f"freeze found nothing to fold in this {type(model).__name__}", stacklevel=2)
    for module in frozen.modules():
        module.train = partial(_refuse_training, module)  # on each: dropout in a parent must not come back either
    return frozen


class _Plan(NamedTuple):
    """The kernel ops that run a chain, and what they were made from."""

    state: tuple[object, ...]
    buffers: list[Tensor]
    steps: list[chain.Step]
    run: Callable[[Tensor], Tensor] | None  # the same in one call, where the backend can


class FrozenChain(nn.Module):
    """A chain of folded units, and the global average pooling behind it if there was one.

    Shapes: input ``[N, C, H, W]`` in the dtype of the weights (any under autocast), output ``[N, C', H', W']``, or
    ``[N, C', 1, 1]`` with pooling.
    """

    def __init__(self, units: list[chain.InferenceUnit], end: chain.End) -> None:
        super().__init__()
        self.end = end
        self.geometry = []
        for i, (kind, stride, padding, weight, bn) in enumerate(units):
            self.geometry.append((kind, stride, padding))
            self.register_buffer(f"weight{i}", weight.clone())
            self.register_buffer(f"bn{i}", bn)
        self.training = False
        self._plans: dict[tuple[object, ...], _Plan] = {}  # by dtype, and the chain behind this one if one is
        # Of the last plan, shape and strides: whether the output is channels_last.
        self._layout: tuple[_Plan, object, bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._checked_dtype(x)
        plan = self._plan(dtype) if _may_plan(x) else None
        if plan is None:
            units = self._units()
            out = chain.infer(x, units, self.end, dtype)
            return fusion.match_memory_format(out, fusion.gives_channels_last(x, units))
        if plan.run is None:
            out = chain.execute(x, plan.steps, dtype)
        else:
            out = plan.run(chain.as_input(x, dtype))
        layout, known = (x.shape, x.stride()), self._layout
        if known is None or known[0] is not plan or known[1] != layout:
            known = self._layout = (plan, layout, fusion.gives_channels_last(x, self._units()))
        return fusion.match_memory_format(out, known[2])

    def run_with(self, x: Tensor, behind: FrozenChain) -> Tensor | None:
        """The outputs of the chain ``behind`` this one, which pools, in one call; None where that cannot be had."""
        dtype = self._checked_dtype(x)
        plan = self._plan(dtype, behind) if self._packs() and _may_plan(x) else None
        return None if plan is None else plan.run(chain.as_input(x, dtype))

    def _packs(self) -> bool:
        return self._buffers["weight0"].device.type == "cpu" and backends.current("cpu") == "cpu"

    def _units(self) -> list[chain.InferenceUnit]:
        return [
            chain.InferenceUnit(*geometry, getattr(self, f"weight{i}"), getattr(self, f"bn{i}"))
            for i, geometry in enumerate(self.geometry)
        ]

    def _plan(self, dtype: torch.dtype, *behind: FrozenChain) -> _Plan | None:
        """The plan for a dtype, with what the CPU kernels want packed; made anew when a buffer is another or was
        changed (but for changes that leave no version: through ``.data``, NumPy or another process). None where
        changes cannot be noticed."""
        chains = (self, *behind)
        buffers = [buffer for each in chains for buffer in each._buffers.values()]
        key = (dtype, *behind)
        plan = self._plans.get(key)
        same = plan is not None and len(plan.buffers) == len(buffers) and all(map(operator.is_, plan.buffers, buffers))
        if not same and any(buffer.is_inference() for buffer in buffers):
            return None  # inference tensors have no version
        packs = self._packs()
        state = (packs, *[buffer._version for buffer in buffers], *[buffer.data_ptr() for buffer in buffers])
        if not same or plan.state != state:
            run = None
            with torch.no_grad():
                pack = backends.cpu.pack if packs else None
                steps = [step for each in chains for step in chain.plan(each._units(), each.end, dtype, pack)]
            if packs:
                run = backends.cpu.plan_runner([(op._schema.name.split("::")[1], args) for op, args in steps])
            # The plan keeps the buffers, so that their addresses do not come again. One chain behind this one is
            # enough: whoever swaps it does not want to keep the other's weights.
            others = {k: v for k, v in self._plans.items() if k[0] != dtype or len(k) != len(key)}
            plan = _Plan(state, buffers, steps, run)
            self._plans = {**others, key: plan}
        return plan

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_plans": {}, "_layout": None}  # another machine may want another layout

    def extra_repr(self) -> str:
        return f"{len(self.geometry)} folded units" + (", global average pooling" if self.end == "pool" else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenChain:
        """``.half()`` and the like: the weights follow, the folded BatchNorms stay in the accumulation dtype."""
        exact = {name: buffer for name, buffer in self._buffers.items() if name.startswith("bn")}
        super()._apply(fn, recurse)
        dtype = acc_dtype(self.weight0.dtype)
        for name, buffer in exact.items():
            if self._buffers[name].dtype != dtype:
                self._buffers[name] = buffer.to(device=self._buffers[name].device, dtype=dtype)
        return self

    def _checked_dtype(self, x: Tensor) -> torch.dtype:
        kind, weight = self.geometry[0][0], self.weight0
        channels = weight.shape[0] if kind == "depthwise" else weight.shape[1]
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            got = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"input: got {got}, a dense torch.Tensor is accepted")
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"input: got shape {tuple(x.shape)}, accepted is [N, {channels}, H, W]")
        if x.device != weight.device:
            raise ValueError(f"input: is on {x.device}, accepted is the weights' device, {weight.device}")
        if x.dtype != weight.dtype and not (chain.is_autocast(x) and x.dtype in fusion.DTYPES):
            raise TypeError(f"input: got {x.dtype}, accepted is the weights' dtype, {weight.dtype}")
        return chain.compute_dtype(x)


def _may_plan(x: Tensor) -> bool:
    # A graph or trace would keep today's packed weights for ever, and who watches the ops wants to see each.
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, counters
        or torch._C._are_functorch_transforms_active()
        or type(x) not in fusion.TENSORS
    )


class FrozenLinear(nn.Module):
    """A linear layer with its weight packed: on a CPU a pointwise convolution of images of one pixel.

    Shapes: input ``[..., K]``, output ``[..., N]``.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        bn = torch.zeros((ops.BN_ROWS, len(weight)), dtype=acc_dtype(weight.dtype), device=weight.device)
        bn[BN_SCALE] = 1
        if linear.bias is not None:
            bn[BN_SHIFT] = linear.bias.detach()
        self.pointwise = FrozenChain([chain.InferenceUnit("pointwise", 1, 0, weight[:, :, None, None], bn)], "linear")
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        weight, bn = self.pointwise.weight0, self.pointwise.bn0
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(f"input: got shape {tuple(x.shape)}, accepted is [..., {weight.shape[1]}]")
        if x.device.type != "cpu" or backends.current("cpu") != "cpu" or x.numel() == 0:
            return F.linear(x.detach(), weight.flatten(1), bn[BN_SHIFT].to(weight.dtype))
        pixels = self.pointwise(x.reshape(-1, x.shape[-1], 1, 1))
        return pixels.reshape(*x.shape[:-1], len(weight))

    def extra_repr(self) -> str:
        n, k = self.pointwise.weight0.shape[:2]
        return f"in_features={k}, out_features={n}"


class FrozenMobileNetV1(MobileNetV1):
    """What :func:`freeze` makes of a :class:`MobileNetV1`: features and classifier run in one call where the backend
    can, and nothing between them was swapped or has hooks."""

    def forward(self, x: Tensor) -> Tensor:
        whole = self._whole()
        out = whole and whole[0].run_with(x, whole[1])
        return super().forward(x) if out is None else out.flatten(1)

    def _whole(self) -> tuple[FrozenChain, FrozenChain] | None:
        """The chain of the features and the classifier's, if there is nothing else."""
        feature, classifier = self._modules["feature"], self._modules["classifier"]
        if type(feature) is not fusion.FusedSequential or type(classifier) is not nn.Sequential:
            return None
        modules = [*feature._modules.values(), *classifier._modules.values()]
        if [type(module) for module in modules] != [FrozenChain, nn.Flatten, FrozenLinear]:
            return None
        features, flatten, linear = modules
        pointwise = linear._modules["pointwise"]
        alone = (feature, features, classifier, flatten, linear, pointwise)
        if (
            features.end != "pool"
            or (flatten.start_dim, flatten.end_dim) != (1, -1)
            or features._buffers["weight0"].dtype != pointwise._buffers["weight0"].dtype
            or not all(map(fusion.is_untouched, alone))
        ):
            return None
        return features, pointwise


def _refuse_training(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise RuntimeError("a frozen model is for inference only: train the model it was made of")
    return type(module).train(module, False)


def _fold_classifier(model: MobileNetV1) -> None:
    classifier = model.classifier  # anybody's, where it was swapped
    last = classifier[-1] if isinstance(classifier, nn.Sequential) and len(classifier) else None
    if not fusion.is_exactly(last, nn.Linear) or "weight" not in last._parameters:
        return
    tensors = [tensor for tensor in (last.weight, last.bias) if tensor is not None]
    if all(type(t) in fusion.TENSORS and t.dtype == last.weight.dtype and t.dtype in fusion.DTYPES for t in tensors):
        classifier[-1] = FrozenLinear(last)


def _fold_units(container: fusion.FusedSequential) -> None:
    modules = list(fusion.flatten(container))
    folded: list[nn.Module] = []
    while modules:
        units, pool = fusion.leading_chain(modules)
        foldable = list(takewhile(lambda unit: unit.bn.running_mean is not None, units))
        if foldable:
            pool = pool and len(foldable) == len(units)
            units = [chain.fold(fusion.as_tensors(unit)) for unit in foldable]
            folded.append(FrozenChain(units, "pool" if pool else "relu"))
            del modules[: 3 * len(foldable) + pool]
        else:
            folded.append(modules.pop(0))
    container._modules.clear()
    for i, module in enumerate(folded):
        container.add_module(str(i), module)
