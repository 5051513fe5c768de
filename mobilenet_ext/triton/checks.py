"""What the signatures of the convolutions allow, and these kernels do not have."""

from __future__ import annotations

from torch import Tensor

from mobilenet_ext.contract import Act, Padding


def check_input(bn_u: Tensor | None, act_u: int) -> None:
    """An activation on load follows a normalisation."""
    if bn_u is None and act_u != Act.LINEAR:
        raise ValueError(f"act_u: expected {int(Act.LINEAR)} (linear) without bn_u, got {act_u}")


def check_plain_input(bn_u: Tensor | None, act_u: int) -> None:
    """A dense convolution reads its input as it is stored."""
    if bn_u is not None:
        raise ValueError(f"bn_u: expected None for a dense convolution, got a tensor of shape {tuple(bn_u.shape)}")
    check_input(bn_u, act_u)


def check_pointwise(stride: int, padding: Padding) -> None:
    if stride != 1:
        raise ValueError(f"stride: expected 1 for a pointwise convolution, got {stride}")
    if any(padding):
        raise ValueError(f"padding: expected 0 for a pointwise convolution, got {padding}")
