"""Which units run fused: a module that was swapped or changed is honoured, and everything else still fuses."""

from __future__ import annotations

import copy

import pytest
import torch
from behaviour import (
    UNITS,
    KernelOps,
    Plain,
    assert_same_step,
    first_units,
    fused_units,
    image_with_gradient,
    units_without,
)
from torch import Tensor, nn

import mobilenet_ext as mx


@pytest.fixture
def model(backend64) -> nn.Module:
    return first_units()


@pytest.fixture
def x() -> Tensor:
    return image_with_gradient()


def test_untouched(model, x):
    assert_same_step(model, x, units=UNITS)
    assert_same_step(model.eval(), x, units=UNITS)
    with KernelOps() as ops, torch.no_grad():
        model(x)
    assert ops.names.count("block_inference") == 4


class ShiftedReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - 0.5)


class ScaledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class LeakyBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


def subclassed(old: nn.Module, new: type[nn.Module]) -> nn.Module:
    twin = copy.deepcopy(old)
    twin.__class__ = new
    return twin


def relu6_up_to(bound: float) -> nn.ReLU6:
    module = nn.ReLU6()
    module.max_val = bound
    return module


SWAPS = {
    "LeakyReLU with a tensor for a slope": (2, lambda old: nn.LeakyReLU(torch.tensor(0.1))),
    "Mish": (2, lambda old: nn.Mish()),
    "ReLU6 with another bound": (2, lambda old: relu6_up_to(2)),
    "Identity for BatchNorm": (1, lambda old: nn.Identity()),
    "GroupNorm": (1, lambda old: nn.GroupNorm(4, old.num_features).double()),
    "InstanceNorm": (1, lambda old: nn.InstanceNorm2d(old.num_features).double()),
    "dilation": (0, lambda old: nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16).double()),
    "7x7": (0, lambda old: nn.Conv2d(16, 16, 7, padding=2, groups=16).double()),
    "full 5x5": (0, lambda old: nn.Conv2d(16, 16, 5, padding=2).double()),
    "3x5": (0, lambda old: nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16).double()),
    "stride 3": (0, lambda old: nn.Conv2d(16, 16, 3, 3, 1, groups=16).double()),
    "padding 3": (0, lambda old: nn.Conv2d(16, 16, 3, 1, 3, groups=16).double()),
    "padding 1 and 3": (0, lambda old: nn.Conv2d(16, 16, 3, 1, (1, 3), groups=16).double()),
    "padding 'same' of a dilated one": (0, lambda old: nn.Conv2d(16, 16, 3, 1, "same", 2, groups=16).double()),
    "reflect": (0, lambda old: nn.Conv2d(16, 16, 3, 2, 1, groups=16, padding_mode="reflect").double()),
    "grouped": (0, lambda old: nn.Conv2d(16, 16, 3, 2, 1, groups=4).double()),
    "grouped 1x1": (0, lambda old: nn.Conv2d(16, 16, 1, groups=2).double()),
    "strided 1x1": (0, lambda old: nn.Conv2d(16, 16, 1, 2).double()),
    "padded 1x1": (0, lambda old: nn.Conv2d(16, 16, 1, 1, 1).double()),
    "subclassed ReLU": (2, lambda old: ShiftedReLU()),
    "subclassed Conv2d": (0, lambda old: subclassed(old, ScaledConv)),
    "subclassed BatchNorm2d": (1, lambda old: subclassed(old, LeakyBatchNorm)),
}


@pytest.mark.parametrize("name", SWAPS)
def test_swapped_child(model, x, name):
    index, make = SWAPS[name]
    model[3][index] = make(model[3][index])
    assert_same_step(model, x, units=units_without(index))
    assert_same_step(model.eval(), x, units=units_without(index))


ACTIVATIONS = {
    "none": nn.Identity,
    "ReLU6": nn.ReLU6,
    "Hardswish": nn.Hardswish,
    "SiLU": nn.SiLU,
    "SiLU in place": lambda: nn.SiLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU,
    "LeakyReLU with a slope of its own": lambda: nn.LeakyReLU(0.3),
    "LeakyReLU with a slope of 0": lambda: nn.LeakyReLU(0),
    "LeakyReLU with a slope below 0": lambda: nn.LeakyReLU(-0.5),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(model, x, activation):
    for index in (1, 3):
        model[index][2] = activation()
    assert_same_step(model, x, units=UNITS)
    assert_same_step(model.eval(), x, units=UNITS)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("unpadded", lambda: nn.Conv2d(16, 16, 3, groups=16)),
        ("padding 2", lambda: nn.Conv2d(16, 16, 3, 2, 2, groups=16)),
        ("other padding of rows than of columns", lambda: nn.Conv2d(16, 16, 3, 1, (0, 2), groups=16)),
        ("padding 'same'", lambda: nn.Conv2d(16, 16, 3, 1, "same", groups=16)),
        ("padding 'valid'", lambda: nn.Conv2d(16, 16, 3, 1, "valid", groups=16)),
        ("5x5", lambda: nn.Conv2d(16, 16, 5, 2, 2, groups=16)),
        ("full 3x3", lambda: nn.Conv2d(16, 16, 3, padding=1)),
        ("1x1 in place of a depthwise one", lambda: nn.Conv2d(16, 16, 1)),
        ("without bias", lambda: nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False)),
    ],
)
def test_swapped_child_that_the_kernels_support(model, x, name, make):
    model[3][0] = make().double()
    assert_same_step(model, x, units=UNITS)
    assert_same_step(model.eval(), x, units=UNITS)


def test_inplace_relu_is_fused(model, x):
    model[3][2] = nn.ReLU(inplace=True)
    assert_same_step(model, x, units=UNITS)


