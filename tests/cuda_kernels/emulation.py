"""Builds the CUDA backend for the emulated device (``emulator/``): the same kernels and bindings, on CPU tensors."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import ninja
import torch
from torch.utils import cpp_extension

from mobilenet_ext.cuda_toolkit import find_cuda_toolkit
from mobilenet_ext.files import locked

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
EMULATOR = Path(__file__).parent / "emulator"
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Werror -Wno-unknown-pragmas -Wno-psabi -ffp-contract=off"
DEFINES = "-DMX_EMULATED_DEVICE -DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY"


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    return None if find_cuda_toolkit() else "no CUDA toolkit is found, whose headers the kernels include"


@cache
def build() -> Path:
    """The library of the whole backend; what has not changed is not compiled again."""
    kernels = sorted((SOURCES / "cuda").glob("*.cu"))
    return compile_library("backend", [*kernels, SOURCES / "cuda" / "bindings.cpp", EMULATOR / "runtime.cpp"], True)


def compile_library(name: str, sources: list[Path], torch_library: bool = False, emulated: bool = True) -> Path:
    """Compiles ``sources``, with the emulator if ``emulated``, into a library under ``build/``."""
    folder = ROOT / "build" / f"cuda-emulation-torch{torch.__version__}" / name
    folder.mkdir(parents=True, exist_ok=True)
    cuda = find_cuda_toolkit().home / "include"
    includes = [f"-I{SOURCES}", f"-I{SOURCES / 'cuda'}", f"-I{EMULATOR}", f"-isystem {cuda}"]
    link = []
    if torch_library:
        includes += [f"-isystem {path}" for path in cpp_extension.include_paths()]
        link = [f"-L{path} -Wl,-rpath,{path}" for path in cpp_extension.library_paths()] + ["-ltorch -ltorch_cpu -lc10"]
    compiler = sysconfig.get_config_var("CXX").split()[0]
    sources = [*sources, EMULATOR / "emulator.cpp"] if emulated else sources
    objects = {folder / (source.name + ".o"): source for source in sources}
    library = folder / f"lib{name}.so"
    lines = [
        "rule compile",
        f"  command = {compiler} {FLAGS} {DEFINES} {' '.join(includes)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -Wl,--no-undefined {' '.join(link)}",
        *(f"build {output}: compile {source}" for output, source in objects.items()),
        f"build {library}: link {' '.join(map(str, objects))}",
    ]
    with locked(folder / ".lock", wait=True):  # workers of pytest-xdist may want it at once
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout)
    return library


def set_device(
    library: Path, capability: int = 90, compiled_for: int | None = None, multiprocessors: int = 2, order: int = 1
) -> None:
    """What the emulated device pretends to be.

    Its code was compiled for ``compiled_for``, else for its own capability; ``order`` -1 runs the threads of a block
    from the last to the first.
    """
    loaded = ctypes.CDLL(str(library))
    loaded.mx_emulator_device(capability, compiled_for or capability, multiprocessors)
    loaded.mx_emulator_order(order)
