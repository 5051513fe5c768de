"""Plans of the C++ CPU kernels: nothing that is done to their handle, or to the tensors they were made of, matters."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from mobilenet_ext import backends
from mobilenet_ext.contract import NO_PADDING, Act

kernels = backends.cpu.kernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


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
        return kernels.make_plan(self.ops, self.tensors, self.settings, self.slopes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plan_gives_the_bits_of_its_ops(dtype: torch.dtype) -> None:
    chain = Chain(dtype)
    assert torch.equal(kernels.run_plan(chain.x, chain.plan()), chain.expected)


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
        expected = kernels.pointwise_inference(
            expected, bns[1], Act.RELU, weights[1], 1, [0] * 4, packed[1], residual
        )
    tensors = [t for row in zip(bns, weights, packed, strict=True) for t in row]
    settings = [Act.RELU, *([Act.RELU, 1, 0, 0, 0, 0] if after else [])]
    ops = ["gated_pointwise_inference", "pointwise_inference"][: 1 + after]
    plan = kernels.make_plan(ops, tensors, settings, [0.0] * len(ops))
    assert torch.equal(kernels.run_plan(x, plan, gate, residual), expected)
    for seams, message in (
        ((None, residual), "gate: expected one"),
        ((gate[:1], residual), "gate: expected"),
        ((gate.double() if dtype != torch.float64 else gate.float(), residual), "gate: expected"),
        ((gate, residual[:, :3]), "residual: expected"),
        ((gate, residual.contiguous()), "residual: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.run_plan(x, plan, *seams)


def test_seams_that_a_plan_has_no_place_for() -> None:
    chain = Chain(torch.float32)
    gate, residual = torch.rand(*chain.x.shape[:2], 1, 1), chain.expected.clone()
    with pytest.raises(RuntimeError, match="gate: expected none"):
        kernels.run_plan(chain.x, chain.plan(), gate)
    with pytest.raises(RuntimeError, match="residual: expected none"):  # its last step pools
        kernels.run_plan(chain.x, chain.plan(), None, residual)
    weight, bn = torch.randn(8, 8, 1, 1), torch.rand(5, 8)
    packed = kernels.pack(None, None, weight)
    ops = ["pointwise_inference", "gated_pointwise_inference"]
    with pytest.raises(RuntimeError, match="expected the convolution with a gate as the first"):
        kernels.make_plan(ops, [bn, weight, packed] * 2, [0, 1, 0, 0, 0, 0, 0], [0.0, 0.0])


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
    assert torch.equal(kernels.run_plan(chain.x, plan), chain.expected)


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
        assert torch.equal(kernels.run_plan(chain.x, plan), chain.expected)
    else:
        with pytest.raises(RuntimeError, match="plan: expected what make_plan gave"):
            kernels.run_plan(chain.x, plan)
    del plan
    gc.collect()
    assert torch.equal(kernels.run_plan(chain.x, other), chain.expected)


def test_a_view_of_a_handle_is_one_and_keeps_the_plan() -> None:
    chain = Chain()
    view = chain.plan()[:]
    assert torch.equal(kernels.run_plan(chain.x, view), chain.expected)


def test_a_copy_and_other_tensors_are_refused() -> None:
    chain = Chain()
    plan = chain.plan()
    for wrong in (plan.clone(), chain.x, torch.zeros(1, dtype=torch.uint8), torch.empty(0), plan[1:]):
        with pytest.raises(RuntimeError, match="plan: expected what make_plan gave"):
            kernels.run_plan(chain.x, wrong)


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
        assert torch.equal(kernels.run_plan(chain.x, plan), chain.expected)
        del rubbish


def test_tensors_that_are_gone_have_no_effect() -> None:
    chain = Chain()
    plan, x, expected = chain.plan(), chain.x, chain.expected
    del chain
    gc.collect()
    assert torch.equal(kernels.run_plan(x, plan), expected)


def test_the_input_is_looked_at_in_each_run() -> None:
    chain = Chain()
    plan = chain.plan()
    x = chain.x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    with pytest.raises(RuntimeError, match="x: expected a storage of at least"):
        kernels.run_plan(x, plan)
    assert torch.equal(kernels.run_plan(chain.x, plan), chain.expected)


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

    def run() -> None:
        while not stop.is_set():
            try:
                results.append(kernels.run_plan(chain.x, plan))
            except RuntimeError as error:
                assert "plan: expected" in str(error)
                return

    threads = [threading.Thread(target=run) for _ in range(3)]
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
        "keep = kernels.make_plan(['dense_inference'], tensors, settings, [0.0]);"
        "import builtins; builtins.keep = keep"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