@pytest.mark.parametrize("size", [1, (1, 1), [1, 1], 2, (1, 2), (None, 1)])
def test_poolings(model, x, size):
    model[-1] = nn.AdaptiveAvgPool2d(size)
    assert_same_step(model, x, units=UNITS)


def test_inserted_and_removed_modules(model, x):
    model[4].append(nn.Dropout(0.0))
    model.insert(2, nn.Identity())
    del model[-1]
    assert_same_step(model, x, units=UNITS)
    del model[5][2]  # its ReLU
    assert_same_step(model, x, units=UNITS)
    del model[5][1]  # its BatchNorm
    assert_same_step(model, x, units=UNITS - 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_that_is_unknown_follows_a_linear_unit(model, x, inplace):
    model[3][2] = nn.ELU(inplace=inplace)
    assert_same_step(model, x, units=UNITS)
    assert_same_step(model.eval(), x, units=UNITS)


def test_linear_units_at_both_ends_and_in_front_of_the_pooling(model, x):
    """As in an inverted residual: the projection has no activation."""
    for index in (0, 4, UNITS - 1):
        del model[index][2]
    assert_same_step(model, x, units=UNITS)
    assert_same_step(model.eval(), x, units=UNITS)


def test_swapped_unit(model, x):
    model[3] = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1).double(), nn.ReLU())
    assert_same_step(model, x, units=UNITS - 1)
    model[3] = nn.Sequential(*(mx.nn.DepthwiseConvBNReLU(16, stride=2).double()))
    assert_same_step(model, x, units=UNITS)  # a plain container is looked into


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def test_container_with_a_forward_of_its_own(model, x):
    model[3] = Residual(*mx.nn.DepthwiseConvBNReLU(16).double())
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == UNITS - 1
    expected = x
    for i, unit in enumerate(model):
        inner = expected
        for leaf in unit if isinstance(unit, nn.Sequential) else [unit]:
            inner = leaf(inner)
        expected = expected + inner if i == 3 else inner
    torch.testing.assert_close(actual, expected)


def test_sync_batch_norm(model, x):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[3][1], nn.SyncBatchNorm)
    assert fused_units(converted, x) == 0
    assert_same_step(converted, x, units=0)
    one = mx.nn.FusedSequential(*copy.deepcopy(model))
    assert_same_step(one, x)


def test_one_sync_batch_norm(model, x):
    model[3] = nn.SyncBatchNorm.convert_sync_batchnorm(model[3])
    assert_same_step(model, x, units=UNITS - 1)


def test_functional_call(model, x):
    """Other tensors in the place of the parameters are the ones that count, and that get the gradients."""
    other = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    weight = other["3.0.weight"].requires_grad_()
    out = torch.func.functional_call(model.eval(), other, (x,))
    twin = copy.deepcopy(model)
    twin.load_state_dict({**twin.state_dict(), **{name: t.detach() for name, t in other.items()}})
    expected = Plain(twin)(x)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad.abs().sum() > 0


def test_symbolic_trace_sees_plain_modules(model, x):
    traced = torch.fx.symbolic_trace(model.eval())
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == 3 * UNITS + 1
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_jit_trace_sees_plain_modules(model, x):
    model.eval().requires_grad_(False)
    traced = torch.jit.trace(model, x.detach())
    torch.testing.assert_close(traced(x.detach()), model(x.detach()))
    assert "mobilenet_ext::" not in str(traced.inlined_graph)


class Tagged(Tensor):
    """A tensor subclass that sees every operation on it."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_see_plain_operations(model, x):
    tagged = x.detach().as_subclass(Tagged)
    with KernelOps() as ops:
        out = model(tagged)
    assert ops.units == 0 and isinstance(out, Tagged)
    assert sum("batch_norm" in name for name in Tagged.seen) >= UNITS


def test_tensor_subclasses_as_parameters(model, x):
    Tagged.seen.clear()
    expected = model.eval()(x)
    model[3][0].weight = nn.Parameter(model[3][0].weight.detach().as_subclass(Tagged))
    torch.testing.assert_close(torch.Tensor(model(x).detach()), expected.detach())
    assert any("conv2d" in name for name in Tagged.seen)


@pytest.mark.parametrize("buffer", ["running_mean", "running_var", "num_batches_tracked"])
def test_batch_norms_that_share_a_buffer(model, x, buffer):
    first, second = model[0][1], model[1][1]
    setattr(second, buffer, getattr(first, buffer))
    if buffer == "num_batches_tracked":
        first.momentum = second.momentum = None
    plain = Plain(model)
    for _ in range(2):
        model(x)
        plain(x)
    for (name, actual), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


MALFORMED = {
    "bias of another length": lambda unit: setattr(unit[0], "bias", nn.Parameter(torch.zeros(1).double())),
    "eps": lambda unit: setattr(unit[1], "eps", -1e-5),
    "only a running variance": lambda unit: setattr(unit[1], "running_mean", None),
    "only a running mean": lambda unit: setattr(unit[1], "running_var", None),
    "running statistics of another length": lambda unit: setattr(unit[1], "running_mean", torch.zeros(3).double()),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_unit_says_what_the_plain_modules_say(model, x, name):
    MALFORMED[name](model[1])
    plain = Plain(model)
    with pytest.raises(Exception) as expected:
        plain(x)
    with pytest.raises(type(expected.value)) as actual:
        model(x)
    assert str(actual.value) == str(expected.value)


def test_weight_of_another_kernel_size(model, x):
    conv = model[1][0]
    conv.weight.data = torch.randn(conv.out_channels, 1, 5, 5, dtype=torch.float64)
    assert_same_step(model, x, units=UNITS - 1)
