"""A process may fork while another of its threads runs kernels, and its children run them too."""

from __future__ import annotations

import json

import pytest
from interposer import run

SETUP = """
import contextlib, json, os, signal, threading, time, torch
import mobilenet_ext as mx
from interposer import attach

torch.set_num_threads(1)
ops = torch.ops.mobilenet_ext_cpu
large, small, image = (
    torch.randn(shape).to(memory_format=torch.channels_last)
    for shape in ((1, 64, 256, 256), (1, 64, 8, 8), (1, 3, 160, 160))
)
bn = torch.rand(5, 64)
unit = mx.nn.StemConvBNReLU(3, 32).eval()
interposer = attach()


def fork(child, seconds=10):
    "How a child that calls this function ends: its exit code, or None where it hangs. True is 0, for success."
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            code = 0 if child() is True else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run_op():
    return ops.norm_act_forward(large, bn, 1, False).isfinite().all().item()
"""

# What a thread does over and over while the process forks, and what each child does once. Locks that are held are made
# to last, so that nearly every fork falls into one.
BUSY_PROCESS = """
frozen = mx.freeze(mx.MobileNetV1(10, 0.25).eval())


def run_frozen():
    return frozen(image).isfinite().all().item()


def run_new_plan():
    return mx.freeze(unit)(image).isfinite().all().item()


def refuse_plan():
    with contextlib.suppress(RuntimeError):
        ops.run_plan([small], bn)
    return True


def empty_cache():
    mx.backends.empty_cache()
    return True


def fork_again():
    return fork(run_op, seconds=4) == 0


def fork_beside_a_thread():
    thread = threading.Thread(target=lambda: [run_op() for _ in range(5)])
    thread.start()
    code = fork(run_op, seconds=4)
    thread.join()
    return code == 0


def ends_of_children(work, child):
    def forever():
        while not done:
            work()

    done = False
    thread = threading.Thread(target=forever)
    thread.start()
    time.sleep(0.05)
    ends = []
    while len(ends) < 5 and None not in ends:
        ends.append(fork(child))
    done = True
    thread.join()
    return ends


torch.set_grad_enabled(False)
run_op()
interposer.interposer_hold(10_000)
print(json.dumps({
    "op": ends_of_children(run_op, run_op),
    "frozen": ends_of_children(run_frozen, run_frozen),
    "op beside frozen": ends_of_children(run_frozen, run_op),
    "new plans": ends_of_children(run_new_plan, run_new_plan),
    "refused plan": ends_of_children(refuse_plan, run_frozen),
    "empty_cache": ends_of_children(empty_cache, run_op),
    "children fork": ends_of_children(run_op, fork_again),
    "children's threads run": ends_of_children(run_op, fork_beside_a_thread),
}))
"""


@pytest.fixture(scope="module")
def ends() -> dict[str, list[int | None]]:
    return json.loads(run(SETUP + BUSY_PROCESS))


@pytest.mark.parametrize(
    "what",
    [
        "op",
        "frozen",
        "op beside frozen",
        "new plans",
        "refused plan",
        "empty_cache",
        "children fork",
        "children's threads run",
    ],
)
def test_no_child_hangs(what: str, ends: dict[str, list[int | None]]) -> None:
    assert ends[what] == [0] * 5


def test_a_fork_during_the_first_call() -> None:
    """Which chooses the instruction set, and makes whatever else is made once."""
    code = """
interposer.interposer_hold(500_000)
thread = threading.Thread(target=run_op)
thread.start()
time.sleep(0.2)
print(fork(run_op))
thread.join()
"""
    assert run(SETUP + code).strip() == "0"


def test_first_calls_import_nothing() -> None:
    """An import holds a lock of its module, which stays locked in the child of a fork."""
    code = """
import sys
import mobilenet_ext as mx, torch

before = set(sys.modules)
network = mx.MobileNetV1(10, 0.25)
x = torch.randn(2, 3, 32, 32)
network(x).sum().backward()
network.eval()(x)
mx.freeze(network)(x)
mx.functional.depthwise_conv2d(x, torch.randn(3, 1, 3, 3))
print(sorted(set(sys.modules) - before))
"""
    assert run(code).strip() == "[]"


def test_what_a_child_inherits() -> None:
    """The tensors with their values, but none of the memory that nobody uses."""
    code = """
def address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

before = ops.norm_act_forward(large, bn, 1, False)
expected = before.clone()

def computes_the_same():
    ops.norm_act_forward(large * 2, bn, 1, False)
    return torch.equal(ops.norm_act_forward(large, bn, 1, False), expected) and torch.equal(before, expected)

print([fork(computes_the_same) for _ in range(4)], torch.equal(before, expected))
idle = [ops.norm_act_forward(large, bn, 1, False) for _ in range(16)]  # 256 MiB
idle.clear()
of_parent = address_space()
print(fork(lambda: of_parent - address_space() > 200 * 2**20), of_parent == address_space())
"""
    assert run(SETUP + code).splitlines() == ["[0, 0, 0, 0] True", "0 True"]


def test_no_system_call_under_a_lock() -> None:
    """All threads would wait for it."""
    code = """
for width in (256, 200, 300, 100, 256, 400, 60):
    x = torch.randn(1, 64, 256, width).to(memory_format=torch.channels_last)
    ops.norm_act_forward(x, bn, 1, False)
interposer.interposer_clock(3600)
ops.norm_act_forward(x, bn, 1, False)
print(interposer.interposer_calls_under_lock(), interposer.interposer_calls() > 0)
"""
    assert run(SETUP + code).strip() == "0 True"
