"""The plans of frozen models: a plan gives the bits of op by op, notices every change, and is shown to nobody."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from behaviour import KernelOps
from cpu_ops import in_a_row
from plain import assert_close, randomise_
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mobilenet_ext as mx
from mobilenet_ext import backends
from mobilenet_ext.contract import Act, acc_dtype


def needs_plans() -> None:
    """Skip where there are none: op by op is all there is, and would be compared with itself."""
    if backends.current("cpu") != "cpu":
        pytest.skip("only the cpu backend has plans")


def plan_calls(frozen, x) -> int:
    """Calls of the kernels that run a plan during frozen(x)."""
    with torch.profiler.profile() as profile:
        frozen(x)
    return sum(event.count for event in profile.key_averages() if event.key == "mobilenet_ext_cpu::run_plan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (1, 1), (33, 17), (40, 24), (130, 5)], ids=str)
def test_packed_weights_give_the_same_bits(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    n, k = shape
    x = torch.randn(2, k, 9, 7).to(dtype=dtype, memory_format=torch.channels_last)
    bns = [(torch.rand(5, channels) + 0.5).to(acc_dtype(dtype)) for channels in (k, n)]
    weights = torch.randn(k, 1, 3, 3).to(dtype), torch.randn(n, k, 1, 1).to(dtype)
    args = (x, bns[0], Act.RELU, weights[0], 1, (1, 1, 1, 1), bns[1], Act.RELU, weights[1])
    kernel = backends.cpu.kernels.block_inference
    packed = backends.cpu.pack(bns[0], *weights)
    assert torch.equal(kernel(*args, packed), kernel(*args, None))
    with pytest.raises(RuntimeError, match="packed"):
        kernel(*args, packed[1:].clone())


def test_weights_are_packed_once_and_anew_when_changed(model, x, monkeypatch):
    calls = []
    pack = backends.cpu.pack
    monkeypatch.setattr(backends.cpu, "pack", lambda *block: calls.append(block) or pack(*block))
    frozen = mx.freeze(model)
    needs_plans()
    before = frozen(x)
    packed = 13 + 1  # the blocks, and the classifier
    assert torch.equal(frozen(x), before) and len(calls) == packed
    other = mx.freeze(randomise_(copy.deepcopy(model)))
    frozen.load_state_dict(other.state_dict())
    assert_close(frozen(x), other(x), 1e-12)
    assert len(calls) == 3 * packed and not torch.equal(frozen(x), before)
    single = copy.deepcopy(frozen).float()
    assert single(x.float()).dtype == torch.float32 and len(calls) == 4 * packed
    restored = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(restored(x), frozen(x)) and len(calls) == 5 * packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_call_gives_the_bits_of_op_by_op(model, x, dtype):
    needs_plans()
    frozen, x = mx.freeze(model).feature.to(dtype), x.to(dtype)
    assert plan_calls(frozen, x) == 1
    alone = frozen(x)
    with KernelOps() as ops:
        watched = frozen(x)
    assert torch.equal(alone, watched) and ops.names.count("block_inference") == 13


def test_who_watches_is_shown_no_plan(model, x):
    frozen = mx.freeze(model)
    expected = frozen(x)  # there is a plan
    for mode in ("real", "fake"):
        graph = make_fx(frozen, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
        targets = [str(node.target) for node in graph.graph.nodes]
        assert not any("run_plan" in target or "pack" in target for target in targets)
        assert_close(graph(x), expected, 1e-12)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert frozen(fake.from_tensor(x)).shape == (2, 10)
    assert torch.equal(frozen(x), expected)


def test_two_dtypes_have_a_plan_each(model, monkeypatch):
    frozen, x = mx.freeze(model.float()), torch.randn(2, 3, 64, 64)
    outputs = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs[enabled] = frozen(x)
    monkeypatch.setattr(backends.cpu, "pack", lambda *_: pytest.fail("packed again"))
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(frozen(x), outputs[enabled])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_classifier_runs_with_the_features(model, x, dtype, bias):
    model.classifier[1] = nn.Linear(model.classifier[1].in_features, 37, bias=bias).double()
    frozen = mx.freeze(model).to(dtype)
    pooled = frozen.feature(x.to(dtype)).flatten(1)
    linear = frozen.classifier[1]
    bias = None if linear.bias is None else linear.bias.double()
    expected = torch.nn.functional.linear(pooled.double(), linear.weight.double(), bias)
    out = frozen(x.to(dtype))
    assert out.dtype == dtype and out.shape == (2, 37)
    eps = torch.finfo(dtype).eps
    assert_close(out, expected, 4 * eps if dtype.itemsize > 2 else eps)


def test_what_changed_in_place_is_noticed(model, x):
    frozen = mx.freeze(model)
    before = frozen(x)
    (depthwise, depthwise_bn, _), (pointwise, pointwise_bn, _) = frozen.feature[1], frozen.feature[2]
    tensors = [t for bn in (depthwise_bn, pointwise_bn) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)]
    for tensor in (*tensors, depthwise.weight, depthwise.bias, pointwise.weight, *frozen.classifier.parameters()):
        tensor.mul_(1.5)
        after, fresh = frozen(x), copy.deepcopy(frozen)(x)
        assert not torch.equal(after, before) and torch.equal(after, fresh)
        before = after
    for tensor in (depthwise.weight, pointwise_bn.running_mean, frozen.classifier[1].bias):
        tensor.data = 1.5 * tensor  # other memory in the same tensor, without a new version
        after, fresh = frozen(x), copy.deepcopy(frozen)(x)
        assert not torch.equal(after, before) and torch.equal(after, fresh)
        before = after
    depthwise.weight = nn.Parameter(2 * depthwise.weight)
    pointwise_bn.running_var = 2 * pointwise_bn.running_var
    after, fresh = frozen(x), copy.deepcopy(frozen)(x)
    assert not torch.equal(after, before) and torch.equal(after, fresh)


def test_a_watched_or_swapped_classifier_stays(model, x):
    seen = []
    model.classifier[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    frozen = mx.freeze(model)
    assert_close(frozen(x), model.eval()(x), 1e-12)
    assert len(seen) == 2
    for other in (nn.Identity(), nn.Flatten(), nn.Sequential()):
        model.classifier = other
        assert_close(mx.freeze(model)(x), model.eval()(x), 1e-12)


def test_the_whole_network_is_one_call_unless_somebody_is_between(model, x):
    needs_plans()
    frozen = mx.freeze(model)
    expected = frozen(x)
    assert isinstance(frozen, mx.MobileNetV1) and plan_calls(frozen, x) == 1
    pooled = frozen.feature(x)
    assert_close(frozen.classifier(pooled), expected, 1e-12)
    for module in (frozen.feature, frozen.classifier, *frozen.classifier):
        seen = []
        handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        assert_close(frozen(x), expected, 1e-12)
        assert len(seen) == 1 and plan_calls(frozen, x) == 1  # the features
        handle.remove()
    for module, calls in ((frozen.feature[4], 3), (frozen.feature[4][1], 2), (frozen.feature[27], 1)):
        seen = []
        handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        assert_close(frozen(x), expected, 1e-12)
        assert len(seen) == 1 and plan_calls(frozen, x) == calls
        handle.remove()
    assert plan_calls(frozen, x) == 1
    twin = mx.freeze(randomise_(copy.deepcopy(model)))
    frozen.classifier[1] = twin.classifier[1]
    assert_close(frozen(x), twin.classifier(pooled), 1e-12)
    assert plan_calls(frozen, x) == 1
    frozen.classifier[1] = nn.Identity()
    assert torch.equal(frozen(x), pooled.flatten(1))
    frozen.classifier = nn.Sequential(nn.Flatten(0), nn.Identity())
    assert frozen(x).shape == (2 * 256,)


def test_hooks_that_stay_do_not_pack_the_weights_again(model, x, monkeypatch):
    frozen = mx.freeze(model)
    frozen.feature[4].register_forward_hook(lambda m, i, o: None)
    expected = frozen(x)
    monkeypatch.setattr(backends.cpu, "pack", lambda *_: pytest.fail("packed again"))
    assert torch.equal(frozen(x), expected)


def test_a_replaced_forward_is_noticed(model, x):
    frozen = mx.freeze(model)
    frozen(x)
    frozen.feature[3][2].forward = torch.sigmoid
    model.eval().feature[3][2].forward = torch.sigmoid
    assert_close(frozen(x), model(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sizes_may_change_from_call_to_call(model, dtype):
    needs_plans()
    frozen = mx.freeze(model).feature.to(dtype)
    for n, h, w in ((1, 64, 64), (3, 33, 95), (0, 64, 64), (2, 1, 1), (1, 64, 64)):
        x = torch.randn(n, 3, h, w).to(dtype)
        with KernelOps():  # op by op
            expected = frozen(x)
        assert torch.equal(frozen(x), expected)
        assert plan_calls(frozen, x) == (n > 0)  # empty batches run op by op


def test_autocast_that_has_ended_is_noticed(model, x):
    """The input has autocast's dtype by itself, and without autocast not that of the weights."""
    frozen, x = mx.freeze(model.float()), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        frozen(x)
    with pytest.raises(RuntimeError, match="dtype|type"):
        frozen(x)


