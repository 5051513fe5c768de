"""The fused modules do what plain modules do: copies, conversions, modes, frozen parameters, BatchNorm's settings."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from behaviour import Plain, assert_same_step, fused_units, plain_forward
from plain import Network, batch_norms, randomise_
from torch import nn

import mobilenet_ext as mx


def block(bias: bool = True) -> nn.Module:
    """Four units: two blocks, the second one with stride 2."""
    torch.manual_seed(2)
    blocks = (mx.nn.DepthwiseSeparableConv(8, 24, bias=bias), mx.nn.DepthwiseSeparableConv(24, 16, stride=2, bias=bias))
    return randomise_(mx.nn.FusedSequential(*blocks)).double()


def image(requires_grad: bool = True, size: int = 9) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(3, 8, size, size, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_step(backend64, training, bias):
    assert_same_step(block(bias).train(training), image(), units=4)


@pytest.mark.parametrize("training", [True, False])
def test_step_of_the_network(backend64, training):
    torch.manual_seed(0)
    model = randomise_(mx.MobileNetV1(10, 0.25)).double().train(training)
    assert_same_step(model, torch.randn(3, 3, 64, 64, dtype=torch.float64), tolerance=1e-7, units=27)


@pytest.mark.parametrize(
    "module",
    [
        lambda: mx.nn.DepthwiseConvBNReLU(8, stride=2),
        lambda: mx.nn.PointwiseConvBNReLU(8, 5, bias=False),
        lambda: mx.nn.StemConvBNReLU(8, 5),
        lambda: mx.nn.DepthwiseSeparableConv(8, 5, stride=2),
    ],
)
def test_modules_on_their_own(backend64, module):
    module = module().double()
    assert_same_step(module, image(), units=2 if isinstance(module, mx.nn.DepthwiseSeparableConv) else 1)


def test_deepcopy(backend64):
    model = block()
    twin = copy.deepcopy(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    model(image()).sum().backward()
    assert all(p.grad is None for p in twin.parameters())
    assert_same_step(twin, image(), units=4)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickling(backend64, way):
    model = block()
    model(image())
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_same_step(loaded, image(), units=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_conversion(cpu_backend, dtype, training):
    model = mx.nn.DepthwiseSeparableConv(8, 16).train(training)
    model = {torch.float16: model.half, torch.bfloat16: model.bfloat16, torch.float64: model.double}[dtype]()
    assert {t.dtype for t in model.state_dict().values()} == {dtype, torch.int64}
    x = torch.randn(2, 8, 6, 6, dtype=dtype, requires_grad=True)
    assert fused_units(model, x) == 2
    out = model(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype for p in model.parameters())
    # And back: a converted module is as usable as a new one.
    back = model.float()
    back.zero_grad()
    assert_same_step(back, torch.randn(2, 8, 6, 6, requires_grad=True), tolerance=1e-4, units=2)


def test_to_dtype_and_memory_format(cpu_backend):
    model = mx.nn.DepthwiseSeparableConv(8, 16).to(torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6, dtype=torch.bfloat16)
    assert fused_units(model, x) == 2
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_meta_device(cpu_backend):
    model = mx.MobileNetV1(10, 0.25).to("meta")
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
    assert model.to_empty(device="cpu").feature[0][0].weight.device.type == "cpu"


def test_mode_is_each_batch_norms_own(backend64):
    model = block()
    model[0][1].eval()
    assert [bn.training for bn in batch_norms(model)] == [True, False, True, True]
    assert_same_step(model, image(), units=4)
    model.eval()
    model[1].train()
    assert_same_step(model, image(), units=4)


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_wanted_in_every_combination(backend64, needs_input, training):
    """(convolution weight, its bias, BatchNorm's weight, its bias), in the first, the last or all of two units."""
    for which, chosen in itertools.product(itertools.product([True, False], repeat=4), ([0], [1], [0, 1])):
        torch.manual_seed(2)
        model = randomise_(mx.nn.DepthwiseSeparableConv(8, 5)).double().train(training)
        for i, (conv, bn, _) in enumerate(model):
            wanted = which if i in chosen else (False,) * 4
            for parameter, on in zip((conv.weight, conv.bias, bn.weight, bn.bias), wanted, strict=True):
                parameter.requires_grad_(on)
        assert_same_step(model, image(needs_input, 4), units=2)


def test_requires_grad_off(backend64):
    model = block().requires_grad_(False)
    assert not model(image(False)).requires_grad
    assert_same_step(model, image(False), units=4)
    assert_same_step(model, image(True), units=4)
    model[1].requires_grad_(True)
    assert_same_step(model, image(False), units=4)


def test_conv_bias_gradient_is_zero_and_never_none(cpu_backend):
    model = mx.MobileNetV1(10, 0.25)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    for unit in model.feature[:-1]:
        bias = unit[0].bias
        assert bias.grad is not None and bias.grad.shape == bias.shape and not bias.grad.any()
    # Weight decay acts on them, as on every parameter with a gradient.
    before = model.feature[4][0].bias.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(model.feature[4][0].bias.detach(), before * 0.95)


def test_gradients_accumulate_and_are_cleared(backend64):
    model, x = block(), image(False)
    model.eval()
    model(x).sum().backward()
    once = [p.grad.clone() for p in model.parameters()]
    model(x).sum().backward()
    for p, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    model.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    model(x).sum().backward()
    for p, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_eval_mode_batch_norm_while_training(backend64):
    """Fine-tuning with frozen statistics: they stay, and the convolution's bias has a gradient."""
    model = block()
    for bn in batch_norms(model):
        bn.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert_same_step(model, image(), units=4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(unit[0].bias.grad.abs().sum() > 0 for blocks in model for unit in blocks)


SETTINGS = {
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "momentum=None": {"momentum": None},
    "momentum=0": {"momentum": 0.0},
    "momentum=1": {"momentum": 1.0},
    "eps=0.1": {"eps": 0.1},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_settings(backend64, settings, training):
    model = block()
    for half in model:
        for unit in half:
            unit[1] = nn.BatchNorm2d(unit[1].num_features, **settings).double()
    model.train(training)
    for _ in range(3):  # momentum=None: a cumulative average
        model.zero_grad()
        assert_same_step(model, image(), units=4)


def test_track_running_stats_switched_off_later(backend64):
    model = block()
    for bn in batch_norms(model):
        bn.track_running_stats = False
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert_same_step(model, image(), units=4)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert_same_step(model.eval(), image(), units=4)


def test_a_unit_in_two_places(backend64):
    """Shared modules run twice, one after the other: so do the updates of their statistics."""
    torch.manual_seed(0)
    unit = mx.nn.DepthwiseConvBNReLU(8).double()
    model = mx.nn.FusedSequential(unit, unit, mx.nn.PointwiseConvBNReLU(8, 8).double(), unit)
    assert_same_step(model, image(), units=4)
    assert unit[1].num_batches_tracked == 3


def test_strided_vectors(backend64):
    """Parameters and buffers need not be dense."""
    model = block()
    for bn in batch_norms(model):
        for name in ("weight", "bias"):
            spread = torch.stack([getattr(bn, name).detach()] * 2, dim=1)[:, 0]
            setattr(bn, name, nn.Parameter(spread))
        bn.running_mean = torch.stack([bn.running_mean] * 2, dim=1)[:, 0]
        bn.running_var = torch.stack([bn.running_var] * 2, dim=1)[:, 0]
    assert not bn.weight.is_contiguous()
    plain = Plain(model)
    x = image(False)
    torch.testing.assert_close(model(x), plain(x))
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("which", ["in_channels", "out_channels", "batch_norm", "statistics"])
def test_tensors_of_another_shape_than_their_modules_say(backend64, which):
    """The plain modules go by the tensors alone; nothing may read past them."""
    model = mx.nn.PointwiseConvBNReLU(8, 16).double()
    conv, bn, _ = model
    if which == "in_channels":
        conv.weight = nn.Parameter(torch.randn(16, 4, 1, 1, dtype=torch.float64))
    elif which == "out_channels":
        conv.weight = nn.Parameter(torch.randn(5, 8, 1, 1, dtype=torch.float64))
        conv.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
        bn.weight, bn.bias = (nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
        bn.running_mean, bn.running_var = (torch.ones(5, dtype=torch.float64) for _ in range(2))
    elif which == "batch_norm":
        bn.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
    else:
        bn.running_var = torch.ones(4, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        try:
            expected = Plain(model)(image())
        except RuntimeError as refusal:
            with pytest.raises(RuntimeError) as error:
                model(image())
            assert str(error.value) == str(refusal)
        else:
            torch.testing.assert_close(model(image()), expected)


@pytest.mark.parametrize("shape", [(8, 6, 6), (2, 7, 6, 6), (2, 8, 6), (2, 8, 6, 6, 6)])
def test_wrong_inputs_raise_what_plain_modules_raise(cpu_backend, shape):
    model = mx.nn.DepthwiseSeparableConv(8, 16)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        plain_forward(model, torch.randn(shape))
    with pytest.raises(type(expected.value)) as actual:
        model(torch.randn(shape))
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("x", [torch.ones(2, 8, 6, 6, dtype=torch.int64), torch.ones(2, 8, 6, 6).half(), None, "image"])
def test_wrong_types_raise_what_plain_modules_raise(cpu_backend, x):
    model = mx.nn.DepthwiseSeparableConv(8, 16)
    with pytest.raises((RuntimeError, TypeError)) as expected:
        plain_forward(model, x)
    with pytest.raises(type(expected.value)) as actual:
        model(x)
    assert str(actual.value) == str(expected.value)


def test_one_value_per_channel_is_refused_as_by_plain_modules(cpu_backend):
    model, plain = mx.MobileNetV1(10, 0.25), Network(10, 0.25)
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="more than 1 value per channel") as expected:
        plain(x)
    with pytest.raises(ValueError) as actual:
        model(x)
    assert str(actual.value) == str(expected.value)
    model.eval()(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mx.nn.DepthwiseConvBNReLU(0),
        lambda: mx.nn.DepthwiseConvBNReLU(-3),
        lambda: mx.nn.DepthwiseConvBNReLU(2.0),
        lambda: mx.nn.DepthwiseConvBNReLU("8"),
        lambda: mx.nn.PointwiseConvBNReLU(0, 8),
        lambda: mx.nn.PointwiseConvBNReLU(8, None),
        lambda: mx.nn.DepthwiseSeparableConv(8, 0),
        lambda: mx.nn.StemConvBNReLU(3, -1),
        lambda: mx.nn.DepthwiseConvBNReLU(8, stride=3),
        lambda: mx.nn.DepthwiseConvBNReLU(8, stride=1.0),
        lambda: mx.nn.DepthwiseConvBNReLU(8, stride=True),
        lambda: mx.nn.DepthwiseSeparableConv(8, 8, stride="2"),
        lambda: mx.nn.StemConvBNReLU(3, 8, stride=(2, 2)),
    ],
)
def test_wrong_constructor_arguments_are_refused_by_name(make):
    with pytest.raises((ValueError, TypeError), match=r"^(channels|in_channels|out_channels|stride): got "):
        make()
