"""A frozen model is the model to whoever looks into it: every module and tensor in its place, and each computes what it
did, called in whatever way. And it is freed like any other."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from behaviour import KernelOps, Plain
from plain import assert_close, randomise_
from torch import Tensor, nn
from torch.func import functional_call

import mobilenet_ext as mx
from mobilenet_ext import backends, plans


@pytest.fixture
def model(model: nn.Module) -> nn.Module:
    return model.eval()


def grey(n: int, channels: int) -> Tensor:
    return torch.randn(n, channels, 9, 9, dtype=torch.float64)


class Residual(mx.nn.DepthwiseSeparableConv):
    def forward(self, x):
        return self[-1](self[0](x)) + x


class Clipped(mx.nn.DepthwiseConvBNReLU):
    def forward(self, x):
        return nn.functional.relu6(self[1](self[0](x)))


class Reversed(mx.nn.FusedSequential):
    def forward(self, x):
        for module in reversed(list(self)):
            x = module(x)
        return x


class Taps(nn.Module):
    """A backbone over MobileNetV1's features that keeps what comes out after some of them."""

    def __init__(self, feature: nn.Module) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, x):
        taps = []
        for i, module in enumerate(self.feature):
            x = module(x)
            if i in (2, 10, 22):
                taps.append(x.mean((2, 3)))
        return torch.cat(taps, 1)


class Inside(nn.Module):
    """Takes a unit apart: the convolution's output, and BatchNorm's before the ReLU."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x):
        conv, bn, relu = self.unit
        y = conv(x)
        z = bn(y)
        return torch.cat([y, z, relu(z)], 1)


class Backwards(nn.Module):
    """Takes a part from the end, by index, slice and name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        head, tail = self.net.feature[:-2], self.net.feature[-2:]
        first = self.net.get_submodule("feature.0")
        x = head[1:](first(x))
        return self.net.classifier[1](self.net.classifier[0](tail(x)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda net: Residual(8, 8), (2, 8, 9, 9)),
        (lambda net: nn.Sequential(Residual(8, 8), mx.nn.PointwiseConvBNReLU(8, 4), Residual(4, 4)), (2, 8, 9, 9)),
        (lambda net: Clipped(8), (2, 8, 9, 9)),
        (lambda net: mx.nn.FusedSequential(Clipped(8), mx.nn.PointwiseConvBNReLU(8, 4)), (2, 8, 9, 9)),
        (lambda net: Reversed(mx.nn.PointwiseConvBNReLU(6, 3), mx.nn.DepthwiseSeparableConv(4, 6)), (2, 4, 9, 9)),
        (lambda net: Taps(net.feature), (2, 3, 64, 64)),
        (lambda net: Inside(net.feature[0]), (2, 3, 64, 64)),
        (lambda net: Backwards(net), (2, 3, 64, 64)),
        (lambda net: net.feature[3:9], (2, 16, 8, 8)),
    ],
    ids=["residual", "residuals", "clipped", "clipped inside", "reversed", "taps", "inside", "backwards", "slice"],
)
def test_whatever_a_model_does_with_its_parts(model, make, shape):
    module = randomise_(make(model)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    frozen = mx.freeze(module)
    expected = module(x)
    for _ in range(2):
        out = frozen(x)
        assert out.shape == expected.shape
        assert_close(out, expected, 1e-12)


def test_every_place_computes_what_it_did(model, x):
    """Each module, called alone with the input that it gets in the model."""
    inputs: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0]))
        for name, m in model.named_modules()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    frozen = mx.freeze(model)
    assert [name for name, _ in frozen.named_modules()] == [name for name, _ in model.named_modules()]
    for name, module in model.named_modules():
        place = frozen.get_submodule(name)
        assert isinstance(place, type(module)) and (not isinstance(module, nn.Sequential) or len(place) == len(module))
        assert_close(place(inputs[name].detach()), module(inputs[name]), 1e-12)


