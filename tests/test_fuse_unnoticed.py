"""``fuse`` and ``freeze`` look at forwards while others are at work in the process: profilers, debuggers, threads."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import gc
import os
import pickle
import pstats
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from behaviour import fused_units
from fuse_networks import Network, a_parameter_of_its_own, assert_close, leaves_something, tries, unit
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import fused_forward, fusing


def after_one_another(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * self.scale


def runs_fused(network: nn.Module) -> bool:
    """In the present mode, without a look at it."""
    return sum(len(chain.units) for chain in fusing.plans_of(network).of(network).chains) == 2


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 6, 6, dtype=torch.float64)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("calls", [after_one_another, a_parameter_of_its_own, leaves_something, tries])
@pytest.mark.parametrize("make", [mx.fuse, mx.freeze])
def test_freed_with_its_last_name(calls: Callable, make: Callable, x: Tensor, without_collector: None) -> None:
    network = make(Network(calls))
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                network.train(training)(x)
    print(mx.fusion_report(network))
    others = [copy.deepcopy(network), pickle.loads(pickle.dumps(copy.deepcopy(network.a))), mx.plain(network)]
    for other in others:
        other(x)
    everything = [network, *others]
    watched = [weakref.ref(m) for each in everything for m in each.modules()]
    watched += [weakref.ref(t) for each in everything for t in each.state_dict(keep_vars=True).values()]
    del network, others, other, everything
    assert not [ref() for ref in watched if ref() is not None]


def test_a_whole_network_is_freed_with_its_last_name(without_collector: None) -> None:
    torchvision = pytest.importorskip("torchvision")
    for make in (mx.fuse, mx.freeze):
        network = make(torchvision.models.mobilenet_v3_small())
        for training in (True, False):
            network.train(training)(torch.randn(2, 3, 32, 32)).sum()
        watched = [weakref.ref(m) for m in network.modules()]
        del network
        assert not [ref() for ref in watched if ref() is not None]


@pytest.mark.parametrize("training", [True, False])
def test_tensors_that_were_replaced_are_freed(training: bool, x: Tensor, without_collector: None) -> None:
    network = mx.fuse(Network(after_one_another))
    for mode in (True, False):
        network.train(mode)(x)
    watched = [weakref.ref(t) for t in network.parameters()]
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    network.train(training)(x)
    assert not [ref() for ref in watched if ref() is not None]
    assert fused_units(network, x) == fused_units(network.train(not training), x) == 2


class Watching:
    """A profiler or a debugger of this thread."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frame: object, event: str, _: object) -> None:
        self.calls += 1


def test_a_profiler_written_in_c_goes_on(x: Tensor) -> None:
    network, profiler = mx.fuse(Network(after_one_another)), cProfile.Profile()
    profiler.enable()
    try:
        network(x)
        assert_close(network(x), network(x))
        "after".upper()
    finally:
        profiler.disable()
    assert any("upper" in name for *_, name in pstats.Stats(profiler).stats)
    assert fused_units(network, x) == 2


def test_the_profiler_of_pytorch_goes_on(x: Tensor) -> None:
    network = mx.fuse(Network(after_one_another))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True) as profiler:
        network(x)
        torch.ones(()).neg()
    assert any(event.name == "aten::neg" for event in profiler.events())
    assert fused_units(network, x) == 2


@pytest.mark.parametrize("hooks", [("profile",), ("trace",), ("profile", "trace")], ids="-".join)
@pytest.mark.parametrize("make", [mx.fuse, mx.freeze])
def test_watched_by_python_code(make: Callable, hooks: tuple[str, ...], x: Tensor) -> None:
    """Both at once leave no way to follow a forward: it runs as it is, and is looked at when one of them is gone."""
    plain = Network(after_one_another).eval()
    watching, network = Watching(), copy.deepcopy(plain)
    before = {hook: getattr(sys, f"get{hook}")() for hook in hooks}
    for hook in hooks:
        getattr(sys, f"set{hook}")(watching)
    try:
        network = make(network)
        out = network(x)
        assert all(getattr(sys, f"get{hook}")() is watching for hook in hooks)
        seen = watching.calls
        assert_close(network(x), out)
    finally:
        for hook in hooks:
            getattr(sys, f"set{hook}")(before[hook])
    assert watching.calls > seen
    assert_close(out, plain(x))
    network(x)
    assert runs_fused(network)


