"""Whoever traces a model gets what the plain modules give: the same graph, and no more warnings."""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from behaviour import KernelOps, fused_units
from functorch.compile import aot_module, make_boxed_func
from plain import randomise_
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.experimental.proxy_tensor import make_fx

import mobilenet_ext as mx

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*jit.*is deprecated", "ignore:.*is deprecated and will be removed", "ignore::torch.jit.TracerWarning"
)


@pytest.fixture(autouse=True)
def _one_precision() -> None:
    """torch.export refuses to start where convolutions and RNNs have different ones."""
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision


def as_plain(module: nn.Module) -> nn.Module:
    """The same modules in ``nn.Sequential`` containers."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*map(as_plain, module)).train(module.training)
    return copy.deepcopy(module)


class Network(nn.Module):
    """Units in nested containers, a pooling and a head, with a residual connection around a block."""

    def __init__(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(1)
        stem, block = mx.nn.StemConvBNReLU(3, 8, stride=2), mx.nn.DepthwiseSeparableConv(8, 8)
        last = mx.nn.FusedSequential(mx.nn.DepthwiseSeparableConv(8, 16, stride=2), nn.AdaptiveAvgPool2d(1))
        self.stem, self.block, self.last = (convert(randomise_(part)) for part in (stem, block, last))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(self.last(x))


def image() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, 16, 16)


def nodes(graph: torch.fx.GraphModule) -> list[tuple[str, str, str, str]]:
    # Quantised functions print their address.
    return [(n.op, getattr(n.target, "__name__", str(n.target)), n.name, str(n.args)) for n in graph.graph.nodes]


def jit_nodes(graph: torch.jit.ScriptModule) -> list[str]:
    return [str(node.kind()) for node in graph.inlined_graph.nodes()]


def aot_graph(model: nn.Module) -> list:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(nodes(graph))
        return make_boxed_func(graph.forward)

    aot_module(model, keep)(image())
    return graphs


def prepare_fx(model: nn.Module) -> torch.fx.GraphModule:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    return quantize_fx.prepare_fx(model, mapping, (image(),))


def convert_fx(model: nn.Module) -> list:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    prepared = prepare_fx(model)
    prepared(image())
    return nodes(quantize_fx.convert_fx(prepared))


class TracesBlocks(torch.fx.Tracer):
    """A tracer that stops at the second level of containers."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name.count(".") == 1 or super().is_leaf_module(module, name)


def export(model: nn.Module, **options: object) -> list:
    return nodes(torch.export.export(model, (image(),), **options).graph_module)


BATCH = {"x": {0: torch.export.Dim("n")}}
TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "symbolic_trace": lambda model: nodes(torch.fx.symbolic_trace(model)),
    "symbolic_trace of a tensor": lambda m: nodes(torch.fx.symbolic_trace(m, concrete_args={"x": image()})),
    "a tracer": lambda model: [str(node) for node in TracesBlocks().trace(model).nodes],
    "fuse": lambda model: nodes(fuse(model)),
    "prepare_fx": lambda model: nodes(prepare_fx(model)),
    "convert_fx": lambda model: convert_fx(model),
    "jit.trace": lambda model: jit_nodes(torch.jit.trace(model, image(), check_trace=not model.training)),
    "jit.script": lambda model: jit_nodes(torch.jit.script(model)),
    "make_fx": lambda model: nodes(make_fx(model)(image())),
    "make_fx before dispatch": lambda model: nodes(make_fx(model, pre_dispatch=True)(image())),
    "make_fx of symbols": lambda m: nodes(make_fx(m, tracing_mode="symbolic", _allow_non_fake_inputs=True)(image())),
    "aot_module": aot_graph,
    "export": lambda model: export(model, strict=False),
    "strict export": lambda model: export(model, strict=True),
    "export of any batch": lambda model: export(model, strict=False, dynamic_shapes=BATCH),
    "strict export of any batch": lambda model: export(model, strict=True, dynamic_shapes=BATCH),
}


INFERENCE_ONLY = ("fuse", "prepare_fx", "convert_fx")
# The tools of TOOLS that are another one with a setting: of some tests these are the slow repetition.
VARIANTS = ("make_fx before dispatch", "make_fx of symbols", "export of any batch", "strict export of any batch")


