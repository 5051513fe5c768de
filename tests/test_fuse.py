"""``mx.fuse``: a fused network does what the plain one does, whatever is done to it; no plan outlives its reasons."""

from __future__ import annotations

import copy
import io
import re
import threading
from collections.abc import Callable

import pytest
import torch
from behaviour import KernelOps, fused_units
from fuse_networks import assert_close, assert_same_step, blocks, first, unit
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


@pytest.mark.parametrize("make", [mx.fuse, mx.freeze])
def test_sequences_in_a_fused_sequence_are_one_chain(make) -> None:
    model = make(mx.nn.FusedSequential(unit(8, 8, 3), nn.Sequential(unit(8, 8), nn.Sequential(), unit(8, 8, 3))).eval())
    x = torch.randn(2, 8, 6, 6)
    assert {row.chain for row in mx.fusion_report(model)} == {0}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        targets: list[str] = []

        def backend(graph, inputs):
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    assert sum("block_inference" in target or "_inference" in target for target in targets) == 2
    torch._dynamo.reset()


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


@pytest.mark.parametrize(
    "plain",
    [name if name == "timm" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS],
    indirect=True,
)
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


def pruned(network: nn.Sequential) -> None:
    """Structured pruning as some tools do it: half of the channels between two convolutions."""
    for tensor in (network[0].weight, network[0].bias, *network[1].parameters(), *network[1].buffers()):
        if tensor.ndim:
            tensor.data = tensor.data[:4].clone()
    network[3].weight.data = network[3].weight.data[:, :4].clone()


def with_larger_kernels(network: nn.Sequential) -> None:
    network[0].weight.data = torch.randn(8, 8, 3, 3, dtype=torch.float64)


def with_too_few_statistics(network: nn.Sequential) -> None:
    network[1].running_var.data = network[1].running_var.data[:4].clone()


def with_too_few_channels(network: nn.Sequential) -> None:
    network[0].weight.data = torch.randn(8, 4, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("change", [pruned, with_larger_kernels, with_too_few_statistics, with_too_few_channels])
@pytest.mark.parametrize("make", [mx.fuse, mx.freeze, lambda m: mx.freeze(mx.nn.FusedSequential(*m))])
@pytest.mark.parametrize("changed", ["before", "after"])
def test_data_of_another_shape(change: Callable, make: Callable, changed: str) -> None:
    """The outputs of the plain modules, or their error."""
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    plain = nn.Sequential(*unit(8, 8), *unit(8, 8)).double().eval()
    for conv in (plain[0], plain[3]):
        conv.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
    network = copy.deepcopy(plain)
    if changed == "after":
        network = make(network)
        network(x)
    for each in (network, plain):
        torch.manual_seed(0)
        change(each)
    if changed == "before":
        network = make(network)
    try:
        expected = plain(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            network(x)
    else:
        assert_close(network(x), expected)


def test_a_frozen_network_without_another_name_can_be_told_to_train() -> None:
    """``train`` gives the network back."""
    for make in (lambda: unit(8, 8), lambda: mx.nn.FusedSequential(*unit(8, 8)), lambda: mx.MobileNetV1(3, 0.25)):
        frozen = mx.freeze(make()).train()
        assert isinstance(frozen, nn.Module) and not frozen.training and not any(m.training for m in frozen.modules())
