"""Other people's networks on a GPU, fused and frozen: the numbers of the plain network, and a step in a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import FORWARD, relative_error
from torch import Tensor, nn

import mobilenet_ext as mx

timm = pytest.importorskip("timm", reason="timm is not installed")

# ReLU6 and residuals; 5x5, gates and Hardswish; 5x5, gates and SiLU; leaky ReLU is in the tests of the ops.
NETWORKS = ("mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_b0", "mnasnet_small")


def pair(name: str, backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network in float64 on the CPU, its fused twin in float32 on the GPU, and images."""
    torch.manual_seed(5)
    plain = timm.create_model(name, num_classes=10, drop_rate=0.0, drop_path_rate=0.0).double()
    fused = mx.fuse(copy.deepcopy(plain).float().to("cuda", memory_format=torch.channels_last))
    return plain, fused, torch.randn(4, 3, 96, 96, dtype=torch.float64)


def on_gpu(x: Tensor) -> Tensor:
    return x.float().to("cuda", memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NETWORKS)
def test_training(backend: str, name: str) -> None:
    """Errors against float64 beside those of PyTorch's own network in float32."""
    plain, fused, x = pair(name, backend)
    own = copy.deepcopy(plain).float().to("cuda", memory_format=torch.channels_last)
    outputs = []
    for network in (plain, fused, own):
        outputs.append(network(x if network is plain else on_gpu(x)))
        outputs[-1].square().sum().backward()
    largest = max(p.grad.norm() for p in plain.parameters()).item()
    for (key, expected), ours, theirs in zip(
        plain.named_parameters(), fused.parameters(), own.parameters(), strict=True
    ):
        error, reference = ((p.grad.cpu().double() - expected.grad).norm().item() for p in (ours, theirs))
        assert error <= max(3 * reference, 1e-4 * largest), key
    expected, ours, theirs = (out.detach().cpu().double() for out in outputs)
    assert relative_error(ours, expected) <= max(FORWARD, 3 * relative_error(theirs, expected))
    buffers = dict(plain.named_buffers())
    for (key, expected), ours, theirs in zip(buffers.items(), fused.buffers(), own.buffers(), strict=True):
        error, reference = ((b.cpu().double() - expected).norm().item() for b in (ours, theirs))
        # A mean may be nothing but rounding: that is judged by the deviation beside it.
        scale = buffers[key.replace("mean", "var")].sqrt() if key.endswith("mean") else expected.double()
        assert error <= max(1e-4 * scale.norm().item(), 3 * reference), key


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(backend: str, name: str) -> None:
    plain, fused, x = pair(name, backend)
    with torch.no_grad():
        expected = plain.eval()(x)
        for network in (fused.eval(), mx.freeze(fused)):
            assert relative_error(network(on_gpu(x)).cpu().double(), expected) <= FORWARD


def test_a_step_in_a_cuda_graph(backend: str) -> None:
    _, fused, x = pair("mobilenetv3_small_050", backend)
    twin, images = copy.deepcopy(fused), on_gpu(x)

    def step(network: nn.Module) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            out = network(images)
        out.float().square().sum().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(fused)
    torch.cuda.current_stream().wait_stream(stream)
    fused.zero_grad(set_to_none=True)
    fused.load_state_dict(twin.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(fused)
    graph.replay()
    expected = step(twin)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for ours, theirs in zip(fused.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
