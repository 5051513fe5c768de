"""Plans of the C++ CPU kernels: nothing that is done to their handle, or to the tensors they were made of, matters."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch
from cpu_ops import in_a_row
from torch import Tensor

from mobilenet_ext import backends
from mobilenet_ext.contract import NO_PADDING, Act

kernels = backends.cpu.kernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def run(plan: Tensor, *inputs: Tensor) -> Tensor:
    (y,) = kernels.run_plan(inputs, plan)
    return y


class Chain:
    """A dense convolution, a block, a depthwise and a pointwise convolution, and the pooling: a step of each kind."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def bn(channels: int) -> Tensor:
            return (torch.rand(5, channels, dtype=torch.float64) + 0.5).to(acc)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype)

        self.x = weight(2, 3, 33, 31).contiguous(memory_format=torch.channels_last)
        bns, weights = [bn(c) for c in (16, 16, 40, 40, 24)], [weight(16, 1, 3, 3), weight(40, 16, 1, 1)]
        block = kernels.pack(bns[1], *weights)
        pointwise = weight(24, 40, 1, 1)
        packed = kernels.pack(None, None, pointwise)
        self.steps = [
            ("dense_inference", (bns[0], Act.LEAKY_RELU, weight(16, 3, 3, 3), 2, (0, 1, 0, 1), None, None, 0.25)),
            (
                "block_inference",
                (
                    bns[1],
                    Act.HARDSWISH,
                    weights[0],
                    1,
                    (1, 0, 0, 1),
                    bns[2],
                    Act.LEAKY_RELU,
                    weights[1],
                    block,
                    None,
                    0.0,
                    0.1,
                ),  # fmt: skip
            ),
            ("depthwise_inference", (bns[3], Act.LINEAR, weight(40, 1, 3, 3), 2, (2, 0, 1, 0), None, None, 0.0)),
            ("pointwise_inference", (bns[4], Act.RELU, pointwise, 1, NO_PADDING, packed, None, 0.0)),
            ("norm_act_forward", (bn(24), Act.RELU6, True, None, 0.0)),
        ]
        arguments = [argument for _, args in self.steps for argument in args if argument is not None]
        self.ops = [name for name, _ in self.steps]
        self.tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.slopes = [argument for argument in arguments if isinstance(argument, float)]
        self.settings = []
        for argument in arguments:
            if not isinstance(argument, (Tensor, float)):
                self.settings += argument if isinstance(argument, tuple) else [int(argument)]
        self.expected = self.op_by_op()

    def op_by_op(self) -> Tensor:
        y = self.x
        for name, args in self.steps:
            y = getattr(kernels, name)(y, *args)
        return y

    def plan(self) -> Tensor:
        return kernels.make_plan(self.ops, self.tensors, self.settings, self.slopes, *in_a_row(len(self.ops)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_gives_the_bits_of_its_ops(dtype: torch.dtype) -> None:
    chain = Chain(dtype)
    assert torch.equal(run(chain.plan(), chain.x), chain.expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("after", [False, True])
def test_a_gate_and_a_residual(dtype: torch.dtype, after: bool) -> None:
    """A gate at the first step and a residual at the last one, which may be the same; the bits of the ops."""
    x, residual = (torch.randn(2, c, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last) for c in (8, 6))
    gate = torch.rand(2, 8, 1, 1).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.randn(6, 8, 1, 1).to(dtype), torch.randn(6, 6, 1, 1).to(dtype)][: 1 + after]
    bns = [torch.rand(5, 6, dtype=acc) for _ in weights]
    packed = [kernels.pack(None, None, weight) for weight in weights]
    expected = kernels.gated_pointwise_inference(
        x, gate, bns[0], Act.RELU, weights[0], packed[0], None if after else residual
    )
    if after:
        expected = kernels.pointwise_inference(expected, bns[1], Act.RELU, weights[1], 1, [0] * 4, packed[1], residual)
    tensors = [t for row in zip(bns, weights, packed, strict=True) for t in row]
    settings = [Act.RELU, *([Act.RELU, 1, 0, 0, 0, 0] if after else [])]
    ops = ["gated_pointwise_inference", "pointwise_inference"][: 1 + after]
    sources = [0, 1, -1, 3, -1, 2] if after else [0, 1, 2]  # the inputs are 0 to 2
    plan = kernels.make_plan(ops, tensors, settings, [0.0] * len(ops), 3, sources, [3 + after])
    assert torch.equal(run(plan, x, gate, residual), expected)
    for inputs, message in (
        ((x, gate), "inputs: expected 3"),
        ((x, gate[:1], residual), "gate: expected shape"),
        ((x, gate.double() if dtype != torch.float64 else gate.float(), residual), "inputs: expected"),
        ((x, gate, residual[:, :, :3].contiguous(memory_format=torch.channels_last)), "residual: expected shape"),
        ((x, gate, residual.contiguous()), "inputs: expected"),
        ((x[:, :4].contiguous(memory_format=torch.channels_last), gate, residual), "inputs: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(plan, *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_with_squeeze_excite_and_a_residual(dtype: torch.dtype) -> None:
    """Values that are read long after they were made, in memory that others use meanwhile; several outputs."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 8, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    depthwise = torch.randn(8, 1, 3, 3).to(dtype)
    pointwise = [torch.randn(8, 8, 1, 1).to(dtype) for _ in range(4)]
    packed = [kernels.pack(None, None, weight) for weight in pointwise]
    bns = [torch.rand(5, 8, dtype=acc) for _ in range(6)]

    def conv(i: int) -> tuple[list[Tensor], list[int]]:
        return [bns[i], pointwise[i], packed[i]], [Act.RELU, 1, 0, 0, 0, 0]

    expand, reduce, widen = (conv(i) for i in range(3))
    steps = [
        ("pointwise_inference", *expand, (0, -1, -1)),  # gives 1
        ("depthwise_inference", [bns[4], depthwise], [Act.SILU, 1, 1, 1, 1, 1], (1, -1, -1)),
        ("norm_act_forward", [bns[5]], [Act.LINEAR, True], (2, -1, -1)),
        ("pointwise_inference", *reduce, (3, -1, -1)),
        ("pointwise_inference", *widen, (4, -1, -1)),
        ("hardsigmoid", [], [], (5, -1, -1)),
        ("sigmoid", [], [], (5, -1, -1)),
        ("gated_pointwise_inference", [bns[3], pointwise[3], packed[3]], [Act.LINEAR], (2, 6, 0)),
        ("gated_pointwise_inference", [bns[3], pointwise[3], packed[3]], [Act.LINEAR], (2, 7, 8)),
    ]
    values = [x]
    for name, tensors, settings, (source, gate, residual) in steps:
        given = values[source]
        if name == "hardsigmoid":
            values.append(torch.nn.functional.hardsigmoid(given))
        elif name == "sigmoid":
            values.append(given.sigmoid())
        elif name == "norm_act_forward":
            values.append(kernels.norm_act_forward(given, tensors[0], *settings))
        elif gate != -1:
            bn, weight, packed_weight = tensors
            values.append(
                kernels.gated_pointwise_inference(
                    given, values[gate], bn, settings[0], weight, packed_weight, values[residual]
                )
            )
        else:
            bn, weight, *packed_weight = tensors
            act, stride, *padding = settings
            values.append(getattr(kernels, name)(given, bn, act, weight, stride, padding, *packed_weight))
    plan = kernels.make_plan(
        [name for name, *_ in steps],
        [tensor for _, tensors, *_ in steps for tensor in tensors],
        [int(setting) for _, _, settings, _ in steps for setting in settings],
        [0.0] * sum(bool(tensors) for _, tensors, *_ in steps),
        1,
        [number for *_, sources in steps for number in sources],
        [9, 1],
    )
    last, first = kernels.run_plan([x], plan)
    assert torch.equal(first, values[1])
    torch.testing.assert_close(last, values[9], rtol=1e-6 if dtype.itemsize > 2 else 2e-2, atol=1e-5)


def test_gates_of_special_values() -> None:
    x = torch.tensor([0.0, -0.0, 3.0, -3.0, 88.0, -88.0, -104.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan])
    for dtype in DTYPES:
        given = x.to(dtype).view(1, -1, 1, 1)
        identity = torch.zeros(5, len(x), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        identity[1] = 1
        for name in ("sigmoid", "hardsigmoid"):
            weight = torch.zeros(len(x), 1, 3, 3, dtype=dtype)
            weight[:, :, 1, 1] = 1
            plan = kernels.make_plan(
                ["depthwise_inference", name], [identity, weight], [0, 1, 1, 1, 1, 1], [0.0], 1,
                [0, -1, -1, 1, -1, -1], [2],
            )  # fmt: skip
            expected = getattr(torch.nn.functional, name)(given)
            torch.testing.assert_close(
                run(plan, given), expected, equal_nan=True, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-7
            )


def test_what_a_plan_has_no_place_for() -> None:
    weight, bn = torch.randn(8, 8, 1, 1), torch.rand(5, 8)
    conv, one = [bn, weight, kernels.pack(None, None, weight)], [0, 1, 0, 0, 0, 0]
    pointwise, pool, gated = "pointwise_inference", "norm_act_forward", "gated_pointwise_inference"
    narrow = torch.randn(4, 8, 1, 1)
    for ops, tensors, settings, inputs, sources, outputs, message in (
        ([pointwise], conv, one, 0, [0, -1, -1], [1], "inputs: expected at least one"),
        ([pointwise], conv, one, 1, [0, -1], [1], "sources: expected three"),
        ([pointwise], conv, one, 1, [1, -1, -1], [1], "input: expected a value that is there"),
        ([pointwise], conv, one, 1, [-1, -1, -1], [1], "input: expected a value that is there"),
        ([pointwise], conv, one, 1, [0, -1, 7], [1], "residual: expected a value that is there"),
        ([pointwise], conv, one, 2, [0, 1, -1], [2], "gate: expected none"),
        ([gated], conv, [0], 1, [0, -1, -1], [1], "gate: expected one"),
        ([pointwise], conv, one, 1, [0, -1, -1], [], "outputs: expected at least one"),
        ([pointwise], conv, one, 1, [0, -1, -1], [2], "outputs: expected a value"),
        ([pointwise], conv, one, 1, [0, -1, -1], [0], "outputs: expected what a step gives"),
        ([pointwise, pool], [*conv, bn], [*one, 0, 1], 1, [0, -1, -1, 1, -1, 0], [2], "residual: expected none"),
        ([pointwise, "sigmoid"], conv, one, 1, [0, -1, -1, 1, -1, 0], [2], "residual: expected none"),
        ([pointwise], [bn[:, :4].contiguous(), narrow, kernels.pack(None, None, narrow)], one, 1, [0, -1, 0], [1],
         "expected a value of 4 channels"),
    ):  # fmt: skip
        slopes = [0.0] * sum(op != "sigmoid" for op in ops)
        with pytest.raises(RuntimeError, match=message):
            kernels.make_plan(ops, tensors, settings, slopes, inputs, sources, outputs)


HANDLE_WRITES = {
    "fill_": lambda h: h.fill_(255),
    "add_": lambda h: h.add_(1),
    "zero_": lambda h: h.zero_(),
    "numpy": lambda h: h.numpy().fill(7),
    "storage": lambda h: h.untyped_storage().fill_(3),
    "random_": lambda h: h.random_(),
    "view": lambda h: h.view(torch.int8).sub_(100),
}


@pytest.mark.parametrize("how", HANDLE_WRITES)
def test_what_is_written_into_a_handle_has_no_effect(how: str) -> None:
    chain = Chain()
    plan = chain.plan()
    HANDLE_WRITES[how](plan)
    assert torch.equal(run(plan, chain.x), chain.expected)


HANDLE_MOVES = {
    "set_": lambda h: h.set_(torch.zeros(4096, dtype=torch.uint8)),
    "set_ nothing": lambda h: h.set_(),
    "data": lambda h: setattr(h, "data", torch.zeros(4096, dtype=torch.uint8)),
    "share_memory_": lambda h: h.share_memory_(),
    "resize_": lambda h: h.resize_(4096),
    "resize_ to nothing": lambda h: h.resize_(0),
    "resize_ of the storage": lambda h: h.untyped_storage().resize_(1 << 20),
    "resize_ of the storage to nothing": lambda h: h.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("how", HANDLE_MOVES)
def test_a_handle_that_is_given_other_memory_is_refused(how: str) -> None:
    chain = Chain()
    plan, other = chain.plan(), chain.plan()
    try:
        HANDLE_MOVES[how](plan)
    except RuntimeError:  # not resizable
        assert torch.equal(run(plan, chain.x), chain.expected)
    else:
        with pytest.raises(RuntimeError, match="plan: expected what make_plan gave"):
            run(plan, chain.x)
    del plan
    gc.collect()
    assert torch.equal(run(other, chain.x), chain.expected)


def test_a_view_of_a_handle_is_one_and_keeps_the_plan() -> None:
    chain = Chain()
    view = chain.plan()[:]
    assert torch.equal(run(view, chain.x), chain.expected)


def test_a_copy_and_other_tensors_are_refused() -> None:
    chain = Chain()
    plan = chain.plan()
    for wrong in (plan.clone(), chain.x, torch.zeros(1, dtype=torch.uint8), torch.empty(0), plan[1:]):
        with pytest.raises(RuntimeError, match="plan: expected what make_plan gave"):
            run(wrong, chain.x)


TENSOR_CHANGES = {
    "fill_": lambda t: t.fill_(1),
    "zero_": lambda t: t.zero_(),
    "set_": lambda t: t.set_(torch.zeros(1, dtype=t.dtype)),
    "set_ nothing": lambda t: t.set_(),
    "resize_ smaller": lambda t: t.resize_(1),
    "resize_ larger": lambda t: t.resize_(1 << 20),
    "transpose": lambda t: t.t_() if t.ndim == 2 else t.unsqueeze_(0),
    "data": lambda t: setattr(t, "data", torch.zeros(3, dtype=t.dtype)),
    "storage": lambda t: t.untyped_storage().resize_(0),
    "storage larger": lambda t: t.untyped_storage().resize_(1 << 22),
}


@pytest.mark.parametrize("how", TENSOR_CHANGES)
def test_changes_of_the_tensors_have_no_effect(how: str) -> None:
    chain = Chain()
    plan = chain.plan()
    for tensor in chain.tensors:
        TENSOR_CHANGES[how](tensor)
        rubbish = [torch.full((1 << 12,), 7, dtype=torch.uint8) for _ in range(20)]  # where it lay
        assert torch.equal(run(plan, chain.x), chain.expected)
        del rubbish


def test_tensors_that_are_gone_have_no_effect() -> None:
    chain = Chain()
    plan, x, expected = chain.plan(), chain.x, chain.expected
    del chain
    gc.collect()
    assert torch.equal(run(plan, x), expected)


def test_the_input_is_looked_at_in_each_run() -> None:
    chain = Chain()
    plan = chain.plan()
    x = chain.x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    with pytest.raises(RuntimeError, match="inputs: expected a storage of at least"):
        run(plan, x)
    assert torch.equal(run(plan, chain.x), chain.expected)


@pytest.mark.parametrize("index", range(12))
def test_a_tensor_without_its_memory_makes_no_plan(index: int) -> None:
    chain = Chain()
    chain.tensors[index].untyped_storage().resize_(2)
    with pytest.raises(RuntimeError, match="expected a storage of at least"):
        chain.plan()


def test_a_handle_lost_while_the_plan_runs() -> None:
    """Another thread takes the handle's memory away: the run that has begun ends well, the next is refused."""
    chain = Chain()
    plan, stop = chain.plan(), threading.Event()
    results: list[Tensor] = []

    def keep_running() -> None:
        while not stop.is_set():
            try:
                results.append(run(plan, chain.x))
            except RuntimeError as error:
                assert "plan: expected" in str(error)
                return

    threads = [threading.Thread(target=keep_running) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(results) < 20:
        pass
    plan.set_()
    for thread in threads:
        thread.join(60)
    stop.set()
    assert all(torch.equal(result, chain.expected) for result in results)


def test_handles_may_outlive_everything() -> None:
    code = (
        "import torch; from mobilenet_ext.backends.cpu import kernels;"
        "tensors, settings = [torch.ones(5, 8), torch.randn(8, 3, 3, 3)], [1, 2, 1, 1, 1, 1];"
        "keep = kernels.make_plan(['dense_inference'], tensors, settings, [0.0], 1, [0, -1, -1], [1]);"
        "import builtins; builtins.keep = keep"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
