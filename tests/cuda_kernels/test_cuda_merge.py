"""The normalisation by running statistics, in CUDA C++, against the oracle.

The merging of partial results is tested where it is used: with each op that leaves some.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from conv_inputs import DTYPES

from mobilenet_ext import ops

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_bn_from_running(affine: bool, conv_bias: bool, dtype: torch.dtype) -> None:
    vectors = [torch.randn(300), torch.rand(300) + 0.1]
    vectors += [torch.randn(300), torch.randn(300)] if affine else [None, None]
    vectors += [torch.randn(300)] if conv_bias else [None]
    vectors = [v if v is None else v.to(dtype) for v in vectors]
    bn = ops.bn_from_running(*vectors, 1e-3)
    expected = oracle.bn_from_running(*vectors, 1e-3)
    assert bn.dtype == torch.float32
    torch.testing.assert_close(bn.double(), expected, rtol=1e-6, atol=1e-6)
