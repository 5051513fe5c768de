"""The CPU backend: C++ kernels (``csrc/cpu``), one build for every instruction set and every torch from 2.11 on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
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


def plan_runner(steps: Sequence[Step]) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """A chain of inference ops, every weight packed, as one call of an input, its gate and a residual
    (``csrc/cpu/plan.h``). It has copies of the tensors that it needs."""
    names = [step.op._schema.name.split("::")[1] for step in steps]
    arguments = [argument for step in steps for argument in (*step.before, *step.after) if argument is not None]
    tensors, settings, slopes = [], [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, float):
            slopes.append(argument)
        else:
            settings += map(int, argument) if isinstance(argument, tuple) else [int(argument)]
    run, plan = kernels.run_plan.default, kernels.make_plan(names, tensors, settings, slopes)
    return lambda x, gate, residual: run(x, plan, gate, residual)


def why_not() -> str | None:
    """None: the kernels run on every CPU."""
    return None
