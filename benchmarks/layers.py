"""Every layer of MobileNetV1: the bytes its kernels must move, their time, and the fraction of the copy rate reached.

    python benchmarks/layers.py [--width 1.0] [--batch 256] [--resolution 224] [--dtype bfloat16] [--backend triton]
                                [--device cuda|cpu] [--passes forward backward inference] [--json FILE]

Bytes are those of activations, each read or written once a pass over the data (weights and vectors of channels are
below one percent of them); they are what fixes the time of a network that is limited by memory. Times are medians on
random data: on a GPU by events around the op, queued behind a kernel that clears the L2; on a CPU by the clock, behind
the same. The copy rate is measured in the same run, in the same way, with a tensor that no cache holds. A small layer
whose data fits in the L2 can exceed it, and one whose kernels take a few microseconds cannot reach it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.models.mobilenet_v1 import BLOCKS

PASSES = ("forward", "backward", "inference")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ONE_PASS = 128 * 128  # a pointwise weight up to this size: both gradients come from one pass over the data
CLEARED = 256 * 2**20  # bytes written between two runs: more than any L2 holds


class Layer(NamedTuple):
    """A kernel op's place in the network. ``size``: height and width of its input; ``block``: channels of the pointwise
    convolution that runs in one kernel with a depthwise one."""

    kind: str  # stem, depthwise, pointwise, block or pool
    in_channels: int
    out_channels: int
    stride: int
    size: int

    @property
    def name(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.kind} {self.in_channels}-{self.out_channels}{stride} {self.size}x{self.size}"

    @property
    def out_size(self) -> int:
        return 1 if self.kind == "pool" else (self.size - 1) // self.stride + 1

    def elements(self, batch: int) -> tuple[int, int]:
        """Of the input and of the output."""
        inside, outside = self.in_channels * self.size**2, self.out_channels * self.out_size**2
        return batch * inside, batch * outside

    def bytes_moved(self, pass_: str, batch: int, itemsize: int) -> int:
        u, y = self.elements(batch)
        if pass_ != "backward":
            return (u + y) * itemsize
        if self.kind == "pool":
            return (y + 2 * u) * itemsize  # the gradient and u read, h written
        if self.kind == "stem":
            return (u + 2 * y) * itemsize  # x, h and y read
        apart = self.kind == "pointwise" and self.in_channels * self.out_channels > ONE_PASS
        reads = u + 2 * y  # u, h and y, again where the gradient of the weight has a pass of its own
        return ((2 if apart else 1) * reads + u) * itemsize


def network(width: float, resolution: int, pass_: str) -> list[Layer]:
    """The layers of a pass, in forward order."""
    channels, size = int(32 * width), (resolution - 1) // 2 + 1
    layers = [Layer("stem", 3, channels, 2, resolution)]
    for out_channels, stride in BLOCKS:
        out_channels = int(out_channels * width)
        if pass_ == "inference":
            layers.append(Layer("block", channels, out_channels, stride, size))
        else:
            layers.append(Layer("depthwise", channels, channels, stride, size))
        size = (size - 1) // stride + 1
        if pass_ != "inference":
            layers.append(Layer("pointwise", channels, out_channels, 1, size))
        channels = out_channels
    if pass_ != "inference":  # there the pooling is PyTorch's own
        layers.append(Layer("pool", channels, channels, 1, size))
    return layers


def make_call(layer: Layer, pass_: str, batch: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """The layer's kernel op on random data, as a step of the network calls it."""
    kind, k, n, stride, size = layer

    def activation(channels: int, size: int) -> Tensor:
        return torch.randn(batch, size, size, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def rows(count: int, channels: int) -> Tensor:
        return torch.rand(count, channels, device=device) + 0.5

    u, bn_u = activation(k, size), rows(5, k)
    if kind == "block":
        return bind(ops.block_inference, u, bn_u, weight(k, 1, 3, 3), stride, rows(5, n), weight(n, k, 1, 1))
    if kind == "pool":
        if pass_ == "forward":
            return bind(ops.bn_relu_pool_forward, u, bn_u)
        return bind(ops.bn_relu_pool_backward, activation(k, 1), u, bn_u, True)
    filters = {"stem": (n, k, 3, 3), "depthwise": (n, 1, 3, 3), "pointwise": (n, k, 1, 1)}[kind]
    geometry = () if kind == "pointwise" else (stride, 1)
    source = (u, weight(*filters), *geometry) if kind == "stem" else (u, bn_u, weight(*filters), *geometry)
    if pass_ == "inference":
        return bind(getattr(ops, f"{kind}_inference"), u, rows(5, n), source[1], *geometry, True)
    if pass_ == "forward":
        return bind(getattr(ops, f"{kind}_forward"), *source, *rows(2, n).unbind(), 1e-5, True)
    output = (activation(n, layer.out_size), activation(n, layer.out_size), rows(6, n))
    if kind == "stem":
        return bind(ops.stem_backward, *output, *source, False, True)
    return bind(getattr(ops, f"{kind}_backward"), *output, *source[:2], True, *source[2:], True, True)


def bind(op: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: op(*args)


class Clock:
    """Median time of a call, each behind a write that leaves none of its data in the cache."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.other = torch.empty(CLEARED, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        for _ in range(3):  # compiles and warms up
            call()
        return statistics.median(self._on_gpu(call) if self.device == "cuda" else self._on_cpu(call))

    def _on_gpu(self, call: Callable[[], object]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, end in events:
            self.other.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in events]

    def _on_cpu(self, call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self.repeats):
            self.other.zero_()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def copy_rate(self) -> float:
        """Bytes a second, read and written."""
        source = torch.randn(CLEARED // 2, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))


def measure(args: argparse.Namespace, clock: Clock) -> Iterator[dict]:
    dtype = DTYPES[args.dtype]
    for pass_ in args.passes:
        known: dict[Layer, float] = {}  # the network repeats some layers
        for layer in network(args.width, args.resolution, pass_):
            if layer not in known:
                known[layer] = clock.seconds(make_call(layer, pass_, args.batch, dtype, args.device))
            moved = layer.bytes_moved(pass_, args.batch, dtype.itemsize)
            yield {"pass": pass_, "layer": layer.name, "bytes": moved, "seconds": known[layer]}


def machine(args: argparse.Namespace) -> dict:
    """What a result has to say about where it is from."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "backend": mx.backends.current(args.device),
        "versions": {
            "mobilenet_ext": mx.__version__,
            "torch": torch.__version__,
            "triton": triton_version,
            "cuda": torch.version.cuda,
        },
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "float32_products": torch.backends.cudnn.conv.fp32_precision,
        "threads": torch.get_num_threads() if args.device == "cpu" else None,
    }


def show(name: str, moved: int, seconds: float, copy_rate: float) -> None:
    rate = moved / seconds
    print(f"{name:36} {moved / 1e6:10.1f} MB {1e3 * seconds:9.3f} ms {rate / 1e9:8.1f} GB/s {rate / copy_rate:7.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--fp32-precision", choices=("ieee", "tf32"), default="ieee", help="of float32 products")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    mx.backends.set(args.backend)
    torch.backends.cudnn.conv.fp32_precision = args.fp32_precision
    torch.manual_seed(0)

    about = machine(args)
    clock = Clock(args.device, args.repeats)
    copy_rate = clock.copy_rate()
    print(
        f"MobileNetV1 {args.width}, {args.resolution}x{args.resolution}, batch {args.batch}, {args.dtype}, "
        f"{about['backend']} backend on {about['device']}, torch {torch.__version__}; copy {copy_rate / 1e9:.1f} GB/s"
    )
    results, pass_ = [], None
    for row in measure(args, clock):
        if row["pass"] != pass_:
            pass_ = row["pass"]
            print(f"\n{pass_}")
        show(row["layer"], row["bytes"], row["seconds"], copy_rate)
        results.append({**row, "fraction_of_copy": row["bytes"] / row["seconds"] / copy_rate})
    print("\ntotals")
    for pass_ in args.passes:
        rows = [row for row in results if row["pass"] == pass_]
        show(pass_, sum(row["bytes"] for row in rows), sum(row["seconds"] for row in rows), copy_rate)
    if args.json:
        settings = {name: getattr(args, name) for name in ("width", "batch", "resolution", "dtype", "repeats")}
        report = {**about, **settings, "copy_bytes_per_second": copy_rate, "layers": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
