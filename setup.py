"""Builds the compiled parts of mobilenet_ext (the package's metadata is in pyproject.toml).

mobilenet_ext/_cpu.abi3.so   schemas of all ops and the CPU kernels, on libtorch's stable ABI: no Python in it, loaded
                             with torch.ops.load_library, and one binary serves torch 2.11 and every newer one
mobilenet_ext/_host.*.so     pybind11 module without torch: what was built, and what this machine's CPU can do

`pip install .`, `pip install -e .` and, for work on the kernels, `python setup.py build_ext --inplace`.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # An sdist and the metadata need no torch; only BuildExt.run() below does.
    torch, BuildExtension, CppExtension = None, build_ext, Extension

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # libtorch's stable ABI as of torch 2.11
CUDA_STATE = "not built: this version has no CUDA kernels"

# No -ffast-math: NaN and Inf must go where PyTorch sends them. Contraction to FMA and a math library that leaves errno
# alone change no special value. -Wno-psabi: GCC's note about passing vectors, which never leave a translation unit.
# -Wno-...uninitialized: false alarms from GCC's own AVX-512 header (GCC bug 105593).
COMPILE_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
COMPILE_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
if "-g" not in os.environ.get("CFLAGS", "").split():
    COMPILE_FLAGS.append("-g0")  # Python's own flags ask for debug information, most of the library's size


def files(*patterns: str) -> list[str]:
    """Paths relative to the root, as setuptools wants them for the sdist's manifest."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cpu_library() -> Extension:
    """The stable-ABI library. The kernels choose their instruction set themselves, so no -march here."""
    return CppExtension(
        "mobilenet_ext._cpu",
        files("csrc/ops.cpp", "csrc/cpu/*.cpp"),
        depends=files("csrc/*.h", "csrc/cpu/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=COMPILE_FLAGS.copy(),
        py_limited_api=True,
    )


def host_module() -> Extension:
    return Extension(
        "mobilenet_ext._host",
        files("csrc/host/*.cpp"),
        depends=files("csrc/host/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=COMPILE_FLAGS.copy(),
        language="c++",
    )


def git_commit() -> str:
    """The checkout's commit, or "" where ROOT is not the top of a git work tree (an unpacked sdist)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if top and Path(top) == ROOT else ""
    except OSError:  # no git
        return ""


def write_build_info(folder: Path) -> None:
    """Writes what csrc/host/build_info.cpp includes; an unchanged file is left alone, so that it is not recompiled."""
    values = {
        "TORCH": torch.__version__,
        "TORCH_TARGET": f"{int(TORCH_TARGET_VERSION[2:4], 16)}.{int(TORCH_TARGET_VERSION[4:6], 16)}",
        "FLAGS": " ".join(COMPILE_FLAGS),
        "CUDA": CUDA_STATE,
        "COMMIT": git_commit(),
    }
    text = "".join(f"#define MX_BUILD_{name} {json.dumps(value)}\n" for name, value in values.items())
    path = folder / "build_info_generated.h"
    if not path.is_file() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class BuildExt(BuildExtension):
    """torch's ninja build, with object files that outlive one build."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if torch is not None:
            # setuptools gives an editable install a temporary folder, in which ninja would compile everything anew.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = str(Path("build") / f"temp.{tag}")

    def run(self) -> None:
        if torch is None:
            raise SystemExit(
                "mobilenet_ext is compiled against PyTorch, and there is none here: install torch>=2.11 first, or let "
                "pip build in isolation (leave out --no-build-isolation), which brings it."
            )
        super().run()

    def build_extensions(self) -> None:
        import ninja
        import pybind11

        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR  # torch looks on PATH, where an environment's need not be
        generated = ROOT / self.build_temp / "generated"
        write_build_info(generated)
        for extension in self.extensions:
            if extension.name == "mobilenet_ext._host":
                extension.include_dirs += [pybind11.get_include(), str(generated)]
        super().build_extensions()

    def get_ext_filename(self, ext_name: str) -> str:
        # Not Python's suffix: a free-threaded Python has no abi3, but there is no Python in this library.
        if ext_name.split(".")[-1] == "_cpu":
            return str(Path(*ext_name.split("."))) + ".abi3.so"
        return super().get_ext_filename(ext_name)


setup(ext_modules=[cpu_library(), host_module()], cmdclass={"build_ext": BuildExt})
