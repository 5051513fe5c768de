"""Tensors whose storage was freed or made smaller than their sizes say, as FSDP does to a sharded parameter."""

from __future__ import annotations

import every_op
import pytest
import torch
import warm_process
from torch import Tensor

import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.contract import Act

# Another process: what fails here is a read of memory that is not there.
PREAMBLE = """
import torch, torch.nn as nn, torch.nn.functional as F
import mobilenet_ext as mx
from mobilenet_ext.backends.cpu import kernels

def resized(t, share=0):
    storage = t.untyped_storage()
    storage.resize_(int(storage.nbytes() * share))
    return t

def refused(f):
    try:
        f()
    except RuntimeError as error:
        assert "storage" in str(error) or "not allocated" in str(error), error
    else:
        raise AssertionError("not refused")

def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)
"""


def run(code: str) -> None:
    process = warm_process.run(PREAMBLE + code)
    assert process.returncode == 0, f"exit status {process.returncode}\n{process.stdout}{process.stderr}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_every_argument_of_every_op(share: float, backend: str) -> None:
    run(
        f"""
import every_op
from mobilenet_ext import ops
mx.backends.set("{backend}")
count = 0
for call in every_op.calls("cpu", (torch.float32,)):
    if call.args[0].shape[-1] == 1:
        continue
    for i, argument in enumerate(call.args):
        if not isinstance(argument, torch.Tensor):
            continue
        broken = [resized(a.clone(), {share}) if j == i else a for j, a in enumerate(call.args)]
        refused(lambda: getattr(ops, call.op)(*broken))
        count += 1
    call.run()
assert count > 100
"""
    )


def test_packed_weights() -> None:
    run(
        """
x, bn = channels_last(1, 32, 8, 8), torch.ones(5, 32)
depthwise, pointwise = torch.randn(32, 1, 3, 3), torch.randn(32, 32, 1, 1)
packed = kernels.pack(bn, depthwise, pointwise)
for share in (0, 0.5):
    broken = resized(packed.clone(), share)
    refused(lambda: kernels.block_inference(x, bn, 1, depthwise, 1, 1, bn, 1, pointwise, broken))
    refused(lambda: kernels.pack(bn, depthwise, resized(pointwise.clone(), share)))
    refused(lambda: kernels.pack(resized(bn.clone(), share), depthwise, pointwise))
kernels.block_inference(x, bn, 1, depthwise, 1, 1, bn, 1, pointwise, packed)
"""
    )


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_parameters_and_input_of_a_model(train: bool, memory_format: str) -> None:
    run(
        f"""
model = mx.MobileNetV1(3, 0.25).train({train}).to(memory_format=torch.{memory_format})
x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.{memory_format})
for t in (x, *model.feature[0].parameters(), *model.feature[1].parameters(), *model.feature[2].parameters()):
    size, kept = t.untyped_storage().nbytes(), t.detach().clone()
    resized(t)
    refused(lambda: model(x))
    t.untyped_storage().resize_(size)
    t.data.copy_(kept)
    assert model(x).isfinite().all()
"""
    )


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("name", ["depthwise", "pointwise"])
def test_functional(name: str, memory_format: str) -> None:
    run(
        f"""
x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.{memory_format})
w = torch.randn(*((8, 1, 3, 3) if "{name}" == "depthwise" else (8, 8, 1, 1)))
conv, fused = mx.functional.{name}_conv2d, mx.functional.{name}_bn_relu
vectors = [torch.rand(8) + 0.5 for _ in range(4)]
refused(lambda: conv(resized(x.clone()), w))
refused(lambda: conv(x, resized(w.clone())))
refused(lambda: conv(x, w, resized(torch.randn(8))))
refused(lambda: fused(x, w, resized(torch.randn(8)), *vectors, training=True))
refused(lambda: fused(resized(x.clone()), w, None, *vectors))
refused(lambda: fused(x, resized(w.clone()), None, *vectors, training=True))
for i in range(4):
    broken = [resized(v.clone()) if j == i else v for j, v in enumerate(vectors)]
    refused(lambda: fused(x, w, None, *broken))
    refused(lambda: fused(x, w, None, *broken, training=True))
    halves = [v.bfloat16() for v in vectors]  # converted before a kernel sees them
    halves[i] = resized(halves[i].clone())
    refused(lambda: fused(x.bfloat16(), w.bfloat16(), None, *halves))
    refused(lambda: fused(x.bfloat16(), w.bfloat16(), None, *halves, training=True))
with torch.autocast("cpu", torch.bfloat16):
    refused(lambda: conv(resized(x.clone()), w))
    refused(lambda: fused(x, resized(w.clone()), None, *vectors))
assert conv(x, w).isfinite().all()
"""
    )


def test_a_frozen_model() -> None:
    run(
        """
for dtype in (torch.float32, torch.bfloat16):
    model = mx.MobileNetV1(3, 0.25).eval().to(dtype)
    x = torch.randn(1, 3, 32, 32).to(dtype)
    frozen = mx.freeze(model)
    expected = frozen(x)
    refused(lambda: frozen(resized(x.clone())))
    refused(lambda: frozen(resized(x.contiguous(memory_format=torch.channels_last).clone())))
    assert torch.equal(frozen(x), expected)
    for p in model.parameters():
        resized(p)
    assert torch.equal(frozen(x), expected)  # has memory of its own
"""
    )


def test_freezing_a_model_without_memory() -> None:
    run(
        """
model = mx.MobileNetV1(3, 0.25)
for tensor in (model.feature[1][0].weight, model.feature[2][1].running_var, model.classifier[1].weight):
    size = tensor.untyped_storage().nbytes()
    resized(tensor)
    refused(lambda: mx.freeze(model))
    tensor.untyped_storage().resize_(size)
assert mx.freeze(model)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
"""
    )


def test_a_part_of_a_larger_storage_is_enough() -> None:
    """An offset counts, and what lies behind the tensor does not."""
    call = next(c for c in every_op.calls("cpu", (torch.float32,)) if c.op == "pointwise_inference")
    x, bn, act, weight, *geometry = call.args

    def inside(t: Tensor, behind: int) -> Tensor:
        storage = torch.empty(3 + t.numel() + behind)
        return storage[3:].as_strided(t.shape, t.stride()).copy_(t)

    expected = call.run()[0]
    with mx.backends.use("cpu"):
        for behind in (0, 5):
            moved = [inside(t, behind) for t in (x, bn, weight)]
            args = (*moved[:2], act, moved[2], *geometry)
            assert torch.equal(ops.pointwise_inference(*args), expected)
        moved[0].untyped_storage().resize_((2 + x.numel()) * 4)
        with pytest.raises(RuntimeError, match="input: expected a storage of at least"):
            ops.pointwise_inference(*args)


def test_an_empty_tensor_needs_no_storage() -> None:
    x = torch.empty(0, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    x.untyped_storage().resize_(0)
    with mx.backends.use("cpu"):
        assert ops.pointwise_inference(x, None, Act.RELU, torch.randn(4, 8, 1, 1), 1, 0).shape == (0, 4, 4, 4)
