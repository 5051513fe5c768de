"""Time and peak memory of a training step on the CPU: mobilenet_ext against the same network of plain modules.

    python benchmarks/training_step.py [--width 1.0] [--resolution 224] [--batch 32] [--dtype float32|bfloat16]

Prints the median step times, taken in turn (A B A B ...) with a pause before each so that no thread pool still spins
from the one before, the median of the pairwise ratios with their quartiles, and each one's peak memory above the
process before its first step, measured in a process of its own. float32 products are IEEE. Before anything is timed
the two networks' losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mobilenet_ext import MobileNetV1

PAUSE_S = 0.3  # longer than OpenMP's threads spin after a parallel region
CLASSES = 10


class Plain(nn.Module):
    """The same modules, run one by one: what PyTorch alone does."""

    def __init__(self, model: MobileNetV1) -> None:
        super().__init__()
        units = [nn.Sequential(*unit) for unit in model.feature[:-1]]
        self.feature = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(*model.classifier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.feature(x))


def build(name: str, width: float) -> nn.Module:
    torch.manual_seed(0)
    model = MobileNetV1(CLASSES, width)
    return (Plain(model) if name == "eager" else model).to(memory_format=torch.channels_last)


def make_step(model: nn.Module, args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(args.batch, 3, args.resolution, args.resolution).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (args.batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = F.cross_entropy(model(x), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check_agreement(args: argparse.Namespace) -> None:
    """From the same weights both networks must give the same loss, and the same gradient behind the whole forward."""
    losses, grads = [], []
    for name in ("eager", "fused"):
        model = build(name, args.width)
        losses.append(make_step(model, args)())
        grads.append(model.classifier[1].weight.grad)
    loss_error = abs(losses[0] - losses[1]) / losses[0]
    grad_error = (grads[0] - grads[1]).norm() / grads[0].norm()
    bound = 1e-4 if args.dtype == "float32" else 5e-2
    print(f"agreement: loss {loss_error:.1e}, last gradient {grad_error:.1e} (relative)")
    if not (loss_error <= bound and grad_error <= 20 * bound):
        raise SystemExit("the two networks disagree: nothing was timed")


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """MiB above the process before its first step, from the kernel's high-water mark."""
    command = [sys.executable, __file__, "--peak-memory-of", name]
    for option in ("width", "resolution", "batch", "dtype"):
        command += [f"--{option}", str(getattr(args, option))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_own_peak(name: str, args: argparse.Namespace) -> float:
    def status(field: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

    step = make_step(build(name, args.width), args)
    before = status("VmRSS")
    for _ in range(3):
        step()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-memory-of", choices=("eager", "fused"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print(measure_own_peak(args.peak_memory_of, args))
        return

    print(
        f"MobileNetV1 {args.width}, {args.resolution}x{args.resolution}, batch {args.batch}, {args.dtype}, "
        f"channels_last, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    check_agreement(args)
    steps = {name: make_step(build(name, args.width), args) for name in ("eager", "fused")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            step()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:6} {1e3 * statistics.median(values):8.1f} ms  (quartiles {1e3 * low:.1f} to {1e3 * high:.1f})")
    ratios = [eager / fused for eager, fused in zip(times["eager"], times["fused"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"eager / fused: {median:.2f}  (quartiles {low:.2f} to {high:.2f})")
    memory = {name: peak_memory(name, args) for name in steps}
    print(
        f"peak memory: eager {memory['eager']:.0f} MiB, fused {memory['fused']:.0f} MiB, "
        f"fused / eager {memory['fused'] / memory['eager']:.2f}"
    )


if __name__ == "__main__":
    main()
