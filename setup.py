"""Builds the compiled parts of mobilenet_ext (the package's metadata is in pyproject.toml).

mobilenet_ext/_cpu.abi3.so   schemas of all ops and the CPU kernels, on libtorch's stable ABI: no Python in it, loaded
                             with torch.ops.load_library, and one binary serves torch 2.11 and every newer one
mobilenet_ext/_cuda.abi3.so  the CUDA kernels, a library of its own so that the CPU's loads everywhere; built where
                             torch has CUDA and a matching toolkit is found
mobilenet_ext/_host.*.so     pybind11 module without torch: what was built, what this machine's CPU can do, and
                             whether Python objects are as they were

`pip install .`, `pip install -e .` and, for work on the kernels, `python setup.py build_ext --inplace`.
"""

import importlib.util
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
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # An sdist and the metadata need no torch; only BuildExt.run() below does.
    torch, BuildExtension, CppExtension = None, build_ext, Extension

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # libtorch's stable ABI as of torch 2.11
# Built for where neither TORCH_CUDA_ARCH_LIST nor a visible GPU says otherwise; of these, what nvcc knows. The PTX is
# of one that every nvcc knows: from it the driver compiles for GPUs that no machine code is of (11.0).
CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0+PTX", "10.0", "12.0")

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
        files("csrc/ops.cpp", "csrc/cpu/*.cpp", "csrc/host/cpu_features.cpp"),
        depends=files("csrc/*.h", "csrc/cpu/*.h", "csrc/host/cpu_features.h"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=COMPILE_FLAGS.copy(),
        py_limited_api=True,
    )


def find_toolkit():
    """The CUDA toolkit to build with, and None; or None, and why not."""
    if torch is None or torch.version.cuda is None:
        return None, "not built: PyTorch is built without CUDA"
    path = ROOT / "mobilenet_ext" / "cuda_toolkit.py"  # the package itself cannot be imported before it is built
    spec = importlib.util.spec_from_file_location("cuda_toolkit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    toolkit = module.find_cuda_toolkit()
    if toolkit is None:
        return None, "not built: no CUDA toolkit is found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    if toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"not built: the CUDA toolkit is {toolkit.version}, PyTorch's CUDA {torch.version.cuda}"
    return toolkit, None


def cuda_architectures(nvcc: Path) -> str:
    """In the form of TORCH_CUDA_ARCH_LIST."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        visible = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(a for a in CUDA_ARCHITECTURES if f"sm_{a.partition('+')[0].replace('.', '')}" in known)


def cuda_library(toolkit) -> Extension:
    # torch takes the folder of the nvcc on PATH for the toolkit's, where a wrapper script has no libcudart beside it.
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(toolkit.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(toolkit.home / "bin" / "nvcc")
    return CUDAExtension(
        "mobilenet_ext._cuda",
        files("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
        depends=files("csrc/*.h", "csrc/cuda/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": COMPILE_FLAGS.copy(),
            "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden"],
        },
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
        "CUDA": NO_CUDA or f"toolkit {TOOLKIT.version}",
        "CUDA_ARCHITECTURES": "" if NO_CUDA else os.environ["TORCH_CUDA_ARCH_LIST"],
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
        if NO_CUDA:
            print(f"mobilenet_ext: CUDA kernels {NO_CUDA}", file=sys.stderr)
        super().build_extensions()

    def get_ext_filename(self, ext_name: str) -> str:
        # Not Python's suffix: a free-threaded Python has no abi3, but there is no Python in these libraries.
        if ext_name.split(".")[-1] in ("_cpu", "_cuda"):
            return str(Path(*ext_name.split("."))) + ".abi3.so"
        return super().get_ext_filename(ext_name)


TOOLKIT, NO_CUDA = find_toolkit()
setup(
    ext_modules=[cpu_library(), *([cuda_library(TOOLKIT)] if TOOLKIT else []), host_module()],
    cmdclass={"build_ext": BuildExt},
)
