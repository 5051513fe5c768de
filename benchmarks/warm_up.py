"""Compiles the Triton kernels of networks that are timed next, in many processes at once: a kernel takes a second, and
a network has more than a hundred.

    python -m benchmarks.warm_up TASK:WIDTH:BATCH...    # training:0.5:128 inference:1:32
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from benchmarks.kernels import kernel_call
from benchmarks.network import DTYPES, Layer, Workload, layers_of

MOST_PROCESSES = 12  # each holds the memory of a layer, and that of its own context, on the GPU
Job = tuple[Layer, str, Workload]  # a layer, a pass of it


def jobs_of(works: Sequence[Workload]) -> list[Job]:
    """Each layer of each pass once."""
    found = []
    for work in works:
        for pass_ in ("inference",) if work.task == "inference" else ("backward", "forward"):
            found += [(layer, pass_, work) for layer in layers_of(work.width, work.resolution, pass_)]
    return list(dict.fromkeys(found))


def call_once(job: Job) -> None:
    """Runs the layer, for which its kernels are compiled and kept on disk."""
    kernel_call(*job)()
    if job[2].device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the memory is the next process's


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a layer failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_up")
    parser.add_argument("works", nargs="+", metavar="TASK:WIDTH:BATCH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--resolution", type=int, default=224)
    args = parser.parse_args(argv)
    works = []
    for text in args.works:
        task, width, batch = text.split(":")
        works.append(Workload(task, float(width), args.resolution, int(batch), args.dtype, args.device))
    jobs, start, failed = jobs_of(works), time.perf_counter(), 0
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(jobs))
    # Not forked: a GPU cannot be used in a fork of a process that has used it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        asked = {pool.submit(call_once, job): job for job in jobs}
        for done in as_completed(asked):
            if error := done.exception():  # also of a process that died
                layer, pass_, work = asked[done]
                print(f"{pass_} {layer.name}, {work}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed += 1
    print(f"{len(jobs) - failed} of {len(jobs)} layers, {time.perf_counter() - start:.0f} s, {processes} processes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