def test_weights_stay_visible(model, x):
    frozen = mx.freeze(model)
    first = next(frozen.parameters())
    assert first.dtype == torch.float64 and first.device.type == "cpu" and not first.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(frozen.state_dict()[name], tensor), name
    assert frozen.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in frozen.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_a_part_of_a_frozen_model_keeps_its_plan(model, x, monkeypatch):
    part = mx.freeze(model).feature[:9]
    expected = part(x)
    if backends.current("cpu") == "cpu":
        monkeypatch.setattr(backends.cpu, "pack", lambda *_: pytest.fail("packed again"))
    assert torch.equal(part(x), expected)
    assert_close(part(x), Plain(model.feature[:9]).eval()(x), 1e-12)


def test_parameters_may_be_swapped_for_a_call(model, x):
    frozen = mx.freeze(model)
    before = frozen(x)
    other = {name: p * 1.1 for name, p in frozen.named_parameters()}
    changed = copy.deepcopy(frozen)
    changed.load_state_dict(other, strict=False)
    assert_close(functional_call(frozen, other, x), changed(x), 1e-12)
    assert torch.equal(frozen(x), before)


def test_a_replica_runs_on_its_own_tensors(model, x):
    frozen = mx.freeze(model)
    frozen(x)
    replica = frozen._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(module) for name, module in frozen._modules.items()}
    for parameter in replica._modules["feature"].parameters():
        parameter.mul_(1.1)
    expected = replica._modules["classifier"](Plain(replica._modules["feature"]).eval()(x))
    assert_close(replica(x), expected, 1e-12)


def test_an_input_that_needs_gradients_gets_them(model, x):
    """As through the model in eval mode with fixed parameters: a frozen network as part of a loss."""
    fixed = Plain(model.requires_grad_(False)).eval()
    frozen = mx.freeze(model)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for out in (frozen.feature(inputs[0]), frozen(inputs[0])):
        inputs[0].grad = inputs[1].grad = None
        expected = fixed(inputs[1]) if out.ndim == 2 else plain_feature(fixed, inputs[1])
        out.square().sum().backward()
        expected.square().sum().backward()
        assert_close(inputs[0].grad, inputs[1].grad, 1e-11)
    with torch.no_grad():
        assert not frozen(inputs[0]).requires_grad
    assert not frozen(x).requires_grad
    assert all(p.grad is None for p in frozen.parameters())


def plain_feature(fixed: Plain, x: Tensor) -> Tensor:
    for module in fixed.module.feature.modules():
        if not isinstance(module, nn.Sequential):
            x = module(x)
    return x


@pytest.mark.parametrize(
    "make",
    [
        lambda: mx.MobileNetV1(10, 0.25),
        lambda: mx.nn.DepthwiseSeparableConv(8, 8),
        lambda: nn.ModuleDict({"a": mx.nn.StemConvBNReLU(3, 4), "b": nn.Dropout()}),
    ],
    ids=["network", "block", "any module"],
)
def test_freed_with_its_last_name(make):
    gc.collect()
    gc.disable()
    try:
        frozen = mx.freeze(make())
        for module in frozen.modules():
            if isinstance(module, (mx.MobileNetV1, mx.nn.FusedSequential)):
                first = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
                module(torch.randn(1, first.in_channels, 32, 32))
        others = [copy.deepcopy(frozen), frozen.train().eval()]
        watched = [weakref.ref(m) for each in (frozen, *others) for m in each.modules()]
        watched += [weakref.ref(t) for each in (frozen, *others) for t in each.state_dict(keep_vars=True).values()]
        del frozen, others, module, first
        assert not [ref() for ref in watched if ref() is not None]
    finally:
        gc.enable()


def run_under(mode: str, make):
    with torch.inference_mode() if mode == "inference mode" else torch.no_grad():
        return make()


