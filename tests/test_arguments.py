"""Everything wrong that can be given to a public function is refused, by the argument's name, before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from behaviour import KernelOps, Plain
from plain import one_thread
from torch import Tensor, nn

import mobilenet_ext as mx

F32 = torch.float32


def depthwise_arguments() -> dict:
    return {"input": torch.randn(2, 8, 6, 6), "weight": torch.randn(8, 1, 3, 3), "bias": torch.randn(8)}


def pointwise_arguments() -> dict:
    return {"input": torch.randn(2, 8, 6, 6), "weight": torch.randn(5, 8, 1, 1), "bias": torch.randn(5)}


def batch_norm_arguments(channels: int) -> dict:
    return {
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
        "bn_weight": torch.ones(channels),
        "bn_bias": torch.zeros(channels),
    }


CALLS = {
    "depthwise_conv2d": depthwise_arguments,
    "pointwise_conv2d": pointwise_arguments,
    "depthwise_bn_relu": lambda: depthwise_arguments() | batch_norm_arguments(8),
    "pointwise_bn_relu": lambda: pointwise_arguments() | batch_norm_arguments(5),
}
DEPTHWISE, POINTWISE = ("depthwise_conv2d", "depthwise_bn_relu"), ("pointwise_conv2d", "pointwise_bn_relu")
WITH_BATCH_NORM = ("depthwise_bn_relu", "pointwise_bn_relu")


def refused(function: str, argument: str, value: object, **others: object) -> str:
    """The message with which the call is refused: the argument's name is in front, and no kernel has run."""
    arguments = CALLS[function]() | {argument: value} | others
    with KernelOps() as ops, pytest.raises((ValueError, TypeError)) as error:
        getattr(mx.functional, function)(**arguments)
    message = str(error.value)
    assert message.startswith((f"{argument}:", f"{argument},")) or f", {argument}:" in message, message
    assert not ops.names
    return message


@pytest.mark.parametrize("function", CALLS)
def test_the_calls_themselves_are_accepted(cpu_backend, function):
    arguments = CALLS[function]()
    assert getattr(mx.functional, function)(**arguments).shape[0] == 2
    optional = [name for name in arguments if name not in ("input", "weight")]
    if function in WITH_BATCH_NORM:
        arguments |= dict.fromkeys(optional, None) | {"training": True}
        assert getattr(mx.functional, function)(**arguments).shape[0] == 2


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("value", [None, "image", 3, [[1.0]], torch.ones(2, 8, 6, 6).numpy()])
@pytest.mark.parametrize("argument", ["input", "weight"])
def test_not_a_tensor(function, argument, value):
    message = refused(function, argument, value)
    assert type(value).__name__ in message


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("value", ["vector", 3, [0.0] * 8])
def test_vectors_that_are_not_tensors(function, value):
    for argument in CALLS[function]():
        if argument not in ("input", "weight"):
            assert type(value).__name__ in refused(function, argument, value)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("shape", [(8, 6, 6), (2, 8, 6), (8,), (), (2, 8, 6, 6, 1)])
def test_input_dimensions(function, shape):
    assert str(tuple(shape)) in refused(function, "input", torch.randn(shape))


@pytest.mark.parametrize("function", CALLS)
def test_no_channels(function):
    refused(function, "input", torch.randn(2, 0, 6, 6))


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("shape", [(2, 8, 0, 6), (2, 8, 6, 0)])
def test_no_pixels(function, shape):
    arguments = CALLS[function]() | {"input": torch.randn(shape)}
    for padding in [{}, {"padding": 2}] if function in DEPTHWISE else [{}]:  # a kernel that sees padding alone
        with pytest.raises(ValueError, match="^input: "):
            getattr(mx.functional, function)(**arguments, **padding)


@pytest.mark.parametrize("function", DEPTHWISE)
@pytest.mark.parametrize(
    "shape", [(7, 1, 3, 3), (8, 2, 3, 3), (8, 1, 7, 7), (8, 1, 5, 3), (8, 1, 3), (8, 3, 3), (0, 1, 3, 3), (8, 8, 3, 3)]
)
def test_depthwise_weight(function, shape):
    message = refused(function, "weight", torch.randn(shape))
    assert str(tuple(shape)) in message and "[8, 1, 3, 3] and [8, 1, 5, 5]" in message


