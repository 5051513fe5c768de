"""The Triton and the CUDA kernels, written independently, give the same results."""

from __future__ import annotations

import every_op
import pytest
import torch
from plain import relative_error

import mobilenet_ext as mx

REASON = next(
    (f"backend {b}: {why}" for b, why in mx.backends.available().items() if b in ("triton", "cuda") and why), None
)
# Both round operands and results once; the sum of a product's terms is what differs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("shape", every_op.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", every_op.DTYPES, ids=str)
def test_backends_agree(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for call in every_op.calls("cuda", (dtype,), (shape,)):
        with mx.backends.use("triton"):
            expected = call.run()
        with mx.backends.use("cuda"):
            outputs = call.run()
        for i, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
            if theirs.numel():
                assert relative_error(ours, theirs) <= TOLERANCE[dtype], (str(call), i)
