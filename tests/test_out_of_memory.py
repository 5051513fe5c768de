"""Too little memory for an op: an exception, or the right result, and the next call works."""

from __future__ import annotations

import sys

import pytest
import warm_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by Linux's means")

# Each attempt has a thread of its own, whose workspaces and whose workers' are small; the workers exist before the
# limit does, for OpenMP ends the process if it cannot make one.
PREAMBLE = """
import resource, threading, torch
import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.backends.cpu import kernels

torch.set_num_threads(2)
MIB = 1 << 20
outcomes = {"memory": 0, "result": 0}

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)

def all_of(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else [outputs]

# PyTorch writes a backtrace into the message of its exception and does not check that malloc gave it room: a heap that
# is full to the last byte ends the process there. These pieces, freed at once, are that room.
def keep_for_the_message():
    pieces = [bytearray(8 << 10) for _ in range(12)]
    del pieces

def attempt(name, f, more):
    def body():
        torch.set_num_threads(2)
        small()
        keep_for_the_message()
        resource.setrlimit(resource.RLIMIT_AS, (used() + more, resource.RLIM_INFINITY))
        try:
            result = f()
        except (RuntimeError, MemoryError) as error:
            result = error
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if isinstance(result, Exception):
            outcomes["memory"] += 1
            text = str(result)
            assert any(words in text for words in ("memory", "alloc")), (name, more, text)
            result = f()  # afterwards there is enough
        else:
            outcomes["result"] += 1
        for actual, expected in zip(all_of(result), wanted[name], strict=True):
            assert torch.equal(actual, expected), (name, more)
        done.append(name)
    done = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert done == [name]

def small():
    x, bn = channels_last(2, 8, 6, 6), torch.rand(5, 8)
    for call in (
        lambda: ops.depthwise_forward(x, None, 0, torch.randn(8, 1, 3, 3), 1, 1, None, None, 1e-5, True),
        lambda: ops.pointwise_forward(x, None, 0, torch.randn(8, 8, 1, 1), 1, 0, None, None, 1e-5, True),
        lambda: ops.norm_act_forward(x, bn, 1, True),
    ):
        call()

def check(calls, mores):
    wanted.update({name: [t.clone() for t in all_of(f())] for name, f in calls.items()})
    for name, f in calls.items():
        for more in mores:
            attempt(name, f, more)

wanted = {}
"""


# What malloc keeps in reserve would hide a limit: one arena, and pieces from 16 KiB on straight from the system.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0"}


def run(code: str) -> None:
    process = warm_process.run(PREAMBLE + code, timeout=500, **ENVIRONMENT)
    assert process.returncode == 0, f"exit status {process.returncode}\n{process.stdout}{process.stderr[-3000:]}"


def test_the_workspaces_of_a_dense_convolution() -> None:
    run(
        """
calls = {}
x, weight, bn = channels_last(2, 1024, 9, 9), torch.randn(1024, 1024, 3, 3) / 96, torch.rand(5, 1024)
h, grad_bn = channels_last(2, 1024, 9, 9), torch.randn(6, 1024)
calls["inference"] = lambda: ops.dense_inference(x, bn, 1, weight, 1, 1)
calls["forward"] = lambda: ops.dense_forward(x, None, 0, weight, 1, 1, None, None, 1e-5, True)
calls["backward"] = lambda: ops.dense_backward(h, x, grad_bn, x, None, 0, False, weight, 1, 1, True, True)
check(calls, [0, 8 * MIB, 36 * MIB, 40 * MIB, 80 * MIB, 120 * MIB])
assert outcomes["memory"] >= 6, outcomes
"""
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_op(dtype: str) -> None:
    run(
        f"""
dtype, linear, relu = torch.{dtype}, 0, 1
acc = torch.float64 if dtype == torch.float64 else torch.float32
calls = {{}}
for c, k, side in ((96, 200, 20), (700, 500, 9), (3, 40, 150)):
    def image(channels, side=side):
        return channels_last(2, channels, side, side, dtype=dtype)
    u, y, bn, bn_k = image(c), image(k), (torch.rand(5, c) + 0.5).to(acc), (torch.rand(5, k) + 0.5).to(acc)
    grad_bn, grad_bn_k = torch.randn(6, c).to(acc), torch.randn(6, k).to(acc)
    depthwise, pointwise = torch.randn(c, 1, 3, 3).to(dtype), torch.randn(k, c, 1, 1).to(dtype)
    dense = torch.randn(k, c, 3, 3).to(dtype)
    packed = kernels.pack(bn, depthwise, pointwise)
    plan = kernels.make_plan(['dense_inference'], [bn_k, dense], [1, 1, 1, 1, 1, 1], [0.0])
    pooled = channels_last(2, c, 1, 1, dtype=dtype)
    here = {{
        "depthwise_forward": (u, bn, relu, depthwise, 1, 1, None, None, 1e-5, True),
        "depthwise_backward": (image(c), u, grad_bn, u, bn, relu, True, depthwise, 1, 1, True, True),
        "depthwise_inference": (u, bn, relu, depthwise, 2, 1),
        "pointwise_forward": (u, bn, relu, pointwise, 1, 0, None, None, 1e-5, True),
        "pointwise_backward": (y, y, grad_bn_k, u, bn, relu, True, pointwise, 1, 0, True, True),
        "pointwise_inference": (u, bn_k, relu, pointwise, 1, 0),
        "dense_forward": (u, None, linear, dense, 2, 1, None, None, 1e-5, True),
        "dense_backward": (y, y, grad_bn_k, u, None, linear, False, dense, 1, 1, True, True),
        "dense_inference": (u, bn_k, relu, dense, 2, 1),
        "norm_act_forward": (u, bn, relu, False),
        "norm_act_backward": (image(c), u, bn, relu, True, False),
        "norm_act_forward pooled": (u, bn, relu, True),
        "norm_act_backward pooled": (pooled, u, bn, relu, True, True),
        "block_inference": (u, bn, relu, depthwise, 1, 1, bn_k, relu, pointwise),
        "block_inference packed": (u, bn, relu, depthwise, 1, 1, bn_k, relu, pointwise, packed),
        "run_plan": (u, plan),
        "pack": (bn, depthwise, pointwise),
    }}
    for name, args in here.items():
        op = getattr(kernels, name.split()[0])
        calls[f"{{name}} {{c}}"] = lambda op=op, args=args: op(*args)
check(calls, [0, MIB // 2, 3 * MIB, 8 * MIB])
assert outcomes["memory"] >= 30, outcomes
"""
    )
