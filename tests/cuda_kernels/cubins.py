"""Compiles the CUDA kernels for real GPUs, which need not be there: what ``test_cuda_machine_code.py`` looks at."""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import background
import sass
from emulation import SOURCES

from mobilenet_ext.cuda_toolkit import find_cuda_toolkit

TOOLKIT = find_cuda_toolkit()
POINTWISE = ("pointwise_forward", "pointwise_backward", "gated_pointwise_forward", "gated_pointwise_backward")
PRODUCTS = (*POINTWISE, "dense_forward", "dense_backward", "block_inference")
FILES = ("depthwise_forward", "depthwise_backward", "norm_act", "merge", "gpu", *PRODUCTS)

Kernels = dict[tuple[str, str], sass.MachineCode]  # by file and name: stride_1<__half, 4>


def why_not() -> str | None:
    """Why no kernel can be compiled and read here, or None."""
    if TOOLKIT is None:
        return "no CUDA toolkit is found"
    tools = all(map(sass.find_tool, ("cuobjdump", "nvdisasm")))
    return None if tools else "cuobjdump and nvdisasm are not found"


@cache
def start(architecture: int) -> list[Future[Kernels]]:
    """Compiles all files in the background."""
    return [background.start(_compile, name, architecture) for name in FILES]


@cache
def of(architecture: int) -> Kernels:
    parts = [part.result() for part in start(architecture)]
    return {name: code for part in parts for name, code in part.items()}


def _compile(name: str, architecture: int) -> Kernels:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        nvcc = [TOOLKIT.home / "bin" / "nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin"]
        compiled = background.run([*nvcc, "-o", cubin.name, SOURCES / "cuda" / f"{name}.cu"])
        assert compiled.returncode == 0, compiled.stdout
        codes = sass.read(Path(cubin.name))
    names = subprocess.run(["c++filt", *codes], check=True, capture_output=True, text=True).stdout.splitlines()
    without_scope = [re.sub(r"\(anonymous namespace\)::|mx::cuda::|^void ", "", n).split("(")[0] for n in names]
    return {(name, short): code for short, code in zip(without_scope, codes.values(), strict=True)}
