"""Activations, their derivatives, and the normalisation before them: applied to what is loaded, and to what is stored.

A new activation is a branch in ``activate`` and one in ``activate_backward``, and a name in ``gates`` where its
derivative is 0 or 1; no other file knows one. ``ACT`` is what ``compiled`` makes of an ``Act`` of ``contract.py``. A
``norm`` is the mean, scale and shift of some channels, each ``[1, C]``, and z is ``(u - mean)*scale + shift``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mobilenet_ext.contract import Act
from mobilenet_ext.triton.formulas import reciprocal
from mobilenet_ext.triton.rows import BN_MEAN, BN_SCALE, BN_SHIFT, load_row

LINEAR = tl.constexpr(int(Act.LINEAR))
RELU = tl.constexpr(int(Act.RELU))
RELU6 = tl.constexpr(int(Act.RELU6))
HARDSWISH = tl.constexpr(int(Act.HARDSWISH))
SILU = tl.constexpr(int(Act.SILU))
LEAKY_RELU = tl.constexpr(int(Act.LEAKY_RELU))


CompiledAct = int | tuple[int, float]


def compiled(act: int, slope: float) -> CompiledAct:
    """The ``ACT`` of a kernel: a number, of a leaky_relu with its slope beside it.

    One value, so that no kernel knows of slopes; compiled in, because a network has one slope, if any.
    """
    return (int(act), float(slope)) if act == Act.LEAKY_RELU else int(act)


@triton.constexpr_function
def _kind(ACT):
    return ACT if isinstance(ACT, int) else ACT[0]


@triton.constexpr_function
def _slope(ACT):
    return ACT[1]


@triton.constexpr_function
def gates(ACT):
    """Whether the derivative is 0 or 1 everywhere, as a = act(z) tells: a gradient passes as it is, or not at all."""
    return _kind(ACT) in (Act.LINEAR, Act.RELU, Act.RELU6)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z). Every activation maps 0 to 0, and NaN to NaN."""
    if _kind(ACT) == LINEAR:
        return z
    elif _kind(ACT) == RELU:
        # A plain maximum, and a select on z > 0, compile to an instruction that loses NaN.
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif _kind(ACT) == RELU6:
        return tl.clamp(z, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif _kind(ACT) == HARDSWISH:
        # One saturating multiply-add. It makes 0 of NaN, which the product with z makes NaN again.
        return z * tl.clamp(z * (1 / 6) + 0.5, 0.0, 1.0)
    elif _kind(ACT) == SILU:
        return z * _sigmoid(z)
    elif _kind(ACT) == LEAKY_RELU:
        return tl.where(z > 0, z, z * _slope(ACT))
    else:
        tl.static_assert(False, "unknown ACT")


@triton.jit
def activate_backward(z, da, ACT: tl.constexpr):
    """dz, the gradient at z, of that at act(z). A NaN in z passes the gradient on (in a leaky_relu:
    times its slope), as in PyTorch."""
    if _kind(ACT) == LINEAR:
        return da
    elif _kind(ACT) == RELU:
        return tl.where(z <= 0, 0.0, da)
    elif _kind(ACT) == RELU6:
        return tl.where((z <= 0) | (z >= 6), 0.0, da)
    elif _kind(ACT) == HARDSWISH:
        return tl.where(z <= -3, 0.0, da * tl.where(z < 3, z * (1 / 3) + 0.5, 1.0))
    elif _kind(ACT) == SILU:
        sigmoid = _sigmoid(z)
        return da * (sigmoid * (z * (1 - sigmoid) + 1))
    elif _kind(ACT) == LEAKY_RELU:
        da = da.to(tl.float32)  # in 16 bits the slope would be rounded too
        return tl.where(z > 0, da, da * _slope(ACT))
    else:
        tl.static_assert(False, "unknown ACT")


@triton.jit
def _sigmoid(z):
    """1/(1 + exp(-z)) to 3 units in the last place; 0 where that is below 2^-126 (z < -87.3)."""
    return reciprocal(1 + tl.exp2(z * -1.4426950408889634))  # 1/log(2)


@triton.jit
def activate_backward_by_output(a, u, norm, da, ACT: tl.constexpr):
    """``activate_backward`` at z = normalise(u, norm) where a = act(z) is at hand.

    Where a tells the derivative z is not computed: that would cost a multiply-add per value. (That of a leaky_relu does
    not: its slope may be 0 or less.)
    """
    if gates(ACT):
        return activate_backward(a, da, ACT)
    else:
        return activate_backward(normalise(u, norm), da, ACT)


@triton.jit
def load_norm(bn_ptr, channels, offsets, mask):
    """The ``norm`` of a ``bn`` at the channels ``offsets``; 0 outside the mask, and without ``bn``."""
    if bn_ptr is None:
        mean = tl.zeros([1, offsets.shape[0]], tl.float32)
        return mean, mean, mean
    else:
        mean = load_row(bn_ptr, BN_MEAN, channels, offsets, mask)
        scale = load_row(bn_ptr, BN_SCALE, channels, offsets, mask)
        shift = load_row(bn_ptr, BN_SHIFT, channels, offsets, mask)
        return mean, scale, shift


@triton.jit
def normalise(u, norm):
    """z. Centred first: a large mean would cancel in u*scale + constant."""
    return centred(u, norm) * norm[1] + norm[2]


@triton.jit
def centred(u, norm):
    """``u - mean``."""
    return u.to(tl.float32) - norm[0]


@triton.jit
def norm_act(u, norm, NORM: tl.constexpr, ACT: tl.constexpr):
    """act(z), in float32. Without ``NORM``, z is ``u``."""
    if NORM:
        return activate(normalise(u, norm), ACT)
    else:
        return activate(u.to(tl.float32), ACT)


@triton.jit
def norm_act_inside(u, norm, mask, NORM: tl.constexpr, ACT: tl.constexpr):
    """``norm_act``, and 0 outside ``mask``, where ``u`` is 0: a convolution's padding is 0 after the activation."""
    a = norm_act(u, norm, NORM, ACT)
    if NORM:
        a = tl.where(mask, a, 0.0)
    return a
