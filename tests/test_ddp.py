"""DistributedDataParallel on two gloo processes: the gradients, buffers and weights of the plain network."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import mobilenet_ext as mx

sys.path.insert(0, str(Path(__file__).parent))  # for the spawned processes

from plain import Network, is_conv_bias, randomise_

WORLD = 2


def batches(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(WORLD, 3, 3, 32, 32, dtype=torch.float64, generator=generator)


def networks() -> tuple[mx.MobileNetV1, Network]:
    torch.manual_seed(21)
    plain = randomise_(Network(10, 0.25)).double()
    model = mx.MobileNetV1(10, 0.25).double()
    model.load_state_dict(plain.state_dict())
    return model, plain


def compare(fused: torch.nn.Module, plain: torch.nn.Module) -> None:
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None, name
        if is_conv_bias(name):
            assert not a.grad.any(), name
        else:
            error = ((a.grad - b.grad).norm() / b.grad.norm()).item()
            assert error < 1e-6, f"{name}: {error:.1e}"
    for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def join(rank: int, folder: str, backend: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    mx.backends.set(backend)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )


def work(rank: int, folder: str, backend: str) -> None:
    join(rank, folder, backend)
    for options in ({}, {"static_graph": True, "gradient_as_bucket_view": True}):
        model, plain = networks()
        parallel = DistributedDataParallel(model, **options)
        reference = DistributedDataParallel(copy.deepcopy(plain), **options)
        for step in range(2):
            parallel.zero_grad()
            reference.zero_grad()
            x = batches(step)[rank]
            parallel(x).square().sum().backward()
            reference(x).square().sum().backward()
            compare(parallel.module, reference.module)
            grads = [None] * WORLD
            dist.all_gather_object(grads, model.feature[5][0].weight.grad)
            assert torch.equal(grads[0], grads[1])  # the processes have averaged
        with parallel.no_sync():  # gradients pile up here until the next step outside
            parallel(batches(5)[rank]).sum().backward()
        parallel(batches(6)[rank]).sum().backward()
        assert all(p.grad is not None for p in parallel.parameters())
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    multiprocessing.spawn(work, args=(str(tmp_path), mx.backends.current("cpu")), nprocs=WORLD, join=True)


def train_fused(rank: int, folder: str, backend: str) -> None:
    """Fused before it is wrapped, and after."""
    import timm

    join(rank, folder, backend)
    torch.manual_seed(22)
    plain = timm.create_model("mobilenetv3_small_050", num_classes=10, drop_rate=0.0).double()
    reference = DistributedDataParallel(copy.deepcopy(plain))
    before = DistributedDataParallel(mx.fuse(copy.deepcopy(plain)))
    after = DistributedDataParallel(copy.deepcopy(plain))
    mx.fuse(after)
    for step in range(2):
        for network in (reference, before, after):
            network.zero_grad()
            network(batches(step)[rank]).square().sum().backward()
        for network in (before, after):
            largest = max(p.grad.norm() for p in reference.parameters()).item()
            for (name, a), b in zip(network.named_parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9 * largest, msg=name)
            for a, b in zip(network.buffers(), reference.buffers(), strict=True):
                torch.testing.assert_close(a, b)
    assert mx.fusion_report(before.module).fused == mx.fusion_report(after.module).fused > 30
    dist.destroy_process_group()


def test_a_fused_network(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    multiprocessing.spawn(train_fused, args=(str(tmp_path), mx.backends.current("cpu")), nprocs=WORLD, join=True)


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    return model.to(memory_format=torch.channels_last)


def strides_of_one(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters whose strides along dimensions of size 1 are those of no memory format."""
    for p in model.parameters():
        strides = [7 if size == 1 else stride for size, stride in zip(p.shape, p.stride(), strict=True)]
        p.data = p.data.as_strided(p.shape, strides)
    return model


def train_without_warnings(rank: int, folder: str, backend: str) -> None:
    """DistributedDataParallel warns once a process of gradients whose strides are not their parameters'."""
    warnings.simplefilter("error")
    join(rank, folder, backend)
    for lay_out, frozen in ((channels_last, 0), (strides_of_one, 0), (channels_last, 9)):
        for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
            model, plain = networks()
            for network in (model, plain):
                network.feature[:frozen].requires_grad_(False).eval()
            parallel = DistributedDataParallel(lay_out(model), **options)
            # In this format, because the plain modules cause the warning in the others.
            reference = DistributedDataParallel(channels_last(plain), **options)
            for step in range(2):
                x = batches(step)[rank]
                parallel(x).square().sum().backward()
                reference(x).square().sum().backward()
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
                if p.requires_grad:
                    assert p.grad.stride() == p.stride(), name
                    if not is_conv_bias(name):
                        error = ((p.grad - q.grad).norm() / q.grad.norm()).item()
                        assert error < 1e-6, f"{name}: {error:.1e}"
    dist.destroy_process_group()


def test_no_warning(tmp_path):
    multiprocessing.spawn(
        train_without_warnings, args=(str(tmp_path), mx.backends.current("cpu")), nprocs=WORLD, join=True
    )
