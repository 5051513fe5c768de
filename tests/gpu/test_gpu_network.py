"""The whole network at 224x224 on a GPU: against float64, and training steps under autocast with a gradient scaler."""

from __future__ import annotations

import copy

import plain
import pytest
import torch
import torch.nn.functional as F
from behaviour import Plain
from plain import FORWARD, TRAINING_FORWARD
from test_network import backward, check_gradients, check_running_statistics, forward_with_masks, pair
from torch import nn

import mobilenet_ext as mx

STEPS, OVERFLOWING = 10, 4


@pytest.mark.parametrize("width", plain.WIDTHS)
def test_training(backend: str, device: str, width: float) -> None:
    fused, expected = pair(width, device)
    out, wanted = forward_with_masks(fused, expected, torch.randn(2, 3, 224, 224), device, TRAINING_FORWARD)
    plain.assert_close(out, wanted, TRAINING_FORWARD, "output")
    check_running_statistics(fused, expected)
    backward(out, wanted, torch.randn(out.shape))
    check_gradients(fused, expected)


@pytest.mark.parametrize("width", plain.WIDTHS)
def test_inference(backend: str, device: str, width: float) -> None:
    fused, expected = (module.eval() for module in pair(width, device))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad(), plain.one_thread():
        wanted = expected(x.double())
        plain.assert_close(fused(x.to(device)), wanted, FORWARD, "output")
        plain.assert_close(mx.freeze(fused)(x.to(device)), wanted, FORWARD, "output of the frozen network")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_ten_steps_under_autocast_with_a_scaler(backend: str, device: str, dtype: torch.dtype) -> None:
    """Beside the plain modules, whose state is set to the fused network's before each step. One step overflows: both
    scalers skip it. (A network's 16-bit gradients are chaotic; how good they are is shown unit by unit.)"""
    fused = plain.randomise_(mx.MobileNetV1(10, 0.5)).to(device)
    own = Plain(fused)
    runs = []
    for module in (fused, own.module):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        runs.append((module, optimiser, torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=3)))
    for step in range(STEPS):
        own.module.load_state_dict(fused.state_dict())
        for a, b in zip(runs[0][1:], runs[1][1:], strict=True):
            b.load_state_dict(copy.deepcopy(a.state_dict()))
        x, labels = torch.randn(8, 3, 96, 96).to(device), torch.randint(10, (8,)).to(device)
        losses, scales, changed = [], [], []
        for call, (module, optimiser, scaler) in zip((fused, own), runs, strict=True):
            before = [p.detach().clone() for p in module.parameters()]
            optimiser.zero_grad()
            with torch.autocast(device, dtype):
                loss = F.cross_entropy(call(x), labels)
            # In 16 bits, and in float32, beyond the largest number.
            scaler.scale(loss * 1e38 if step == OVERFLOWING else loss).backward()
            scaler.step(optimiser)
            scaler.update()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
            changed.append([not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)])
        assert losses[0] == pytest.approx(losses[1], rel=5e-2 if dtype == torch.bfloat16 else 1e-2)
        assert scales[0] == scales[1]
        if step == OVERFLOWING:
            assert not any(changed[0]) and not any(changed[1])
        else:
            weights = [p.ndim > 1 for p in fused.parameters()]
            assert all(c for c, weight in zip(changed[0], weights, strict=True) if weight)
            assert all(c for c, weight in zip(changed[1], weights, strict=True) if weight)
    for (name, a), b in zip(fused.named_buffers(), own.module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2, msg=lambda text, name=name: f"{name}: {text}")


def test_ten_steps_in_float32(backend: str, device: str) -> None:
    """Beside the plain modules on the same GPU, from the same state before each step, at the size of ImageNet."""
    fused = plain.randomise_(mx.MobileNetV1(10, 0.25)).to(device)
    own = Plain(fused)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (fused, own.module)]
    for _ in range(STEPS):
        own.module.load_state_dict(fused.state_dict())
        optimisers[1].load_state_dict(copy.deepcopy(optimisers[0].state_dict()))
        x, labels = torch.randn(8, 3, 224, 224).to(device), torch.randint(10, (8,)).to(device)
        losses = []
        for call, optimiser in zip((fused, own), optimisers, strict=True):
            optimiser.zero_grad()
            losses.append(F.cross_entropy(call(x), labels))
            losses[-1].backward()
            optimiser.step()
        plain.assert_close(losses[0], losses[1], TRAINING_FORWARD, "loss")
        for (name, a), b in zip(fused.named_buffers(), own.module.buffers(), strict=True):
            plain.assert_close(a, b, TRAINING_FORWARD, name)
        # Gradients in front of a ReLU with some turned signs are compared in `test_training`; behind all, here.
        ours, theirs = (module.classifier[1].weight.grad for module in (fused, own.module))
        plain.assert_close(ours, theirs, plain.GRADIENT, "gradient of the classifier")


def test_gradients_flow_into_every_parameter(backend: str, device: str) -> None:
    """Zeros, or a layer left out, would pass no comparison above; NaN neither. This one needs no reference."""
    network: nn.Module = mx.MobileNetV1(1000, 1.0).to(device)
    with torch.autocast(device, torch.bfloat16):
        out = network(torch.randn(8, 3, 224, 224, device=device))
    F.cross_entropy(out, torch.randint(1000, (8,), device=device)).backward()
    for name, p in network.named_parameters():
        assert p.grad.isfinite().all(), name
        assert plain.is_conv_bias(name) or p.grad.abs().sum() > 0, name