@pytest.mark.parametrize("function", POINTWISE)
@pytest.mark.parametrize("shape", [(5, 7, 1, 1), (5, 8), (5, 8, 3, 3), (0, 8, 1, 1), (5, 1, 1, 1), (5, 8, 1)])
def test_pointwise_weight(function, shape):
    assert str(tuple(shape)) in refused(function, "weight", torch.randn(shape))


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("shape", [(7,), (1,), (), (0,), (8, 1), (1, 5)])
def test_vector_shapes(function, shape):
    for argument in CALLS[function]():
        if argument not in ("input", "weight"):
            assert str(tuple(shape)) in refused(function, argument, torch.ones(shape))


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_dtypes_that_no_kernel_has(function, dtype):
    for argument, tensor in CALLS[function]().items():
        message = refused(function, argument, tensor.to(dtype))
        assert str(dtype).removeprefix("torch.") in message


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mixed_dtypes(function, dtype):
    for argument, tensor in CALLS[function]().items():
        if argument == "input":
            continue  # the others are then the odd ones out
        refused(function, argument, tensor.to(dtype))
    with pytest.raises(TypeError, match="weight: got"):
        arguments = CALLS[function]()
        getattr(mx.functional, function)(**arguments | {"input": arguments["input"].to(dtype)})


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_beside_16_bits(cpu_backend, function, dtype):
    """Of the activations' dtype or of float32, and all the same."""
    given = CALLS[function]()
    low = {name: t.to(dtype) for name, t in given.items()}
    vectors = [name for name in given if name not in ("input", "weight", "bias")]
    call = getattr(mx.functional, function)
    assert call(**low).dtype == dtype
    assert call(**low | {name: given[name] for name in vectors}).dtype == dtype
    for name in vectors[1:]:
        with pytest.raises(TypeError, match=f"^{name}: got "):
            call(**low | {name: given[name]})


@pytest.mark.parametrize("function", CALLS)
def test_devices(function):
    for argument, tensor in CALLS[function]().items():
        if argument != "input":
            assert "meta" in refused(function, argument, tensor.to("meta"))
    arguments = {name: tensor.to("meta") for name, tensor in CALLS[function]().items()}
    assert getattr(mx.functional, function)(**arguments).device.type == "meta"


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_layouts(function):
    for argument, tensor in CALLS[function]().items():
        assert "sparse_coo" in refused(function, argument, tensor.to_sparse())
    refused(function, "input", torch.randn(6, 6).to_sparse_csr())


@pytest.mark.parametrize("function", DEPTHWISE)
@pytest.mark.parametrize("stride", [0, -1, 3, 1.0, "1", None, (1, 1), True, torch.tensor(1)])
def test_stride(function, stride):
    assert "accepted are 1 and 2" in refused(function, "stride", stride)


@pytest.mark.parametrize("function", DEPTHWISE)
@pytest.mark.parametrize(
    "padding",
    [-1, 3, 1.0, "same", None, True, (), (1,), (1, 1, 1), (0, 3), (0, 1, 2, 3), (1, 1, 1, 1, 1), (1, 1.0), {1}],
)
def test_padding(function, padding):
    assert "accepted are 0, 1 and 2" in refused(function, "padding", padding)


@pytest.mark.parametrize("size", [(2, 5), (5, 2), (1, 1)])
def test_image_smaller_than_the_kernel(size):
    refused("depthwise_conv2d", "input", torch.randn(2, 8, *size), padding=0)
    assert mx.functional.depthwise_conv2d(torch.randn(2, 8, *size), torch.randn(8, 1, 3, 3)).shape == (2, 8, *size)
    height, width = size
    sides = (0, max(3 - width, 0), max(3 - height, 0), 0)
    x, weight = torch.randn(2, 8, *size), torch.randn(8, 1, 3, 3)
    assert mx.functional.depthwise_conv2d(x, weight, padding=sides).shape == (
        2,
        8,
        max(height - 2, 1),
        max(width - 2, 1),
    )


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("value", [None, "0.1", True, (0.1,), torch.tensor(0.1)])
@pytest.mark.parametrize("argument", ["momentum", "eps"])
def test_numbers(function, argument, value):
    refused(function, argument, value, training=True)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("value", [-1e-5, -1.0, float("nan"), float("inf")])
def test_eps(function, value):
    refused(function, "eps", value, training=True)
    refused(function, "eps", value)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
def test_eps_of_zero_is_refused_in_training_alone(cpu_backend, function):
    refused(function, "eps", 0.0, training=True)
    getattr(mx.functional, function)(**CALLS[function](), eps=0.0)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_momentum(function, value):
    refused(function, "momentum", value, training=True)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("argument", ["training", "relu"])
@pytest.mark.parametrize("value", [None, 1, "no", torch.tensor(True)])
def test_switches(function, argument, value):
    refused(function, argument, value)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
