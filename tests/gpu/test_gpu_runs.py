"""How kernels run on a GPU: the same bits every time, in a CUDA graph, compiled, on streams, on a second device."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import plain
import pytest
import torch
import torch.nn.functional as F
from test_reproducible import assert_same_bits, results
from torch import Tensor, nn

import mobilenet_ext as mx
from benchmarks.peers.torch_peers import capture

BATCH = 8


def network(device: str, width: float = 0.5) -> nn.Module:
    return plain.randomise_(mx.MobileNetV1(10, width)).to(device)


def images(device: str, size: int = 224) -> Tensor:
    return torch.randn(BATCH, 3, size, size).to(device)


def make_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A training step that can be captured: nothing of it stays on the host."""
    labels = torch.arange(BATCH, device=x.device) % 10
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimiser.step()

    return step


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1.0, 0.25])
def test_the_same_bits(backend: str, device: str, width: float, dtype: torch.dtype, training: bool) -> None:
    model, x = network(device, width).to(dtype), images(device).to(dtype)
    first = results(model, x, training)
    for _ in range(3):
        assert_same_bits(first, results(model, x, training))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_captured_training_step(backend: str, device: str, dtype: torch.dtype) -> None:
    """Replayed on new images it does, bit for bit, what the step does without a graph."""
    model, x = network(device), images(device)
    start = copy.deepcopy(model.state_dict())
    graph = capture(make_step(model, x, dtype))
    twin, other = copy.deepcopy(model), torch.empty_like(x)
    twin_step = make_step(twin, other, dtype)
    model.load_state_dict(start), twin.load_state_dict(start)
    for _ in range(3):
        x.normal_()
        other.copy_(x)
        graph.replay()
        twin_step()
        assert_same_bits(list(model.state_dict().values()), list(twin.state_dict().values()))
    assert not torch.equal(start["feature.0.0.weight"], model.feature[0][0].weight)
    assert model.feature[0][1].num_batches_tracked == start["feature.0.1.num_batches_tracked"] + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_captured_inference(backend: str, device: str, batch: int, dtype: torch.dtype) -> None:
    frozen, x = mx.freeze(network(device).to(dtype)), images(device)[:batch].to(dtype)
    outputs: list[Tensor] = []
    with torch.no_grad():
        graph = capture(lambda: outputs.append(frozen(x)))
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert_same_bits([outputs[-1]], [frozen(x)])


def test_compiled_without_a_graph_break(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiler = "inductor" if importlib.util.find_spec("triton") else "aot_eager"
    model, x = network(device), images(device)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    out, expected = compiled(x), twin(x)
    plain.assert_close(out, expected, plain.FORWARD, "output")
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not plain.is_conv_bias(name):
            plain.assert_close(p.grad, q.grad, plain.GRADIENT, f"gradient of {name}")
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        plain.assert_close(a, b, plain.FORWARD, name)
    model.eval(), twin.eval()
    with torch.no_grad():
        plain.assert_close(compiled(x), twin(x), plain.FORWARD, "output in eval")


def test_kernels_run_on_the_current_stream(backend: str, device: str) -> None:
    """The images are written late on a stream of their own: a kernel that runs elsewhere sees the old ones."""
    model, new = network(device), images(device)
    state = copy.deepcopy(model.state_dict())
    expected = results(model, new, True)
    x = torch.zeros_like(new)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles: some 50 ms
        x.copy_(new)
        actual = results(model, x, True)
    torch.cuda.synchronize()
    assert_same_bits(expected, actual)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


def test_several_streams_at_once(backend: str, device: str) -> None:
    models = [network(device) for _ in range(3)]
    xs = [images(device) for _ in models]
    expected = [results(model, x, True) for model, x in zip(models, xs, strict=True)]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    for _ in range(3):
        actual = []
        for stream, model, x in zip(streams, models, xs, strict=True):
            with torch.cuda.stream(stream):
                actual.append(results(model, x, True))
        torch.cuda.synchronize()
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_tensors_on_another_device_than_the_current_one(backend: str, device: str, training: bool) -> None:
    assert torch.cuda.current_device() == 0
    model, x = network(device), images(device)
    expected = results(model, x, training)
    actual = results(copy.deepcopy(model).to("cuda:1"), x.to("cuda:1"), training)
    assert torch.cuda.current_device() == 0
    for a, b in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        plain.assert_close(a.double(), b.double(), plain.TRAINING_FORWARD)


def test_nothing_waits_for_the_gpu(backend: str, device: str) -> None:
    """A training step and an inference, after a first one, raise under PyTorch's check for synchronising calls."""
    model, x = network(device), images(device)
    step, frozen = make_step(model, x, torch.bfloat16), mx.freeze(model)
    step(), frozen(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(), frozen(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
