"""Choosing a backend: available, set, use, the environment variable, the fallback of ``auto``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from plain import randomise_

import mobilenet_ext as mx
from mobilenet_ext import _host, backends
from mobilenet_ext.backends import cuda, gpus

NAMES = {"triton", "cuda", "cpu", "reference"}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    env.setdefault("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def _restore():
    chosen, auto = backends._chosen, dict(backends._auto)
    yield
    backends._chosen = chosen
    backends._auto.clear()
    backends._auto.update(auto)


def unit_output() -> torch.Tensor:
    return mx.functional.pointwise_conv2d(torch.ones(1, 4, 2, 2), torch.ones(3, 4, 1, 1))


def test_available():
    names = backends.available()
    assert set(names) == NAMES
    assert names["cpu"] is None and names["reference"] is None
    for name, why_not in names.items():
        assert why_not is None or (isinstance(why_not, str) and why_not and "\n" not in why_not), name


def test_auto_picks_the_cpu_kernels():
    backends.set("auto")
    assert backends.current("cpu") == "cpu"


def test_set_and_use():
    backends.set("reference")
    assert backends.current("cpu") == "reference"
    with backends.use("cpu"):
        assert backends.current("cpu") == "cpu"
        with backends.use("reference"):
            assert backends.current("cpu") == "reference"
        assert backends.current("cpu") == "cpu"
        with backends.use("auto"):
            assert backends.current("cpu") == "cpu"
    assert backends.current("cpu") == "reference"


def test_use_restores_after_an_error():
    before = backends.current("cpu")
    with pytest.raises(KeyError), backends.use("reference"):
        raise KeyError
    assert backends.current("cpu") == before


@pytest.fixture
def spy(monkeypatch):
    """Counts the calls that reach the reference backend."""
    calls = []
    original = backends.reference.pointwise_inference

    def counted(*args):
        calls.append(threading.get_ident())
        return original(*args)

    monkeypatch.setattr(backends.reference, "pointwise_inference", counted)
    return calls


def test_the_choice_decides_what_runs(spy):
    with backends.use("reference"):
        unit_output()
    assert len(spy) == 1
    backends.set("reference")
    unit_output()
    assert len(spy) == 2


def test_the_choice_holds_in_other_threads(spy):
    """Backward runs on threads of its own."""
    with backends.use("reference"):
        thread = threading.Thread(target=unit_output)
        thread.start()
        thread.join()
    assert len(spy) == 1 and spy[0] != threading.get_ident()


@pytest.mark.parametrize("choose", [backends.set, lambda name: backends.use(name).__enter__()])
@pytest.mark.parametrize("name", ["tensorflow", "", "CPU", None, 3, ["cpu"]])
def test_unknown_names_are_refused(choose, name):
    before = backends.current("cpu")
    with pytest.raises(ValueError, match="^backend .*accepted are auto, .*reference") as error:
        choose(name)
    assert repr(name) in str(error.value)
    assert backends.current("cpu") == before


@pytest.mark.parametrize("choose", [backends.set, lambda name: backends.use(name).__enter__()])
def test_unusable_backends_are_refused_with_the_reason(choose):
    unusable = {name: why for name, why in backends.available().items() if why is not None}
    if not unusable:
        pytest.skip("every backend is usable here")
    before = backends.current("cpu")
    for name, why in unusable.items():
        with pytest.raises(RuntimeError) as error:
            choose(name)
        assert name in str(error.value) and why in str(error.value)
    assert backends.current("cpu") == before


def test_a_backend_of_another_device_is_refused():
    with backends.use("cpu"), pytest.raises(RuntimeError, match="cpu.*cuda"):
        backends.current("cuda")


def test_auto_falls_back_to_the_reference_and_says_so_once(monkeypatch):
    for name, backend in list(backends._BACKENDS.items()):
        if backend.device_type == "cpu":  # Triton's too, where it is interpreted
            broken = backend._replace(why_not=lambda: "the kernels are out of order")
            monkeypatch.setitem(backends._BACKENDS, name, broken)
    backends._auto.clear()
    backends._chosen = "auto"
    with pytest.warns(UserWarning, match="reference.*out of order") as caught:
        first = unit_output()
        second = unit_output()
    assert len(caught) == 1
    assert torch.equal(first, second)
    assert backends.current("cpu") == "reference"


def test_no_warning_otherwise():
    backends._auto.clear()
    backends._chosen = "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit_output()
        mx.functional.pointwise_conv2d(torch.ones(1, 4, 2, 2, device="meta"), torch.ones(3, 4, 1, 1, device="meta"))


SHOW = "import mobilenet_ext as mx; print(mx.backends.current('cpu'))"


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_environment_variable(name):
    done = run_python(SHOW, MOBILENET_EXT_BACKEND=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name.replace("auto", "cpu")


@pytest.mark.parametrize("name", ["tensorflow", "triton"])
def test_wrong_environment_variable(name):
    if backends.available().get(name, "unknown") is None:
        pytest.skip(f"backend {name} is usable here")
    done = run_python(SHOW, MOBILENET_EXT_BACKEND=name)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert "MOBILENET_EXT_BACKEND" in message and name in message


def test_results_of_the_backends_agree():
    torch.manual_seed(0)
    model = randomise_(mx.MobileNetV1(10, 0.25)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outputs = []
    for name, why_not in backends.available().items():
        if why_not is None and name in ("cpu", "reference"):
            with backends.use(name):
                outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], torch.zeros_like(outputs[0]))


@pytest.fixture
def visible_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of GPUs that PyTorch is made to see."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: found[device])
    return found


def test_every_visible_gpu_counts(visible_gpus: list[tuple[int, int]]) -> None:
    assert gpus.why_not((8, 0)) == "PyTorch finds no CUDA GPU"
    visible_gpus += [(9, 0), (7, 5)]
    assert gpus.why_not((7, 5)) is None
    assert gpus.why_not((8, 0)) == "a GPU's compute capability is 7.5, 8.0 is needed"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("7.5;8.0;9.0+PTX", (7, 5), True),
        ("7.5;8.0;9.0+PTX", (8, 6), True),  # machine code of 8.0
        ("7.5;8.0;9.0+PTX", (12, 0), True),  # PTX
        ("8.0;9.0+PTX;10.0;12.0", (11, 0), True),
        ("7.5;8.0;9.0+PTX", (7, 0), False),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0 9.0a", (9, 0), True),
        ("7.5+PTX", (9, 0), True),
    ],
)
def test_what_machine_code_runs_on(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on(built, capability) is runs


def test_cuda_says_for_what_it_was_built(
    visible_gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    visible_gpus += [(7, 5), (9, 0)]
    library = tmp_path / "_cuda.abi3.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(cuda, "LIBRARY", library)
    monkeypatch.setattr(_host, "build_info", lambda: {"cuda_architectures": "7.5;8.0"})
    assert cuda.why_not() == "a GPU's compute capability is 9.0, the kernels were built for 7.5;8.0"
    monkeypatch.setattr(_host, "build_info", lambda: {"cuda_architectures": "7.5;9.0"})
    cuda._load_error.cache_clear()
    assert cuda.why_not().startswith("_cuda.abi3.so does not load: ")
    cuda._load_error.cache_clear()
