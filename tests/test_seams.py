"""Where chains of a fused network meet residuals and gates: the kernels take them over, with the plain numbers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_networks import assert_same_step, unit
from plain import randomise_
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenet_ext as mx


class Ops(TorchDispatchMode):
    """Counts the kernel ops, those with a residual, and PyTorch's sums and products of images."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "mobilenet_ext":
            self.counts[name] += 1
            names = [argument.name for argument in func._schema.arguments]
            if "residual" in names and len(args) > (at := names.index("residual")) and args[at] is not None:
                self.counts["residual"] += 1
        elif namespace == "aten" and name.partition(".")[0] in ("add", "add_", "mul", "mul_"):
            self.counts["pytorch"] += args[0].dim() == 4 and max(t.numel() for t in args[:2] if torch.is_tensor(t)) > 99
        return func(*args, **(kwargs or {}))


class Residual(nn.Module):
    def __init__(self, join: Callable[[Residual, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.main = unit(3, 8), nn.Sequential(unit(8, 8, 3), unit(8, 8, act=None))
        self.shortcut = unit(8, 8) if join in (shortcut_last, shortcut_first) else None
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, self.before(x))


def plus(self: Residual, x: Tensor) -> Tensor:
    return self.main(x) + x


def plus_on_the_right(self: Residual, x: Tensor) -> Tensor:
    return x + self.main(x)


def in_place(self: Residual, x: Tensor) -> Tensor:
    out = self.main(x)
    out += x
    return out


def add_method(self: Residual, x: Tensor) -> Tensor:
    return self.main(x).add(x)


def add_in_place(self: Residual, x: Tensor) -> Tensor:
    return self.main(x).add_(x)


def torch_add(self: Residual, x: Tensor) -> Tensor:
    return torch.add(x, self.main(x))


def shortcut_last(self: Residual, x: Tensor) -> Tensor:
    out = self.main(x)
    return out + self.shortcut(x)


def shortcut_first(self: Residual, x: Tensor) -> Tensor:
    out = self.shortcut(x)
    return self.main(x) + out


def and_an_activation(self: Residual, x: Tensor) -> Tensor:
    return F.relu(self.main(x) + x)


FUSED_RESIDUALS = [
    plus, plus_on_the_right, in_place, add_method, add_in_place, torch_add, shortcut_last, shortcut_first,
    and_an_activation,
]  # fmt: skip


def into_the_shortcut(self: Residual, x: Tensor) -> Tensor:
    shortcut = x.clone()
    shortcut += self.main(x)
    return shortcut * 2


def the_residual_changes(self: Residual, x: Tensor) -> Tensor:
    shortcut = x.clone()
    out = self.main(x)
    shortcut.mul_(3)
    return out + shortcut


def twice_itself(self: Residual, x: Tensor) -> Tensor:
    out = self.main(x)
    return out + out


def scaled(self: Residual, x: Tensor) -> Tensor:
    return torch.add(self.main(x), x, alpha=2)


def read_twice(self: Residual, x: Tensor) -> Tensor:
    out = self.main(x)
    return (out + x) * out.mean()


def broadcast(self: Residual, x: Tensor) -> Tensor:
    return self.main(x) + x.mean((2, 3), keepdim=True)


def of_float32(self: Residual, x: Tensor) -> Tensor:
    return self.main(x) + x.float()


def transposed(self: Residual, x: Tensor) -> Tensor:
    return self.main(x) + x.transpose(2, 3).contiguous().transpose(2, 3)


LEFT_RESIDUALS = [
    into_the_shortcut, the_residual_changes, twice_itself, scaled, read_twice, broadcast, of_float32, transposed,
]  # fmt: skip


class Gated(nn.Module):
    """A block with squeeze-excite; ``join`` multiplies what the gate is made of with the gate."""

    def __init__(self, join: Callable[[Gated, Tensor], Tensor]) -> None:
        super().__init__()
        self.before = nn.Sequential(unit(3, 8, act=nn.SiLU), unit(8, 8, 3, act=nn.SiLU))
        self.pool, self.reduce, self.expand = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.after = nn.Sequential(unit(8, 8, act=None), unit(8, 6))
        self.join = join

    def gate(self, mean: Tensor) -> Tensor:
        return self.expand(self.reduce(mean).relu()).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.join(self, self.before(x)))


def torchvision_gate(self: Gated, x: Tensor) -> Tensor:
    return self.gate(self.pool(x)) * x


def timm_gate(self: Gated, x: Tensor) -> Tensor:
    return x * self.gate(x.mean((2, 3), keepdim=True))


def functional_gate(self: Gated, x: Tensor) -> Tensor:
    return torch.mul(self.gate(F.adaptive_avg_pool2d(x, 1)), x)


def gate_in_place(self: Gated, x: Tensor) -> Tensor:
    gate = self.gate(x.mean(dim=[-1, -2], keepdim=True))
    x *= gate
    return x


def gate_method(self: Gated, x: Tensor) -> Tensor:
    return x.mul(self.gate(torch.mean(x, (2, 3), keepdim=True)))


def constant_mean(self: Gated, x: Tensor) -> Tensor:
    return x * self.gate(self.pool(x).detach())


FUSED_GATES = [torchvision_gate, timm_gate, functional_gate, gate_in_place, gate_method, constant_mean]


def one_gate_per_image(self: Gated, x: Tensor) -> Tensor:
    return x * self.gate(self.pool(x)).mean(1, keepdim=True)


def a_map(self: Gated, x: Tensor) -> Tensor:
    return x * self.gate(x.mean((2, 3), keepdim=True)).expand(x.shape)


def read_by_others(self: Gated, x: Tensor) -> Tensor:
    return x * self.gate(self.pool(x)) + x


def pooled_after(self: Gated, x: Tensor) -> Tensor:
    return x * 2 * self.gate(self.pool(x))


def another_mean(self: Gated, x: Tensor) -> Tensor:
    return x * self.gate(x.mean((1, 2), keepdim=True).expand(-1, 8, -1, -1)[..., :1])


LEFT_GATES = [one_gate_per_image, a_map, read_by_others, pooled_after, another_mean]


def networks(kind: type[nn.Module], join: Callable[..., Tensor]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    plain = randomise_(kind(join)).double()
    return mx.fuse(copy.deepcopy(plain)), plain


def compare(kind: type[nn.Module], join: Callable[..., Tensor]) -> tuple[Ops, Ops]:
    """The numbers of training, evaluation and frozen networks; what was run in each."""
    fused, plain = networks(kind, join)
    runs = (Ops(), Ops())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
        fused.train(), plain.train()
        assert_same_step(fused, plain, x)
        assert fused(x).stride() == plain(x).stride()
        with runs[0]:
            fused(x)
        plain(x)
        fused.eval(), plain.eval()
        assert_same_step(fused, plain, x)  # gradients, by running statistics
        frozen = mx.freeze(plain)
        with torch.no_grad():
            expected = plain(x)
            for network in (fused, frozen):
                out = network(x)
                torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
                assert out.stride() == expected.stride()
            with runs[1]:
                fused(x)
    return runs


@pytest.mark.parametrize("join", FUSED_RESIDUALS, ids=lambda f: f.__name__)
def test_residuals(cpu_backend: str, join: Callable[..., Tensor]) -> None:
    training, inference = compare(Residual, join)
    assert training.counts["residual"] == inference.counts["residual"] == 2  # once in each memory format
    assert training.counts["pytorch"] == inference.counts["pytorch"] == 0


@pytest.mark.parametrize("join", LEFT_RESIDUALS, ids=lambda f: f.__name__)
def test_sums_that_stay(join: Callable[..., Tensor]) -> None:
    training, inference = compare(Residual, join)
    assert training.counts["residual"] == inference.counts["residual"] == 0


@pytest.mark.parametrize("join", FUSED_GATES, ids=lambda f: f.__name__)
def test_gates(cpu_backend: str, join: Callable[..., Tensor]) -> None:
    training, inference = compare(Gated, join)
    assert training.counts["gated_pointwise_forward"] == inference.counts["gated_pointwise_inference"] == 2
    assert training.counts["pytorch"] == inference.counts["pytorch"] == 0


@pytest.mark.parametrize("join", LEFT_GATES, ids=lambda f: f.__name__)
def test_products_that_stay(join: Callable[..., Tensor]) -> None:
    training, inference = compare(Gated, join)
    assert training.counts["gated_pointwise_forward"] == inference.counts["gated_pointwise_inference"] == 0


@pytest.mark.parametrize("join", [plus, shortcut_last, timm_gate, torchvision_gate], ids=lambda f: f.__name__)
def test_frozen(join: Callable[..., Tensor]) -> None:
    """In plans of the CPU, which add and multiply themselves."""
    _, plain = networks(Residual if join in (plus, shortcut_last) else Gated, join)
    frozen, x = mx.freeze(plain), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    with torch.no_grad(), torch.profiler.profile() as profile:
        frozen(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mobilenet_ext_cpu::run_plan"] == 1  # the network as a whole
    assert not {"aten::add", "aten::mul", "aten::conv2d"} & counts.keys()


def saved_elements(network: nn.Module, x: Tensor) -> int:
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x)
    return sum(seen.values())


def test_a_gate_keeps_no_activation() -> None:
    """Of the gated activation neither the normalised form nor the product is kept, only what the convolution gave."""
    fused, _ = networks(Gated, timm_gate)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    pixels = 2 * 32 * 32
    # x, and the outputs of four convolutions; the rest is gates and vectors.
    assert saved_elements(fused, x) - pixels * (3 + 8 + 8 + 8 + 6) < 1000


@pytest.mark.parametrize("join", [plus, timm_gate], ids=lambda f: f.__name__)
def test_what_learns(join: Callable[..., Tensor]) -> None:
    """Gradients where only some parameters have any, and where none flows through one of the two ways."""
    kind = Residual if join is plus else Gated
    for learning in ("before", "main", "after", "after.0.1", "expand", "before|after", "reduce|expand", "x"):
        fused, plain = networks(kind, join)
        x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
        for network in (fused, plain):
            for name, p in network.named_parameters():
                p.requires_grad_(any(name.startswith(part) for part in learning.split("|")))
        for training in (True, False):
            grads = []
            for network in (fused, plain):
                network.train(training).zero_grad()
                given = x.clone().requires_grad_(learning == "x")
                out = network(given)
                if out.requires_grad:
                    out.square().sum().backward()
                grads.append([out, given.grad, *(p.grad for p in network.parameters())])
            for ours, theirs in zip(*grads, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("join", [plus, shortcut_last, timm_gate, a_map], ids=lambda f: f.__name__)
def test_autocast(dtype: torch.dtype, join: Callable[..., Tensor]) -> None:
    """Not further from float64 than plain autocast, up to half as much again; in its dtypes."""
    kind = Gated if join in (timm_gate, a_map) else Residual
    fused, plain = networks(kind, join)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = copy.deepcopy(plain)(x)
    fused.float(), plain.float()
    with torch.autocast("cpu", dtype):
        ours, theirs = fused(x.float()), plain(x.float())
    assert ours.dtype == theirs.dtype
    error, allowed = ((out.double() - expected).norm() for out in (ours, theirs))
    assert error <= 1.5 * allowed


def test_hooks_are_called() -> None:
    """Whoever watches a module sees its own input and output, and only what is watched runs as it did."""
    fused, plain = networks(Gated, torchvision_gate)
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    for path in ("pool", "before.1", "after.0.0", "reduce"):
        seen = []
        for network in (fused, plain):
            module = network.get_submodule(path)
            handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((args[0], out)))
            network(x)
            handle.remove()
        for ours, theirs in zip(seen[:2], seen[2:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_same_step(fused, plain, x)


def test_double_backward_is_refused() -> None:
    for kind, join in ((Residual, plus), (Gated, timm_gate)):
        fused, _ = networks(kind, join)
        x = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_a_batch_of_gradients() -> None:
    """``is_grads_batched`` runs backward once per gradient, as with the plain modules."""
    for kind, join in ((Residual, plus), (Gated, timm_gate)):
        networks_, jacobians = networks(kind, join), []
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
        for network in networks_:
            given = x.clone().requires_grad_()
            out = network(given)
            grads = torch.eye(out.numel(), dtype=torch.float64)[:3].view(3, *out.shape)
            jacobians.append(torch.autograd.grad(out, given, grads, is_grads_batched=True)[0])
        torch.testing.assert_close(*jacobians, rtol=1e-9, atol=1e-9)
