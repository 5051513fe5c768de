"""No memory for one of an op's allocations: an exception, or the right result, and the next call works."""

from __future__ import annotations

import pytest
from interposer import run

PREAMBLE = """
import ctypes, sys, threading, torch
import mobilenet_ext as mx
from interposer import attach
from mobilenet_ext.backends.cpu import kernels

torch.set_num_threads(2)
interposer = attach()
interposer.interposer_fail.argtypes = [ctypes.c_long, ctypes.c_long]
outcomes = {"failed": 0, "result": 0}

def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)

def all_of(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else [outputs]

def in_a_new_thread(f):
    "Its workspaces and its workers' are small, and no memory of earlier outputs waits for it."
    def body():
        torch.set_num_threads(2)
        small()
        mx.backends.empty_cache()
        results.append(f())
    results = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return results[0]

def small():
    x, bn = channels_last(2, 8, 6, 6), torch.rand(5, 8)
    kernels.depthwise_forward(x, None, 0, torch.randn(8, 1, 3, 3), 1, 1, None, None, 1e-5, True)
    kernels.pointwise_forward(x, None, 0, torch.randn(8, 8, 1, 1), 1, 0, None, None, 1e-5, True)
    kernels.norm_act_forward(x, bn, 1, True)

def failing(f, first, last):
    "What f returns or raises where its allocations first to last find no memory, and how many it makes."
    interposer.interposer_fail(first, last)
    try:
        result = f()
    except RuntimeError as error:
        result = error
    finally:
        made = interposer.interposer_allocations()
        interposer.interposer_fail(sys.maxsize, sys.maxsize)
    return result, made

def check(name, f):
    "Each allocation of f in turn: it alone finds no memory, or all from it on."
    expected, made = in_a_new_thread(lambda: failing(f, sys.maxsize, sys.maxsize))
    for first in range(made):
        for last in (first, sys.maxsize):
            def attempt():
                result, _ = failing(f, first, last)
                if not isinstance(result, Exception):
                    outcomes["result"] += 1
                    return result
                outcomes["failed"] += 1
                assert any(words in str(result) for words in ("memory", "alloc")), (name, str(result))
                return f()
            for actual, wanted in zip(all_of(in_a_new_thread(attempt)), all_of(expected), strict=True):
                assert torch.equal(actual, wanted), (name, first, last)
    return made
"""


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bfloat16", "float64"))]
)
def test_every_op(dtype: str) -> None:
    code = f"""
dtype, linear, relu, silu = torch.{dtype}, 0, 1, 4
acc = torch.float64 if dtype == torch.float64 else torch.float32
around = [1, 1, 1, 1]
for c, k, side in ((96, 200, 20), (700, 500, 9), (3, 40, 150), (8, 24, 300)):
    def image(channels, side=side):
        return channels_last(2, channels, side, side, dtype=dtype)
    def table(rows, channels):
        return (torch.rand(rows, channels) + 0.5).to(acc)
    u, y, gate, pooled = image(c), image(k), image(c, 1), image(c, 1)
    bn, bn_k, grad_bn, grad_bn_k = table(5, c), table(5, k), table(6, c), table(6, k)
    depthwise, pointwise = torch.randn(c, 1, 3, 3).to(dtype), torch.randn(k, c, 1, 1).to(dtype)
    five_by_five, dense = torch.randn(c, 1, 5, 5).to(dtype), torch.randn(k, c, 3, 3).to(dtype)
    packed = kernels.pack(bn, depthwise, pointwise)
    in_a_row = (1, [0, -1, -1, 1, -1, -1], [2])
    ops, settings = ["dense_inference", "norm_act_forward"], [1, 1, *around, 1, 1]
    pooled_dense = (ops, [bn_k, dense, bn_k], settings, [0.0, 0.0], *in_a_row)
    plan = kernels.make_plan(*pooled_dense)
    calls = {{
        "depthwise_forward": (u, bn, relu, depthwise, 1, around, None, None, 1e-5, True),
        "depthwise_forward 5x5": (u, bn, silu, five_by_five, 1, [2, 2, 2, 2], None, None, 1e-5, True),
        "depthwise_backward": (image(c), u, grad_bn, u, bn, relu, True, depthwise, 1, around, True, True),
        "depthwise_backward 5x5": (image(c), u, grad_bn, u, bn, silu, True, five_by_five, 1, [2, 2, 2, 2], True, True),
        "depthwise_inference": (u, bn, relu, depthwise, 2, around),
        "pointwise_forward": (u, bn, relu, pointwise, 1, 0, None, None, 1e-5, True),
        "pointwise_backward": (y, y, grad_bn_k, u, bn, relu, True, pointwise, 1, 0, True, True),
        "pointwise_inference": (u, bn_k, relu, pointwise, 1, 0),
        "pointwise_inference residual": (u, bn_k, relu, pointwise, 1, 0, None, y),
        "gated_pointwise_forward": (u, bn, relu, gate, pointwise, None, None, 1e-5, True),
        "gated_pointwise_backward": (y, y, grad_bn_k, u, bn, relu, gate, pointwise, True, True),
        "gated_pointwise_inference": (u, gate, bn_k, relu, pointwise),
        "dense_forward": (u, None, linear, dense, 2, around, None, None, 1e-5, True),
        "dense_backward": (y, y, grad_bn_k, u, None, linear, False, dense, 1, around, True, True),
        "dense_inference": (u, bn_k, relu, dense, 2, around),
        "norm_act_forward": (u, bn, relu, False),
        "norm_act_backward": (image(c), u, bn, relu, True, False),
        "norm_act_forward pooled": (u, bn, relu, True),
        "norm_act_backward pooled": (pooled, u, bn, relu, True, True),
        "block_inference": (u, bn, relu, depthwise, 1, around, bn_k, relu, pointwise),
        "block_inference packed": (u, bn, relu, depthwise, 1, around, bn_k, relu, pointwise, packed),
        "run_plan": ([u], plan),
        "pack": (bn, depthwise, pointwise),
        "make_plan": pooled_dense,
    }}
    for name, args in calls.items():
        op = getattr(kernels, name.split()[0])
        if name == "make_plan":  # what it returns is an address
            made = check(name, lambda: kernels.run_plan([u], op(*args)))
        else:
            made = check(name, lambda: op(*args))
        assert made > 0, name
print(outcomes["failed"] > 100, outcomes["result"] > 100)
"""
    assert run(PREAMBLE + code).split() == ["True", "True"]


def test_the_workspaces_of_a_dense_convolution() -> None:
    code = """
x, weight, bn = channels_last(2, 1024, 9, 9), torch.randn(1024, 1024, 3, 3) / 96, torch.rand(5, 1024)
h, grad_bn, around = channels_last(2, 1024, 9, 9), torch.randn(6, 1024), [1, 1, 1, 1]
check("inference", lambda: kernels.dense_inference(x, bn, 1, weight, 1, around))
check("forward", lambda: kernels.dense_forward(x, None, 0, weight, 1, around, None, None, 1e-5, True))
check("backward", lambda: kernels.dense_backward(h, x, grad_bn, x, None, 0, False, weight, 1, around, True, True))
print(outcomes["failed"] > 6, outcomes["result"] > 6)
"""
    assert run(PREAMBLE + code).split() == ["True", "True"]
