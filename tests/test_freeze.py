"""``freeze``: the outputs of ``eval()``, nothing shared, inference only."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from behaviour import KernelOps, Plain, fused_units
from plain import assert_close, randomise_
from torch import Tensor, nn
from torch.nn.utils import prune

import mobilenet_ext as mx


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
        frozen = mx.freeze(nn.Sequential(nn.Conv2d(3, 4, 7), nn.Dropout(0.5)))
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


def test_from_meta_to_empty(model, x):
    """``to_empty`` takes a frozen model back from the meta device; whoever loads its values has it as it was."""
    frozen = mx.freeze(model)
    expected, state = frozen(x), copy.deepcopy(frozen.state_dict())
    frozen.to("meta").to_empty(device="cpu")
    frozen.load_state_dict(state)
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