@pytest.mark.parametrize(
    "make",
    [
        lambda model: mx.freeze(model),
        lambda model: mx.freeze(model).to(torch.bfloat16),
        lambda model: mx.freeze(copy.deepcopy(model)),
        lambda model: mx.freeze(mx.freeze(model)),
    ],
    ids=["freeze", "to", "copied model", "twice"],
)
def test_frozen_in_inference_mode(model, x, make):
    """The plan is there, it notices changes, and the numbers are those of a model frozen outside."""
    if backends.current("cpu") != "cpu":
        pytest.skip("only the cpu backend has plans")
    frozen, inside = run_under("no grad", lambda: make(model)), run_under("inference mode", lambda: make(model))
    dtype = next(frozen.parameters()).dtype
    x = x.to(dtype)
    for mode in ("no grad", "inference mode", "no grad"):
        for each in (frozen, inside):
            packed = []
            run_under(mode, lambda each=each: each(x))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(backends.cpu, "pack", lambda *args, packed=packed: packed.append(args))
                out = run_under(mode, lambda each=each: each(x))
            assert not packed and torch.equal(out, frozen(x))
            assert plan_runs(each, x, mode) == 1
    for each in (frozen, inside):
        each.classifier[1].bias.add_(1)
    assert torch.equal(inside(x), frozen(x))


def plan_runs(frozen: nn.Module, x: Tensor, mode: str) -> int:
    with torch.profiler.profile() as profile:
        run_under(mode, lambda: frozen(x))
    return sum(event.count for event in profile.key_averages() if event.key == "mobilenet_ext_cpu::run_plan")


def test_tensors_of_inference_mode_give_right_numbers(model, x):
    """Somebody else's, put in afterwards: they do not tell when they change, so no plan rests on them."""
    frozen = mx.freeze(model)
    frozen(x)
    with torch.inference_mode():
        state = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
        frozen.load_state_dict(state, assign=True)
        expected = Plain(frozen.feature).eval()(x)
        assert_close(frozen.feature(x), expected, 1e-12)
        for tensor in state.values():
            tensor.mul_(1.5)
        assert_close(frozen.feature(x), Plain(frozen.feature).eval()(x), 1e-12)


def test_pictures_of_torchvision(model, x):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    picture = tv_tensors.Image(x)
    frozen, expected = mx.freeze(model), model(picture)
    out = frozen(picture)
    assert type(out) is type(expected)
    assert_close(out, expected, 1e-12)
    with tv_tensors.set_return_type("TVTensor"):
        assert type(frozen(picture)) is type(model(picture)) is tv_tensors.Image


def test_modules_in_place_run_fused(model, x):
    frozen = mx.freeze(model)
    with KernelOps() as ops:
        for module in frozen.feature:
            x = module(x)
    assert ops.units == 27


def test_a_thread_that_is_late_leaves_no_outdated_plan(monkeypatch):
    """One thread makes a plan of the old weights while another changes them and runs."""
    frozen, x = mx.freeze(mx.nn.PointwiseConvBNReLU(4, 4)), torch.randn(1, 4, 3, 3)
    started, changed = threading.Event(), threading.Event()
    fold = plans.fold

    def slow_fold(unit):
        folded = fold(unit)
        if threading.current_thread() is not threading.main_thread():
            started.set()
            changed.wait()
        return folded

    monkeypatch.setattr(plans, "fold", slow_fold)
    thread = threading.Thread(target=frozen, args=(x,))
    thread.start()
    started.wait()
    frozen[1].bias.add_(1)
    frozen(x)
    changed.set()
    thread.join()
    assert_close(frozen(x), Plain(frozen).eval()(x), 1e-6)


@pytest.mark.parametrize("attribute", ["forward", "_conv_forward"])
def test_what_a_convolution_does_instead_is_noticed(model, x, attribute):
    frozen = mx.freeze(model)
    frozen(x)
    conv = frozen.feature[3][0]
    setattr(conv, attribute, lambda x, *_: x * 3)
    out = frozen.feature[3](x[:, :1].expand(-1, conv.in_channels, -1, -1).contiguous())
    plain = frozen.feature[3][2](frozen.feature[3][1](3 * x[:, :1].expand(-1, conv.in_channels, -1, -1)))
    assert_close(out, plain, 1e-12)


def test_a_shallow_copy_of_a_frozen_layer() -> None:
    """It is put in eval mode itself, whether the model is still there or not."""
    frozen = mx.freeze(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)))
    layer = copy.copy(frozen[3])
    assert layer.eval() is layer and frozen[3].eval() is frozen[3]
    del frozen
    assert layer.eval() is layer and not layer.training
