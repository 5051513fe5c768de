"""Training steps from recorded graphs (``recorded_graph``) against the same steps without: bit for bit the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graph import Graph, recorded
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import backends
from mobilenet_ext.train import EpochStats, RecipeError, RunOptions, StepGraph, TrainError, default_recipe, run_training
from mobilenet_ext.train.loop import train_one_epoch

BATCH, CLASSES = 4, 3


@pytest.fixture
def graphs() -> Iterator[list[Graph]]:
    with recorded() as graphs:
        yield graphs


def batches(count: int = 6, last: int = BATCH, size: int = 33, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [BATCH] * (count - 1) + [last]
    return [
        (
            torch.randn(n, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return mx.MobileNetV1(CLASSES, 0.125, dropout=dropout)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **options})


class Training:
    """A model and its optimizer, trained with and without graphs side by side."""

    def __init__(self, model: nn.Module, make: Callable[..., torch.optim.Optimizer] = sgd, **options: Any) -> None:
        self.models = model, copy.deepcopy(model)
        self.optimizers = [make(each) for each in self.models]
        self.told: list[str] = []
        self.step_graph = StepGraph(self.told.append)
        self.options = options

    def both(self, change: Callable[[nn.Module, torch.optim.Optimizer], object]) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            change(model, optimizer)

    def epoch(self, loader: list[tuple[Tensor, Tensor]], **options: Any) -> EpochStats:
        """An epoch of both; asserts that they are the same."""
        options = {**self.options, **options}
        state = torch.get_rng_state()
        with_graph, without = (
            (torch.set_rng_state(state), train_one_epoch(model, loader, optimizer, step_graph=graph, **options))[1]
            for model, optimizer, graph in zip(self.models, self.optimizers, (self.step_graph, None), strict=True)
        )
        for name in ("loss", "accuracy", "top5_accuracy", "images", "batches", "complete", "class_correct"):
            assert getattr(with_graph, name) == getattr(without, name), name
        self.assert_same()
        return with_graph

    def assert_same(self) -> None:
        a, b = self.models
        for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(left, right), name
        for left, right in zip(a.parameters(), b.parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None)
            assert left.grad is None or torch.equal(left.grad, right.grad)
        left, right = (optimizer.state_dict() for optimizer in self.optimizers)
        assert left["param_groups"] == right["param_groups"]
        for key, state in right["state"].items():
            assert all(
                torch.equal(left["state"][key][name], value) for name, value in state.items() if value is not None
            )


def test_epochs_with_a_shorter_last_batch_and_a_schedule(graphs: list[Graph]) -> None:
    training = Training(network())
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=4) for each in training.optimizers]
    losses = []
    for epoch in range(3):
        losses.append(training.epoch(batches(7, last=2, seed=epoch)).loss)
        for scheduler in schedulers:
            scheduler.step()
    assert len(set(losses)) == 3 and all(map(math.isfinite, losses))
    # The gradients once, from the third of 6 + 6 + 6 batches on; the optimizer's step from the second replay with a
    # learning rate on.
    gradients, *updates = graphs
    assert gradients.replays == 4 + 6 + 6
    assert [update.replays for update in updates] == [3, 5, 5]
    assert training.told == []


def test_a_learning_rate_that_changes_at_every_step(graphs: list[Graph]) -> None:
    training = Training(network())
    for optimizer in training.optimizers:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        optimizer.after_batch = schedule.step
    for _ in range(2):
        for loader in ([batch] for batch in batches()):
            training.epoch(loader)
            training.both(lambda model, optimizer: optimizer.after_batch())
    assert [graph.replays for graph in graphs] == [10]


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("foreach", [False, True])
def test_dropout_autocast_and_kinds_of_sgd(
    graphs: list[Graph], foreach: bool, momentum: float, amp_dtype: torch.dtype | None
) -> None:
    training = Training(
        network(dropout=0.4),
        lambda model: sgd(model, momentum=momentum, foreach=foreach, nesterov=momentum > 0),
        amp_dtype=amp_dtype,
        loss_function=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1, ignore_index=1),
    )
    for _ in range(2):
        training.epoch(batches())
    assert [graph.replays for graph in graphs] == [10, 9]


def test_on_batch_and_should_stop(graphs: list[Graph]) -> None:
    training = Training(network())
    seen: list[tuple[int, float]] = []
    stop = iter([*[False] * 6, True] * 2)
    stats = training.epoch(
        batches(9),
        on_batch=lambda running: seen.append((running.batches, running.loss)),
        should_stop=lambda: next(stop),
    )
    assert not stats.complete and seen[:6] == seen[6:] and len(set(seen)) == 6
    assert graphs[0].replays == 4


def test_resumed_from_a_state_dict(graphs: list[Graph]) -> None:
    """Loaded in place, or into the same optimizer, whose buffers are then others: the next steps use those."""
    training = Training(network())
    training.epoch(batches())
    state = copy.deepcopy((training.models[0].state_dict(), training.optimizers[0].state_dict()))
    first = training.epoch(batches())

    def restore(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))

    training.both(restore)
    again = training.epoch(batches())
    assert again.loss == first.loss
    assert [graph.replays for graph in graphs] == [16, 9, 5]


def test_adam(graphs: list[Graph]) -> None:
    """Its count of steps is on the host, where a replay would not see it: it runs as it is. Of all, ``capturable``
    moves it to the device; only there PyTorch accepts it."""
    training = Training(network(), lambda model: torch.optim.Adam(model.parameters(), lr=1e-3))
    for _ in range(2):
        training.epoch(batches())
    assert [graph.replays for graph in graphs] == [10]
    assert float(training.optimizers[0].state[training.models[0].classifier[1].weight]["step"]) == 12


CHANGES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "a setting": lambda model, optimizer: setattr(model.feature[1][1], "momentum", 0.3),
    "a module": lambda model, optimizer: model.feature[3].__setitem__(2, nn.ReLU6()),
    "a frozen parameter": lambda model, optimizer: model.feature[0][0].weight.requires_grad_(False),
    "other memory": lambda model, optimizer: model.feature[2].double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_captured_anew(graphs: list[Graph], change: str) -> None:
    training = Training(network())
    training.epoch(batches(4))
    training.both(CHANGES[change])
    training.epoch(batches(8))
    assert [graph.replays for graph in graphs if graph.replays > 1] == [2, 4, 3]
    assert training.told == []


def test_a_hook_sees_every_step(graphs: list[Graph]) -> None:
    training = Training(network())
    training.epoch(batches())
    seen: list[int] = []
    for watch in (
        lambda model: model.feature[5].register_forward_hook(lambda *_: seen.append(1)),
        lambda model: model.classifier[1].weight.register_hook(lambda grad: seen.append(1)),
        lambda model: model.classifier[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append(1)),
    ):
        handles = [watch(model) for model in training.models]
        training.epoch(batches(8))
        for handle in handles:
            handle.remove()
        assert len(seen) == 16
        seen.clear()
    training.optimizers[0].register_step_post_hook(lambda *_: seen.append(1))
    for _ in range(6):
        training.epoch(batches(8))
    assert len(seen) == 48 and graphs[-1].replays > 10
    assert len(training.told) == 1 and "hooks, or a forward of its own" in training.told[0]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network(dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 if float(x.sum()) > 0 else 2)


def cumulative() -> nn.Module:
    model = network()
    model.feature[4][1].momentum = None
    return model


REFUSED = {
    "counts": (Counting, "a module changes its attributes in each step"),
    "waits": (Waiting, "operation not permitted when stream is capturing"),
    "momentum None": (cumulative, "a BatchNorm with momentum=None reads on the host"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_runs_as_it_is_and_that_is_said_once(graphs: list[Graph], name: str) -> None:
    make, reason = REFUSED[name]
    training = Training(make())
    for _ in range(2):
        training.epoch(batches(9))
    assert sum(graph.replays for graph in graphs) == 0
    assert len(training.told) == 1 and f"training steps run without a CUDA graph: {reason}" in training.told[0]


def test_a_parameter_that_the_optimizer_does_not_have(graphs: list[Graph]) -> None:
    """Its gradients add up from step to step."""
    training = Training(network(), lambda model: sgd(model.feature))
    training.epoch(batches())
    assert not graphs and "is not the optimizer's" in training.told[0]


def test_steps_of_another_kind_in_between(graphs: list[Graph]) -> None:
    training = Training(network())
    training.epoch(batches(4))
    with backends.use("reference"):
        training.epoch(batches(1))
    training.epoch(batches(6))
    training.epoch(batches(6), amp_dtype=torch.bfloat16)
    with torch.autograd.set_detect_anomaly(True):
        training.epoch(batches(3))
    assert len(training.told) == 1 and "anomaly detection" in training.told[0]


def test_many_shapes_do_not_take_all_the_time_for_captures(graphs: list[Graph]) -> None:
    training = Training(network())
    for size in (33, 37, 41, 33, 37, 41):
        training.epoch(batches(5, size=size))
    assert len(graphs) == 4  # two of each kind


def test_a_scaler_decides_on_the_host(graphs: list[Graph]) -> None:
    training = Training(network())
    scalers = iter([torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)])
    stats = train_one_epoch(
        training.models[0], batches(), training.optimizers[0], scaler=next(scalers), step_graph=training.step_graph
    )
    assert not graphs and stats.batches == 6


def test_a_run_and_its_resumption(graphs: list[Graph], images: Path, tmp_path: Path) -> None:
    """As the command line trains: the history and ``last.pt`` are those of a run without graphs, also resumed."""
    settings = {"width": 0.125, "resolution": 40, "batch_size": 5, "lr": 0.05}  # 24 images: the last batch has 4
    recipe = default_recipe(str(images), epochs=4, **settings)
    plain = run_training(recipe, tmp_path / "plain", RunOptions(workers=0, cuda_graph=False))
    assert graphs == []
    whole = run_training(recipe, tmp_path / "whole", RunOptions(workers=0))
    assert [graph.replays for graph in graphs] == [2 + 3 * 4, 1, 3, 3, 3]
    with pytest.MonkeyPatch.context() as patch:
        original = mx.train.run._Run._one_epoch

        def one_epoch(run: Any, interrupt: Any) -> None:
            original(run, interrupt)
            interrupt.requested = run.epoch == 2

        patch.setattr(mx.train.run._Run, "_one_epoch", one_epoch)
        run_training(recipe, tmp_path / "resumed", RunOptions(workers=0, cuda_graph=True))
    resumed = run_training(recipe, tmp_path / "resumed", RunOptions(workers=0, cuda_graph=True), resume=True)
    columns = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    histories = [[[row[name] for name in columns] for row in run.history] for run in (plain, whole, resumed)]
    assert histories[0] == histories[1] == histories[2] and len(histories[0]) == 4
    first, *others = (
        torch.load(tmp_path / name / "last.pt", weights_only=False) for name in ("plain", "whole", "resumed")
    )
    for other in others:
        torch.testing.assert_close(other["model"], first["model"], rtol=0, atol=0)
        torch.testing.assert_close(other["optimizer"], first["optimizer"], rtol=0, atol=0)
        assert torch.equal(other["rng"]["cpu"], first["rng"]["cpu"])


def test_nothing_is_captured_on_a_cpu() -> None:
    training = Training(network())
    training.epoch(batches())
    assert training.told == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_unasked_a_run_captures_where_it_can(device: str, amp: str) -> None:
    recipe = default_recipe("digits", amp=amp)
    assert mx.train.run._captures(recipe, RunOptions(torch.device(device))) == (device == "cuda" and amp != "fp16")
    assert not mx.train.run._captures(recipe, RunOptions(torch.device(device), cuda_graph=False))


def test_the_run_says_where_it_cannot(tmp_path: Any) -> None:
    recipe = default_recipe("digits")
    with pytest.raises(TrainError, match="--cuda-graph: expected a CUDA device, got cpu"):
        run_training(recipe, tmp_path / "run", RunOptions(cuda_graph=True))
    gpu = RunOptions(torch.device("cuda"), cuda_graph=True)
    with pytest.raises(TrainError, match="--cuda-graph: expected --amp off or bf16, got fp16"):
        mx.train.run._captures(default_recipe("digits", amp="fp16"), gpu)
    assert not issubclass(TrainError, RecipeError)
