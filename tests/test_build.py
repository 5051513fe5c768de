"""The build: sdist, metadata, wheel tag, the choice of torch, and what the libraries link to. (tests/install_matrix.sh
installs into fresh environments; it takes long and is run by hand.)"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from every_op import kernel_ops

import mobilenet_ext as mx
from mobilenet_ext import _host
from mobilenet_ext.cuda_toolkit import find_cuda_toolkit

ROOT = Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns(
    ".git", ".*_cache", ".hypothesis", ".venv", "__pycache__", "build", "dist", "*.so", "*.egg-info", "runs", "data"
)


def why_no_cuda() -> str | None:
    """Why the CUDA library is not to be expected here. Where it is, it must be there: a missing one is no reason."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    toolkit = find_cuda_toolkit()
    if toolkit is None or toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"no toolkit for CUDA {torch.version.cuda}"
    return None


WITH_CUDA = pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda()))


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: building leaves files behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=BUILT))


@pytest.fixture(scope="module")
def sdist(source: Path) -> dict[str, bytes]:
    """Contents of the sdist by path, built as pip builds it."""
    build = "import sys; sys.path.insert(0, 'build_tools'); import backend; backend.build_sdist('dist')"
    result = run(sys.executable, "-c", build, cwd=source)
    assert result.returncode == 0, result.stdout
    (archive,) = (source / "dist").glob("mobilenet_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        files = [member for member in tar.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: tar.extractfile(member).read() for member in files}


def test_sdist_holds_every_source(sdist: dict[str, bytes], source: Path) -> None:
    wanted = [
        path for folder in ("csrc", "mobilenet_ext", "build_tools", "tests") for path in (source / folder).rglob("*")
    ]
    wanted = {str(path.relative_to(source)) for path in wanted if path.suffix in {".py", ".cpp", ".h", ".cu", ".sh"}}
    wanted |= {"setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE"}
    assert {"csrc/ops.h", "csrc/cuda/merge.cu"} <= wanted
    assert wanted - sdist.keys() == set()
    assert not [name for name in sdist if name.endswith((".so", ".pyc", ".o"))]


def test_metadata(sdist: dict[str, bytes]) -> None:
    metadata = message_from_bytes(sdist["PKG-INFO"])
    assert metadata["Version"] == mx.__version__
    required = [line for line in metadata.get_all("Requires-Dist") if "extra" not in line]
    assert sorted(required) == ["numpy", "torch>=2.11"]
    asked_for = {
        extra
        for extras in re.findall(r"'\.\[([\w,-]+)\]'", (ROOT / "README.md").read_text())
        for extra in extras.split(",")
    }
    assert {"train", "test", "digits"} <= asked_for <= set(metadata.get_all("Provides-Extra"))


def test_wheel_is_for_this_python_and_platform(source: Path) -> None:
    ask = (
        "from setuptools import distutils; from distutils.core import run_setup; "
        "command = run_setup('setup.py', stop_after='init').get_command_obj('bdist_wheel'); "
        "command.ensure_finalized(); print(*command.get_tag())"
    )
    result = run(sys.executable, "-W", "ignore", "-c", ask, cwd=source)
    interpreter, abi, platform = result.stdout.splitlines()[-1].split()
    assert interpreter == abi.rstrip("t") == f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert platform.replace("-", "_") == sysconfig.get_platform().replace("-", "_").replace(".", "_")


def test_failed_compile_fails_with_the_compilers_message(source: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=BUILT)
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    (tree / "csrc" / "ops.cpp").write_text('#error "broken on purpose"\n')
    result = run(sys.executable, "setup.py", "build_ext", cwd=tree)
    assert result.returncode != 0
    assert 'error: #error "broken on purpose"' in result.stdout


# --- Which torch is compiled against ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "package", "required"),
    [
        (None, False, ["torch>=2.11"]),
        ("2.11.0", True, []),
        ("2.13.0+cpu", True, []),
        ("3.0.0a0+git1234", True, []),
        ("2.10.1", True, ["torch>=2.11"]),  # pip replaces it
        ("2.13.0", False, ["torch>=2.11"]),  # metadata of an editable install: not importable from there
    ],
)
def test_torch_is_a_build_requirement_only_where_there_is_none(
    version: str | None, package: bool, required: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        information = tmp_path / f"torch-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    if package:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"platlib": str(tmp_path), "purelib": str(tmp_path)})
    monkeypatch.setattr(sys, "path", sys.path.copy())
    spec = importlib.util.spec_from_file_location("mobilenet_ext_build_backend", ROOT / "build_tools" / "backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)

    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == required
    assert (str(tmp_path) in sys.path) == (not required)
    assert str(tmp_path) not in sys.path[:-1]  # behind the build requirements


# --- What was built ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=WITH_CUDA)])
def test_library_needs_only_the_stable_abi(backend: str) -> None:
    library = getattr(mx.backends, backend).LIBRARY
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert any(name.startswith("aoti_torch_") for name in symbols)
    unstable = [name for name in symbols if re.match(r"_?Py|_ZNK?(2at|3c10|5torch)", name)]
    assert unstable == []


@WITH_CUDA
def test_cuda_library_loads_and_implements_every_op() -> None:
    """On machines without a GPU too."""
    torch.ops.load_library(str(mx.backends.cuda.LIBRARY))
    for name in kernel_ops():
        qualified = f"mobilenet_ext_cuda::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"), name
        assert getattr(torch.ops.mobilenet_ext_cuda, name).default._schema.arguments[0].name
    assert _host.build_info()["cuda"].startswith("toolkit ")


@pytest.mark.skipif(bool(torch.version.cuda), reason="this torch has CUDA")
def test_without_cuda_the_reason_is_one_line() -> None:
    assert _host.build_info()["cuda"] == "not built: PyTorch is built without CUDA"
    assert mx.backends.available()["cuda"] == "not built: PyTorch is built without CUDA"
    assert _host.build_info()["cuda_architectures"] == ""


@WITH_CUDA
@pytest.mark.parametrize("wanted", ["", "8.6;9.0"])
def test_cuda_architectures(wanted: str, source: Path) -> None:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs', else those of the README, PTX for others with them."""
    ask = (
        "import os; from distutils.core import run_setup; run_setup('setup.py', stop_after='init'); "
        "print(os.environ['TORCH_CUDA_ARCH_LIST'])"
    )
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": wanted, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", "from setuptools import distutils; " + ask]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == (wanted or "7.5;8.0;9.0+PTX;10.0;12.0")


def test_build_info() -> None:
    information = _host.build_info()
    assert set(information) == {"compiler", "flags", "torch", "torch_target", "cuda", "cuda_architectures", "commit"}
    assert information["torch_target"] == "2.11"
    assert "-ffast-math" not in information["flags"]  # NaN and Inf must go where PyTorch sends them


def test_host_module_needs_no_torch() -> None:
    load = (
        "import importlib.util, sys; sys.modules['torch'] = None; "
        f"spec = importlib.util.spec_from_file_location('_host', {_host.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(module.build_info()['torch'])"
    )
    result = run(sys.executable, "-c", load, cwd=ROOT)
    assert result.stdout.strip() == _host.build_info()["torch"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="compares with Linux's /proc/cpuinfo")
def test_cpu_features_are_those_that_the_kernel_reports() -> None:
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1).split()
    features = _host.cpu_features()
    assert features.keys() == {
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512_bf16",
        "amx_bf16",
    }
    assert {name for name, usable in features.items() if usable} == features.keys() & set(flags)
