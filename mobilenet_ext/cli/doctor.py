"""``mobilenet-ext doctor``: what is installed, which backends work here, and whether their numbers are right."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilenet_ext import __version__, backends, functional
from mobilenet_ext.cuda_toolkit import find_cuda_toolkit

# Relative errors of float32 against float64 (norm of the difference over norm of the reference).
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
EPS = 1e-5
MOMENTUM = 0.1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add ``doctor`` to the command line's subcommands."""
    return subparsers.add_parser(
        "doctor",
        help="show versions and backends, and check the backends' numbers",
        description="Shows versions, how the extension was built and which backends work here, and checks each usable "
        "backend against float64. Exit status 0 if all of them pass, 1 otherwise.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if every usable backend passes its self-check, else 1."""
    for name, value in _environment():
        print(f"{name:<16} {value}")
    print("\nBackends")
    failed = []
    for name, why_not in backends.available().items():
        if why_not is not None:
            print(f"  {name:<10} not usable: {why_not}")
            continue
        device = backends.device_type(name) or "cpu"
        print(f"  {name:<10} usable; float32 on {device} tensors against float64, relative errors:")
        for check in CHECKS:
            result = _self_check(name, device, check)
            print(f"    {check.name:<20} {result.text}")
            if not result.passed:
                failed.append(name)
    if failed:
        print(f"\nWrong numbers from: {', '.join(dict.fromkeys(failed))}")
        return 1
    print("\nAll usable backends pass.")
    return 0


# --- What is installed ------------------------------------------------------------------------------------------------


def _environment() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield "mobilenet_ext", f"{__version__}, {Path(functional.__file__).parent}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__
    yield "Triton", _triton()
    toolkit = find_cuda_toolkit()
    yield "CUDA toolkit", f"{toolkit.version}, {toolkit.home} ({toolkit.found_by})" if toolkit else "not found"
    yield "C++ compiler", _compiler()
    yield from _host_module()
    yield "instruction set", backends.cpu.isa()
    yield "threads", f"{torch.get_num_threads()}"
    yield "GPU", _gpu()


def _triton() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:  # whatever a broken installation raises belongs in the report
        return f"does not import: {error}"


def _compiler() -> str:
    command = shlex.split(os.environ.get("CXX", "c++"))  # what torch's build compiles with
    if shutil.which(command[0]) is None:
        return f"not found ({command[0]})"
    output = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return f"{output.partition(chr(10))[0]} ({shlex.join(command)})"


def _host_module() -> Iterator[tuple[str, str]]:
    try:
        from mobilenet_ext import _host
    except ImportError as error:  # a source tree that was built in place for another Python
        yield "built", f"not known: {error}"
        return
    build = _host.build_info()
    commit = f", commit {build['commit']}" if build["commit"] else ""
    yield "built", f"by {build['compiler']} against torch {build['torch']} (runs on {build['torch_target']}+){commit}"
    yield "flags", build["flags"]
    yield "CUDA kernels", ", for ".join(filter(None, [build["cuda"], build["cuda_architectures"]]))
    yield "CPU features", " ".join(name for name, usable in _host.cpu_features().items() if usable) or "none known"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


# --- The self-check ---------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    name: str
    channels: int
    out_channels: int
    kernel: int
    stride: int

    def fused(self, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """The unit as mobilenet_ext computes it, in training mode."""
        options = {"training": True, "momentum": MOMENTUM, "eps": EPS}
        if self.kernel == 1:
            return functional.pointwise_bn_relu(x, weight, None, mean, var, gamma, beta, **options)
        return functional.depthwise_bn_relu(x, weight, None, mean, var, gamma, beta, stride=self.stride, **options)

    def plain(self, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """The same from PyTorch's own operations."""
        groups = 1 if self.kernel == 1 else self.channels
        y = F.conv2d(x, weight, stride=self.stride, padding=self.kernel // 2, groups=groups)
        return F.relu(F.batch_norm(y, mean, var, gamma, beta, training=True, momentum=MOMENTUM, eps=EPS))


CHECKS = (
    Check("depthwise", channels=24, out_channels=24, kernel=3, stride=1),
    Check("depthwise, stride 2", channels=24, out_channels=24, kernel=3, stride=2),
    Check("pointwise", channels=24, out_channels=40, kernel=1, stride=1),
)


class Result(NamedTuple):
    passed: bool
    text: str


def _self_check(backend: str, device: str, check: Check) -> Result:
    """One training step of a convolution unit, forward and backward, on tensors on ``device``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n = check.out_channels
    per_group = check.channels if check.kernel == 1 else 1
    x, weight = random(2, check.channels, 13, 11), random(n, per_group, check.kernel, check.kernel)
    tensors = [x, weight, random(n), random(n).abs() + 0.5, random(n), random(n)]
    grad = random(*check.plain(*(t.clone() for t in tensors)).shape)
    forward_wanted, gradients_wanted = _step(check.plain, tensors, grad, torch.float64)
    try:
        with backends.use(backend), _full_precision():
            there = [t.to(device) for t in tensors]
            forward, gradients = _step(check.fused, there, grad.to(device), torch.float32)
        forward_error = max(map(_relative_error, forward, forward_wanted))
        gradient_error = max(map(_relative_error, gradients, gradients_wanted))
    except Exception as error:  # the report goes on with the next check
        return Result(False, f"FAILED: {type(error).__name__}: {error}")
    # Not `>`: an error that is NaN must not pass.
    passed = forward_error <= FORWARD_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE
    return Result(
        passed,
        f"forward {forward_error:.1e} (at most {FORWARD_TOLERANCE:.0e}), gradients {gradient_error:.1e} "
        f"(at most {GRADIENT_TOLERANCE:.0e}) {'ok' if passed else 'FAILED'}",
    )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products without TF32, which GPUs may use by default."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def _step(
    unit: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """(output and running statistics, gradients of input, weight, gamma and beta) in ``dtype``."""
    x, weight, mean, var, gamma, beta = (t.to(dtype, copy=True) for t in tensors)
    inputs = [t.requires_grad_() for t in (x, weight, gamma, beta)]
    y = unit(x, weight, mean, var, gamma, beta)
    gradients = torch.autograd.grad(y, inputs, grad.to(dtype))
    return [y.detach(), mean, var], list(gradients)


def _relative_error(result: Tensor, wanted: Tensor) -> float:
    if result.shape != wanted.shape:
        raise ValueError(f"shape {tuple(result.shape)} where {tuple(wanted.shape)} was wanted")
    return ((result.cpu().double() - wanted).norm() / wanted.norm()).item()
