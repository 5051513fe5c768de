"""``mx.fuse``: a fused network does what the plain one does, whatever is done to it; no plan outlives its reasons."""

from __future__ import annotations

import copy
import io
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from behaviour import KernelOps, fused_units
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mobilenet_ext as mx

timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

NETWORKS = {
    "torchvision": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35, dropout=0.0),
    "timm": lambda: timm.create_model("mobilenetv2_035", num_classes=10),
}
UNITS = 52  # of MobileNetV2


@pytest.fixture(params=NETWORKS)
def plain(request: pytest.FixtureRequest) -> nn.Module:
    network = NETWORKS[request.param]().double()
    network(torch.randn(8, 3, 32, 32, dtype=torch.float64))  # running statistics that differ
    return network


@pytest.fixture
def fused(plain: nn.Module) -> nn.Module:
    return mx.fuse(copy.deepcopy(plain))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if type(module).__name__ == "InvertedResidual"]


def first(network: nn.Module, kind: type[nn.Module], index: int = 5) -> nn.Module:
    return [module for module in network.modules() if isinstance(module, kind)][index]


def assert_same_step(fused: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    """Output, gradients and buffers of a forward and backward."""
    outputs = []
    for network in (fused, plain):
        network.zero_grad()
        out = network(x)
        out.square().sum().backward()
        outputs.append(out)
    assert_close(outputs[0], outputs[1], tolerance)
    largest = max(p.grad.abs().max() for p in plain.parameters()).item()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=10 * tolerance, atol=tolerance * largest)
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_runs_on_the_kernels_in_place(plain, x):
    parameters, modules, keys = list(plain.parameters()), list(plain.modules()), list(plain.state_dict())
    representation = repr(plain)
    twin = copy.deepcopy(plain)
    assert mx.fuse(plain) is plain
    assert fused_units(plain, x) == UNITS and fused_units(plain.eval(), x) == UNITS
    assert list(map(id, plain.parameters())) == list(map(id, parameters))
    assert list(plain.modules()) == modules and list(plain.state_dict()) == keys and repr(plain) == representation
    assert all(isinstance(a, type(b)) for a, b in zip(plain.modules(), twin.modules(), strict=True))


def test_steps_and_evaluation_in_turn(fused, plain, x):
    optimizers = [torch.optim.SGD(network.parameters(), 1e-5, momentum=0.9) for network in (fused, plain)]
    for training in (True, False, True, True, False):
        fused.train(training), plain.train(training)
        assert_same_step(fused, plain, x, 1e-6)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            assert_close(fused(x), plain(x), 1e-6)  # the steps have multiplied what rounding left


def test_looks_once_at_each_mode(fused, x, monkeypatch):
    from mobilenet_ext import fused_forward

    looks = []
    real = fused_forward.ForwardGraph
    monkeypatch.setattr(fused_forward, "ForwardGraph", lambda module: looks.append(module) or real(module))
    for _ in range(3):
        for training in (True, False):
            fused.train(training)
            fused(x)
            with torch.no_grad():
                fused(x)
    assert len(looks) == 4