def test_a_frozen_model_with_parts_in_two_dtypes_is_refused(model, x):
    frozen = mx.freeze(model)
    frozen.classifier.float()
    with pytest.raises((TypeError, RuntimeError), match="dtype|input"):
        frozen(x)


def test_only_a_plan_is_taken_for_one():
    weight, bn = torch.randn(8, 3, 3, 3), torch.ones(5, 8)
    kernels, x = backends.cpu.kernels, torch.randn(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    dense = ["dense_inference"]
    padding = [1, 1, 1, 1]
    plan = kernels.make_plan(dense, [bn, weight], [1, 2, *padding], [0.0], *in_a_row(1))
    assert torch.equal(kernels.run_plan([x], plan)[0], kernels.dense_inference(x, bn, Act.RELU, weight, 2, 1))
    for wrong, message in ((plan.clone(), "plan"), (x, "plan")):
        with pytest.raises(RuntimeError, match=message):
            kernels.run_plan([x], wrong)
    for wrong in (x.double(), x[:, :2].contiguous(memory_format=torch.channels_last), torch.randn(1, 3, 8, 8)):
        with pytest.raises(RuntimeError, match="inputs: expected"):
            kernels.run_plan([wrong], plan)
    pooled, narrow = [*dense, "norm_act_forward"], bn[:, :4].contiguous()
    for ops, tensors, settings, message in (
        (dense, [bn, weight], [1, 3, *padding], "stride: expected 1 or 2"),
        (dense, [bn, weight], [7, 1, *padding], "act: expected an Act"),
        (["dense_forward"], [bn, weight], [1, 1, 1], "ops: no step of a plan"),
        (["norm_act_forward"], [bn, weight], [1, 1], "pooling after a convolution"),
        ([], [bn, weight], [], "ops: expected at least one"),
        (dense, [bn, weight], [1, 1, 1, 1, 1], "settings: too few"),
        (dense, [bn, weight], [1, 1, 1, 1, 1, 3], "padding: expected 0, 1 or 2"),
        (dense, [bn, weight], [1, 1, *padding, 1], "settings: more"),
        (pooled, [bn, weight], [1, 1, *padding, 0, 1], "tensors: too few"),
        (pooled, [bn, weight, bn], [1, 1, *padding, 0, 0], "pooling"),
        (dense, [narrow, weight], [1, 1, *padding], "bn: expected shape"),
        (dense, [bn, weight, bn], [1, 1, *padding], "tensors: more"),
        (dense, [bn], [1, 1, *padding], "tensors: too few"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.make_plan(ops, tensors, settings, [0.0] * len(ops), *in_a_row(len(ops)))
    for slopes, message in (([], "slopes: too few"), ([0.0, 0.0], "slopes: more")):
        with pytest.raises(RuntimeError, match=message):
            kernels.make_plan(dense, [bn, weight], [1, 1, *padding], slopes, *in_a_row(1))
