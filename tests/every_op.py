"""A call of every kernel op, for tests that go through all of them; as a script, runs them on one backend.

``python tests/every_op.py cuda`` is what compute-sanitizer watches. ``python tests/every_op.py triton 12 bfloat16``
runs those of one dtype in so many processes, for a backend that compiles each kernel first.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.contract import NO_PADDING, Act, conv_output_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Channels that fill 128-bit accesses and that do not, odd sizes, tails of every tile.
SHAPES = [(2, 40, 9, 13), (3, 3, 7, 5), (1, 8, 1, 1), (1, 24, 17, 33)]  # N, C, H, W
ACTS = (Act.RELU, Act.RELU6, Act.HARDSWISH, Act.SILU)  # one for each shape
ONE = (1, 1, 1, 1)  # on each side
UNEQUAL = (1, 2, 0, 2)
SLOPE = 0.2  # of leaky ReLU
FILTERS = {40: 72, 3: 5, 8: 16, 24: 136}


def kernel_ops() -> set[str]:
    """The ops of ``csrc/ops.h`` that every backend implements: those with a kernel of the CPU's, which has more."""
    names = {name.partition("::")[::2] for name in torch._C._dispatch_get_all_op_names()}
    public = {name for namespace, name in names if namespace == "mobilenet_ext"}
    return public & {name for namespace, name in names if namespace == "mobilenet_ext_cpu"}


class Call(NamedTuple):
    op: str
    args: tuple

    def __str__(self) -> str:
        first = self.args[0]
        return f"{self.op} {list(first.shape)} {str(first.dtype).removeprefix('torch.')}"

    def run(self) -> list[torch.Tensor]:
        outputs = getattr(ops, self.op)(*self.args)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]


