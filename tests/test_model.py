"""MobileNetV1 as an object: names, keys, counts, initial weights, indexing, wrong arguments."""

from __future__ import annotations

import inspect

import pytest
import torch
from behaviour import fused_units
from plain import BLOCKS, WIDTHS, Network, randomise_
from torch import nn

import mobilenet_ext as mx

PARAMETERS = {1.0: 3_228_170, 0.75: 1_832_458, 0.5: 829_194, 0.25: 218_378}


def test_public_names():
    assert {"MobileNetV1", "freeze", "backends", "functional", "nn"} <= set(dir(mx))
    for name in ("depthwise_conv2d", "pointwise_conv2d", "depthwise_bn_relu", "pointwise_bn_relu"):
        assert callable(getattr(mx.functional, name))
    for name in ("DepthwiseConvBNReLU", "PointwiseConvBNReLU", "DepthwiseSeparableConv"):
        assert issubclass(getattr(mx.nn, name), nn.Module)


def test_signature():
    parameters = inspect.signature(mx.MobileNetV1).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "num_classes": 1000,
        "width_multiplier": 1.0,
        "conv_bias": True,
        "dropout": 0.0,
    }
    assert parameters["conv_bias"].kind is parameters["dropout"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("width", WIDTHS)
def test_parameter_counts(width):
    model = mx.MobileNetV1(10, width)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS[width]


def test_parameter_count_without_conv_bias():
    model = mx.MobileNetV1(num_classes=1000, conv_bias=False)
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    assert all(unit[0].bias is None for unit in model.feature[:-1])


def test_module_tree():
    model = mx.MobileNetV1(10)
    assert [name for name, _ in model.named_children()] == ["feature", "classifier"]
    assert isinstance(model.feature, nn.Sequential) and len(model.feature) == 28
    for unit in model.feature[:-1]:
        assert [type(child) for child in unit] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert type(model.feature[-1]) is nn.AdaptiveAvgPool2d
    assert [type(child) for child in model.classifier] == [nn.Flatten, nn.Linear]
    # Dropout has no module, with or without a probability: the keys stay.
    assert list(mx.MobileNetV1(10, dropout=0.2).state_dict()) == list(model.state_dict())


def test_channels_and_strides():
    model = mx.MobileNetV1(10, 0.75)
    convs = [unit[0] for unit in model.feature[:-1]]
    assert (convs[0].in_channels, convs[0].out_channels, convs[0].stride) == (3, 24, (2, 2))
    channels = 24
    for (out_channels, stride), depthwise, pointwise in zip(BLOCKS, convs[1::2], convs[2::2], strict=True):
        assert (depthwise.in_channels, depthwise.groups, depthwise.stride) == (channels, channels, (stride, stride))
        channels = int(0.75 * out_channels)
        assert (pointwise.out_channels, pointwise.kernel_size) == (channels, (1, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_keys_shapes_and_dtypes_are_the_plain_ones(bias):
    actual = mx.MobileNetV1(7, 0.25, conv_bias=bias).state_dict()
    expected = Network(7, 0.25, bias).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in actual.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    assert list(actual) == list(expected)
    assert {"feature.0.0.weight", "feature.0.1.running_mean", "classifier.1.weight"} <= set(actual)


@pytest.mark.parametrize("bias", [True, False])
def test_same_seed_gives_the_plain_weights(bias):
    torch.manual_seed(1)
    model = mx.MobileNetV1(7, 0.5, conv_bias=bias)
    torch.manual_seed(1)
    plain = Network(7, 0.5, bias)
    for (name, actual), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


def test_plain_checkpoint_loads_both_ways(cpu_backend):
    plain, model = randomise_(Network(10, 0.25)), mx.MobileNetV1(10, 0.25)
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert fused_units(model.eval(), x) == 27
    torch.testing.assert_close(model(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    nn.init.normal_(model.classifier[1].weight)
    plain.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        mx.MobileNetV1(11, 0.25).load_state_dict(plain.state_dict())


def test_features_and_their_slices(backend64):
    model = randomise_(mx.MobileNetV1(10, 0.25)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = model.feature(x)
    assert features.shape == (2, 256, 1, 1)
    torch.testing.assert_close(model(x), model.classifier(features))

    head, tail = model.feature[:9], model.feature[9:]
    assert isinstance(head, nn.Sequential) and (len(head), len(tail)) == (9, 19)
    assert head[2] is model.feature[2] and tail[-1] is model.feature[27] is model.feature[-1]
    assert head[0][0].weight is model.feature[0][0].weight
    assert fused_units(head, x) == 9  # a slice is fused too
    torch.testing.assert_close(tail(head(x)), features)
    one_by_one = x
    for unit in model.feature:
        one_by_one = unit(one_by_one)
    torch.testing.assert_close(one_by_one, features)
    assert [type(m) for m in model.feature[3][1:]] == [nn.BatchNorm2d, nn.ReLU]
    assert list(model.feature[::2]) == list(model.feature)[::2]


def test_changing_a_slice_changes_the_model():
    model = mx.MobileNetV1(10, 0.25)
    model.feature[:2].requires_grad_(False)
    assert [p.requires_grad for p in model.feature[1].parameters()] == [False] * 4
    assert all(p.requires_grad for p in model.feature[2].parameters())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_classes", 0),
        ("num_classes", -1),
        ("num_classes", 2.5),
        ("num_classes", "10"),
        ("num_classes", None),
        ("width_multiplier", 0),
        ("width_multiplier", 0.01),
        ("width_multiplier", -1.0),
        ("width_multiplier", float("nan")),
        ("width_multiplier", float("inf")),
        ("width_multiplier", "0.5"),
        ("width_multiplier", None),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("dropout", "0.5"),
        ("dropout", None),
    ],
)
def test_wrong_arguments_are_refused_by_name(argument, value):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: got "):
        mx.MobileNetV1(**{argument: value})


@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_refusals_say_which_kind(kind):
    arguments = {"num_classes": 0} if kind is ValueError else {"num_classes": "10"}
    with pytest.raises(kind, match="^num_classes: "):
        mx.MobileNetV1(**arguments)


def test_smallest_width(cpu_backend):
    model = mx.MobileNetV1(3, 1 / 32)
    assert model.feature[0][0].out_channels == 1
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_dropout_acts_in_training_only():
    model = mx.MobileNetV1(10, 0.25, dropout=0.5).eval()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    pooled = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    model.train()(x)
    model.eval()(x)
    assert (pooled[0] == 0).float().mean() > (pooled[1] == 0).float().mean() + 0.1
