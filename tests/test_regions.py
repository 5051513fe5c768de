"""Frozen networks as plans of several chains: as the plain networks, whatever is changed or asked in between."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from fuse_networks import assert_close, unit
from plain import randomise_
from torch import Tensor, nn
from torch.profiler import profile

import mobilenet_ext as mx
from mobilenet_ext import backends, fusing
from mobilenet_ext.regions import Region


class Block(nn.Module):
    """An inverted residual with squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = unit(8, 16, act=nn.SiLU), unit(16, 16, 3, act=nn.SiLU)
        self.pool, self.reduce, self.widen = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = unit(16, 8, act=None)

    def gate(self, x: Tensor) -> Tensor:
        return self.widen(self.reduce(self.pool(x)).relu()).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.gate(y))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = unit(3, 8, 3, act=nn.ReLU6)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = unit(8, 12)
        self.pool, self.dropout, self.linear = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2), nn.Linear(12, 5)
        self.hidden = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.last(self.blocks(self.first(x))))
        x = nn.functional.hardswish(self.hidden(torch.flatten(x, 1)))
        return self.linear(self.dropout(x))


class Taps(Network):
    """Gives what lies between its blocks too, and a gate's input."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.first(x)
        b = self.blocks[0](a)
        return {"b": b, "c": self.blocks[1](b), "mean": self.pool(a), "a": a}


class TwoBranches(Network):
    """Sums of chains that both begin at one value, one of them after the other is done."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.blocks[0](a)
        return self.last(self.blocks[1](a) + self.last[0](b)[:, :8])


