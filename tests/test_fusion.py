"""Which units run fused: whatever watches or changes a module is honoured, and everything else still fuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from behaviour import KernelOps, Plain, assert_same_step, fused_units
from plain import randomise_
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import mobilenet_ext as mx

UNITS = 9


@pytest.fixture
def model(backend64) -> nn.Module:
    """The first nine units of the network and a pooling, in float64."""
    torch.manual_seed(5)
    feature = randomise_(mx.MobileNetV1(10, 0.25)).double().feature
    return mx.nn.FusedSequential(*feature[:UNITS], feature[-1])


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(6)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def test_untouched(model, x):
    assert_same_step(model, x, units=UNITS)
    assert_same_step(model.eval(), x, units=UNITS)
    with KernelOps() as ops, torch.no_grad():
        model(x)
    assert ops.names.count("block_inference") == 4


def shapes_of(calls: list, tensors: object) -> None:
    calls.append([tuple(t.shape) for t in tensors if t is not None])


# What a hook sees at the children of unit 3 (depthwise, stride 2; 16 channels, 16x16), at the unit, and in front of and
# behind them.
INSIDE, OUTSIDE = (2, 16, 8, 8), (2, 16, 16, 16)
LEVELS = {"conv": ((3, 0), OUTSIDE, INSIDE), "bn": ((3, 1), INSIDE, INSIDE), "relu": ((3, 2), INSIDE, INSIDE)}


def units_without(index: int) -> int:
    """How many units are left where one's module ``index`` runs by itself: in front of an activation a linear unit."""
    return UNITS if index == 2 else UNITS - 1


def child(model: nn.Module, path: tuple[int, ...]) -> nn.Module:
    for index in path:
        model = model[index]
    return model


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "with_kwargs"])
def test_hook_on_a_leaf(model, x, level, kind):
    path, shape_in, shape_out = LEVELS[level]
    target, calls = child(model, path), []
    if kind == "forward":
        handle = target.register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
        expected = [shape_in, shape_out]
    elif kind == "with_kwargs":
        handle = target.register_forward_hook(lambda m, i, k, o: shapes_of(calls, (*i, o)), with_kwargs=True)
        expected = [shape_in, shape_out]
    elif kind == "forward_pre":
        handle = target.register_forward_pre_hook(lambda m, i: shapes_of(calls, i))
        expected = [shape_in]
    elif kind == "full_backward":
        handle = target.register_full_backward_hook(lambda m, gi, go: shapes_of(calls, (*gi, *go)))
        expected = [shape_in, shape_out]
    else:
        handle = target.register_full_backward_pre_hook(lambda m, go: shapes_of(calls, go))
        expected = [shape_out]
    with KernelOps() as ops:
        model(x).sum().backward()
    assert ops.units == units_without(path[-1])
    assert calls == [expected]
    handle.remove()
    assert fused_units(model, x) == UNITS
    assert calls == [expected] or kind not in ("full_backward", "full_backward_pre")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hook_on_a_unit_leaves_it_fused(model, x, kind):
    """A unit's hook sees the unit's input and output; its inside is nobody's business."""
    calls, unit = [], model[3]
    if kind == "forward":
        unit.register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
    elif kind == "forward_pre":
        unit.register_forward_pre_hook(lambda m, i: shapes_of(calls, i))
    elif kind == "full_backward":
        unit.register_full_backward_hook(lambda m, gi, go: shapes_of(calls, (*gi, *go)))
    else:
        unit.register_full_backward_pre_hook(lambda m, go: shapes_of(calls, go))
    with KernelOps() as ops:
        model(x).sum().backward()
    assert ops.units == UNITS
    expected = {
        "forward": [[OUTSIDE, INSIDE]],
        "forward_pre": [[OUTSIDE]],
        "full_backward": [[OUTSIDE, INSIDE]],
        "full_backward_pre": [[INSIDE]],
    }
    assert calls == expected[kind]


def test_hook_on_the_container_and_the_pooling(model, x):
    calls = []
    model.register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
    model[-1].register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
    assert fused_units(model, x) == UNITS
    assert calls == [[(2, 64, 4, 4), (2, 64, 1, 1)], [(2, 3, 32, 32), (2, 64, 1, 1)]]


