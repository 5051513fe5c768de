"""The fused depthwise-separable block in Triton, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, BLOCKS, DTYPES, FLOAT32_AND_16_BITS, Block, block_inputs
from cpu_ops import (
    assert_close,
    assert_same_specials,
    is_channels_last_dense,
)

from mobilenet_ext.contract import Act, Padding
from mobilenet_ext.triton import gpu, heuristics
from mobilenet_ext.triton.block_inference import block_inference

H100 = gpu.H100
# The intermediate activation is rounded to the activations' dtype, where the oracle keeps it in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TILED = (2, 40, 40, 3, 11, 1)


def choose(monkeypatch: pytest.MonkeyPatch, *candidates: heuristics.Config) -> None:
    monkeypatch.setattr(heuristics, "block_inference", lambda *_: candidates)


def check(
    shape: Block, dtype: torch.dtype, acts: tuple[Act, Act] = (Act.RELU, Act.RELU), padding: Padding = ALL_SIDES
) -> None:
    args = block_inputs(shape, dtype, *acts, padding)
    y = block_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.block_inference(*args), TOLERANCE[dtype])


@in_turn("shape, dtype", BLOCKS, *FLOAT32_AND_16_BITS)
def test_block_inference(shape: Block, dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_several_tiles(dtype: torch.dtype, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, heuristics.config(num_warps=4, BLOCK_H=2, BLOCK_W=8, BLOCK_N=32, BLOCK_C=16))
    check((*TILED[:5], stride), dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 0, 1, 1)], ids=str)
def test_sides_of_the_padding(padding: Padding, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, heuristics.config(num_warps=4, BLOCK_H=2, BLOCK_W=8, BLOCK_N=32, BLOCK_C=16))
    check((*TILED[:5], stride), torch.float32, padding=padding)


@in_turn("acts, dtype", [*((act, Act.RELU) for act in Act), *((Act.RELU, act) for act in Act)], *FLOAT32_AND_16_BITS)
def test_other_activations(acts: tuple[Act, Act], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel in float32, as two in 16 bits."""
    config = heuristics.config(num_warps=4, BLOCK_H=2, BLOCK_W=8, BLOCK_N=32, BLOCK_C=16)
    choose(monkeypatch, config if dtype == torch.float32 else heuristics.TWO_KERNELS)
    check((1, 24, 40, 3, 11, 1), dtype, acts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, filters in ((1, 72), (500, 136)):
        problem = (n, 5, 9, 24, filters, 1, dtype.itemsize, H100)
        for config in heuristics.block_inference(*problem):
            choose(monkeypatch, config)
            check((1, 24, filters, 5, 9, 1), dtype)


def test_one_kernel_for_a_small_problem_with_few_channels() -> None:
    def is_one_kernel(images: int, size: int, channels: int) -> bool:
        problem = (images, size, size, channels, 2 * channels, 1, 2, H100)
        return heuristics.block_inference(*problem)[0] != heuristics.TWO_KERNELS

    assert is_one_kernel(1, 112, 32) and is_one_kernel(1, 56, 64)
    assert not is_one_kernel(1, 28, 256) and not is_one_kernel(256, 112, 32) and not is_one_kernel(256, 56, 128)


@combinations("act, dtype, stride", Act, DTYPES[:2], [1, 2])
def test_nan_and_inf(act: Act, dtype: torch.dtype, stride: int) -> None:
    args = block_inputs((1, 8, 16, 9, 9, stride), dtype, act, act)
    x = args[0]
    x[0, 0, 0, 0], x[0, 1, 8, 8] = float("nan"), float("nan")
    x[0, 2, 0, 8] = float("inf")
    assert_same_specials(block_inference(*args), oracle.block_inference(*args))


@pytest.mark.parametrize("fused", [True, False])
def test_empty_batch(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = heuristics.config(num_warps=4, BLOCK_H=2, BLOCK_W=8, BLOCK_N=32, BLOCK_C=16)
    choose(monkeypatch, config if fused else heuristics.TWO_KERNELS)
    assert block_inference(*block_inputs((0, 8, 16, 9, 9, 2), torch.float32)).shape == (0, 16, 5, 5)