def test_running_statistics_come_together(function):
    for training in (True, False):
        for argument in ("running_mean", "running_var"):
            refused(function, argument, None, training=training)
    refused(function, "running_mean", None, running_var=None)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
def test_one_value_per_channel(cpu_backend, function):
    arguments = CALLS[function]() | {"input": torch.randn(1, 8, 1, 1)}
    before = arguments["running_mean"].clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        getattr(mx.functional, function)(**arguments, training=True)
    assert torch.equal(arguments["running_mean"], before)
    assert getattr(mx.functional, function)(**arguments).shape[2:] == (1, 1)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
def test_settings_are_keywords(function):
    with pytest.raises(TypeError, match="positional argument"):
        getattr(mx.functional, function)(*CALLS[function]().values(), 1)


@pytest.mark.parametrize("function", CALLS)
def test_unknown_and_missing_arguments(function):
    with pytest.raises(TypeError, match="dilation"):
        getattr(mx.functional, function)(**CALLS[function](), dilation=1)
    with pytest.raises(TypeError, match="weight"):
        getattr(mx.functional, function)(torch.randn(1, 8, 6, 6))


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["1e400", "-1e400", "1e5000"])
@pytest.mark.parametrize("argument", ["momentum", "eps"])
def test_integers_larger_than_any_float(function, argument, value):
    """Python does not even print those of more than 4300 digits."""
    assert "expected" in refused(function, argument, value, training=True)
    refused(function, argument, value)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)], ids=lambda n: type(n).__name__)
def test_numbers_of_other_libraries(cpu_backend, function, number):
    call = getattr(mx.functional, function)
    for argument in ("momentum", "eps"):
        given, expected = (CALLS[function]() for _ in range(2))
        torch.testing.assert_close(
            call(
                **given | {"input": expected["input"], "weight": expected["weight"]},
                training=True,
                **{argument: number},
            ),
            call(**expected, training=True, **{argument: 0.25}),
        )
        torch.testing.assert_close(given["running_var"], expected["running_var"])


@pytest.mark.parametrize("function", DEPTHWISE)
def test_integers_of_other_libraries(cpu_backend, function):
    arguments, call = CALLS[function](), getattr(mx.functional, function)
    assert torch.equal(call(**arguments, stride=np.int64(2)), call(**arguments, stride=2))
    refused(function, "stride", np.float64(1))
    refused(function, "stride", np.int64(3))
    refused(function, "stride", 10**400)


def inference_tensor(like: Tensor) -> Tensor:
    with torch.inference_mode():
        return like.clone()


UNUSABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda t: t[:1].expand(len(t)),
    "of an inference mode": inference_tensor,
    "leaf": lambda t: t.clone().requires_grad_(),
    "not a leaf": lambda t: t.clone().requires_grad_() * 1,
    "view of a leaf": lambda t: t[None].clone().requires_grad_()[0],
}


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_running_statistics_that_cannot_be_updated(function, argument, kind):
    buffer = UNUSABLE[kind](CALLS[function]()[argument])
    before = buffer.detach().clone()
    assert "expected" in refused(function, argument, buffer, training=True)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_running_statistics_that_are_only_read(cpu_backend, function, kind):
    """As by F.batch_norm: none that need a gradient."""
    arguments = CALLS[function]()
    buffer = UNUSABLE[kind](arguments["running_var"])
    if buffer.requires_grad:
        refused(function, "running_var", buffer)
    with torch.no_grad():
        actual = getattr(mx.functional, function)(**arguments | {"running_var": buffer})
        expected = getattr(mx.functional, function)(**arguments | {"running_var": buffer.detach().clone()})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
def test_running_statistics_in_the_memory_of_another_argument(function):
    arguments = CALLS[function]()
    c = len(arguments["running_mean"])
    mean = arguments["running_mean"]
    refused(function, "running_var", mean, running_mean=mean, training=True)
    shifted = torch.ones(c + 1)
    refused(function, "running_var", shifted[1:], running_mean=shifted[:-1], training=True)
    for other in ("bias", "bn_weight", "bn_bias"):
        for argument in ("running_mean", "running_var"):
            tensor = arguments[other]
            assert other in refused(function, argument, tensor, **{other: tensor}, training=True)
    whole = torch.ones(arguments["input"].numel())
    message = refused(function, "running_mean", whole[3 : 3 + c], input=whole.view(2, 8, 6, 6), training=True)
    assert "input" in message
    weight = arguments["weight"].clone()
    refused(function, "running_var", weight.view(-1)[:c], weight=weight, training=True)


