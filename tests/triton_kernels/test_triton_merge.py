"""The kernels that merge partial results, against plain PyTorch in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
from cpu_ops import assert_close, random_bn

from mobilenet_ext.contract import BN_MEAN, BN_ROWS, BN_RSTD, BN_SCALE
from mobilenet_ext.triton import merge


@pytest.mark.parametrize("programs, channels", [(1, 1), (3, 24), (200, 40), (5000, 3)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics(programs, channels, mean):
    rows = [torch.randn(1 + i % 7, channels, dtype=torch.float64) + mean for i in range(programs)]
    partial = []
    for row in rows:
        origin = row[0].float().double()
        m2 = row.var(0, correction=0) * len(row)
        partial.append(torch.stack([torch.full_like(origin, len(row)), origin, row.mean(0) - origin, m2]))
    partial = torch.stack(partial).float()
    gamma, beta = torch.rand(channels) + 0.5, torch.randn(channels)
    values = torch.cat(rows).T.reshape(1, channels, -1, 1)
    expected = oracle.batch_bn(values, gamma, beta, 1e-5)
    bn = merge.statistics(partial, gamma, beta, 1e-5)
    assert bn.shape == (BN_ROWS, channels)
    torch.testing.assert_close(bn.double(), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_nothing():
    bn = merge.statistics(merge.empty_statistics(torch.empty(0), 0, 5), None, None, 0.25)
    expected = torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0])[:, None].expand(5, 5)
    torch.testing.assert_close(bn, expected)


@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_bn_from_running(affine, conv_bias):
    channels = 300
    vectors = [torch.randn(channels), torch.rand(channels) + 0.1]
    vectors += [torch.randn(channels), torch.randn(channels)] if affine else [None, None]
    vectors += [torch.randn(channels)] if conv_bias else [None]
    bn = merge.bn_from_running(*vectors, 1e-3)
    expected = oracle.bn_from_running(*vectors, 1e-3)
    torch.testing.assert_close(bn.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_stats", [False, True])
@pytest.mark.parametrize("programs, channels, elements", [(1, 3, 27), (70, 24, 216), (300, 8, 600)])
def test_gradients(programs, channels, elements, batch_stats):
    sums = merge.empty_sums(torch.empty(0), programs, channels).normal_()
    partial = torch.randn(programs + 3, elements)
    bn = random_bn(channels, torch.float32)
    grad_weight = torch.full((elements,), float("nan"))
    grad_bn = merge.gradients(sums, bn, batch_stats, 50, partial, grad_weight)
    assert_close(grad_weight, partial.double().sum(0), 1e-5)
    beta, centred = sums.double().sum(0)
    scale, rstd = bn[BN_SCALE].double(), bn[BN_RSTD].double()
    gamma = rstd * centred
    zero = torch.zeros_like(gamma)
    y_coefficient, constant = (-scale * rstd * gamma / 50, -scale * beta / 50) if batch_stats else (zero, zero)
    expected = torch.stack([scale, y_coefficient, bn[BN_MEAN].double(), constant, gamma, beta])
    torch.testing.assert_close(grad_bn.double(), expected, rtol=1e-4, atol=1e-5)

    only_bn = merge.gradients(sums, bn, batch_stats, 50, None, grad_weight.new_empty(0))
    torch.testing.assert_close(only_bn, grad_bn, rtol=1e-4, atol=1e-5)
    assert merge.gradients(None, None, False, 0, partial, grad_weight).shape == (0,)