@pytest.mark.parametrize("where", ["network", "block", "convolution", "normalisation"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_forward_hooks(plain, x, where, when):
    """They are called, see what they saw, and may change it; when they are gone, all is fused again."""
    choose = {
        "network": lambda network: network,
        "block": lambda network: blocks(network)[3],
        "convolution": lambda network: first(network, nn.Conv2d),
        "normalisation": lambda network: first(network, nn.BatchNorm2d),
    }[where]
    fused = copy.deepcopy(plain)
    if when == "after":
        mx.fuse(fused)(x), plain(x)
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output * 1.5

    handles = [choose(network).register_forward_hook(hook) for network in (fused, plain)]
    mx.fuse(fused)
    assert_same_step(fused, plain, x)
    assert len(seen) == 2
    assert_close(seen[0], seen[1])
    for handle in handles:
        handle.remove()
    assert_same_step(fused, plain, x)
    assert fused_units(fused, x) == UNITS


def test_full_backward_hooks(fused, plain, x):
    seen = []
    for network in (fused, plain):
        hook = blocks(network)[3].register_full_backward_hook(lambda module, before, after: seen.append(after[0]))
        network(x).square().sum().backward()
        hook.remove()
    assert_close(seen[0], seen[1])
    assert fused_units(fused, x) == UNITS


def test_a_layer_replaced_changed_or_frozen(fused, plain, x):
    fused(x), plain(x)
    for network in (fused, plain):
        first(network, nn.BatchNorm2d, 4).eps = 0.3
        first(network, nn.BatchNorm2d, 7).eval()
        first(network, nn.Conv2d, 6).weight = nn.Parameter(first(network, nn.Conv2d, 6).weight.detach() * 2)
        first(network, nn.Conv2d, 4).stride = (1, 1)
        blocks(network)[5].requires_grad_(False)
    assert_same_step(_without_gradients_of_frozen(fused), _without_gradients_of_frozen(plain), x)
    assert fused_units(fused, x) == UNITS
    head = nn.Linear(first(plain, nn.Linear, 0).in_features, 3).double()
    for network in (fused, plain):
        if isinstance(network.classifier, nn.Sequential):
            network.classifier[1] = head
        else:
            network.classifier = head
    assert_close(fused(x), plain(x))


def _without_gradients_of_frozen(network: nn.Module) -> nn.Module:
    """What is frozen has a gradient of zeros here, so that all have one."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.requires_grad_()
    return network


def test_copies_and_pickles(fused, plain, x):
    fused.eval(), plain.eval()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for twin in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert fused_units(twin, x) == UNITS
        assert_close(twin(x), plain(x))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in fused.parameters()}


def test_unfuse(fused, plain, x):
    assert mx.unfuse(fused) is fused
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    assert [vars(module).keys() for module in fused.modules()] == [vars(module).keys() for module in plain.modules()]
    assert fused_units(fused, x) == 0
    assert fused_units(mx.fuse(mx.fuse(fused)), x) == UNITS


def test_functional_call_and_its_gradients(fused, plain, x):
    fused.eval(), plain.eval()
    parameters = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}
    outputs, gradients = [], []
    for network in (fused, plain):

        def loss(parameters: dict[str, Tensor], network: nn.Module = network) -> Tensor:
            return torch.func.functional_call(network, parameters, (x,)).square().sum()

        outputs.append(loss(parameters))
        gradients.append(torch.func.grad(loss)(parameters))
    assert_close(outputs[0], outputs[1])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient)
    assert_close(fused(x), plain(x))


def test_checkpointing(fused, plain, x):
    gradients = []
    for network in (fused, plain):
        leaf = x.clone().requires_grad_()
        checkpoint(network, leaf, use_reentrant=False).square().sum().backward()
        gradients.append(leaf.grad)
    assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(list(fused.buffers()), list(plain.buffers()))


@pytest.mark.parametrize("tool", ["fx", "jit.trace", "jit.script", "export"])
def test_tools_see_the_plain_network(fused, plain, x, tool):
    fused.eval(), plain.eval()
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision  # torch.export wants it
    with torch.no_grad():
        fused(x)
        if tool == "fx":
            converted = torch.fx.symbolic_trace(fused)
        elif tool == "jit.trace":
            converted = torch.jit.trace(fused, x)
        elif tool == "jit.script":
            converted = torch.jit.script(fused)
        else:
            converted = torch.export.export(fused, (x,)).module()
        with KernelOps() as ops:
            assert_close(converted(x), plain(x))
    assert not ops.names
    assert fused_units(fused, x) == UNITS


def test_compiles(fused, plain, x):
    fused.eval(), plain.eval()
    targets: list[str] = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(fused, backend=backend, fullgraph=True)(x), plain(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(plain, x, dtype):
    plain.eval()
    expected = plain(x)
    theirs = copy.deepcopy(plain).to(dtype)
    ours = mx.fuse(copy.deepcopy(plain)).to(dtype)
    errors = [(network(x.to(dtype)).double() - expected).norm().item() for network in (ours, theirs)]
    assert fused_units(ours, x.to(dtype)) == UNITS
    assert errors[0] <= 1.5 * errors[1]


def test_inputs_that_the_kernels_leave(fused, plain, x):
    fused.eval(), plain.eval()
    assert fused(x[:0]).shape == (0, 10)
    assert_close(fused(x=x), plain(x))
    assert_close(torch.vmap(fused)(x[None])[0], plain(x))
    assert_close(nn.DataParallel(fused)(x), plain(x))
    assert fused.to("meta")(x.to("meta")).shape == (2, 10)
    for network in (fused, plain.to("meta")):
        with pytest.raises(RuntimeError, match="expected input|Invalid channel"):
            network(torch.empty(1, 4, 64, 64, dtype=torch.float64, device="meta"))


def test_threads(fused, plain, x):
    """Each looks at the network for itself, and disturbs nobody who calls modules meanwhile."""
    fused.eval(), plain.eval()
    with torch.no_grad():
        expected = plain(x)
    outputs: list[Tensor] = []

    def run(network: nn.Module) -> None:
        for _ in range(5):
            with torch.no_grad():
                outputs.append(network(x))

    threads = [threading.Thread(target=run, args=(network,)) for network in (fused, plain, fused, plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 20
    for output in outputs:
        assert_close(output, expected)


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fused": mx.fuse,
    "frozen": mx.freeze,
    "of mx.nn": lambda network: mx.nn.FusedSequential(network, mx.nn.PointwiseConvBNReLU(10, 4)).double(),
    "plain already": lambda network: network,
}


@pytest.mark.parametrize("name", MAKERS)
def test_plain_twin(plain, name) -> None:
    plain.eval()
    body = nn.Sequential(*unit(3, 8), *unit(8, 10)).double().eval() if name == "of mx.nn" else plain
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = MAKERS[name](copy.deepcopy(body)).eval()
    twin = mx.plain(model)
    with torch.no_grad():
        with KernelOps() as ops:
            assert_close(twin(x), model(x) if name == "of mx.nn" else body(x))
        assert name == "of mx.nn" or not ops.names
        with KernelOps() as ops:
            twin(x)
    assert not ops.names and list(twin.state_dict()) == list(model.state_dict())
    assert not any(type(module).__module__.startswith("mobilenet_ext") for module in twin.modules())
    assert all(module.training for module in twin.train().modules())
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_plain_twin_of_mobilenet_v1() -> None:
    for model in (mx.MobileNetV1(10, 0.25).eval(), mx.freeze(mx.MobileNetV1(10, 0.25))):
        x = torch.randn(2, 3, 32, 32)
        twin = mx.plain(model)
        with torch.no_grad(), KernelOps() as ops:
            out = twin(x)
        assert not ops.names
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


# Networks that make it hard: what is not proven stays as it is.


def unit(c: int, k: int, size: int = 1, act: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    groups = c if size > 1 and c == k else 1
    conv = nn.Conv2d(c, k, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(k), *([act()] if act else []))


class Network(nn.Module):
    """Two units one after the other; ``calls`` says how."""

    def __init__(self, calls: Callable[[Network, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = unit(8, 8, 3), unit(8, 8)
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.kept: list[Tensor] = []
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("centre", torch.zeros(8))
        self.steps = {"n": 0}
        if calls is a_generator:
            self.generator = random.Random(0)
        self.calls = calls
        self.double()

    def forward(self, x: Tensor) -> object:
        return self.calls(self, x)


def tap(self: Network, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.act(self.bn(y)) + y.mean()


def shape_of_the_inside(self: Network, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.act(self.bn(y)) * y.shape[2]


def twice(self: Network, x: Tensor) -> Tensor:
    return self.act(self.bn(self.conv(self.act(self.bn(self.conv(x))))))


def shared_activation(self: Network, x: Tensor) -> Tensor:
    return self.act(self.bn(self.act(self.conv(x))))


def control_flow(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if x.mean() > 0 else self.b(x)


def leaves_something(self: Network, x: Tensor) -> Tensor:
    self.last = self.a(x)
    return self.b(self.last)


def fills_a_list(self: Network, x: Tensor) -> Tensor:
    self.kept.append(self.a(x))
    return self.b(self.kept[-1])


def python_random(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if random.random() < 0.5 else self.b(x)


def numpy_random(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if np.random.rand() < 0.5 else self.b(x)


def torch_random(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if float(torch.rand(())) < 0.5 else self.b(x)


def noise(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x) + torch.rand(x.shape, dtype=x.dtype))


def without_gradients(self: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.a(x)
    return self.b(y)


def a_parameter_of_its_own(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x) * torch.sigmoid(self.scale))


def checkpoints(self: Network, x: Tensor) -> Tensor:
    return self.b(checkpoint(self.a, x, use_reentrant=False))


def in_place(self: Network, x: Tensor) -> Tensor:
    y = self.a(x)
    z = self.bn(self.conv(y))
    return z.add_(y).mul_(2)


def functions(self: Network, x: Tensor) -> Tensor:
    return F.relu6(self.bn(F.conv2d(x, self.conv.weight, self.conv.bias)))


def several_outputs(self: Network, x: Tensor) -> dict[str, object]:
    y = self.a(x)
    return {"y": y, "all": [self.b(y), (y, 3)], "none": None}


def aliased(self: Network, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    before = y
    y *= 0.5
    return self.b(y) + before


def a_view(self: Network, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    half = y[:, :4]
    half += 1
    return self.b(y)


def is_a_tensor(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if isinstance(x, Tensor) else 1)


def dtype(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if x.dtype is torch.float64 else 1)


def looks_up(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * {6: 2.0}.get(x.shape[-1], 1.0)


def prints(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * len(f"{x.shape[-1]}{x.shape[-2]}")


def has_an_attribute(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if hasattr(x, "tensors") else getattr(x, "scale", 3))


def tries(self: Network, x: Tensor) -> Tensor:
    try:
        return self.a(x.view(7, 7))
    except RuntimeError:
        return self.b(x)


def kind_of_a_module(self: Network, x: Tensor) -> Tensor:
    for module in (self.conv, self.bn):
        x = self.act(module(x)) if type(module) is nn.BatchNorm2d else module(x)
    return x


def for_a_moment(self: Network, x: Tensor) -> Tensor:
    self.bn.eval()
    y = self.bn(self.conv(x))
    self.bn.train(self.training)
    return self.a(y)


def swaps(self: Network, x: Tensor) -> Tensor:
    self.a, self.b = self.b, self.a
    return self.a(x)


def statistics_between(self: Network, x: Tensor) -> Tensor:
    y = self.conv(x)
    mean = self.bn.running_mean.clone()
    return self.b(self.act(self.bn(y)) + mean.view(1, -1, 1, 1))


def changes_a_buffer(self: Network, x: Tensor) -> Tensor:
    y = self.a(x)
    self.centre = 0.9 * self.centre + 0.1 * y.detach().mean((0, 2, 3))
    return y - self.centre.view(1, -1, 1, 1)


def counts(self: Network, x: Tensor) -> Tensor:
    self.steps["n"] = self.steps["n"] + 1
    return self.a(x) * self.steps["n"]


def a_list_of_modules(self: Network, x: Tensor) -> Tensor:
    for module in nn.ModuleList([self.a, self.b]):
        x = module(x)
    return x


def a_generator(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * self.generator.random()


HARD = {
    aliased: 2, a_view: 2, is_a_tensor: 1, dtype: 1, looks_up: 1, prints: 1, has_an_attribute: 1, tries: 1,
    kind_of_a_module: 0, for_a_moment: 1, swaps: 1, statistics_between: 1, changes_a_buffer: 1, counts: 1,
    a_list_of_modules: 2, a_generator: 1,
    tap: 0, shape_of_the_inside: 0, twice: 0, shared_activation: 0, control_flow: 1, leaves_something: 2,
    fills_a_list: 2, python_random: 1, numpy_random: 1, torch_random: 1, noise: 2, without_gradients: 2,
    a_parameter_of_its_own: 2, checkpoints: 2, in_place: 2, functions: 0, several_outputs: 2,
}  # fmt: skip


@pytest.mark.parametrize("calls", HARD, ids=lambda calls: calls.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_hard_to_follow(calls: Callable, training: bool) -> None:
    """With how many units fused, in which the networks' own modules are found one by one."""
    plain = Network(calls).train(training)
    fused = mx.fuse(copy.deepcopy(plain))
    for i in range(8):
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        results = []
        for network in (fused, plain):
            torch.manual_seed(i), random.seed(i), np.random.seed(i)
            network.zero_grad()
            leaf = x.clone().requires_grad_()
            with KernelOps() as ops:
                out = network(leaf)
            if network is fused:
                found = 2 if calls is for_a_moment and not training else HARD[calls]  # where nothing changes
                assert ops.units == found, ops.names
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            sum((t * t).sum() for t in tensors).backward()
            buffers = [] if calls is checkpoints else list(network.buffers())  # plain ones count twice
            results.append((out, leaf.grad, [p.grad for p in network.parameters()], buffers))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
        assert type(results[0][0]) is type(results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(fused.kept, plain.kept, strict=True)) or calls is fills_a_list
    assert len(fused.kept) == len(plain.kept)


def set_attribute(network: nn.Module, flag: bool) -> None:
    network.flag = flag


def set_item(network: nn.Module, flag: bool) -> None:
    network.flags["a"] = flag


def set_attribute_of_a_child(network: nn.Module, flag: bool) -> None:
    network.holder.flag = flag


def set_class_of_a_child(network: nn.Module, flag: bool) -> None:
    network.act.__class__ = nn.ReLU if flag else nn.Tanh


def set_element(network: nn.Module, flag: bool) -> None:
    network.list_of_flags[0] = flag


def asks_its_attributes(self: Network, x: Tensor) -> Tensor:
    yes = self.flag and self.flags["a"] and self.list_of_flags[0] and self.holder.flag
    return self.act((self.a if yes else self.b)(x))


CHANGES = [set_attribute, set_item, set_element, set_attribute_of_a_child, set_class_of_a_child]


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_that_decide(change: Callable) -> None:
    """A forward that reads them is looked at again when they change."""
    plain = Network(lambda self, x: self.a(x) if self.flag and self.flags["a"] and self.list_of_flags[0] else self.b(x))
    plain.flag, plain.flags, plain.list_of_flags = True, {"a": True}, [True]
    plain.holder = nn.Module()
    plain.holder.flag = True
    fused = mx.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for flag in (True, False, True):
        change(fused, flag), change(plain, flag)
        assert_close(fused(x), plain(x))
        assert fused_units(fused, x) == 1


def test_a_forward_that_is_not_known_is_looked_at_once_for_each_mode(monkeypatch) -> None:
    from mobilenet_ext import fused_forward

    fused = mx.fuse(Network(leaves_something))
    looks = []
    real = fused_forward.ForwardGraph
    monkeypatch.setattr(fused_forward, "ForwardGraph", lambda module: looks.append(module) or real(module))
    for training in (True, True, False, False, True):
        fused.train(training)(torch.randn(2, 8, 6, 6, dtype=torch.float64))
    assert sum(module is fused for module in looks) == 2


def test_slices(fused, plain, x) -> None:
    """Are made by the class that a fused module has."""
    sequence = "features" if hasattr(plain, "features") else "blocks"
    plain.eval(), fused.eval()
    parts = [getattr(network, sequence)[:1] for network in (fused, plain, mx.freeze(fused))]
    shape = (2, first(parts[0], nn.Conv2d, 0).in_channels, 8, 8)
    x = torch.randn(shape, dtype=torch.float64)
    expected = parts[1](x)
    for part in (parts[0], parts[2], mx.fuse(copy.deepcopy(parts[0])), copy.deepcopy(parts[0]).cpu()):
        assert_close(part(x), expected)
    assert mx.fusion_report(parts[0]).fused > 0
    mx.unfuse(parts[0])


def test_hooks_see_tensors() -> None:
    network = Network(a_list_of_modules)
    seen: list[type] = []
    for layer in (network.a[0], network.b[1]):
        layer.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    mx.fuse(network)(torch.randn(2, 8, 6, 6, dtype=torch.float64))
    assert seen == [Tensor, Tensor]


def test_a_network_that_is_another_at_each_call_runs_its_own_forward() -> None:
    """It would cost more to look at it each time. Its parts run fused all the same."""
    plain = Network(scaled)
    fused, x = mx.fuse(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for i in range(12):
        plain.factor = fused.factor = i / 7
        assert_close(fused(x), plain(x))
    with KernelOps() as ops:
        fused(x)
    assert ops.units == 2


def scaled(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x) * self.factor)


def test_modules_in_a_list_are_called_themselves() -> None:
    plain = Network(lambda self, x: self.layers[1](self.layers[0](x)))
    plain.layers = [plain.a, plain.b]
    fused = mx.fuse(plain)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with KernelOps() as ops:
        fused(x)
    assert ops.units == 2 and fused.a[1].num_batches_tracked == 1


def test_several_arguments() -> None:
    """A forward of more than one tensor runs as it is, with its children's on the kernels."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = unit(8, 8), unit(8, 8)

        def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.left(x) + scale * self.right(y)

    plain = Two().double()
    fused = mx.fuse(copy.deepcopy(plain))
    x, y = torch.randn(2, 2, 8, 5, 5, dtype=torch.float64)
    with KernelOps() as ops:
        assert_close(fused(x, y, scale=2.0), plain(x, y, scale=2.0))
    assert ops.units == 2


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "relu_": lambda x: x.relu_(),
    "F.relu6": F.relu6,
    "F.hardswish": F.hardswish,
    "F.silu": F.silu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.leaky_relu by name": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
}


def activates(self: Network, x: Tensor) -> Tensor:
    return self.b(ACTIVATIONS[self.activation](self.bn(self.conv(x))))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_as_functions(name: str) -> None:
    plain = Network(activates)
    plain.activation = name
    fused = mx.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert fused_units(fused, x) == 2
    assert sum(row.chain == 0 for row in mx.fusion_report(fused)) == 2  # in one chain
    plain(x)
    assert_same_step(_used(fused), _used(plain), x)


def _used(network: Network) -> nn.Module:
    for module in (network.a, network.scale):
        module.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    network.zero_grad = lambda: None
    return network


@pytest.mark.parametrize("training", [True, False])
def test_normalisations_of_libraries(training: bool) -> None:
    norms = [
        timm.layers.BatchNormAct2d(8, act_layer=nn.ReLU6),
        timm.layers.BatchNormAct2d(8, apply_act=False),
        timm.layers.FrozenBatchNormAct2d(8, act_layer=nn.SiLU),
        torchvision.ops.FrozenBatchNorm2d(8),
        timm.layers.BatchNormAct2d(8, drop_layer=lambda: nn.Dropout2d(0.0)),  # something in between: not fused
    ]
    layers = [layer for norm in norms for layer in (nn.Conv2d(8, 8, 1), norm)]
    plain = nn.Sequential(*layers).double().train(training)
    for name, tensor in plain.state_dict().items():
        if tensor.ndim == 1 and name.split(".")[0] in "1357":
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    fused = mx.fuse(copy.deepcopy(plain))
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64)
    assert fused_units(fused, x) == 4
    plain(x)
    assert_same_step(fused, plain, x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: 3, "expected an nn.Module, got int"),
        (lambda: torch.jit.script(unit(8, 8)), "before torch.jit.script"),
        (lambda: torch.compile(unit(8, 8)), "before torch.compile"),
        (lambda: torch.fx.symbolic_trace(unit(8, 8)), "traced from"),
    ],
    ids=["no module", "scripted", "compiled", "traced"],
)
def test_what_cannot_be_fused_is_refused(model: Callable, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        mx.fuse(model())


def test_parts_without_python_code_stay_as_they_are() -> None:
    plain = nn.Sequential(unit(8, 8), torch.jit.script(unit(8, 8)), torch.fx.symbolic_trace(unit(8, 8))).double()
    fused = mx.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert_close(fused(x), plain(x))


def test_report(fused, x) -> None:
    report = mx.fusion_report(fused)
    names = {name for name, module in fused.named_modules() if isinstance(module, nn.Conv2d)}
    assert {row.name for row in report} == names and report.fused == UNITS == len(report)
    assert str(report).startswith("52 of 52 convolutions run on the kernels, in 16 chains")
    first(fused, nn.Conv2d).register_forward_hook(lambda *_: None)
    row = next(row for row in mx.fusion_report(fused) if row.why_not)
    assert row.chain is None and row.why_not == "a hook, or a forward of its own"


REASONS = {
    tap: "its output is read 2 times",
    twice: "called 2 times in a forward",
    functions: "not called",
    shared_activation: "its output is read by ReLU, not by a BatchNorm",
}


@pytest.mark.parametrize("calls", REASONS, ids=lambda calls: calls.__name__)
def test_report_says_why(calls: Callable) -> None:
    report = mx.fusion_report(mx.fuse(Network(calls)))
    assert next(row for row in report if row.name == "conv").why_not == REASONS[calls]


def test_report_of_what_is_not_known() -> None:
    reasons = {row.name: row.why_not for row in mx.fusion_report(mx.fuse(Network(control_flow)))}
    assert reasons["a.0"] is reasons["b.0"] is None and "Network" in reasons["conv"]
    assert mx.fusion_report(unit(8, 8))[0].why_not == "not in a module that fuse() was given"
    assert mx.fusion_report(mx.MobileNetV1(10, 0.25)).fused == 27
    with pytest.raises(TypeError, match="expected an nn.Module"):
        mx.fusion_report(None)