def unless_slow(tool: str, slow: Iterable[str], *more: object) -> object:
    """A tool, and more, as parameters of a test."""
    return pytest.param(tool, *more, marks=[pytest.mark.slow] * (tool in slow))


@pytest.mark.parametrize(
    ("tool", "training"),
    [
        *((tool, False) for tool in TOOLS),
        *(unless_slow(tool, VARIANTS, True) for tool in TOOLS if tool not in INFERENCE_ONLY),
    ],
)
def test_tool_sees_the_plain_modules(tool, training):
    seen = []
    for convert in (as_plain, lambda module: module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = TOOLS[tool](Network(convert).train(training))
        # The jit says once a process that it is deprecated.
        told = [str(w.message) for w in caught if "deprecated" not in str(w.message)]
        seen.append((graph, [text for text in told if "Converting a tensor" in text]))
    assert seen[0] == seen[1]
    assert "mobilenet_ext" not in str(seen[1][0])


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_sees_the_plain_modules_of_a_frozen_model(tool):
    plain, ours = Network(as_plain).eval().requires_grad_(False), Network(lambda module: module)
    frozen = mx.freeze(ours)
    frozen(image())  # there are plans
    assert TOOLS[tool](frozen) == TOOLS[tool](plain)


@pytest.mark.parametrize("tool", [unless_slow(tool, (*VARIANTS, "strict export", "aot_module")) for tool in TOOLS])
def test_frozen_network(tool):
    """As the model that it was made of."""
    model = randomise_(mx.MobileNetV1(10, 0.25)).eval().requires_grad_(False)
    frozen = mx.freeze(model)
    frozen(image())
    ours, expected = str(TOOLS[tool](frozen)), str(TOOLS[tool](model))
    assert "mobilenet_ext" not in ours
    assert ours == expected or tool == "jit.script"  # which compiles the model's dropout too


@pytest.mark.parametrize("freeze", [False, True])
def test_jit_trace_of_the_network_does_not_warn(freeze):
    model = mx.MobileNetV1(10, 0.25).eval()
    model = mx.freeze(model) if freeze else model
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(model, image())


def test_symbolic_trace_leaves_nothing_unused():
    graph = torch.fx.symbolic_trace(mx.MobileNetV1(10, 0.25))
    assert not [node for node in graph.graph.nodes if node.op != "output" and not node.users]


@pytest.mark.parametrize("how", ["trace", "script", "export"])
def test_what_was_traced_computes_the_same_without_this_package(how):
    model, x = Network(lambda module: module).eval(), image()
    if how == "export":
        loaded = torch.export.export(model, (x,)).run_decompositions().module()
    else:
        traced = torch.jit.trace(model, x) if how == "trace" else torch.jit.script(model)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    with KernelOps() as ops:
        out = loaded(x)
    assert not ops.names
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool", ["trace", "make_fx", "export", "symbolic_trace", "an exception"])
def test_kernels_run_again_afterwards(cpu_backend, tool):
    model, x = Network(lambda module: module), image()
    if tool == "trace":
        torch.jit.trace(model.eval(), x)
    elif tool == "make_fx":
        make_fx(model)(x)
    elif tool == "export":
        torch.export.export(model, (x,))
    elif tool == "symbolic_trace":
        torch.fx.symbolic_trace(model)
    else:
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 2"):
            make_fx(model)(x[:, :2])
    with KernelOps() as ops:
        model(x)
    assert ops.units == 5


def test_calls_of_modules_that_somebody_replaced(monkeypatch):
    """As ``torch.fx`` does it."""
    called, original = [], nn.Module.__call__

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        called.append(type(self))
        return original(self, *args, **kwargs)

    model, x = Network(lambda module: module).eval(), image()
    expected = model(x)
    monkeypatch.setattr(nn.Module, "__call__", call)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert called.count(nn.Conv2d) == called.count(nn.ReLU) == 5


def test_compiled_child_is_called(cpu_backend):
    """``module.compile()`` of a unit, or of a module in it, is not passed over."""
    compiled = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    model, x = Network(lambda module: module).eval(), image()
    expected = model(x)
    model.last[0][0].compile(backend=compiled)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert compiled.frame_count == 1
    model.block[1][0].compile(backend=compiled)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert fused_units(model, x) == 4


class Functions(nn.Module):
    """All of ``mx.functional``, or the functions of PyTorch that they stand for."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        torch.manual_seed(3)
        self.depthwise, self.pointwise = nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Parameter(torch.randn(5, 8, 1, 1))
        self.bias = nn.Parameter(torch.randn(8))
        self.norms = nn.ModuleList([randomise_(nn.BatchNorm2d(channels)) for channels in (8, 5)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        if self.plain:
            x = F.conv2d(x, self.depthwise, self.bias, 1, 1, groups=8)
            x = F.conv2d(x, self.depthwise, self.bias, 2, 1, groups=8)
            x = F.relu(self.batch_norm(x, first))
            y = self.batch_norm(F.conv2d(x, self.pointwise), second)
            return F.conv2d(x, self.pointwise) + y
        x = mx.functional.depthwise_conv2d(x, self.depthwise, self.bias)
        vectors = (first.running_mean, first.running_var, first.weight, first.bias)
        options = {"training": self.training, "momentum": 0.2, "eps": 1e-3}
        x = mx.functional.depthwise_bn_relu(x, self.depthwise, self.bias, *vectors, stride=2, **options)
        vectors = (second.running_mean, second.running_var, second.weight, second.bias)
        y = mx.functional.pointwise_bn_relu(x, self.pointwise, None, *vectors, relu=False, **options)
        return mx.functional.pointwise_conv2d(x, self.pointwise) + y

    def batch_norm(self, x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.2, 1e-3)


def features() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(2, 8, 9, 9)


FUNCTION_TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "jit.trace": lambda model: jit_nodes(torch.jit.trace(model, features(), check_trace=not model.training)),
    "make_fx": lambda model: [node[1] for node in nodes(make_fx(model)(features())) if node[0] == "call_function"],
    "export": lambda m: sorted(node[1] for node in nodes(torch.export.export(m, (features(),)).graph_module)),
    "strict export": lambda m: sorted(
        node[1] for node in nodes(torch.export.export(m, (features(),), strict=True).graph_module)
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tool", FUNCTION_TOOLS)
def test_tool_sees_plain_functions(tool, training):
    plain, ours = (FUNCTION_TOOLS[tool](Functions(plain).train(training)) for plain in (True, False))
    assert plain == ours
    assert "mobilenet_ext" not in str(ours)


def test_functions_of_proxies():
    """The weights, and so the number of groups, are known when the graph runs."""
    model, x = Functions(plain=False).eval(), features()
    graph = torch.fx.symbolic_trace(model)
    assert sum("mobilenet_ext" in str(node.target) for node in graph.graph.nodes) == 0
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_traced_functions_compute_the_same(training):
    model = Functions(plain=False).train(training)
    twin, x = copy.deepcopy(model), features()
    traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
    traced.load_state_dict(model.state_dict())  # tracing ran it once
    torch.testing.assert_close(traced(x), twin(x), rtol=1e-4, atol=1e-4)
    for ours, expected in zip(traced.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def onnx() -> Iterator[Callable[[nn.Module, Tensor, bool], list[str]]]:
    loaded = pytest.importorskip("onnx")

    def export(model: nn.Module, x: Tensor, dynamo: bool) -> list[str]:
        if dynamo and importlib.util.find_spec("onnxscript") is None:
            pytest.skip("torch.onnx.export(dynamo=True) needs onnxscript")
        file = io.BytesIO()
        torch.onnx.export(model, (x,), file, dynamo=dynamo)
        return [node.op_type for node in loaded.load_from_string(file.getvalue()).graph.node]

    yield export


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(onnx, dynamo):
    plain, ours = (onnx(Network(convert).eval(), image(), dynamo) for convert in (as_plain, lambda module: module))
    assert plain == ours and "Conv" in ours
    plain, ours = (onnx(Functions(plain).eval(), features(), dynamo) for plain in (True, False))
    assert plain == ours and "Conv" in ours
