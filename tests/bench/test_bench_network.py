"""The benchmarks' account of bytes and operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mobilenet_ext as mx
from benchmarks import network


def gigabytes(pass_: str) -> float:
    return sum(layer.bytes_moved(pass_, 256, 2) for layer in network.layers_of(1.0, 224, pass_)) / 1e9


def test_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits, 224x224, batch 256: 5.2 GB forward, 3.2 GB for inference by blocks; backward 12.0 GB, or 10.4 and 14.2
    with all, or none, of the pointwise convolutions in one pass."""
    assert gigabytes("forward") == pytest.approx(5.2, abs=0.05)
    assert gigabytes("inference") == pytest.approx(3.2, abs=0.05)
    for largest, expected in ((network.ONE_PASS, 12.0), (1024 * 1024, 10.4), (0, 14.2)):
        monkeypatch.setattr(network, "ONE_PASS", largest)
        assert gigabytes("backward") == pytest.approx(expected, abs=0.05)


def test_operations_are_those_that_torch_counts() -> None:
    work = network.Workload("inference", 0.5, 65, 2, "float32", "cpu")
    model = network.Plain(work.model())
    with FlopCounterMode(display=False) as counter:
        model.feature(work.images())
    assert work.operations() == counter.get_total_flops()
    # The gradients of the input and of the weight. (Torch 2.13 counts a depthwise convolution's as a dense one's.)
    with FlopCounterMode(display=False) as stem:
        model.feature[0](work.images())
    training = work._replace(task="training").operations()
    assert training == 3 * counter.get_total_flops() - stem.get_total_flops()


@pytest.mark.parametrize("pass_", ["forward", "inference"])
def test_layers_are_those_of_the_network(pass_: str) -> None:
    convolutions = [unit[0] for unit in mx.MobileNetV1(10, 0.75).feature[:-1]]
    listed = network.layers_of(0.75, 224, pass_)
    if pass_ == "inference":
        assert [layer.out_channels for layer in listed] == [c.out_channels for c in convolutions[::2]]
        return
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [layer[1:4] for layer in listed[:-1]]
    assert listed[-1].size == 7


def test_the_model_is_the_same_for_all_and_healthy() -> None:
    work = network.Workload("inference", 0.25, 64, 4, "float32", "cpu")
    models = [work.model(), work.model()]
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(norm.training for norm in models[0].modules() if isinstance(norm, nn.BatchNorm2d))
    logits = models[0](work.images())
    assert logits.std() > 0.05, "running statistics that fit no image leave nothing to compare"


def test_the_model_of_a_gpu_needs_no_kernel_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(op: str, device_type: str) -> None:
        raise RuntimeError(f"backend 'cuda' runs on cuda tensors, not on {device_type} tensors")

    monkeypatch.setattr(mx.backends, "kernel", kernel)
    network.Workload("training", 0.25, 64, 4, "float32", "cpu").model()
