"""What the depthwise kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tap(weight_ptr, tap, channels, mask):
    return tl.load(weight_ptr + channels * 9 + tap, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_filter(weight_ptr, channels, mask):
    """The rows of a ``[C, 1, 3, 3]`` weight at ``channels``: three times three taps, each ``[1, len(channels)]``."""
    top = (
        _load_tap(weight_ptr, 0, channels, mask),
        _load_tap(weight_ptr, 1, channels, mask),
        _load_tap(weight_ptr, 2, channels, mask),
    )
    middle = (
        _load_tap(weight_ptr, 3, channels, mask),
        _load_tap(weight_ptr, 4, channels, mask),
        _load_tap(weight_ptr, 5, channels, mask),
    )
    bottom = (
        _load_tap(weight_ptr, 6, channels, mask),
        _load_tap(weight_ptr, 7, channels, mask),
        _load_tap(weight_ptr, 8, channels, mask),
    )
    return top, middle, bottom
