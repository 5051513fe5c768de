"""The machine code of the CUDA kernels for real GPUs, which need not be there: what ``test_cuda_machine_code.py`` looks
at. It is the installed library's, if that has some for the GPU and is of these sources; else it is compiled."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import sass
from emulation import SOURCES

import mobilenet_ext
from mobilenet_ext.cuda_toolkit import find_cuda_toolkit

LIBRARY = Path(mobilenet_ext.__file__).with_name("_cuda.abi3.so")
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
def of(architecture: int) -> Kernels:
    read = _installed if _is_installed(architecture) else _compiled
    return {name: code for part in read(architecture) for name, code in part.items()}


def _is_installed(architecture: int) -> bool:
    if not LIBRARY.is_file() or LIBRARY.stat().st_mtime < max(path.stat().st_mtime for path in SOURCES.rglob("*")):
        return False
    return f".sm_{architecture}.cubin" in _cuobjdump("-lelf", LIBRARY)


def _installed(architecture: int) -> list[Kernels]:
    with tempfile.TemporaryDirectory() as folder:
        _cuobjdump("-xelf", "all", "-arch", f"sm_{architecture}", LIBRARY, cwd=folder)
        cubins = sorted(Path(folder).iterdir(), key=lambda cubin: int(cubin.name.split(".")[-3]))
        return [_read(file, cubin) for file, cubin in zip(sorted(FILES), cubins, strict=True)]  # as they were linked


def _cuobjdump(*arguments: object, **options: str) -> str:
    command = [sass.find_tool("cuobjdump"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def _compiled(architecture: int) -> list[Kernels]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(partial(_compile, architecture=architecture), FILES))


def _compile(name: str, architecture: int) -> Kernels:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        nvcc = [TOOLKIT.home / "bin" / "nvcc", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin"]
        command = [*nvcc, "-o", cubin.name, SOURCES / "cuda" / f"{name}.cu"]
        compiled = subprocess.run(command, capture_output=True, text=True)
        assert compiled.returncode == 0, compiled.stderr
        return _read(name, Path(cubin.name))


def _read(file: str, cubin: Path) -> Kernels:
    codes = sass.read(cubin)
    named = {file for mangled in codes for file in re.findall(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", mangled)}
    assert named <= {file}, named  # those that only this file has say so
    names = subprocess.run(["c++filt", *codes], check=True, capture_output=True, text=True).stdout.splitlines()
    without_scope = [re.sub(r"\(anonymous namespace\)::|mx::cuda::|^void ", "", n).split("(")[0] for n in names]
    return {(file, short): code for short, code in zip(without_scope, codes.values(), strict=True)}
