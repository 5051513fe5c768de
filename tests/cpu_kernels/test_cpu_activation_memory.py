"""The memory of large activations is kept for the next one, and given back when nobody takes it."""

from __future__ import annotations

import io
import threading

import torch
from cpu_ops import (
    activation,
    ops,
    random_bn,
)

from mobilenet_ext.contract import Act

LARGE = (8, 64, 64, 64)  # 8 MiB of float32


def normalised(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    u = activation(*shape, dtype=dtype)
    return ops.norm_act_forward(u, random_bn(shape[1], dtype), Act.LINEAR, False)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_block_serves_the_next_tensor_of_its_size() -> None:
    first = normalised(LARGE)
    address = first.data_ptr()
    second = normalised(LARGE)
    assert second.data_ptr() != address
    view = first[2:]
    del first
    third = normalised(LARGE)
    assert third.data_ptr() != address, "a view still holds the block"
    del view
    assert normalised(LARGE).data_ptr() == address
    del second, third
    smaller = normalised((4, 64, 64, 64))
    assert smaller.data_ptr() != address, "half a block would be wasted"


def test_the_tensor_is_an_ordinary_one() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        y = normalised(LARGE, dtype)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
        assert torch.equal(y.clone(), y)
    y.add_(1)
    torch.save(y, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), y)


def test_blocks_that_nobody_takes_go_back_to_the_system() -> None:
    large = [normalised((32, 64, 64, 64)) for _ in range(8)]  # 256 MiB
    del large
    with_blocks = resident()
    other = activation(*LARGE, dtype=torch.float32)
    bn = random_bn(64, torch.float32)
    for _ in range(600):
        ops.norm_act_forward(other, bn, Act.LINEAR, False)
    assert with_blocks - resident() > 200 * 2**20


def test_threads_share_the_blocks() -> None:
    u, bn = activation(*LARGE, dtype=torch.float32), random_bn(64, torch.float32)
    expected = ops.norm_act_forward(u, bn, Act.RELU, False)
    wrong = []

    def work() -> None:
        kept = []
        for i in range(40):
            kept.append(ops.norm_act_forward(u, bn, Act.RELU, False))
            if i % 3 == 2:
                wrong.extend(1 for y in kept if not torch.equal(y, expected))
                kept.clear()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
