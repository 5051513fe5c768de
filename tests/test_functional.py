"""``mx.functional`` against float64 ``F.conv2d``, ``F.batch_norm`` and ReLU: every layer shape of the network, random
shapes, 16 bits and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain import FORWARD, GRADIENT, Shape
from torch import Tensor

import mobilenet_ext as mx
from mobilenet_ext.contract import KERNEL_SIZES, PADDINGS, Padding

SHAPES = plain.channel_shapes(("depthwise", "pointwise"))
# At the size they have in the network: the largest images, the largest channel counts and both strides.
FULL_SIZE = [
    Shape("depthwise", 32, 32, 1, 112),
    Shape("depthwise", 64, 64, 2, 112),
    Shape("depthwise", 512, 512, 1, 14),
    Shape("depthwise", 1024, 1024, 1, 7),
    Shape("pointwise", 32, 64, 1, 112),
    Shape("pointwise", 128, 128, 1, 56),
    Shape("pointwise", 512, 512, 1, 14),
    Shape("pointwise", 1024, 1024, 1, 7),
]
SIXTEEN_BIT_SHAPES = [
    Shape("depthwise", 32, 32, 1, 16),
    Shape("depthwise", 64, 64, 2, 15),
    Shape("depthwise", 24, 24, 1, 9),
    Shape("depthwise", 128, 128, 2, 8),
    Shape("pointwise", 8, 16, 1, 14),
    Shape("pointwise", 96, 192, 1, 9),
    Shape("pointwise", 512, 512, 1, 6),
]
RANDOM = settings(
    derandomize=True,
    deadline=5000,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_input(shape: Shape, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Input (one column narrower than high), weight and bias."""
    kernel = 3 if shape.kind == "depthwise" else 1
    inner = 1 if shape.kind == "depthwise" else shape.in_channels
    x = torch.randn(batch, shape.in_channels, shape.size, shape.size - 1)
    weight = torch.randn(shape.out_channels, inner, kernel, kernel) / (inner * kernel * kernel) ** 0.5
    return x, weight, torch.randn(shape.out_channels)


def random_vectors(channels: int) -> list[Tensor]:
    """running_mean, running_var, bn_weight and bn_bias."""
    return [
        torch.rand(channels) - 0.5,
        torch.rand(channels) + 0.5,
        torch.rand(channels) + 0.5,
        torch.rand(channels) - 0.5,
    ]


SYMMETRIC: Padding = (1, 1, 1, 1)
PADDING = st.tuples(*[st.sampled_from(PADDINGS)] * 4)


def conv(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding = SYMMETRIC
) -> Tensor:
    if kind == "pointwise":
        return F.conv2d(x, weight, bias)
    return F.conv2d(F.pad(x, padding), weight, bias, stride, groups=x.shape[1])


def fused_conv(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int | tuple[int, ...] = 1
) -> Tensor:
    if kind == "pointwise":
        return mx.functional.pointwise_conv2d(x, weight, bias)
    return mx.functional.depthwise_conv2d(x, weight, bias, stride, padding)


def bn_relu(kind, x, weight, bias, mean, var, gamma, beta, stride, training, relu=True, signs=None) -> Tensor:
    """The plain unit, in the dtype of its arguments. ``signs``: a ReLU with those of another run."""
    z = F.batch_norm(conv(kind, x, weight, bias, stride), mean, var, gamma, beta, training, 0.1, 1e-5)
    if not relu:
        return z
    return torch.relu(z) if signs is None else signs(z)


def fused_bn_relu(kind, x, weight, bias, mean, var, gamma, beta, stride, training, relu=True) -> Tensor:
    if kind == "pointwise":
        function, more = mx.functional.pointwise_bn_relu, {}
    else:
        function, more = mx.functional.depthwise_bn_relu, {"stride": stride}
    return function(x, weight, bias, mean, var, gamma, beta, training=training, relu=relu, **more)


def gradients(out: Tensor, inputs: list[Tensor | None], upstream: Tensor, keep: bool = False) -> list[Tensor | None]:
    leaves = [x for x in inputs if x is not None]
    upstream = upstream.to(device=out.device, dtype=out.dtype)
    grads = iter(torch.autograd.grad(out, leaves, upstream, retain_graph=keep))
    return [None if x is None else next(grads) for x in inputs]