class BroadcastResidual(Network):
    """One image is added to all of a batch, between two chains."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        block = self.blocks[0]
        mean = a.mean(0, keepdim=True)
        return self.last(block.project(block.depthwise(block.expand(a))) + mean)


def network(kind: type[nn.Module] = Network) -> nn.Module:
    torch.manual_seed(5)
    return randomise_(kind()).double().eval()


def images(n: int = 2, h: int = 9, w: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, h, w, dtype=torch.float64).to(dtype)


def by_name(out: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"out": out} if isinstance(out, Tensor) else out


def plans_in(run: Callable[[], object]) -> int:
    with profile() as events:
        run()
    return sum(event.count for event in events.key_averages() if event.key == "mobilenet_ext_cpu::run_plan")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_one_call_for_the_network() -> None:
    plain = network()
    frozen = mx.freeze(plain)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for n, h, w in ((2, 9, 7), (1, 9, 7), (3, 4, 4), (1, 1, 1), (2, 9, 7)):
            x = images(n, h, w).contiguous(memory_format=memory_format)
            assert_close(frozen(x), plain(x))
            assert plans_in(lambda x=x: frozen(x)) == 1


@pytest.mark.parametrize("kind", [Taps, TwoBranches, BroadcastResidual])
def test_several_outputs_and_inputs(kind: type[nn.Module]) -> None:
    plain = network(kind)
    frozen = mx.freeze(plain)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images().contiguous(memory_format=memory_format)
        for batch in (x, x[:1]):
            ours, theirs = by_name(frozen(batch)), by_name(plain(batch))
            assert ours.keys() == theirs.keys()
            for name in theirs:
                assert_close(ours[name], theirs[name])
                assert ours[name].stride() == theirs[name].stride()
    assert plans_in(lambda: frozen(x)) < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    plain, x = network(), images(4, 16, 16)
    expected = plain(x)
    frozen = mx.freeze(plain).to(dtype)
    plain = plain.to(dtype)
    error, allowed = ((out.double() - expected).norm() for out in (frozen(x.to(dtype)), plain(x.to(dtype))))
    assert error <= max(1.5 * allowed, 1e-5 * expected.norm())
    assert plans_in(lambda: frozen(x.to(dtype))) == 1


def test_autocast() -> None:
    plain = network().float()
    frozen, x = mx.freeze(plain), images(4, 16, 16, torch.float32)
    expected = copy.deepcopy(plain).double()(x.double())
    assert_close(frozen(x).double(), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = frozen(x), plain(x)
        assert plans_in(lambda: frozen(x)) == 1
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours.double() - expected).norm() <= 1.5 * (theirs.double() - expected).norm()
    assert_close(frozen(x).double(), expected, 1e-5)


def identity(features: int) -> nn.Linear:
    linear = nn.Linear(features, features, bias=False, dtype=torch.float64)
    nn.init.eye_(linear.weight)
    return linear


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight": lambda net: net.blocks[1].project[0].weight.mul_(2),
    "a running mean": lambda net: net.first[1].running_mean.add_(1),
    "the gate's bias": lambda net: net.blocks[0].widen.bias.add_(1),
    "the linear layer": lambda net: net.linear.weight.neg_(),
    "the one before": lambda net: net.hidden.bias.add_(1),
    "another linear layer": lambda net: setattr(net, "hidden", identity(12)),
    "a dropout that drops": lambda net: net.dropout.register_forward_hook(lambda module, args, out: 2 * out),
    "another parameter": lambda net: setattr(net.last[0], "weight", nn.Parameter(-net.last[0].weight)),
    "another module": lambda net: net.blocks.__setitem__(0, nn.Identity()),
    "another activation": lambda net: net.first.__setitem__(2, nn.ReLU()),
    "another gate": lambda net: setattr(type(net.blocks[0]), "gate", lambda self, x: x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "gate", Block.gate)  # put back afterwards
    plain, x = network(), images()
    frozen = mx.freeze(plain)
    frozen(x)
    if change == "another gate":  # what a class's methods do is looked at when a network is frozen
        CHANGES[change](plain)
        frozen = mx.freeze(plain)
    else:
        CHANGES[change](frozen), CHANGES[change](plain)
    assert_close(frozen(x), plain.eval()(x))


def test_hooks_and_gradients() -> None:
    plain, x = network(), images()
    frozen = mx.freeze(plain)
    frozen(x)
    for path in ("blocks.0.pool", "blocks.1", "last.0"):
        seen = []
        for net in (frozen, plain):
            handle = net.get_submodule(path).register_forward_hook(lambda _, args, out, s=seen: s.append(out))
            net(x)
            handle.remove()
        assert_close(*seen)
    with torch.enable_grad():
        grads = []
        for net in (frozen, plain):
            given = x.clone().requires_grad_()
            net(given).square().sum().backward()
            grads.append(given.grad)
    assert_close(*grads)
    assert plans_in(lambda: frozen(x)) == 1


def test_copies_and_backends() -> None:
    plain, x = network(), images()
    frozen = mx.freeze(plain)
    frozen(x)
    for twin in (copy.deepcopy(frozen), mx.freeze(frozen), frozen.double()):
        assert_close(twin(x), plain(x))
    with backends.use("reference"):
        assert plans_in(lambda: frozen(x)) == 0
        assert_close(frozen(x), plain(x))
    assert plans_in(lambda: frozen(x)) == 1


def test_a_pickle_of_a_library_network() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    plain, x = randomise_(torchvision.models.mobilenet_v3_small()).double().eval(), images(2, 40, 40)
    frozen = pickle.loads(pickle.dumps(mx.freeze(plain)))
    assert_close(frozen(x), plain(x), 1e-8)


def test_threads() -> None:
    plain, xs = network(), [images(n + 1, 9 + n, 9) for n in range(4)]
    frozen = mx.freeze(plain)
    expected = [plain(x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(frozen(xs[i]), expected[i], rtol=1e-9, atol=1e-9):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_inputs_are_the_plain_modules_errors() -> None:
    plain = network()
    frozen = mx.freeze(plain)
    for x in (images()[:, :2], images().float(), torch.randn(3, 9, dtype=torch.float64), images()[:, :, :0]):
        errors = []
        for net in (frozen, plain):
            with pytest.raises(Exception) as caught:
                net(x)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
    assert frozen(images(0)).shape == (0, 5)


def test_only_the_weights_of_one_plan_are_kept() -> None:
    """Those of the chains, which a region of chains needs no more, are let go."""
    frozen = mx.freeze(network())
    frozen(images())
    called = vars(fusing.plans_of(frozen).of(frozen).run.__self__).values()
    (region,) = [each for each in called if isinstance(each, Region)]
    assert all(chain.prepared is None for chain in region.chains)


def test_an_activation_inside_of_a_norm_is_replaced() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    first, second = (timm.layers.BatchNormAct2d(8, act_layer=nn.ReLU6) for _ in range(2))
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), first, nn.Conv2d(8, 8, 3, padding=1, groups=8), second)
    plain, x = randomise_(plain).double().eval(), 10 * images()
    frozen = mx.freeze(plain)
    assert_close(frozen(x), plain(x))
    for net in (frozen, plain):
        net[1].act = nn.SiLU()
    assert_close(frozen(x), plain(x))
