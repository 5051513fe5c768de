"""Settings and tensors of a unit's modules that the kernels do not take as they are: what the plain modules do, with
their message where they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mobilenet_ext as mx


def unit(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), act or nn.ReLU())


def answer(network: nn.Module, x: Tensor) -> Tensor | str:
    try:
        return network(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def assert_same_answers(plain: nn.Module, x: Tensor) -> None:
    """Of the module fused and frozen, in training and in eval mode: the output, or the error."""
    for training in (True, False):
        plain.train(training)
        expected = answer(copy.deepcopy(plain), x)
        networks = [mx.nn.FusedSequential(*copy.deepcopy(plain)).train(training), mx.fuse(copy.deepcopy(plain))]
        for network in networks if training else [*networks, mx.freeze(networks[0]), mx.freeze(plain)]:
            actual = answer(network, x)
            assert type(actual) is type(expected), (actual, expected)
            if isinstance(expected, str):
                assert actual == expected
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


SETTINGS: dict[str, Callable[[nn.Sequential], None]] = {
    "padding: an int": lambda m: setattr(m[0], "padding", 1),
    "padding: one number": lambda m: setattr(m[0], "padding", (1,)),
    "padding: a list": lambda m: setattr(m[0], "padding", [1, 1]),
    "padding: a wrong word": lambda m: setattr(m[0], "padding", "bogus"),
    "kernel size: an int": lambda m: setattr(m[0], "kernel_size", 3),
    "stride: an int": lambda m: setattr(m[0], "stride", 1),
    "stride: floats": lambda m: setattr(m[0], "stride", (1.0, 1.0)),
    "dilation: an int": lambda m: setattr(m[0], "dilation", 1),
    "a slope beyond float32": lambda m: setattr(m, "2", nn.LeakyReLU(1e39)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    plain = unit()
    SETTINGS[name](plain)
    assert_same_answers(plain, torch.randn(2, 8, 9, 9))


@pytest.mark.parametrize("size", [(1, 1), [1, 1], 1.0, True, np.array([1, 1]), (1, None)], ids=repr)
def test_sizes_of_a_pooling(size: object) -> None:
    plain = unit().append(nn.AdaptiveAvgPool2d(1))
    plain[3].output_size = size
    assert_same_answers(plain, torch.randn(2, 8, 9, 9))


class Doubling(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def test_a_call_of_its_own() -> None:
    assert_same_answers(nn.Sequential(Doubling(*unit()), *unit()), torch.randn(2, 8, 9, 9))


@pytest.mark.parametrize("name", ["_call_impl", "_wrapped_call_impl"])
def test_a_replaced_call(name: str) -> None:
    plain = unit()
    plain[2].__dict__[name] = lambda x: 2 * x
    x = torch.randn(2, 8, 9, 9)
    fused = mx.nn.FusedSequential(*plain)
    torch.testing.assert_close(fused(x), copy.deepcopy(plain)(x))


def shared(m: nn.Sequential) -> None:
    m[4].running_mean.data, m[4].running_var.data = m[1].running_mean.data, m[1].running_var.data


def overlapping(m: nn.Sequential) -> None:
    memory = torch.cat([torch.zeros(8), torch.ones(12)])
    m[1].running_mean.data, m[1].running_var.data = memory[:8], memory[8:16]
    m[4].running_mean.data, m[4].running_var.data = torch.zeros(8), memory[12:]


def one_for_mean_and_variance(m: nn.Sequential) -> None:
    m[1].running_var.data = m[1].running_mean.data


def one_counter(m: nn.Sequential) -> None:
    m[4].num_batches_tracked.data = m[1].num_batches_tracked.data
    m[1].momentum = m[4].momentum = None


def side_by_side(m: nn.Sequential) -> None:
    memory = torch.cat([torch.zeros(16), torch.ones(16)])
    for i, bn in enumerate((m[1], m[4])):
        bn.running_mean.data, bn.running_var.data = memory[8 * i : 8 * i + 8], memory[16 + 8 * i : 24 + 8 * i]


@pytest.mark.parametrize("share", [shared, overlapping, one_for_mean_and_variance, one_counter, side_by_side])
def test_running_statistics_that_share_memory(share: Callable) -> None:
    networks = [nn.Sequential(*unit(), *unit()), mx.nn.FusedSequential(*unit(), *unit())]
    for network in networks:
        share(network)
        torch.manual_seed(1)
        for _ in range(3):
            network(torch.randn(4, 8, 6, 6))
    for expected, actual in zip(networks[0].buffers(), networks[1].buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_batches_are_counted_without_running_statistics() -> None:
    for kind in (nn.Sequential, mx.nn.FusedSequential):
        network = kind(*unit())
        network[1].running_mean = network[1].running_var = None
        network(torch.randn(2, 8, 9, 9))
        assert network[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_a_frozen_model_sees_tensors_that_are_plain_attributes(name: str) -> None:
    frozen = mx.freeze(mx.nn.FusedSequential(*unit()))
    bn, x = frozen[1], torch.randn(2, 8, 9, 9)
    frozen(x)
    slots = bn._buffers if name in bn._buffers else bn._parameters
    bn.__dict__[name] = slots.pop(name)
    frozen(x)
    bn.__dict__[name] = bn.__dict__[name] * 0.5 + 1
    torch.testing.assert_close(frozen(x), nn.Sequential(*frozen)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 16), (1, 1, 1), (8, 4, 4)], ids=str)
@pytest.mark.parametrize("pixels", [(5, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("act", [None, nn.ReLU])
def test_strides_of_bare_convolutions(shape: tuple[int, ...], pixels: tuple[int, int], act: type | None) -> None:
    """Of one channel or one pixel, which are contiguous in both formats."""
    layers = [layer for c, k in zip(shape, shape[1:], strict=False) for layer in (nn.Conv2d(c, k, 1), act and act())]
    plain = nn.Sequential(*filter(None, layers))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(2, shape[0], *pixels).contiguous(memory_format=memory_format)
        with torch.no_grad():
            for network in (mx.nn.FusedSequential(*plain), mx.freeze(plain)):
                assert network(x).stride() == plain(x).stride()
