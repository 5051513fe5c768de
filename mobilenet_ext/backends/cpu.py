"""The CPU backend: C++ kernels (``csrc/cpu``), one build for every instruction set and every torch from 2.11 on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mobilenet_ext.inference_steps import Step

LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"

if not LIBRARY.exists():
    raise ImportError(
        f"{LIBRARY} is missing: mobilenet_ext is imported from a source tree whose kernels were not built; "
        "run `pip install -e .` there"
    )
torch.ops.load_library(str(LIBRARY))  # also defines the schemas of the op set

kernels = torch.ops.mobilenet_ext_cpu


def isa() -> str:
    """The instruction set that the kernels chose for this machine."""
    chosen = ctypes.CDLL(str(LIBRARY)).mx_cpu_isa
    chosen.restype = ctypes.c_char_p
    return chosen().decode()


def empty_cache() -> None:
    """Gives the memory that the kernels keep for later calls back to the system."""
    ctypes.CDLL(str(LIBRARY)).mx_cpu_empty_cache()


def pack(depthwise_bn: Tensor | None, depthwise_weight: Tensor | None, pointwise_weight: Tensor) -> Tensor:
    """What ``block_inference``, or without a depthwise part ``pointwise_inference``, otherwise makes of these at each
    call (``csrc/cpu/block_inference.h``): uint8, one-dimensional."""
    return kernels.pack(depthwise_bn, depthwise_weight, pointwise_weight)


class PlanBuilder:
    """Inference ops that become one call (``csrc/cpu/plan.h``), which has copies of the tensors that it needs.

    Values are numbered: those that the call is given, then what each op gives.
    """

    def __init__(self, inputs: int) -> None:
        self._inputs, self._ops, self._sources = inputs, [], []
        self._tensors: list[Tensor] = []
        self._settings: list[int] = []
        self._slopes: list[float] = []

    def add(
        self, op: str, arguments: Iterable[object], source: int, gate: int | None = None, residual: int | None = None
    ) -> int:
        """Add an op with its arguments after the activation, every weight packed; the number of what it gives."""
        self._ops.append(op)
        self._sources += [source, *(-1 if value is None else value for value in (gate, residual))]
        for argument in arguments:
            if isinstance(argument, Tensor):
                self._tensors.append(argument)
            elif isinstance(argument, float):
                self._slopes.append(argument)
            elif argument is not None:
                self._settings += map(int, argument) if isinstance(argument, tuple) else [int(argument)]
        return self._inputs + len(self._ops) - 1

    def add_steps(
        self, steps: Sequence[Step], source: int, gate: int | None = None, residual: int | None = None
    ) -> int:
        """Add a chain, whose last op adds the residual; the number of what it gives."""
        for i, step in enumerate(steps):
            of_this = (gate if step.gated else None, residual if i == len(steps) - 1 else None)
            name = step.op._schema.name.split("::")[1]
            source = self.add(name, (*step.before, *step.after), source, *of_this)
        return source

    def build(self, outputs: Sequence[int]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """The call, which gives the values of these numbers."""
        plan = kernels.make_plan(
            self._ops, self._tensors, self._settings, self._slopes, self._inputs, self._sources, outputs
        )
        run = kernels.run_plan.default
        return lambda inputs: run(inputs, plan)


def why_not() -> str | None:
    """None: the kernels run on every CPU."""
    return None
