"""Finding the CUDA toolkit among folders that only look like one. The toolkits are folders made here."""

from pathlib import Path

import pytest

from mobilenet_ext import cuda_toolkit
from mobilenet_ext.cuda_toolkit import find_cuda_toolkit


def make_script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str, runtime_library: bool = True) -> Path:
    make_script(
        home / "bin" / "nvcc",
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release X, V{version}"; fi',
        f"if [ \"$1\" = --dryrun ]; then echo '#$ _SPACE_=' >&2; echo '#$ TOP={home}/bin/..' >&2; fi",
    )
    if runtime_library:
        (home / "lib64").mkdir()
        (home / "lib64" / "libcudart.so").touch()
    return home


@pytest.fixture(autouse=True)
def no_toolkit_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(cuda_toolkit, "DEFAULT_HOME", tmp_path / "default")


def test_none() -> None:
    assert find_cuda_toolkit() is None


def test_default_folder(tmp_path: Path) -> None:
    make_toolkit(tmp_path / "default", "13.0.88")
    assert find_cuda_toolkit() == (tmp_path / "default", "13.0.88", "default folder")


def test_script_on_path_leads_to_the_toolkit_that_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "default", "12.0.1")
    home = make_toolkit(tmp_path / "real", "13.0.88")
    wrapper = make_script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/bin")
    assert find_cuda_toolkit() == (home, "13.0.88", f"nvcc on PATH, {wrapper}")


def test_environment_variable_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toolkit(tmp_path / "default", "12.0.1")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "mine", "12.8.93")))
    assert find_cuda_toolkit() == (tmp_path / "mine", "12.8.93", "environment variable CUDA_HOME")


def test_folder_that_cannot_be_linked_with_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "compiler_only", "12.8.93", runtime_library=False)))
    make_toolkit(tmp_path / "default", "13.0.88")
    assert find_cuda_toolkit().home == tmp_path / "default"
