"""``freeze``: the inference copy of a model, its BatchNorms folded and its blocks in one kernel each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor, nn

from mobilenet_ext import backends, chain, fusion
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
    if not any(isinstance(module, FrozenChain) for module in frozen.modules()):
        warnings.warn(f"freeze found nothing to fold in this {type(model).__name__}", stacklevel=2)
    for module in frozen.modules():
        module.train = partial(_refuse_training, module)  # on each: dropout in a parent must not come back either
    return frozen


class FrozenChain(nn.Module):
    """A chain of folded units, and the global average pooling behind it if there was one.

    Shapes: input ``[N, C, H, W]`` in the dtype of the weights (any under autocast), output ``[N, C', H', W']``, or
    ``[N, C', 1, 1]`` with pooling.
    """

    def __init__(self, units: list[fusion.UnitModules], pool: bool) -> None:
        super().__init__()
        self.end: chain.End = "pool" if pool else "relu"
        self.geometry = []
        for i, unit in enumerate(units):
            kind, stride, padding, weight, bn, _ = chain.fold(fusion.as_tensors(unit))
            self.geometry.append((kind, stride, padding))
            self.register_buffer(f"weight{i}", weight.clone())
            self.register_buffer(f"bn{i}", bn)
        self.training = False
        self._packed: tuple[list[object], list[Tensor | None], list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._checked_dtype(x)
        units = [
            chain.InferenceUnit(*geometry, getattr(self, f"weight{i}"), getattr(self, f"bn{i}"), packed)
            for i, (geometry, packed) in enumerate(zip(self.geometry, self._packed_weights(), strict=True))
        ]
        out = chain.infer(x, units, self.end, dtype)
        return fusion.match_memory_format(out, fusion.gives_channels_last(x, units))

    def _packed_weights(self) -> list[Tensor | None]:
        """The pointwise weights as the CPU kernels read them, packed anew when a weight is another or was changed
        (but for changes through ``.data``, which leave no trace)."""
        weights = [getattr(self, f"weight{i}") for i in range(len(self.geometry))]
        # A compiled graph would take the packed weights of today for ever, and other backends pack none. Inference
        # tensors have no version: their changes would go unnoticed.
        if (
            torch.compiler.is_compiling()
            or weights[0].device.type != "cpu"
            or backends.current("cpu") != "cpu"
            or any(weight.is_inference() for weight in weights)
        ):
            return [None] * len(weights)
        state = [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]
        if self._packed is None or self._packed[0] != state:
            with torch.no_grad():
                pointwise = [kind == "pointwise" for kind, _, _ in self.geometry]
                packed = [
                    backends.cpu.pack_weight(w.contiguous()) if p else None
                    for w, p in zip(weights, pointwise, strict=True)
                ]
            self._packed = state, packed, weights  # which keeps their addresses from coming again
        return self._packed[1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_packed": None}  # another machine may want another layout

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


def _refuse_training(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise RuntimeError("a frozen model is for inference only: train the model it was made of")
    return type(module).train(module, False)


def _fold_units(container: fusion.FusedSequential) -> None:
    modules = list(fusion.flatten(container))
    folded: list[nn.Module] = []
    while modules:
        units, pool = fusion.leading_chain(modules)
        foldable = list(takewhile(lambda unit: unit.bn.running_mean is not None, units))
        if foldable:
            pool = pool and len(foldable) == len(units)
            folded.append(FrozenChain(foldable, pool))
            del modules[: 3 * len(foldable) + pool]
        else:
            folded.append(modules.pop(0))
    container._modules.clear()
    for i, module in enumerate(folded):
        container.add_module(str(i), module)
