"""Training steps replayed from CUDA graphs: the host launches one graph where it would launch hundreds of kernels.

A step is captured in two graphs. The first holds everything up to the gradients and the sums of the statistics; it
rests on the model and on the shapes alone, and lives for the whole training. The second holds the optimizer's step,
whose numbers (the learning rate) are part of it: it is captured anew when a schedule changes them, which takes a
hundredth of the time, and where they change at every step the optimizer runs as it is. So the optimizer needs no
learning rate in a tensor, and its state, its checkpoints and its results are those of a training without graphs.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import optimizer as optimizer_module

from mobilenet_ext import _host, cuda_graph
from mobilenet_ext.untouched import forwards_are_original, is_untouched

Measured = tuple[Tensor, ...]
Compute = Callable[[Tensor, Tensor], Measured]

WARM_UP = 2  # steps alike in front of a capture: they compile kernels, choose algorithms, make the optimizer's state


class StepGraph:
    """Runs training steps, from CUDA graphs where it can; hand one to all ``train_one_epoch`` of a training.

    The first steps on a GPU run as they are, and so does any that differs from those that were captured: a shorter
    batch, another model, dtype or backend, a hook, a changed setting of a module. Results are those of the steps run as
    they are, bit for bit where the kernels' are. What was captured, the memory of its activations with it, is kept
    until this object goes.

    On other devices nothing is captured. Nor is it, and ``tell`` says so once, where the model is watched (hooks,
    tracers), compiled or distributed, where it has a BatchNorm with ``momentum=None``, which reads its count on the
    host, or where the capture fails: because a module or the loss function waits for the device, or for want of memory.
    Python code of modules and of the loss function does not run in a replay; what it does to attributes of modules is
    noticed, other effects are not. While a step is captured no other thread may wait for the whole device.

    Args:
        tell: is called with a sentence.
    """

    def __init__(self, tell: Callable[[str], None] = warnings.warn) -> None:
        self._tell = tell
        self._told: set[str] = set()
        self._broken = self._broken_update = False  # a capture failed, of the gradients or of the optimizer's step
        self._gradients: _Gradients | None = None
        self._update: _Update | None = None
        self._last: object = None  # what the step before rested on, ...
        self._alike = 0  # how many in a row it was ...
        self._patience = WARM_UP  # ... and must be; more after each capture, so that they cannot take all the time
        self._last_update: _Numbers | None = None

    def step(
        self,
        compute: Compute,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        *,
        modules: Iterable[nn.Module],
        others: tuple[object, ...] = (),
    ) -> Measured:
        """``zero_grad``, ``compute`` and the optimizer's step.

        Args:
            compute: takes ``images`` and ``labels``, leaves gradients, and gives tensors without any.
            optimizer: of all parameters that get gradients.
            images, labels: of this step, on the device.
            modules: all that ``compute`` calls.
            others: what it depends on besides.

        Returns:
            The result of ``compute``, which the next step overwrites.
        """
        if self._broken or not cuda_graph.is_for(images.device):
            return _plain(compute, optimizer, images, labels)
        why_not = cuda_graph.why_not_now()
        if why_not is not None:
            self._say(f"training steps run without a CUDA graph: {why_not}")
            return _plain(compute, optimizer, images, labels)
        inputs = (_layout(images), _layout(labels), torch.is_grad_enabled())
        rests_on = (inputs, tuple(modules), others, forwards_are_original(), cuda_graph.settings())
        if self._gradients is not None:
            if self._gradients.rests_on[1:] != rests_on[1:] or not self._gradients.modules_hold():
                self._gradients = self._update = self._last = None  # at once: its memory is wanted
            elif self._gradients.rests_on == rests_on:
                return self._replay(optimizer, images, labels)
        self._alike = self._alike + 1 if rests_on == self._last else 0
        self._last = rests_on
        if self._alike < self._patience:
            return _plain(compute, optimizer, images, labels)
        self._alike, self._patience = 0, 2 * self._patience
        self._gradients = self._update = None
        optimizer.zero_grad(set_to_none=True)
        why_not = _why_not(rests_on[1], images, labels)
        if why_not is None:
            try:
                gradients = _Gradients(compute, rests_on, images, labels)
                if gradients.modules_hold():
                    self._gradients = gradients
                    return self._replay(optimizer, images, labels)
                why_not = "a module changes its attributes in each step"
            except RuntimeError as error:
                why_not = _in_a_line(error)
            self._broken = True
        self._say(f"training steps run without a CUDA graph: {why_not}")
        return _plain(compute, optimizer, images, labels)

    def _replay(self, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Measured:
        self._gradients.replay(images, labels)
        before, self._last_update = self._last_update, None if self._broken_update else _Numbers.of(optimizer)
        now = self._last_update
        if self._update is not None and (now is None or not now.are(self._update.numbers)):
            self._update = None
        if self._update is None and now is not None and before is not None and now.are(before):
            try:
                self._update = _Update(optimizer, now, images.device)
            except RuntimeError as error:
                self._broken_update = True
                self._say(f"the optimizer's steps run without a CUDA graph: {_in_a_line(error)}")
        if self._update is not None:
            self._update.graph.replay()
        else:
            optimizer.step()
        return self._gradients.measured

    def _say(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._tell(sentence)


def _plain(compute: Compute, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Measured:
    optimizer.zero_grad(set_to_none=True)
    measured = compute(images, labels)
    optimizer.step()
    return measured


class _Gradients:
    """A captured ``compute``: its inputs, the gradients that it leaves, its result."""

    def __init__(self, compute: Compute, rests_on: tuple[object, ...], images: Tensor, labels: Tensor) -> None:
        self.rests_on = rests_on
        modules = _with_children(rests_on[1])
        self._dicts = (*_hooks(nn_module, "_global"), *(d for m in modules for d in _dicts(m)))
        self._values = tuple(value for d in self._dicts for value in d.values())
        self._tensors = _tensors(modules)
        self._answers = tuple(answer for t in self._tensors for answer in (t.requires_grad, t.data_ptr()))
        self._images, self._labels = images.clone(), labels.clone()
        self._graph, self.measured = cuda_graph.capture(images.device, partial(compute, self._images, self._labels))
        # The optimizer, and whoever looks at them, finds them at the parameters, also after a step without the graph.
        self._grads = [(t, t.grad) for t in self._tensors if t.grad is not None]

    def modules_hold(self) -> bool:
        """Whether every attribute, hook and tensor of the modules is as it was."""
        return (
            _host.dicts_are((), (), self._dicts, self._values)
            and _host.tensors_answer(self._tensors, Tensor.requires_grad, Tensor.data_ptr, self._answers)
            and not any(map(_has_hooks, self._tensors))
        )

    def replay(self, images: Tensor, labels: Tensor) -> None:
        self._images.copy_(images)
        self._labels.copy_(labels)
        for parameter, grad in self._grads:
            parameter.grad = grad
        self._graph.replay()


class _Update:
    """A captured step of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, numbers: _Numbers, device: torch.device) -> None:
        self.numbers = numbers
        self.graph, _ = cuda_graph.capture(device, optimizer.step)


