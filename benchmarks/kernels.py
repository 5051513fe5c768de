"""Layer by layer: our kernel op, and PyTorch's convolution, BatchNorm and ReLU for the same layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comparison import Effort
from benchmarks.network import Layer, Workload, layers_of
from benchmarks.peers import OURS
from benchmarks.timing import KERNEL_CLEARS, Call, interleave
from mobilenet_ext import backends, ops
from mobilenet_ext.contract import NO_PADDING, Act

PASSES = ("forward", "backward", "inference")
# Relative errors against float64 of the same inputs: a peer in 16 bits rounds what we keep in float32.
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
EPS = 1e-5


def compare_layers(
    work: Workload, pass_: str, peers: Sequence[str], effort: Effort, others: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """A result for each distinct layer of a pass, with ``count``, how often the network has it; rows as in
    ``comparison.compare_runners``. A layer that fails is a row that says how, and ends nothing.

    ``others``: more backends, with a row ``mobilenet_ext, BACKEND`` each. They take no turns with the first, since who
    chooses a backend at every call would time the choice too.
    """
    layers = layers_of(work.width, work.resolution, pass_)
    for layer in dict.fromkeys(layers):
        print(f"  {pass_} {layer.name}", file=sys.stderr, flush=True)
        rows = _time((OURS, *peers), layer, pass_, work, effort)
        for backend in others:
            with backends.use(backend):
                (row,) = _time((OURS,), layer, pass_, work, effort)
            rows.append({**row, "runner": f"{OURS}, {backend}"})
        yield {
            "workload": {**work._asdict(), "pass": pass_, "layer": layer.name},
            "count": layers.count(layer),
            "bytes": layer.bytes_moved(pass_, work.batch, work.torch_dtype.itemsize),
            "operations": layer.operations(pass_, work.batch),
            "rows": rows,
        }


def _time(names: Sequence[str], layer: Layer, pass_: str, work: Workload, effort: Effort) -> list[dict[str, Any]]:
    """A row for each runner."""
    calls, rows = {}, []
    for name in names:
        row: dict[str, Any] = {"runner": name, "seconds": []}
        rows.append(row)
        try:
            call, row["error"] = RUNNERS[name](layer, pass_, work)
            if not row["error"] <= ALLOWED[work.dtype]:
                row["refused"] = f"wrong output: relative error {row['error']:.1e}"
                continue
            call()
            if work.device == "cuda":
                torch.cuda.synchronize()  # so that its error is this row's
            calls[name] = call
        except Exception as error:
            row["refused"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    samples = interleave(calls, work.device, effort.rounds, effort.burst_s, pause_s=0.1, clears=KERNEL_CLEARS)
    for row in rows:
        row["seconds"] = samples.get(row["runner"], [])
    return rows


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# --- ours -------------------------------------------------------------------------------------------------------------


def kernel_call(layer: Layer, pass_: str, work: Workload) -> Callable[[], Any]:
    """The layer's kernel op on random data, as a step of the network calls it."""
    kind, k, n, stride, size = layer
    dtype, batch = work.torch_dtype, work.batch
    # Random numbers from the device itself: one generator on the CPU would take longer than all that is timed.
    source_of = {"generator": torch.Generator(work.device).manual_seed(0), "device": work.device}

    def activation(channels: int, size: int) -> Tensor:
        return torch.randn(batch, size, size, channels, dtype=dtype, **source_of).permute(0, 3, 1, 2)

    def weight(*shape: int) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3]
        return (torch.randn(shape, **source_of) / fan_in**0.5).to(dtype)

    def rows(count: int, channels: int) -> Tensor:
        return torch.rand(count, channels, **source_of) + 0.5

    u, bn_u = activation(k, size), rows(5, k)
    if kind == "block":
        return bind(
            ops.block_inference,
            *(u, bn_u, Act.RELU, weight(k, 1, 3, 3), stride, (1, 1, 1, 1), rows(5, n), Act.RELU, weight(n, k, 1, 1)),
        )
    if kind == "pool":
        if pass_ == "forward":
            return bind(ops.norm_act_forward, u, bn_u, Act.RELU, True)
        return bind(ops.norm_act_backward, activation(k, 1), u, bn_u, Act.RELU, True, True)
    filters = {"dense": (n, k, 3, 3), "depthwise": (n, 1, 3, 3), "pointwise": (n, k, 1, 1)}[kind]
    convolution = (weight(*filters), stride, NO_PADDING if kind == "pointwise" else (1, 1, 1, 1))
    is_first = kind == "dense"  # of an image, which needs no gradient
    source = (u, None, Act.LINEAR) if is_first else (u, bn_u, Act.RELU)
    if pass_ == "inference":
        return bind(ops.INFERENCE[kind], u, rows(5, n), Act.RELU, *convolution)
    if pass_ == "forward":
        return bind(ops.FORWARD[kind], *source, *convolution, *rows(2, n).unbind(), EPS, True)
    output = (activation(n, layer.out_size), activation(n, layer.out_size), rows(6, n))
    return bind(ops.BACKWARD[kind], *output, *source, not is_first, *convolution, not is_first, True)