MODES = [
    (training, grad, inference, dtype)
    for training in (True, False)
    for grad, inference in ((True, False), (False, False), (False, True))
    for dtype in (None, torch.bfloat16, torch.float16)
]


@contextlib.contextmanager
def mode_of(training: bool, grad: bool, inference: bool, dtype: torch.dtype | None, network: nn.Module):
    network.train(training)
    with torch.set_grad_enabled(grad), torch.inference_mode(inference):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            yield


@pytest.mark.parametrize("make", [mx.fuse, mx.freeze])
def test_any_number_of_modes_in_turn(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is looked at once."""
    network, x = make(Network(after_one_another).float()), torch.randn(2, 8, 6, 6)
    for mode in MODES:
        with mode_of(*mode, network):
            network(x)
    monkeypatch.setattr(fused_forward, "ForwardGraph", lambda module: pytest.fail("looked at again"))
    for mode in 2 * MODES:
        with mode_of(*mode, network):
            network(x)
            assert runs_fused(network), mode


def autocast_dtype(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (2 if torch.get_autocast_dtype("cpu") is torch.float16 else 1)


def test_the_dtype_of_autocast_is_part_of_the_mode() -> None:
    plain = Network(autocast_dtype).float().eval()
    fused, x = mx.fuse(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with mode_of(False, False, False, dtype, fused):
            assert_close(fused(x), plain(x), 0.05)


def test_random_numbers_of_other_threads(x: Tensor) -> None:
    """They are drawn once each, and are no reason not to fuse."""
    drawn: list[float] = []
    done = threading.Event()

    def draw() -> None:
        while not done.is_set() and len(drawn) < 10**6:
            drawn.append(random.random())
            np.random.rand()

    random.seed(3)
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        networks = [mx.fuse(Network(after_one_another)) for _ in range(20)]
        for network in networks:
            network(x)
    finally:
        done.set()
        thread.join()
    random.seed(3)
    assert drawn == [random.random() for _ in drawn]
    assert all(fused_units(network, x) == 2 for network in networks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_process_of_one_that_looks_at_a_forward_collects_garbage(x: Tensor) -> None:
    looking, forked = threading.Event(), threading.Event()

    def waits(self: Network, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            looking.set(), forked.wait(10)
        return self.a(x)

    globals().update(looking=looking, forked=forked)
    network = mx.fuse(Network(waits))
    thread = threading.Thread(target=network, args=(x,))
    thread.start()
    try:
        assert looking.wait(10)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() and sys.gettrace() is None else 1)
    finally:
        forked.set()
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_sequences_that_were_sliced_are_freed(x: Tensor, without_collector: None) -> None:
    network = mx.fuse(nn.Sequential(unit(8, 8, 3), unit(8, 8)).double())
    part = network[:1]
    part(x)
    watched = weakref.ref(part)
    del part
    assert watched() is None


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_a_signal_handler_runs_while_a_forward_is_looked_at() -> None:
    handled: list[int] = []

    def handle(number: int, frame: object) -> None:
        with contextlib.suppress(ValueError):
            handled.append(number)

    x = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        for i in range(10):
            network = mx.fuse(nn.Sequential(*(Network(after_one_another) for _ in range(10))))
            signal.setitimer(signal.ITIMER_REAL, 0.001 * (i + 1))
            network(x)
            deadline = time.monotonic() + 5
            while len(handled) == i and time.monotonic() < deadline:  # the alarm comes after the forward
                time.sleep(0.001)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(handled) == 10
    assert fused_units(network, x) == 20


class Held:
    """Something with a callback for its end."""


def lets_go(self: Network, x: Tensor) -> Tensor:
    FREED.append(weakref.ref(Held(), freed))
    return self.b(self.a(x))


FREED: list[object] = []


def freed(reference: object) -> None:
    try:
        FREED.append(reference)
    finally:
        pass


def test_a_callback_runs_while_a_forward_is_looked_at(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    FREED.clear()
    network = mx.fuse(Network(lets_go))
    network(x)
    assert not capsys.readouterr().err
    assert fused_units(network, x) == 2