def calls(
    device: str, dtypes: tuple[torch.dtype, ...] = DTYPES, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Iterator[Call]:
    """Every op at odd shapes; the same numbers at each call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for dtype, shape in product(dtypes, shapes):
        n, c, h, w = shape
        act = ACTS[SHAPES.index(shape) % len(ACTS)]

        def image(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return random(*shape).to(device, dtype).contiguous(memory_format=torch.channels_last)

        def bn(channels: int) -> torch.Tensor:
            gamma, rstd = (random(channels).abs() + 0.5 for _ in range(2))
            mean, beta, var = random(channels) / 3, random(channels) / 3, rstd**-2
            return torch.stack([mean, gamma * rstd, beta, rstd, var]).to(device)

        def affine(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
            return (random(channels).abs() + 0.5).to(device), random(channels).to(device)

        def with_affine(channels: int) -> tuple:
            """gamma, beta, eps, stats and a bias."""
            return *affine(channels), 1e-5, True, random(channels).to(device)

        def filters(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (random(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(device, dtype)

        k = FILTERS[c]
        u, bn_u = image(n, c, h, w), bn(c)
        pointwise = filters(k, c, 1, 1)
        y, grad_bn = image(n, k, h, w), random(6, k).to(device)
        yield Call("pointwise_forward", (u, bn_u, act, pointwise, 1, NO_PADDING, *with_affine(k)))
        backward = (image(n, k, h, w), y, grad_bn, u, bn_u, act, True, pointwise, 1, NO_PADDING)
        yield Call("pointwise_backward", (*backward, True, True))
        yield Call("pointwise_backward", (*backward, False, True))
        yield Call("pointwise_inference", (u, bn(k), act, pointwise, 1, NO_PADDING))
        leaky = (u, bn(k), Act.LEAKY_RELU, pointwise, 1, NO_PADDING, None, image(n, k, h, w), SLOPE)
        yield Call("pointwise_inference", leaky)
        gate = image(n, c, 1, 1)
        yield Call("gated_pointwise_forward", (u, bn_u, act, gate, pointwise, *with_affine(k)))
        for bn_of, act_of in ((bn_u, act), (None, Act.LINEAR)):
            of_output = (image(n, k, h, w), y, grad_bn)
            yield Call("gated_pointwise_backward", (*of_output, u, bn_of, act_of, gate, pointwise, True, True))
        yield Call("gated_pointwise_inference", (u, gate, bn(k), act, pointwise, None, image(n, k, h, w)))
        yield Call("norm_act_forward", (u, bn_u, act, False))
        yield Call("norm_act_forward", (u, bn_u, Act.LEAKY_RELU, False, image(n, c, h, w), SLOPE))
        yield Call("norm_act_backward", (image(n, c, h, w), u, bn_u, act, True, False))
        yield Call("norm_act_backward", (image(n, c, h, w), u, bn_u, act, True, False, image(n, c, 1, 1)))
        yield Call("norm_act_backward", (image(n, c, h, w), u, bn_u, Act.LEAKY_RELU, True, False, None, False, SLOPE))
        yield Call("norm_act_forward", (u, bn_u, act, True))
        yield Call("norm_act_backward", (image(n, c, 1, 1), u, bn_u, act, True, True))
        for stride in (1, 2):
            out = [(side - 1) // stride + 1 for side in (h, w)]
            depthwise, dense = filters(c, 1, 3, 3), filters(k, c, 3, 3)
            y, grad_bn = image(n, c, *out), random(6, c).to(device)
            yield Call("depthwise_forward", (u, bn_u, act, depthwise, stride, ONE, *with_affine(c)))
            yield Call(
                "depthwise_backward",
                (image(n, c, *out), y, grad_bn, u, bn_u, act, True, depthwise, stride, ONE, True, True),
            )
            residual = image(n, k, *out)
            yield Call("depthwise_inference", (u, bn_u, act, depthwise, stride, ONE))
            yield Call("depthwise_inference", (u, bn_u, act, depthwise, stride, ONE, None, image(n, c, *out)))
            block = (u, bn_u, act, depthwise, stride, ONE, bn(k), act, pointwise)
            yield Call("block_inference", block)
            yield Call("block_inference", (*block, None, residual))
            yield Call("dense_forward", (u, None, Act.LINEAR, dense, stride, ONE, *with_affine(k)))
            y, grad_bn = image(n, k, *out), random(6, k).to(device)
            yield Call(
                "dense_backward",
                (image(n, k, *out), y, grad_bn, u, None, Act.LINEAR, False, dense, stride, ONE, True, True),
            )
            for size, padding in ((3, UNEQUAL), (5, (2, 2, 2, 2))):
                out = conv_output_size(h, w, size, stride, padding)
                depthwise, y = filters(c, 1, size, size), image(n, c, *out)
                conv = (depthwise, stride, padding)
                yield Call("depthwise_forward", (u, bn_u, act, *conv, *with_affine(c)))
                backward = (image(n, c, *out), y, random(6, c).to(device), u, bn_u, act, True, *conv)
                yield Call("depthwise_backward", (*backward, True, True))
                yield Call("depthwise_inference", (u, bn_u, act, *conv, None, image(n, c, *out)))
            yield Call("dense_inference", (u, bn(k), act, dense, stride, ONE))
            yield Call("dense_inference", (u, bn(k), act, dense, stride, ONE, None, residual))
    mean, var = random(24).to(device), random(24).abs().to(device)
    yield Call("bn_from_running", (mean, var, *affine(24), random(24).to(device), 1e-5))


def run(backend: str, dtypes: tuple[torch.dtype, ...] = DTYPES, shapes: Sequence[tuple[int, ...]] = SHAPES) -> int:
    """How many calls were run, to their end."""
    count = 0
    with mx.backends.use(backend):
        for call in calls(mx.backends.device_type(backend) or "cpu", dtypes, shapes):
            call.run()
            count += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    backend, processes = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
    dtypes = tuple(getattr(torch, name) for name in sys.argv[3:]) or DTYPES
    if processes == 1:
        count = run(backend, dtypes)
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = [(backend, (dtype,), (shape,)) for dtype, shape in product(dtypes, SHAPES)]
            count = sum(pool.starmap(run, parts, chunksize=1))
    print(f"{backend}: {count} calls")