def bind(op: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: op(*args)


def _ours(layer: Layer, pass_: str, work: Workload) -> tuple[Call, float]:
    # One image is compared: the reference backend in float32 is slow.
    call = kernel_call(layer, pass_, work._replace(batch=1))

    def outputs() -> tuple[Tensor, ...]:
        result = call()
        return result if isinstance(result, tuple) else (result,)

    actual = outputs()
    with backends.use("reference"):
        expected = outputs()
    pairs = zip(actual, expected, strict=True)
    error = max(_error(a, e) for a, e in pairs if e.numel() and e.dim() == 4)
    return kernel_call(layer, pass_, work), error


# --- PyTorch's --------------------------------------------------------------------------------------------------------


def _modules(layer: Layer) -> nn.Sequential:
    """The layer as a user of plain PyTorch has it. Our kernel normalises its input and PyTorch's modules their output:
    one BatchNorm and one ReLU a convolution either way."""
    torch.manual_seed(0)
    kind, k, n, stride, _ = layer

    def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    if kind == "block":
        return nn.Sequential(*unit(k, k, 3, stride, k), *unit(k, n, 1, 1, 1))
    if kind == "pool":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*unit(k, n, 1 if kind == "pointwise" else 3, stride, k if kind == "depthwise" else 1))


class _Module:
    """One pass of plain modules. 16 bits by autocast in training, in the weights for inference, as users do."""

    def __init__(self, module: nn.Module, x: Tensor, pass_: str, dtype: torch.dtype, compiled: bool) -> None:
        self.pass_, self.dtype = pass_, dtype
        self.module = module.train(pass_ != "inference")
        if pass_ == "inference":
            self.module.requires_grad_(False).to(dtype)
            x = x.to(dtype)
        if compiled:
            torch._dynamo.reset()  # a batch of another size before would have it compiled for any size
        self.forward = torch.compile(self.module) if compiled else self.module
        self.x = x.to(dtype).requires_grad_(pass_ == "backward" and x.shape[1] != 3)
        if pass_ == "backward":
            self.y = self._run()
            self.grad = torch.randn_like(self.y)
            self.wanted = [t for t in (self.x, *self.module.parameters()) if t.requires_grad]

    def _run(self) -> Tensor:
        with torch.autocast(
            self.x.device.type, self.dtype, enabled=self.pass_ != "inference" and self.dtype.itemsize == 2
        ):
            return self.forward(self.x)

    def __call__(self) -> Any:
        if self.pass_ == "backward":
            return torch.autograd.grad(self.y, self.wanted, self.grad, retain_graph=True)
        with torch.set_grad_enabled(self.pass_ == "forward"):
            return self._run()


def _theirs(memory_format: torch.memory_format, compiled: bool = False):
    def make(layer: Layer, pass_: str, work: Workload) -> tuple[Call, float]:
        module = _modules(layer).to(device=work.device, memory_format=memory_format)
        exact = _modules(layer).to(work.device).double().train(pass_ != "inference")
        x = torch.randn(work.batch, layer.in_channels, layer.size, layer.size, device=work.device)
        with torch.no_grad():
            expected = exact(x[:2].double())
        x = x.contiguous(memory_format=memory_format)
        few = x[:2].contiguous(memory_format=memory_format)
        # Of a backward pass its forward is compared.
        compared = "inference" if pass_ == "inference" else "forward"
        check = _Module(module, few, compared, work.torch_dtype, compiled)
        error = _error(check().detach(), expected)
        return _Module(module, x, pass_, work.torch_dtype, compiled), error

    return make


RUNNERS: dict[str, Callable[[Layer, str, Workload], tuple[Call, float]]] = {
    OURS: _ours,
    "eager NCHW": _theirs(torch.contiguous_format),
    "eager channels_last": _theirs(torch.channels_last),
    "torch.compile": _theirs(torch.channels_last, compiled=True),
}