@pytest.mark.parametrize("function", WITH_BATCH_NORM)
def test_running_statistics_beside_others_in_one_memory(cpu_backend, function):
    """Rows, columns and every other element of one tensor: each has memory of its own, and is updated."""
    call = getattr(mx.functional, function)
    expected = CALLS[function]()
    call(**expected, training=True)
    c = len(expected["running_mean"])
    names = ("running_mean", "running_var", "bn_weight", "bn_bias")
    for views in (
        torch.zeros(4, c).unbind(0),
        torch.zeros(c, 4).unbind(1),
        [torch.zeros(4 * c)[i::4] for i in range(4)],
    ):
        given = {
            **expected,
            **{name: view.copy_(CALLS[function]()[name]) for name, view in zip(names, views, strict=True)},
        }
        call(**given, training=True)
        for name in names[:2]:
            torch.testing.assert_close(given[name], expected[name])


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(function):
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(8, 6, 6), torch.randn(8, 6, 6)], layout=layout)
        assert "nested" in refused(function, "input", nested)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:DeprecationWarning")
def test_quantised_and_other_layouts(function):
    arguments = CALLS[function]()
    refused(function, "weight", torch.quantize_per_tensor(arguments["weight"], 0.1, 0, torch.qint8))
    refused(function, "input", torch.quantize_per_tensor(arguments["input"], 0.1, 0, torch.quint8))
    refused(function, "input", arguments["input"].to_mkldnn())


class Doubling(torch.Tensor):
    """A subclass that gives an operation another meaning."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is torch.conv2d else out


@pytest.mark.parametrize("function", CALLS)
def test_subclasses_mean_what_they_mean_to_pytorch(cpu_backend, function):
    arguments = CALLS[function]() | {"bias": None}
    call = getattr(mx.functional, function)
    out = call(**arguments | {"input": arguments["input"].as_subclass(Doubling)})
    assert type(out) is Doubling
    twice = call(**arguments | {"weight": 2 * arguments["weight"]})
    torch.testing.assert_close(out.as_subclass(Tensor), twice)


def assert_as_plain(model: nn.Module, x: Tensor, change: Callable[[nn.Module], None] = lambda model: None) -> None:
    """The same error from the module as from its leaves, or the same result and buffers; both after ``change``."""
    plain = Plain(model)
    change(model)
    change(plain.module)
    outcomes = []
    for module in (model, plain):
        try:
            outcomes.append(module(x))
        except Exception as error:  # whichever it is, it has to be both modules'
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[1], Tensor):
        torch.testing.assert_close(*outcomes)
        for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
    else:
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("kind", "training", "learns"),
    [("of an inference mode", True, True), ("of an inference mode", True, False), ("leaf", True, True)]
    + [("leaf", False, True), ("not a leaf", True, True), ("expanded", True, True), ("expanded", False, True)],
)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_modules_do_with_odd_buffers_what_plain_modules_do(cpu_backend, name, kind, training, learns):
    def change(model: nn.Module) -> None:
        model[1]._buffers[name] = UNUSABLE[kind](model[1]._buffers[name])

    model = mx.nn.DepthwiseConvBNReLU(4).train(training).requires_grad_(learns)
    with one_thread():  # PyTorch's threads write each channel's statistics, here all to the same memory
        assert_as_plain(model, torch.randn(2, 4, 6, 6), change)


@pytest.mark.parametrize("setting", ["momentum", "eps"])
@pytest.mark.parametrize("value", [True, 1, np.float32(0.25), 10**400], ids=["bool", "int", "numpy", "1e400"])
def test_modules_do_with_odd_settings_what_plain_modules_do(cpu_backend, setting, value):
    model = mx.nn.DepthwiseConvBNReLU(4)
    setattr(model[1], setting, value)
    assert_as_plain(model, torch.randn(2, 4, 6, 6))
    assert_as_plain(copy.deepcopy(model).eval(), torch.randn(2, 4, 6, 6))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("x", [torch.randn(2, 4, 0, 6), torch.randn(2, 4, 6, 0), torch.randn(0, 4, 0, 0)], ids=str)
def test_modules_and_images_without_pixels(cpu_backend, x):
    assert_as_plain(mx.nn.DepthwiseConvBNReLU(4).eval(), x)
    assert_as_plain(mx.nn.PointwiseConvBNReLU(4, 3).eval(), x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_modules_and_nested_tensors(cpu_backend):
    assert_as_plain(mx.nn.DepthwiseConvBNReLU(4).eval(), torch.nested.nested_tensor([torch.randn(4, 6, 6)] * 2))
