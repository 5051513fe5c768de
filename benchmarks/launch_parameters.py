"""Launch parameters of the Triton kernels beside each other, on a GPU: what ``heuristics.py`` should choose.

    python -m benchmarks.launch_parameters [--kernels NAME ...] [--batch 256] [--json FILE]

Every kernel of a layer runs with each of many parameters (``launch_candidates.py``), far more than the heuristics' own
candidates. The table names for each layer the heuristics' choice and the fastest ones; the file holds them all.
Processes compile first, in parallel; then one process times, each call after a write that clears the L2.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mobilenet_ext as mx
from benchmarks.kernels import kernel_call
from benchmarks.launch_candidates import GRADIENT_MERGES, KERNELS, MERGES, Candidate, Merge, merging
from benchmarks.network import Layer, Workload, layers_of
from benchmarks.timing import CLEARED
from mobilenet_ext.triton import heuristics, merge

CALLS = 7  # timed of each candidate; one that is far behind the best gets fewer
CLOCK_HZ = 2e9  # about that of a GPU
SHOWN = 5


class Case(NamedTuple):
    """A kernel of a layer."""

    kernel: str
    layer: Layer
    pass_: str

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.layer.name.partition(' ')[2]}"


@contextlib.contextmanager
def replaced(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    originals = {name: getattr(heuristics, name) for name in functions}
    for name, function in functions.items():
        setattr(heuristics, name, function)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(heuristics, name, function)


def cases(kernels: list[str], width: float, resolution: int) -> Iterator[Case]:
    for kernel in kernels:
        kind, pass_, _ = KERNELS[kernel]
        # Inference's layers are whole blocks; the convolutions apart are those of a training step's forward pass.
        layers = layers_of(width, resolution, pass_ if kind == "block" else pass_.replace("inference", "forward"))
        for layer in dict.fromkeys(layers):
            if layer.kind == kind:
                yield Case(kernel, layer, pass_)


def compile_share(kernels: list[str], width: float, resolution: int, share: int, shares: int) -> None:
    """Compiles each ``shares``-th of the candidates, by running them on a few small images."""
    done, index = set(), 0
    for case in cases(kernels, width, resolution):
        small = case.layer._replace(size=min(case.layer.size, 28))
        call = None
        for candidate in KERNELS[case.kernel][2](case.layer):
            compiled = {name: value for name, value in candidate.parameters.items() if name != "waves"}
            depends = (case.kernel, str(compiled), case.layer.stride, case.layer.in_channels <= compiled.get("K", 0))
            if depends in done:
                continue
            done.add(depends)
            index += 1
            if index % shares == share:
                call = call or kernel_call(small, case.pass_, Workload("training", 1, 0, 2, "bfloat16", "cuda"))
                with replaced(candidate.replaced), contextlib.suppress(Exception):
                    with contextlib.redirect_stdout(io.StringIO()):
                        call()


def compile_in_parallel(kernels: list[str], width: float, resolution: int) -> None:
    shares = max(1, (os.cpu_count() or 1) - 1)
    context = multiprocessing.get_context("spawn")
    arguments = [(kernels, width, resolution, share, shares) for share in range(shares)]
    workers = [context.Process(target=compile_share, args=a) for a in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def time_of(call: Callable[[], Any], best: float, other: torch.Tensor) -> float:
    """Microseconds of a call, or infinity where it does not run."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints all of what ptxas refuses
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
    except Exception as error:  # too large for this GPU, or one that the compiler refuses
        print(f"    {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return float("inf")
    times: list[float] = []
    for number in (2, CALLS - 2):
        # The GPU sleeps until all of these calls are queued: a slow host must not be measured with them.
        torch.cuda._sleep(int(CLOCK_HZ * number * 2 * (host + 30e-6)))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
        for start, end in events:
            other.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times += [1e3 * start.elapsed_time(end) for start, end in events]
        if min(times) > 1.3 * best:
            break
    return statistics.median(times)


def sweep(name: str, call: Callable[[], Any], candidates: Iterator[Candidate], other: torch.Tensor) -> dict[str, Any]:
    chosen = time_of(call, float("inf"), other)
    found: list[tuple[float, dict[str, Any]]] = []
    for candidate in candidates:
        with replaced(candidate.replaced):
            us = time_of(call, min([chosen, *(time for time, _ in found)]), other)
        found.append((round(us, 1), candidate.parameters))
    found.sort(key=lambda row: row[0])
    print(f"{name}: {chosen:.0f} us as chosen; of {len(found)}", flush=True)
    for us, parameters in found[:SHOWN]:
        print(f"  {us:8.1f}  {' '.join(f'{key}={value}' for key, value in parameters.items())}", flush=True)
    return {"name": name, "chosen_us": round(chosen, 1), "found": [row for row in found if row[0] < 1.5 * found[0][0]]}


def merge_call(problem: Merge, gradients: bool) -> Callable[[], Any]:
    if gradients:
        partial = torch.randn(problem.rows, problem.columns, device="cuda")
        weight = torch.empty(problem.columns, device="cuda")
        return lambda: merge.gradients(None, None, False, 0, partial, weight)
    partial = torch.rand(problem.rows, 4, problem.columns, device="cuda") + 1
    gamma, beta = torch.rand(2, problem.columns, device="cuda")
    return lambda: merge.statistics(partial, gamma, beta, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, "merge"], default=[*KERNELS, "merge"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        if args.json:
            args.json.write_text(json.dumps(results))

    kernels = [kernel for kernel in args.kernels if kernel != "merge"]
    with mx.backends.use("triton"):
        start = time.perf_counter()
        compile_in_parallel(kernels, args.width, args.resolution)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        other = torch.empty(CLEARED, dtype=torch.uint8, device="cuda")
        for case in cases(kernels, args.width, args.resolution):
            work = Workload("training", args.width, args.resolution, args.batch, "bfloat16", "cuda")
            candidates = list(KERNELS[case.kernel][2](case.layer))
            if candidates:
                add(sweep(case.name, kernel_call(case.layer, case.pass_, work), iter(candidates), other))
        if "merge" in args.kernels:
            for problem in MERGES:
                add(sweep(f"statistics {problem.name}", merge_call(problem, False), merging(None), other))
            for problem in GRADIENT_MERGES:
                add(sweep(f"gradients {problem.name}", merge_call(problem, True), merging(None), other))
        print(f"all in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
