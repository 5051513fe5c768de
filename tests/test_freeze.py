"""``freeze``: the outputs of ``eval()``, nothing shared, inference only."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from behaviour import KernelOps, Plain, fused_units
from plain import assert_close, randomise_
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

import mobilenet_ext as mx
from mobilenet_ext import backends
from mobilenet_ext.contract import Act, acc_dtype


@pytest.fixture
def model(backend64) -> nn.Module:
    torch.manual_seed(11)
    return randomise_(mx.MobileNetV1(10, 0.25, dropout=0.3)).double()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(12)
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def needs_plans() -> None:
    """Skip where there are none: op by op is all there is, and would be compared with itself."""
    if backends.current("cpu") != "cpu":
        pytest.skip("only the cpu backend has plans")


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in module.state_dict().values()}


def test_outputs_are_those_of_eval(model, x):
    frozen = mx.freeze(model)
    expected = Plain(model.feature).eval()(x)
    assert_close(frozen.feature(x), expected, 1e-12)
    assert_close(frozen(x), model.eval()(x), 1e-12)
    with KernelOps() as ops:
        frozen.feature(x)
    assert ops.names.count("block_inference") == 13 and ops.units == 27


def test_the_model_is_left_as_it_was(model, x):
    before = copy.deepcopy(model.state_dict())
    model.train()
    frozen = mx.freeze(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    frozen(x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert fused_units(model, x) == 27


def test_nothing_is_shared(model, x):
    frozen = mx.freeze(model)
    assert not storages(model) & storages(frozen)
    expected = frozen(x)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(frozen(x), expected)
    for tensor in frozen.state_dict().values():
        tensor.fill_(1)
    assert not any(t.any() for t in model.state_dict().values())


def test_inference_only(model, x):
    frozen = mx.freeze(model)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(x).requires_grad
    assert not any(m.training for m in frozen.modules())
    assert frozen.eval() is frozen and frozen.train(False) is frozen


def test_train_changes_nothing(model, x):
    model.classifier.append(nn.Dropout(0.5))
    frozen = mx.freeze(model)
    expected = frozen(x)
    student = nn.ModuleDict({"teacher": frozen, "student": nn.Linear(1, 1)})
    assert student.train() is student and student.training and student["student"].training
    for module in frozen.modules():
        assert module.train() is module and module.train(False) is module and module.eval() is module
    assert not any(m.training for m in frozen.modules())
    assert torch.equal(frozen(x), expected)  # dropout stays off


def test_train_changes_nothing_where_nothing_could_be_folded(backend64):
    with pytest.warns(UserWarning, match="nothing to fold"):
        frozen = mx.freeze(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5)))
    assert frozen.train() is frozen and not any(m.training for m in frozen.modules())


def test_copies_and_pickles(model, x):
    frozen = mx.freeze(model)
    expected = frozen(x)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), mx.freeze(frozen)):
        assert torch.equal(twin(x), expected)
        assert not storages(twin) & storages(frozen)
        assert twin.train() is twin and not any(m.training for m in (*twin.modules(), *frozen.modules()))


def test_state_dict(model, x):
    frozen = mx.freeze(model)
    state = copy.deepcopy(frozen.state_dict())
    other = mx.freeze(randomise_(mx.MobileNetV1(10, 0.25)).double())
    assert not torch.allclose(other(x), frozen(x))
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), frozen(x))
    other.load_state_dict(randomise_(copy.deepcopy(model)).state_dict(), strict=True)  # the keys are the model's
    assert not torch.allclose(other(x), frozen(x))
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(other(x), frozen(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion(model, x, dtype):
    """Afterwards and before give outputs in that dtype; afterwards, BatchNorm's vectors keep the accumulation dtype."""
    expected = model.eval()(x)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for first, frozen in ((True, mx.freeze(model).to(dtype)), (False, mx.freeze(copy.deepcopy(model).to(dtype)))):
        conv, bn, _ = frozen.feature[3]
        assert conv.weight.dtype == dtype
        kept = torch.float32 if first else dtype
        assert all(t.dtype == kept for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
        out = frozen(x.to(dtype))
        assert out.dtype == dtype
        assert_close(out, expected, tolerance)
    half = mx.freeze(model).half()
    assert half.feature[0][0].weight.dtype == half.classifier[1].weight.dtype == torch.float16
    assert half.double().feature[0][1].running_var.dtype == torch.float64


def test_to_device_and_back(model, x):
    frozen = mx.freeze(model)
    state, expected = copy.deepcopy(frozen.state_dict()), frozen(x)
    frozen.to("meta")
    assert frozen(x.to("meta")).shape == (2, 10)
    frozen.load_state_dict(state, assign=True)  # a tensor on meta has no values to come back with
    assert torch.equal(frozen(x), expected)


def test_hooks_are_kept(model, x):
    calls = []
    model.feature[3].register_forward_hook(lambda m, i, o: calls.append(tuple(o.shape)))
    model.feature[8][0].register_forward_hook(lambda m, i, o: calls.append(tuple(o.shape)))
    model.feature.register_forward_hook(lambda m, i, o: calls.append(tuple(o.shape)))
    model.register_forward_pre_hook(lambda m, i: calls.append("model"))
    frozen = mx.freeze(model)
    out = frozen(x)
    shapes = [(2, 16, 16, 16), (2, 64, 8, 8), (2, 256, 1, 1)]
    assert len(calls) == 4 and calls[0] == "model" and calls[-1] == shapes[-1]
    assert calls[1][1] == 16 and calls[2][0] == 2
    assert fused_units(frozen.feature, x) == 26
    assert_close(out, model.eval()(x), 1e-12)


def test_hooks_that_change_what_passes_are_kept(model, x):
    model.feature[5][2].register_forward_hook(lambda m, i, o: 2 * o)
    frozen = mx.freeze(model)
    assert_close(frozen(x), model.eval()(x), 1e-12)


def test_pruned_and_swapped_units_stay(model, x):
    prune.l1_unstructured(model.feature[4][0], "weight", amount=0.5)
    model.feature[9][2] = nn.Mish()
    with torch.no_grad():
        model.eval()(x)  # a pruned weight with a history cannot be copied, in plain models neither
    frozen = mx.freeze(model)
    assert fused_units(frozen.feature, x) == 26  # without the pruned one; the other is linear then
    assert_close(frozen(x), model.eval()(x), 1e-12)


def test_activations_are_folded_and_their_bounds_are_watched(model, x):
    model.feature[4][2], model.feature[5][2], model.feature[6][2] = nn.ReLU6(), nn.Hardswish(), nn.SiLU()
    for index, slope in ((0, 0.1), (13, 0.2), (14, 0.3)):  # the dense one, a depthwise and a pointwise one
        model.feature[index][2] = nn.LeakyReLU(slope)
    del model.feature[7][2], model.feature[8][2], model.feature[26][2]  # a depthwise one, the pointwise one, the last
    frozen = mx.freeze(model)
    assert fused_units(frozen.feature, x) == 27
    assert_close(frozen(x), model.eval()(x), 1e-12)
    for each in (model, frozen):
        each.feature[4][2].max_val = 0.5
    assert_close(frozen(x), model.eval()(x), 1e-12)


def test_units_without_running_statistics_stay(model, x):
    channels = model.feature[6][1].num_features
    model.feature[6][1] = nn.BatchNorm2d(channels, track_running_stats=False).double()
    frozen = mx.freeze(model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert_close(frozen(x), model.eval()(x), 1e-12)


class Reversed(nn.Module):
    """Modules of a dictionary, called in another order than they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"b": mx.nn.DepthwiseConvBNReLU(4), "a": mx.nn.StemConvBNReLU(3, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["b"](self.parts["a"](x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: mx.nn.DepthwiseConvBNReLU(3),
        lambda: mx.nn.PointwiseConvBNReLU(3, 5, bias=False),
        lambda: mx.nn.DepthwiseSeparableConv(3, 5, stride=2),
        lambda: nn.Sequential(nn.Upsample(scale_factor=2), mx.nn.DepthwiseSeparableConv(3, 5), nn.Flatten()),
        lambda: mx.nn.StemConvBNReLU(3, 4),
        Reversed,
    ],
)
def test_modules_and_models_that_contain_some(backend64, make, x):
    module = randomise_(make()).double()
    frozen = mx.freeze(module)
    assert_close(frozen(x), module.eval()(x), 1e-12)
    assert fused_units(frozen, x) == fused_units(module, x) > 0


@pytest.mark.parametrize("settings", [{"affine": False}, {"eps": 0.1}])
def test_batch_norm_settings(model, x, settings):
    for unit in model.feature[:-1]:
        unit[1] = randomise_(nn.BatchNorm2d(unit[1].num_features, **settings)).double()
    assert_close(mx.freeze(model)(x), model.eval()(x), 1e-12)


@pytest.mark.parametrize("wrong", [None, "model", torch.ones(1), mx.MobileNetV1, lambda x: x])
def test_not_a_module(wrong):
    with pytest.raises(TypeError, match="^model: expected an nn.Module, got "):
        mx.freeze(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "image",
        [[1.0]],
        torch.ones(64, 64).double(),
        torch.ones(2, 4, 64, 64).double(),
        torch.ones(2, 3, 64, 64),
        torch.ones(2, 3, 64, 64, dtype=torch.int64),
        torch.ones(2, 3, 64, 64, dtype=torch.complex128),
        torch.ones(2, 3, 64, 64, device="meta", dtype=torch.float64),
        torch.ones(2, 3, 64, 64).double().to_sparse(),
        torch.ones(2, 3, 0, 64).double(),
        torch.ones(2, 3, 0, 0).double(),
        torch.ones(1, 3, 0, 0).double(),
        torch.nested.nested_tensor([torch.ones(3, 4, 4).double(), torch.ones(3, 5, 5).double()]),
    ],
)
def test_wrong_inputs_give_the_errors_of_the_plain_modules(model, wrong):
    """By shape and dtype, or in the same words; nothing has run."""
    frozen, plain_model = mx.freeze(model), Plain(model).eval()
    for _ in range(2):
        with pytest.raises(Exception) as expected:
            plain_model(wrong)
        with KernelOps() as ops, pytest.raises(type(expected.value)) as raised:
            frozen(wrong)
        assert str(raised.value) == str(expected.value)
        assert not ops.names
        frozen(torch.ones(1, 3, 8, 8).double())  # now there is a plan


def test_a_subclass_runs_as_in_the_plain_modules(model):
    class Picture(Tensor):
        pass

    unit, x = model.feature[0], torch.randn(1, 3, 8, 8).double()
    frozen, expected = mx.freeze(unit), Plain(unit).eval()
    picture = x.as_subclass(Picture)
    assert type(frozen(picture)) is type(expected(picture)) is Picture
    assert_close(frozen(picture).as_subclass(Tensor), expected(x), 1e-12)


def test_image_smaller_than_an_unpadded_kernel_is_refused(backend64):
    module = mx.nn.FusedSequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        mx.freeze(module)(torch.ones(2, 4, 2, 2))


def test_autocast(model, x):
    frozen = mx.freeze(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen.feature(x.float()).dtype == torch.bfloat16
        assert frozen.feature(x.bfloat16()).dtype == torch.bfloat16


def test_compiles(model, x):
    frozen = mx.freeze(model)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), frozen(x), 1e-12)


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


def plan_calls(frozen, x) -> int:
    """Calls of the kernels that run a plan during frozen(x)."""
    with torch.profiler.profile() as profile:
        frozen(x)
    return sum(event.count for event in profile.key_averages() if event.key == "mobilenet_ext_cpu::run_plan")


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
    plan = kernels.make_plan(dense, [bn, weight], [1, 2, *padding])
    assert torch.equal(kernels.run_plan(x, plan), kernels.dense_inference(x, bn, Act.RELU, weight, 2, 1))
    for wrong, message in ((plan.clone(), "plan"), (x, "plan")):
        with pytest.raises(RuntimeError, match=message):
            kernels.run_plan(x, wrong)
    for wrong in (x.double(), x[:, :2].contiguous(memory_format=torch.channels_last), torch.randn(1, 3, 8, 8)):
        with pytest.raises(RuntimeError, match="x: expected"):
            kernels.run_plan(wrong, plan)
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
            kernels.make_plan(ops, tensors, settings)


def test_from_meta_to_empty(model, x):
    """``to_empty`` takes a frozen model back from the meta device; whoever loads its values has it as it was."""
    frozen = mx.freeze(model)
    expected, state = frozen(x), copy.deepcopy(frozen.state_dict())
    frozen.to("meta").to_empty(device="cpu")
    frozen.load_state_dict(state)
    assert torch.equal(frozen(x), expected)
