"""Other people's networks, fused and frozen: the same numbers, and nearly all that their convolutions write is written
by the kernels."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenet_ext as mx

timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

# The share of what all convolutions write that the kernels write at 224x224, at least.
NETWORKS = {
    "torchvision:mobilenet_v2": 1.0,
    "torchvision:mobilenet_v3_small": 0.99,
    "torchvision:mnasnet0_5": 1.0,
    "torchvision:efficientnet_b0": 0.99,
    "torchvision:shufflenet_v2_x0_5": 1.0,
    "timm:mobilenetv1_100": 1.0,
    "timm:mobilenetv2_050": 1.0,
    "timm:mobilenetv3_small_050": 0.99,
    "timm:efficientnet_lite0": 1.0,
    "timm:mobilenetv4_conv_small": 1.0,
    "timm:ghostnet_050": 0.99,
    "timm:lcnet_050": 0.99,
}
MORE = {
    "torchvision:mobilenet_v3_large": 0.99,
    "torchvision:mnasnet1_0": 1.0,
    "torchvision:shufflenet_v2_x1_0": 1.0,
    "timm:mobilenetv1_100h": 1.0,
    "timm:mobilenetv2_120d": 1.0,
    "timm:mobilenetv3_large_100": 0.99,
    "timm:mobilenetv4_conv_medium": 1.0,
    "timm:mobilenetv4_conv_large": 1.0,
    "timm:mobilenetv4_hybrid_medium": 0.92,
    "timm:mnasnet_100": 1.0,
    "timm:semnasnet_100": 0.99,
    "timm:spnasnet_100": 1.0,
    "timm:fbnetc_100": 1.0,
    "timm:fbnetv3_b": 0.99,
    "timm:efficientnet_b0": 0.99,
    "timm:tinynet_a": 0.99,
    "timm:hardcorenas_a": 0.99,
    "timm:ghostnetv2_100": 0.85,
    "timm:rexnet_100": 0.99,
    "timm:rexnetr_100": 0.99,
    "timm:tf_efficientnet_lite0": 1.0,
    "timm:tf_mobilenetv3_large_100": 0.99,
    "timm:repghostnet_100": 0.99,
    "timm:mobileone_s0": 0.86,
    "timm:xception41": 0.96,
}
CASES = [*NETWORKS.items(), *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE.items())]


class Written(TorchDispatchMode):
    """Counts the elements that convolutions write: those of the kernels, and PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "aten" and name.startswith("convolution"):
            self.others += out.numel()
        elif namespace == "mobilenet_ext" and name.rpartition("_")[2] in ("forward", "inference"):
            output = out[0] if isinstance(out, tuple) else out
            if name == "block_inference":  # of two convolutions, the first of which writes as many pixels
                self.kernels += output.numel() + output.numel() // output.shape[1] * args[0].shape[1]
            elif not name.startswith("norm_act"):
                self.kernels += output.numel()
        return out

    @property
    def share(self) -> float:
        return self.kernels / (self.kernels + self.others)


def make(name: str) -> nn.Module:
    library, _, name = name.partition(":")
    network = timm.create_model(name) if library == "timm" else getattr(torchvision.models, name)()
    return network.double()


def first_output(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(("name", "share"), CASES)
def test_network(name: str, share: float) -> None:
    plain = make(name)
    fused, keys = copy.deepcopy(plain), list(plain.state_dict())
    assert list(mx.fuse(fused).state_dict()) == keys
    for training in (True, False):
        with Written() as written:
            mx.fuse(copy.deepcopy(plain).to("meta")).train(training)(
                torch.empty(2, 3, 224, 224, device="meta").double()
            )
        assert written.share >= share

    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outputs = []
    for network in (fused, plain):
        torch.manual_seed(1)  # dropout
        outputs.append(first_output(network(x)))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-9)
    largest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None).item()
    for (parameter, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), parameter
        if theirs.grad is not None:  # some are 0, but for rounding
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9 * largest, msg=parameter)
    for (buffer, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=buffer)

    plain.eval(), fused.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # one would say that nothing was folded
        expected = plain(x)
        for network in (fused, mx.freeze(plain), mx.freeze(fused)):
            assert mx.fusion_report(network).fused == mx.fusion_report(fused).fused > 0
            torch.testing.assert_close(network(x), expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:mobilenetv3_small_050"])
def test_float32(name: str) -> None:
    """Within 1e-5 of float64, in eval mode and frozen."""
    network = make(name)
    network(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    network.eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x)
        network.float()
        for ours in (mx.fuse(copy.deepcopy(network)), mx.freeze(network)):
            error = (ours(x.float()).double() - expected).norm() / expected.norm()
            assert error < 1e-5
