"""Runs everything that keeps memory, plans or locks for a long time, and looks at what grows.

    python tests/soak.py --seconds 1200

Threads run random networks, frozen and in training, on random images; meanwhile the process forks, freezes and drops
models and empties the cache, and some rounds run under a limit on the address space. Every result must be, bit for bit,
the first one of its problem. At the end resident memory, mappings, file descriptors and threads must be where they were
after the first tenth. Exits with 1 and says so where one is not.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import mobilenet_ext as mx

MIB = 2**20
ROOM = 600 * MIB  # of address space in a round under a limit, beyond what is used: more than the threads need at once
CHILD_SECONDS = 60


class Problems:
    """Random problems, each with the result that it had first."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.networks = [mx.MobileNetV1(10, width) for width in (0.25, 0.5)]
        shapes = [(n, 3, side, side) for n in (1, 2, 5) for side in (65, 96, 160, 224)]
        self.images = [
            torch.randn(shape, generator=generator).to(memory_format=torch.channels_last if i % 3 else None)
            for i, shape in enumerate(shapes)
        ]
        self.frozen = [mx.freeze(network.eval()) for network in self.networks]
        self._first: dict[tuple[str, int, int], Tensor] = {}

    def infer(self, network: int, image: int) -> Tensor:
        with torch.no_grad():
            return self.frozen[network](self.images[image])

    def freeze(self, network: int, image: int) -> Tensor:
        with torch.no_grad():
            return mx.freeze(self.networks[network])(self.images[image])

    def gradient(self, network: int, image: int) -> Tensor:
        """In eval mode, so that threads do not change the statistics of one another."""
        x = self.images[image].detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.networks[network](x).square().sum(), x)
        return gradient

    def train(self, network: int, image: int) -> Tensor:
        """Two steps of a network of its own."""
        plain = mx.MobileNetV1(10, 0.25)
        plain.load_state_dict(self.networks[0].state_dict())
        optimizer = torch.optim.SGD(plain.parameters(), 1e-4, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss = plain(self.images[image]).square().mean()
            loss.backward()
            optimizer.step()
        return loss.detach()

    def check(self, kind: str, network: int, image: int) -> None:
        result = getattr(self, kind)(network, image)
        key = (kind, network, image)
        first = self._first.setdefault(key, result)
        if not torch.equal(result, first):
            raise AssertionError(f"{kind} of network {network} and image {tuple(self.images[image].shape)} changed")

    def draw(self, rng: random.Random, kinds: tuple[str, ...]) -> None:
        self.check(rng.choice(kinds), rng.randrange(len(self.networks)), rng.randrange(len(self.images)))

    def run_all(self) -> None:
        """Every problem once, so that none is met for the first time later."""
        for kind in ("infer", "freeze", "gradient", "train"):
            for network in range(len(self.networks)):
                for image in range(len(self.images)):
                    self.check(kind, network, image)


def in_child(work: Callable[[], None]) -> None:
    """Runs ``work`` in a child of this process; raises where that fails or does not end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if status:
                raise AssertionError(f"a child ended with status {status}")
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a child did not end within {CHILD_SECONDS} s")


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def figures() -> dict[str, int]:
    """What must not grow, with nothing idle in it."""
    gc.collect()
    mx.backends.empty_cache()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "resident MiB": resident // MIB,
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


# Beyond the figures after the first tenth; what malloc holds depends on which threads met.
ALLOWED = {"resident MiB": 200, "mappings": 100, "file descriptors": 0, "threads": 0}


def child_work(problems: Problems, seed: float) -> None:
    """No backward, for which PyTorch has threads that a child lacks."""
    rng = random.Random(seed)
    for _ in range(3):
        problems.draw(rng, ("infer", "freeze"))


def round_of_threads(problems: Problems, rng: random.Random, seconds: float) -> int:
    """Threads at work, and forks meanwhile; the number of problems."""
    deadline = time.monotonic() + seconds
    failures: list[BaseException] = []
    counts = []

    def work(own: random.Random) -> None:
        torch.set_num_threads(1)  # of this thread
        count = 0
        try:
            while time.monotonic() < deadline and not failures:
                problems.draw(own, ("infer", "infer", "freeze", "gradient", "train"))
                count += 1
        except BaseException as error:
            failures.append(error)
        counts.append(count)

    threads = [threading.Thread(target=work, args=(random.Random(rng.random()),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        while time.monotonic() < deadline and not failures:
            in_child(partial(child_work, problems, rng.random()))
            if rng.random() < 0.3:
                mx.backends.empty_cache()
            time.sleep(rng.random() * 0.1)
    finally:
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return sum(counts)


def soak(seconds: float, seed: int) -> bool:
    """Whether nothing grew; raises where a result changed or a child hung."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    problems = Problems(seed)
    problems.run_all()
    start = time.monotonic()
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    done = rounds = 0
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    while time.monotonic() - start < seconds:
        limited = rounds % 3 == 2
        if limited:
            mx.backends.empty_cache()
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + ROOM, hard))
        try:
            done += round_of_threads(problems, rng, min(10, seconds / 20))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        rounds += 1
        last = figures()
        if time.monotonic() - start < seconds / 10 or not first:
            first = last
        print(f"{time.monotonic() - start:6.0f} s  {done} problems  {last}", flush=True)
    grown = {name: last[name] - first[name] for name in ALLOWED if last[name] - first[name] > ALLOWED[name]}
    print(f"{done} problems, every result as at first; " + (f"grown: {grown}" if grown else "nothing grew"))
    return not grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return 0 if soak(options.seconds, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