class _Numbers(NamedTuple):
    """What a captured step of an optimizer rests on."""

    optimizer: torch.optim.Optimizer
    settings: list[object]
    tensors: list[object]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> _Numbers | None:
        """None where the step must run as it is: it is watched, or a part of it runs on the host.

        Most optimizers keep a count of their steps there. SGD has none, and others none when told to be ``capturable``.
        """
        groups = optimizer.param_groups
        settings = [value for group in groups for name, value in group.items() if name != "params"]
        on_device = [value for value in settings if _is_on_device(value)]
        if type(optimizer) is torch.optim.SGD:  # which reads a learning rate on the device, if it is not fused
            capturable = not on_device or all(group["fused"] for group in groups)
        else:
            capturable = all(group.get("capturable", False) for group in groups)
        # What a schedule puts in place of the optimizer's method only counts.
        own_step = "step" in optimizer.__dict__ and not hasattr(optimizer.step, "_wrapped_by_lr_sched")
        hooks = (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            optimizer_module._global_optimizer_pre_hooks,
            optimizer_module._global_optimizer_post_hooks,
        )
        if not capturable or own_step or any(hooks):
            return None
        on_host = [value for value in settings if not _is_on_device(value)]
        values = [value.tolist() if isinstance(value, Tensor) else value for value in on_host]
        parameters = [p for group in groups for p in group["params"]]
        of_parameters = [each for p in parameters for each in (p, p.grad, *optimizer.state.get(p, {}).values())]
        return cls(optimizer, values, on_device + of_parameters)

    def are(self, other: _Numbers) -> bool:
        return (
            self.optimizer is other.optimizer
            and self.settings == other.settings
            and len(self.tensors) == len(other.tensors)
            and all(map(operator.is_, self.tensors, other.tensors))
        )


def _why_not(modules: tuple[nn.Module, ...], images: Tensor, labels: Tensor) -> str | None:
    """Why a step that begins now, without gradients, cannot be captured."""
    modules = _with_children(modules)
    tensors = _tensors(modules)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "it may talk to other processes"
    if any(isinstance(m, nn.DataParallel) for m in modules) or any(t.device != images.device for t in tensors):
        return f"not all of the model is on {images.device}"
    if not all(map(is_untouched, modules)) or any(map(_has_hooks, tensors)):
        return "the model is compiled or watched: a module or parameter has hooks, or a forward of its own"
    if any(isinstance(m, _NormBase) and m.track_running_stats and m.momentum is None for m in modules):
        return "a BatchNorm with momentum=None reads on the host how many batches there were"
    if any(t.grad is not None for t in tensors):
        return "a parameter that gets gradients is not the optimizer's"
    if torch.is_autocast_enabled(images.device.type):
        return "autocast around the steps keeps the weights of the first one"
    if any(t.requires_grad or torch.empty_like(t).stride() != t.stride() for t in (images, labels)):
        return "the images require gradients, or they or the labels are not dense"
    return None


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.shape, t.stride(), t.dtype, t.device


def _with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(each for module in modules for each in module.modules()))


def _tensors(modules: Iterable[nn.Module]) -> tuple[Tensor, ...]:
    slots = [slot for module in modules for slot in (module._parameters, module._buffers)]
    return tuple(dict.fromkeys(t for slot in slots for t in slot.values() if t is not None))


def _dicts(module: nn.Module) -> tuple[dict, ...]:
    return module.__dict__, module._parameters, module._buffers, module._modules, *_hooks(module, "")


def _hooks(owner: object, prefix: str) -> list[dict]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(owner, prefix + name) for name in names]


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def _is_on_device(setting: object) -> bool:
    return isinstance(setting, Tensor) and not setting.is_cpu


def _in_a_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
