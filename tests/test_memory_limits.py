"""Memory that is kept for later calls makes room where there is little, and goes when nobody takes it."""

from __future__ import annotations

from interposer import run

SETUP = """
import gc, os, resource, torch
import mobilenet_ext as mx
from interposer import attach

torch.set_num_threads(2)
torch.set_grad_enabled(False)
ops = torch.ops.mobilenet_ext_cpu
MB = 2**20


def used(field):
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE") // MB


def address_space():
    return used(0)


def resident():
    return used(1)


def limit_to(more):
    "Of address space, in MiB beyond what is used now."
    limit = (address_space() + more) * MB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def nhwc(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


weight, bn = nhwc(64, 1, 1, 1).contiguous(), torch.rand(5, 64)


def output(megabytes):
    "An activation of this size, made from one of a 64th of it."
    return ops.pointwise_inference(nhwc(1, 1, 64, megabytes * MB // (64 * 64 * 4)), bn, 1, weight, 1, 0)


output(1)
"""


def test_outputs_one_at_a_time_under_a_limit() -> None:
    code = """
limit_to(1000)
sizes = [300, 200, 260, 160, 128, 230, 700, 20, 650, 400]
print(all(output(size).nbytes == size * MB for size in sizes))
"""
    assert run(SETUP + code).strip() == "True"


def test_outputs_of_random_sizes_under_a_limit() -> None:
    code = """
import random
random.seed(0)
limit_to(1000)
held = []
for _ in range(60):
    held.append(output(random.randrange(1, 150)))
    if len(held) > 4:
        del held[random.randrange(len(held))]
print(len(held))
"""
    assert run(SETUP + code).strip() == "4"


def test_a_network_trains_with_batches_of_many_sizes_under_a_limit() -> None:
    """And the numbers are those without one."""
    code = """
torch.set_grad_enabled(True)
network = mx.MobileNetV1(10, 0.5)
batches = [nhwc(size, 3, 128, 128) for size in (24, 9, 17, 24, 5, 20, 13, 23)]

def losses():
    torch.manual_seed(0)
    values = []
    for batch in batches:
        network.zero_grad()
        loss = network(batch).square().sum()
        loss.backward()
        values.append(loss.item())
    return values

losses()
expected = losses()
mx.backends.empty_cache()
gc.collect()
limit_to(400)
print(losses() == expected)
"""
    assert run(SETUP + code).strip() == "True"


def test_a_frozen_network_under_a_limit() -> None:
    code = """
frozen = mx.freeze(mx.MobileNetV1(10, 0.5).eval())
images = [nhwc(n, 3, 224, 224) for n in (32, 20, 7, 28, 12, 31, 3, 24)]
expected = [frozen(x) for x in images]
mx.backends.empty_cache()
limit_to(260)
print(all(torch.equal(frozen(x), y) for x, y in zip(images, expected)))
"""
    assert run(SETUP + code).strip() == "True"


def test_a_workspace_takes_the_room_of_idle_memory() -> None:
    code = """
x, w = nhwc(1, 1024, 3, 3), torch.randn(1024, 1024, 3, 3)
expected = ops.dense_inference(x, None, 0, w, 1, 1)
mx.backends.empty_cache()
limit_to(450)
output(420)  # MiB, idle from here on
print(torch.equal(ops.dense_inference(x, None, 0, w, 1, 1), expected))
"""
    assert run(SETUP + code).strip() == "True"


def test_a_weight_gradient_takes_the_room_of_idle_memory() -> None:
    code = """
h = u = nhwc(1, 6144, 2, 2)
w = torch.randn(6144, 6144, 1, 1)
gradient = lambda: ops.pointwise_backward(h, None, None, u, None, 0, False, w, 1, 0, False, True)[1]  # 144 MiB
expected = gradient()
mx.backends.empty_cache()
limit_to(600)
output(500)
print(torch.equal(gradient(), expected))
"""
    assert run(SETUP + code).strip() == "True"


def test_what_does_not_fit_is_an_error_and_the_process_goes_on() -> None:
    code = """
limit_to(500)
kept = output(200)
try:
    output(600)
    print("none")
except RuntimeError as error:
    print("not enough memory" in str(error))
print(output(200).nbytes == kept.nbytes)
"""
    assert run(SETUP + code).split() == ["True", "True"]


def test_idle_memory_is_bounded() -> None:
    """By a multiple of what was ever in use at once, however many sizes there were."""
    code = """
before = address_space()
for size in range(40, 90):
    output(size)
print(address_space() - before)
"""
    assert int(run(SETUP + code)) < 2 * 90 + 30  # the other 30: one input and PyTorch's own


def test_empty_cache() -> None:
    code = """
kept = output(20)
copy = kept.clone()
before = address_space(), resident()
outputs = [output(50) for _ in range(6)]
outputs.clear()
idle = address_space() - before[0], resident() - before[1]
mx.backends.empty_cache()
left = address_space() - before[0], resident() - before[1]
print(min(idle) > 250, max(left) < 30, torch.equal(kept, copy), mx.backends.empty_cache())
"""
    assert run(SETUP + code).split() == ["True", "True", "True", "None"]


def test_empty_cache_frees_workspaces() -> None:
    code = """
x, w = nhwc(1, 1024, 3, 3), torch.randn(1024, 1024, 3, 3)
before = resident()
expected = ops.dense_inference(x, None, 0, w, 1, 1)
with_workspace = resident() - before
mx.backends.empty_cache()
without = resident() - before
print(with_workspace > 60, without < 10, torch.equal(ops.dense_inference(x, None, 0, w, 1, 1), expected))
"""
    assert run(SETUP + code).split() == ["True", "True", "True"]


def test_memory_goes_back_after_a_minute() -> None:
    """At the next call, whatever its size; what is used each step stays for longer steps than usual."""
    code = """
interposer = attach()
outputs = [output(50) for _ in range(6)]
outputs.clear()
idle = address_space()
interposer.interposer_clock(45)
output(1)
early = idle - address_space()
interposer.interposer_clock(70)
output(1)
print(early < 30, idle - address_space() > 250)
"""
    assert run(SETUP + code).split() == ["True", "True"]


def test_steps_of_one_size_ask_the_system_for_nothing() -> None:
    """What is kept is enough for a training step, though it needs more blocks than it uses at once."""
    code = """
torch.set_grad_enabled(True)
interposer = attach()
network, images = mx.MobileNetV1(10, 0.5), nhwc(8, 3, 160, 160)

def step():
    network(images).square().mean().backward()
    calls.append(interposer.interposer_calls())

calls = []
for _ in range(8):
    step()
print(calls[0] > 0, calls[-1] - calls[2])
"""
    assert run(SETUP + code).split() == ["True", "0"]
