"""Training steps and frozen models from real CUDA graphs: bit for bit what they give without."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from test_reproducible import assert_same_bits
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext.train import RunOptions, StepGraph, default_recipe, run_training, train_one_epoch

BATCH, CLASSES, SIZE = 16, 10, 64


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return mx.MobileNetV1(CLASSES, 0.25, dropout=dropout).to("cuda", memory_format=torch.channels_last)


def batches(count: int = 7, last: int = 5, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
        for n in (*[BATCH] * (count - 1), last)
    ]


def prepare(images: Tensor) -> Tensor:
    return images.to("cuda", memory_format=torch.channels_last)


def train(
    model: nn.Module,
    step_graph: StepGraph | None,
    amp_dtype: torch.dtype | None = None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **settings: Any,
) -> tuple[list[Any], list[Tensor]]:
    """Two epochs: what they say, and all tensors after them."""
    torch.cuda.manual_seed(7)
    optimizer = make(model.parameters(), lr=0.05, **settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    said = []
    for epoch in range(2):
        stats = train_one_epoch(
            model, batches(seed=epoch), optimizer, device="cuda", prepare=prepare, amp_dtype=amp_dtype,
            step_graph=step_graph,
        )  # fmt: skip
        said.append((stats.loss, stats.accuracy, stats.class_correct, stats.images))
        scheduler.step()
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    gradients = [p.grad for p in model.parameters()]
    return said, [*model.state_dict().values(), *gradients, *state, torch.cuda.get_rng_state()]


def assert_same_training(model: nn.Module, told: list[str], **options: Any) -> StepGraph:
    step_graph, twin = StepGraph(told.append), copy.deepcopy(model)
    said, tensors = train(model, step_graph, **options)
    expected_said, expected = train(twin, None, **options)
    assert said == expected_said
    assert_same_bits(tensors, expected)
    return step_graph


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9, "weight_decay": 1e-3},
    "fused": {"momentum": 0.9, "fused": True},
    "Adam": {"make": torch.optim.Adam},
    "capturable Adam": {"make": torch.optim.Adam, "capturable": True},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_training(backend: str, amp_dtype: torch.dtype | None, optimizer: str) -> None:
    told: list[str] = []
    model = network(dropout=0.3)
    step_graph = assert_same_training(model, told, amp_dtype=amp_dtype, **OPTIMIZERS[optimizer])
    assert told == [] and step_graph._gradients is not None
    assert (step_graph._update is None) == (optimizer == "Adam")


class Waiting(nn.Module):
    """Waits for the device where its second half begins."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = network(dropout=0.3), nn.Linear(CLASSES, CLASSES).cuda()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.last(nn.functional.dropout(x, 0.2) if float(x.sum().detach()) > -1e9 else x)


def test_a_capture_that_fails_does_no_harm(backend: str) -> None:
    """Nor to random numbers, to the current stream, to memory that is freed later, or to a capture after it."""
    told: list[str] = []
    stream = torch.cuda.current_stream()
    assert_same_training(Waiting(), told)
    assert len(told) == 1 and told[0].startswith("training steps run without a CUDA graph: ")
    assert torch.cuda.current_stream() == stream
    told.clear()
    assert assert_same_training(network(dropout=0.3), told)._gradients is not None and told == []


def test_a_run_and_its_resumption(backend: str, tmp_path: Path) -> None:
    """The recipe, with threads that pin memory while a step is captured."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    recipe = default_recipe("digits", epochs=2, batch_size=128)
    options = {"device": torch.device("cuda", 0), "workers": 2}
    histories = {}
    for name, cuda_graph in (("graph", True), ("plain", False)):
        result = run_training(recipe, tmp_path / name, RunOptions(**options, cuda_graph=cuda_graph))
        histories[name] = [(row["train_loss"], row["val_loss"], row["val_accuracy"]) for row in result.history]
    assert histories["graph"] == histories["plain"]
    states = [torch.load(tmp_path / name / "last.pt", weights_only=False) for name in histories]
    assert_same_bits(*([*state["model"].values()] for state in states))
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_frozen(backend: str, dtype: torch.dtype) -> None:
    model = plain.randomise_(network()).to(dtype)
    frozen, expected = mx.freeze(model, cuda_graph=True), mx.freeze(model)
    outputs: list[tuple[Tensor, Tensor]] = []
    for _ in range(4):
        for n in (1, BATCH):
            x = torch.randn(n, 3, SIZE, SIZE, device="cuda", dtype=dtype)
            outputs.append((frozen(x), expected(x)))
            with torch.inference_mode():
                outputs.append((frozen(x), expected(x)))
    for model in (frozen, expected):
        model.classifier[1].bias.add_(1)
    x = torch.randn(1, 3, SIZE, SIZE, device="cuda", dtype=dtype)
    outputs += [(frozen(x), expected(x)) for _ in range(4)]
    assert_same_bits(*([pair[i] for pair in outputs] for i in (0, 1)))
    kept = frozen.plans._graphs._kept
    assert len(kept) == 2 and not frozen.plans._graphs._broken


def test_frozen_on_streams_of_several_threads(backend: str) -> None:
    model = plain.randomise_(network())
    frozen, expected = mx.freeze(model, cuda_graph=True), mx.freeze(model)
    xs = [torch.randn(BATCH, 3, SIZE, SIZE, device="cuda") for _ in range(3)]
    wanted = [expected(x) for x in xs]
    outputs: list[list[Tensor]] = [[] for _ in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            outputs[i] = [frozen(xs[i]) for _ in range(30)]
        streams[i].synchronize()

    for i in range(len(xs)):
        work(i)
        assert_same_bits(outputs[i], [wanted[i]] * 30)
    assert len(frozen.plans._graphs._kept) == 3
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(outputs, wanted, strict=True):
        assert_same_bits(got, [want] * 30)


class WaitingLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 if float(x.sum()) > 0 else 2)


def test_frozen_with_a_module_that_waits(backend: str) -> None:
    torch.manual_seed(3)
    model = plain.randomise_(mx.nn.FusedSequential(mx.nn.DepthwiseSeparableConv(8, 8), WaitingLayer())).cuda()
    frozen, x = mx.freeze(model, cuda_graph=True), torch.randn(2, 8, 20, 20, device="cuda")
    first = frozen(x)
    with pytest.warns(UserWarning, match="a frozen model runs without CUDA graphs"):
        second = frozen(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits([first, first], [second, frozen(x)])