def test_hooks_that_change_what_passes(model, x):
    """The activation of one, the gradient of the other: the result is that of plain modules with the same hooks."""
    model[2][1].register_forward_hook(lambda m, i, o: o * 2)
    model[5][0].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    model[7].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    leaves = Plain(model)
    # Plain() calls leaves only: the unit's own backward hook is applied to its input there.
    leaves.module[7]._backward_hooks.clear()
    leaves.module[7][0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    other = x.detach().clone().requires_grad_()
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == UNITS - 2
    expected = leaves(other)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


GLOBAL_HOOKS = {
    "forward": (nn_module.register_module_forward_hook, lambda calls: lambda m, i, o: calls.append(type(m))),
    "forward_pre": (nn_module.register_module_forward_pre_hook, lambda calls: lambda m, i: calls.append(type(m))),
    "backward": (nn_module.register_module_full_backward_hook, lambda calls: lambda m, i, o: calls.append(type(m))),
    "backward_pre": (
        nn_module.register_module_full_backward_pre_hook,
        lambda calls: lambda m, o: calls.append(type(m)),
    ),
}


@pytest.fixture
def remove_handles() -> Iterator[list]:
    handles: list = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hook_fires_for_every_module(model, x, kind, remove_handles):
    register, make = GLOBAL_HOOKS[kind]
    calls: list = []
    expected = model(x)
    remove_handles.append(register(make(calls)))
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == 0
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    for leaf in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU):
        assert calls.count(leaf) == UNITS
    remove_handles.pop().remove()
    assert fused_units(model, x) == UNITS


def reparametrise(conv: nn.Module, how: str) -> None:
    if how == "prune":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    elif how == "prune bias":
        prune.random_unstructured(conv, "bias", amount=0.5)
    elif how == "weight_norm":
        parametrizations.weight_norm(conv)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(conv)
    elif how == "old weight_norm":
        old_weight_norm(conv)
    elif how == "old spectral_norm":
        old_spectral_norm(conv)
    else:
        parametrize.register_parametrization(conv, "weight", Doubled())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize(
    "how",
    [
        "prune",
        "prune bias",
        "parametrize",
        "weight_norm",
        "spectral_norm",
        pytest.param("old weight_norm", marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")),
        pytest.param("old spectral_norm", marks=pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")),
    ],
)
def test_parametrised_convolution(model, x, how):
    before = model.eval()(x)
    reparametrise(model[4][0], how)
    # In eval mode: spectral_norm's power iteration moves at each forward in training.
    assert not torch.allclose(model(x), before) or "weight_norm" in how
    assert_same_step(model, x, units=UNITS - 1)
    assert any(name.startswith("4.0.") and p.grad is not None for name, p in model.named_parameters())


def test_pruned_entries_stay_zero(model, x):
    prune.l1_unstructured(model[4][0], "weight", amount=0.5)
    model(x).sum().backward()
    mask = model[4][0].weight_mask
    assert (model[4][0].weight_orig.grad[mask == 0] == 0).all()
    prune.remove(model[4][0], "weight")
    assert fused_units(model, x) == UNITS  # a plain parameter again
    assert_same_step(model, x, units=UNITS)


def test_parametrised_batch_norm(model, x):
    parametrize.register_parametrization(model[4][1], "weight", Doubled())
    assert_same_step(model, x, units=UNITS - 1)


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


@pytest.mark.parametrize("index", [0, 1, 2])
def test_replaced_forward(model, x, index):
    target, calls = model[3][index], []

    def forward(input: Tensor) -> Tensor:
        calls.append(tuple(input.shape))
        return type(target).forward(target, input) * 0.5

    expected = model.eval()(x)
    target.forward = forward
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == units_without(index)
    assert calls == [OUTSIDE if index == 0 else INSIDE]
    assert not torch.allclose(actual, expected)


def test_forward_replaced_on_the_class(model, x, monkeypatch):
    """As quantisation and tracing tools do it."""
    original, calls = nn.ReLU.forward, []

    def forward(self: nn.ReLU, input: Tensor) -> Tensor:
        calls.append(tuple(input.shape))
        return original(self, input)

    monkeypatch.setattr(nn.ReLU, "forward", forward)
    model(x)
    assert len(calls) == UNITS


def test_replaced_inner_method(model, x):
    conv = model[3][0]
    conv._conv_forward = lambda input, weight, bias: F.conv2d(input, weight * 2, bias, 2, 1, 1, 16)
    assert_same_step(model.eval(), x, units=UNITS - 1)


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


def test_network_with_a_hook(backend64):
    torch.manual_seed(0)
    net = mx.MobileNetV1(10, 0.25).double()
    calls = []
    net.feature[13][0].register_forward_hook(lambda m, i, o: shapes_of(calls, (o,)))
    assert fused_units(net, torch.randn(2, 3, 64, 64, dtype=torch.float64)) == 26
    assert calls == [[(2, 128, 4, 4)]]


def test_optimisation_hooks_on_parameters(model, x):
    """Hooks of tensors are autograd's, and fire without leaving the kernels."""
    calls = []
    weight = model[3][0].weight
    weight.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    with KernelOps() as ops:
        model(x).sum().backward()
    assert ops.units == UNITS
    assert calls == [(16, 1, 3, 3)] * 2


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
