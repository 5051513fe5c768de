"""Every kernel launch of the network, recorded without a GPU and compiled ahead of time.

Launches are not listed but recorded, from networks of meta tensors whose kernel ops go to the Triton backend: what the
heuristics choose is what is compiled. Triton's own binder makes the specialisation, as it does for a launch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sass
import triton
from sass import MachineCode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

import mobilenet_ext.triton
from mobilenet_ext.contract import Act
from mobilenet_ext.triton import gpu
from mobilenet_ext.triton.activation import compiled


class Architecture(NamedTuple):
    """What to compile for, and the GPU that the heuristics see."""

    name: str
    capability: int
    gpu: gpu.Gpu

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


ARCHITECTURES = (
    Architecture("sm_80", 80, gpu.Gpu(108, 163 * 1024, 80)),
    Architecture("sm_90", 90, gpu.Gpu(132, 227 * 1024, 90)),
    Architecture("sm_100", 100, gpu.Gpu(148, 227 * 1024, 100)),
    # Consumer GPUs: little shared memory.
    Architecture("sm_86", 86, gpu.Gpu(84, 99 * 1024, 86)),
    Architecture("sm_120", 120, gpu.Gpu(170, 99 * 1024, 120)),
)


class Launch(NamedTuple):
    """One specialisation of a kernel: what a compilation takes, in a form that can be sent to another process."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]

    @property
    def names(self) -> dict[str, Any]:
        """The compile-time constants by name, pointers that were None left out."""
        values = {list(self.signature)[i]: value for (i,), value in self.constants.items()}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        pointers = [kind for kind in self.signature.values() if kind.startswith("*")]
        constants = " ".join(f"{name}={value}" for name, value in {**self.names, **self.options}.items())
        return f"{self.module.rpartition('.')[2]}.{self.kernel}({', '.join(dict.fromkeys(pointers))}; {constants})"


def with_activation(launch: Launch, act: Act) -> Launch | None:
    """The launch with ``act`` in place of ReLU; None if there is none in it."""
    names = list(launch.signature)
    relus = [key for key, value in launch.constants.items() if names[key[0]].startswith("ACT") and value == Act.RELU]
    constants = {**launch.constants, **dict.fromkeys(relus, compiled(act, slope=0.01))}
    return launch._replace(constants=constants) if relus else None


class TritonOps(TorchDispatchMode):
    """Hands the kernel ops of meta tensors to the Triton backend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        op = mobilenet_ext.triton.ops.get(name) if namespace == "mobilenet_ext" else None
        return (op or func)(*args, **(kwargs or {}))


GRID_LIMITS = (2**31 - 1, 65535, 65535)


@contextlib.contextmanager
def recording(architecture: Architecture, launches: dict[str, Launch]) -> Iterator[None]:
    """Adds each different launch that would run on a GPU of ``architecture`` to ``launches``; nothing runs."""
    backend = make_backend(architecture.target)
    binders: dict[JITFunction, Any] = {}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(0 < size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=False)), (self, grid)
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binders[self](*args, **kwargs)
        key = f"{self.__module__}.{self.__name__} {specialization} {options}"
        if key not in launches:
            _, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
            launches[key] = Launch(self.__module__, self.__name__, signature, constants, attributes, options)

    run, JITFunction.run = JITFunction.run, record
    h100, gpu.H100 = gpu.H100, architecture.gpu  # what gpu.of() gives for meta tensors
    try:
        with TritonOps():
            yield
    finally:
        JITFunction.run, gpu.H100 = run, h100


@dataclass(frozen=True)
class CompiledLaunch(MachineCode):
    shared: int
    dots: list[tuple[str, int, int, int]]  # matrix products in the source: operands' type, M, N, K
    unused: list[str]  # arguments that the compiled kernel never looks at


def compile_launch(launch: Launch, architecture: Architecture) -> CompiledLaunch:
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source_type = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_type(kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=architecture.target, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = sass.read(Path(file.name)).values()
    dots, unused = _dots(compiled.asm.get("ttir") or compiled.asm["ttgir"]), _unused(launch, compiled.asm["ptx"])
    return CompiledLaunch(**vars(code), shared=compiled.metadata.shared, dots=dots, unused=unused)


def use_cache(folder: str) -> None:
    """For a worker process: compile into ``folder``, so that nothing compiled before is taken for this run's."""
    os.environ["TRITON_CACHE_DIR"] = folder


def _dots(ir: str) -> list[tuple[str, int, int, int]]:
    shapes = r" : (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x(\w+).*?> \* (?:tensor|!ttg\.memdesc)<\d+x(\d+)x\w+"
    found = re.findall(r"= tt(?:ng)?\.(?:dot|warp_group_dot) .*" + shapes, ir)
    return [(kind, int(m), int(n), int(k)) for m, k, kind, n in found]


def _unused(launch: Launch, ptx: str) -> list[str]:
    """Arguments that are never read. TMA's description of a matrix comes with two sizes and two strides after it, which
    it has in itself as well."""
    unused, i = [], 0
    for name, kind in launch.signature.items():
        if kind != "constexpr":
            if not re.search(rf"(ld\.param\S*|mov\.b64)\s[^;]*_param_{i}\b", ptx):
                unused.append(name)
            i += 5 if kind.startswith("tensordesc") else 1
    return unused