def check_conv(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding) -> None:
    given = [x, weight, bias]
    leaves = [None if t is None else t.requires_grad_() for t in given]
    expected_leaves = [None if t is None else plain.as_leaf64(t) for t in given]
    out = fused_conv(kind, *leaves, stride, padding)
    upstream = torch.randn(out.shape)
    actual = gradients(out, leaves, upstream)
    with plain.one_thread():
        expected = conv(kind, *expected_leaves, stride, padding)
        wanted = gradients(expected, expected_leaves, upstream)
    plain.assert_close(out, expected, FORWARD, "output")
    for name, a, b in zip(("input", "weight", "bias"), actual, wanted, strict=True):
        if b is not None:
            plain.assert_close(a, b, GRADIENT, f"gradient of {name}")


def check_bn_relu(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, vectors: list[Tensor], stride: int, training: bool
) -> None:
    given = [x, weight, bias, *vectors[2:]]
    leaves = [None if t is None else t.requires_grad_() for t in given]
    expected_leaves = [None if t is None else plain.as_leaf64(t) for t in given]
    running, expected_running = [t.clone() for t in vectors[:2]], [t.cpu().double() for t in vectors[:2]]
    out = fused_bn_relu(kind, *leaves[:3], *running, *leaves[3:], stride, training)
    upstream = torch.randn(out.shape)
    actual = gradients(out, leaves, upstream)
    signs = plain.Relu(out.detach().cpu() > 0, FORWARD)
    with plain.one_thread():
        expected = bn_relu(
            kind, *expected_leaves[:3], *expected_running, *expected_leaves[3:], stride, training, signs=signs
        )
        wanted = gradients(expected, expected_leaves, upstream)
    if training and kind == "pointwise" and x.shape[1] == 1:
        # The output does not depend on the scale of the only weight of a channel: its true gradient is nearly zero.
        actual[1], wanted[1] = None, None
    plain.assert_close(out, expected, FORWARD, "output")
    for name, a, b in zip(("running_mean", "running_var"), running, expected_running, strict=True):
        plain.assert_close(a, b, FORWARD, name)
    for name, a, b in zip(("input", "weight", "bias", "bn_weight", "bn_bias"), actual, wanted, strict=True):
        if name == "bias" and training:
            assert a is None or not a.any(), "in front of batch statistics the gradient of a bias is zero"
        elif b is not None:
            plain.assert_close(a, b, GRADIENT, f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolution_of_every_layer(backend: str, device: str, shape: Shape) -> None:
    x, weight, bias = (t.to(device) for t in random_input(shape))
    check_conv(shape.kind, x.contiguous(memory_format=torch.channels_last), weight, bias, shape.stride, SYMMETRIC)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unit_of_every_layer(backend: str, device: str, shape: Shape, training: bool) -> None:
    x, weight, bias = (t.to(device) for t in random_input(shape))
    vectors = [t.to(device) for t in random_vectors(shape.out_channels)]
    check_bn_relu(shape.kind, x, weight, bias, vectors, shape.stride, training)


@pytest.mark.parametrize("shape", FULL_SIZE, ids=str)
def test_full_size(backend: str, device: str, shape: Shape) -> None:
    x, weight, bias = (t.to(device) for t in random_input(shape))
    vectors = [t.to(device) for t in random_vectors(shape.out_channels)]
    check_conv(shape.kind, x.clone(), weight.clone(), bias.clone(), shape.stride, SYMMETRIC)
    check_bn_relu(shape.kind, x, weight, bias, vectors, shape.stride, True)


def odd_input(
    data: Any, kind: str, smallest: int = 1, padding: Padding = SYMMETRIC
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any batch, channels, image and kernel, in one of the memory formats that people pass."""
    n, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    inner, kernel = (1, data.draw(st.sampled_from(KERNEL_SIZES["depthwise"]))) if kind == "depthwise" else (c, 1)
    left, right, top, bottom = padding
    h, w = (data.draw(st.integers(max(smallest, kernel - sides), 19)) for sides in (top + bottom, left + right))
    c_out = c if kind == "depthwise" else data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    x = torch.randn(n, c, h, w, generator=generator)
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"]))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.stack([x, -x], 4)[..., 0]
    elif layout == "transposed":
        x = torch.randn(n, c, w, h, generator=generator).transpose(2, 3)
    weight = torch.randn(c_out, inner, kernel, kernel, generator=generator) / (inner * kernel * kernel) ** 0.5
    bias = torch.randn(c_out, generator=generator) if data.draw(st.booleans()) else None
    return x, weight, bias


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
@RANDOM
@given(data=st.data())
def test_convolution_of_any_shape(backend: str, device: str, kind: str, data: Any) -> None:
    stride, padding = data.draw(st.integers(1, 2)), data.draw(PADDING)
    x, weight, bias = odd_input(data, kind, padding=padding)
    x, weight, bias = (None if t is None else t.to(device) for t in (x, weight, bias))
    check_conv(kind, x, weight, bias, stride, padding)


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
@RANDOM
@given(data=st.data())
def test_unit_of_any_shape(backend: str, device: str, kind: str, data: Any) -> None:
    training, stride = data.draw(st.booleans()), data.draw(st.integers(1, 2))
    # Few values a channel make the variance, and with it the whole unit, ill conditioned in any float32 computation.
    x, weight, bias = odd_input(data, kind, 5 if training else 1)
    x, weight, bias = (None if t is None else t.to(device) for t in (x, weight, bias))
    vectors = [t.to(device) for t in random_vectors(weight.shape[0])]
    check_bn_relu(kind, x, weight, bias, vectors, stride, training)


@pytest.mark.parametrize(
    ("padding", "sides"), [(2, (2, 2, 2, 2)), ((1, 2), (2, 2, 1, 1)), ([0, 1, 0, 2], (0, 1, 0, 2)), (0, (0, 0, 0, 0))]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_padding(backend: str, device: str, stride: int, padding: Any, sides: Padding) -> None:
    """One number, two as nn.Conv2d has them or four as F.pad has them, of the convolution and of the unit."""
    x, weight, bias = (t.to(device) for t in random_input(Shape("depthwise", 16, 16, 1, 9)))
    vectors = [t.to(device) for t in random_vectors(16)]
    plain.assert_close(
        fused_conv("depthwise", x, weight, bias, stride, padding),
        conv("depthwise", *(t.double() for t in (x, weight, bias)), stride, sides),
        FORWARD,
    )
    out = mx.functional.depthwise_bn_relu(x, weight, bias, *vectors, stride=stride, padding=padding)
    y = conv("depthwise", *(t.double() for t in (x, weight, bias)), stride, sides)
    plain.assert_close(out, F.relu(F.batch_norm(y, *(t.double() for t in vectors))), FORWARD)


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_relu_left_out(backend: str, device: str, kind: str) -> None:
    x, weight, bias = (t.to(device) for t in random_input(Shape(kind, 16, 16, 1, 9)))
    vectors = [t.to(device) for t in random_vectors(16)]
    for training in (True, False):
        given = [t.clone().requires_grad_() for t in (x, weight)]
        expected_given = [plain.as_leaf64(t) for t in (x, weight)]
        out = fused_bn_relu(kind, *given, bias, *[t.clone() for t in vectors], 1, training, relu=False)
        others = [t.cpu().double() for t in (bias, *vectors)]
        expected = bn_relu(kind, *expected_given, *others, 1, training, relu=False)
        assert (out < 0).any()
        plain.assert_close(out, expected, FORWARD, "output")
        upstream = torch.randn(out.shape)
        for a, b in zip(gradients(out, given, upstream), gradients(expected, expected_given, upstream), strict=True):
            plain.assert_close(a, b, GRADIENT, "gradient")


def compare_in_16_bits(
    fused: Callable[..., Tensor], own: Callable[..., Tensor], given: dict[str, Tensor], device: str, relu: bool = False
) -> None:
    """Run both on the same values, and ``own`` in float64 too; every output and gradient is held to the promise.

    Where there is a ReLU, the gradients' float64 reference takes the signs of the run that it judges: the few elements
    whose sign rounding has turned, in either run, are a matter of luck and would drown all other errors.
    """
    exact = [plain.as_leaf64(t) for t in given.values()]
    upstream, results = None, []
    with plain.one_thread(), torch.autocast(device, enabled=False):
        expected = own(*exact)
    for function in (fused, own):
        leaves = [plain.leaf(t.to(device)) for t in given.values()]
        out = function(*leaves)
        if upstream is None:
            upstream = torch.randn(out.shape).to(out.dtype)
        grads = gradients(out, leaves, upstream)
        signs = plain.Relu(out.detach().cpu() > 0, plain.corner(out.dtype))
        with plain.one_thread(), torch.autocast(device, enabled=False):
            judge = own(*exact, signs=signs) if relu else expected
            wanted = gradients(judge, exact, upstream, keep=True)
        errors = [plain.relative_error(a, b) for a, b in zip((out, *grads), (expected, *wanted), strict=True)]
        results.append((errors, [t.dtype for t in (out, *grads)]))
    (ours, dtypes), (theirs, own_dtypes) = results
    assert dtypes == own_dtypes
    for name, a, b in zip(("output", *given), ours, theirs, strict=True):
        plain.check_errors(a, b, f"{'gradient of ' if name != 'output' else ''}{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SIXTEEN_BIT_SHAPES, ids=str)
def test_convolution_in_16_bits(backend: str, device: str, shape: Shape, dtype: torch.dtype) -> None:
    given = dict(zip(("input", "weight", "bias"), (t.to(dtype) for t in random_input(shape)), strict=True))
    compare_in_16_bits(
        lambda x, w, b: fused_conv(shape.kind, x, w, b, shape.stride),
        lambda x, w, b: conv(shape.kind, x, w, b, shape.stride),
        given,
        device,
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("vectors", ["16-bit-vectors", "float32-vectors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SIXTEEN_BIT_SHAPES, ids=str)
def test_unit_in_16_bits(
    backend: str, device: str, shape: Shape, dtype: torch.dtype, vectors: str, training: bool
) -> None:
    x, weight, _ = (t.to(dtype) for t in random_input(shape))
    vector_dtype = dtype if vectors == "16-bit-vectors" else torch.float32
    mean, var, gamma, beta = (t.to(vector_dtype) for t in random_vectors(shape.out_channels))

    def run(unit: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, **signs: Any) -> Tensor:
            running = [t.clone().to(device=x.device, dtype=gamma.dtype) for t in (mean, var)]
            return unit(shape.kind, x, weight, None, *running, gamma, beta, shape.stride, training, **signs)

        return call

    given = {"input": x, "weight": weight, "bn_weight": gamma, "bn_bias": beta}
    compare_in_16_bits(run(fused_bn_relu), run(bn_relu), given, device, relu=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_autocast(backend: str, device: str, kind: str, dtype: torch.dtype) -> None:
    """Under autocast float32 arguments are cast as autocast casts them for the plain convolution, vectors are not."""
    shape = Shape(kind, 32, 32, 1, 14)
    x, weight, bias = (t.to(dtype).float() for t in random_input(shape))
    mean, var, gamma, beta = random_vectors(32)

    def run(unit: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, **signs: Any) -> Tensor:
            running = [t.clone().to(device=x.device, dtype=gamma.dtype) for t in (mean, var)]
            out = unit(kind, x, weight, None, *running, gamma, beta, 1, True, **signs)
            assert not torch.equal(running[0], mean.to(running[0])), "the running statistics were not updated"
            return out

        return call

    with torch.autocast(device, dtype):
        compare_in_16_bits(
            lambda x, w, b: fused_conv(kind, x, w, b, 1),
            lambda x, w, b: conv(kind, x, w, b, 1),
            {"input": x, "weight": weight, "bias": bias},
            device,
        )
        given = {"input": x, "weight": weight, "bn_weight": gamma, "bn_bias": beta}
        compare_in_16_bits(run(fused_bn_relu), run(bn_relu), given, device, relu=True)


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_float64(backend64: str, kind: str) -> None:
    x, weight, bias = (t.double() for t in random_input(Shape(kind, 24, 24, 1, 9)))
    vectors = [t.double() for t in random_vectors(24)]
    given = [plain.leaf(t) for t in (x, weight)]
    expected_given = [plain.leaf(t) for t in (x, weight)]
    running, expected_running = [t.clone() for t in vectors[:2]], [t.clone() for t in vectors[:2]]
    out = fused_bn_relu(kind, *given, bias, *running, *vectors[2:], 1, True)
    expected = bn_relu(kind, *expected_given, bias, *expected_running, *vectors[2:], 1, True)
    upstream = torch.randn_like(expected)
    actual = [out, *running, *gradients(out, given, upstream)]
    for a, b in zip(actual, [expected, *expected_running, *gradients(expected, expected_given, upstream)], strict=True):
        plain.assert_close(a, b, 1e-12, "float64")


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("this torch is built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_is_placed_as_by_the_functions_of_pytorch(mesh):
    """The convolutions: DTensor of torch 2.11 knows no batch normalisation."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = distribute_tensor(torch.randn(4, 8, 6, 6), mesh, [Shard(0)])
    w, p = (distribute_tensor(torch.randn(shape), mesh, [Replicate()]) for shape in ((8, 1, 3, 3), (5, 8, 1, 1)))
    y, expected = mx.functional.depthwise_conv2d(x, w), F.conv2d(x, w, None, 1, 1, groups=8)
    torch.testing.assert_close(y.full_tensor(), expected.full_tensor())
    assert y.placements == expected.placements == (Shard(0),)
    y, expected = mx.functional.pointwise_conv2d(x, p), F.conv2d(x, p)
    torch.testing.assert_close(y.full_tensor(), expected.full_tensor())
    assert y.placements == expected.placements == (Shard(0),)
