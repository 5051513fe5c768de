import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobilenet_ext.train import TrainError, choose_device, count_trainable_parameters, evaluate, train_one_epoch


class Fixed(nn.Module):
    """Looks the outputs up: image ``i`` (a number) gives row ``i``."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[images.long()]


def batches(labels: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.arange(float(len(labels)))
    return list(zip(images.split(size), torch.tensor(labels).split(size), strict=True))


def linear_batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 8, 5, generator=generator)
    return [(x, (x[:, 0] > 0).long()) for x in images]


def test_evaluate_counts_images_not_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(7, 8, generator=generator), [0, 1, 2, 3, 4, 5, 5]
    stats = evaluate(Fixed(rows), batches(labels, 3))  # the last batch has one image
    target = torch.tensor(labels)
    assert stats.loss == pytest.approx(float(nn.functional.cross_entropy(rows.double(), target)), rel=1e-6)
    assert stats.accuracy == pytest.approx(float((rows.argmax(1) == target).double().mean()))
    ranks = (rows > rows.gather(1, target[:, None])).sum(1)
    assert stats.top5_accuracy == pytest.approx(float((ranks < 5).double().mean()))
    assert (stats.images, stats.batches, stats.complete) == (7, 3, True)
    assert stats.class_images == (1, 1, 1, 1, 1, 2, 0, 0)
    assert sum(stats.class_correct) == round(stats.accuracy * 7)
    assert stats.seconds > 0 and stats.images_per_second == pytest.approx(7 / stats.seconds)


def test_top5_with_fewer_classes_is_one() -> None:
    assert evaluate(Fixed(torch.eye(3)), batches([2, 0, 1], 2)).top5_accuracy == 1.0


def test_evaluate_neither_trains_nor_records_gradients() -> None:
    model = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = evaluate(model, linear_batches()), evaluate(model, linear_batches())
    assert first.loss == second.loss and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_train_one_epoch_is_the_plain_loop() -> None:
    models = [nn.Linear(5, 2), nn.Linear(5, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    losses, right = [], 0
    for images, labels in linear_batches():
        optimizers[0].zero_grad()
        outputs = models[0](images)
        loss = nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizers[0].step()
        losses.append(loss.item())
        right += int((outputs.argmax(1) == labels).sum())
    stats = train_one_epoch(models[1].eval(), linear_batches(), optimizers[1])
    assert models[1].training
    assert torch.equal(models[0].weight, models[1].weight)
    assert stats.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert stats.accuracy == right / 48


def test_the_loss_function_and_preparation_are_used() -> None:
    model = nn.Linear(5, 2)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.3)
    stats = evaluate(model, linear_batches(1), smoothed, prepare=lambda images: images * 2)
    images, labels = linear_batches(1)[0]
    assert stats.loss == pytest.approx(smoothed(model(images * 2), labels).item(), rel=1e-6)


def test_should_stop_ends_the_pass_between_batches() -> None:
    seen: list[int] = []
    model = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"on_batch": lambda running: seen.append(running.batches), "should_stop": lambda: len(seen) >= 2}
    stats = train_one_epoch(model, linear_batches(), optimizer, **options)
    assert (stats.batches, stats.images, stats.complete) == (2, 16, False)
    assert math.isfinite(stats.loss)


def test_a_pass_without_batches() -> None:
    stats = evaluate(nn.Linear(5, 2), linear_batches(), should_stop=lambda: True)
    assert (stats.images, stats.complete) == (0, False) and math.isnan(stats.loss) and math.isnan(stats.accuracy)


def test_autocast_reaches_the_model() -> None:
    seen: list[torch.dtype] = []
    model = nn.Linear(5, 2)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for dtype in (None, torch.bfloat16, torch.float16):
        evaluate(model, linear_batches(1), amp_dtype=dtype)
    assert seen == [torch.float32, torch.bfloat16, torch.float16]


def test_a_scaler_skips_steps_that_overflow() -> None:
    model = nn.Linear(5, 2)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    train_one_epoch(model, [(x * 1e3, y) for x, y in linear_batches(1)], optimizer, scaler=scaler)
    assert torch.equal(model.weight, before) and scaler.get_scale() < 3e38
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_one_epoch(model, linear_batches(1), optimizer, scaler=scaler)
    assert not torch.equal(model.weight, before)


def test_labels_without_an_output_are_refused() -> None:
    with pytest.raises(TrainError, match="a label is 2, but the model has 2 outputs"):
        evaluate(nn.Linear(5, 2), [(torch.zeros(1, 5), torch.tensor([2]))])


def test_count_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 2, bias=False))
    assert count_trainable_parameters(model) == 16
    model[0].requires_grad_(False)
    assert count_trainable_parameters(model) == 4
    model.append(model[1])
    assert count_trainable_parameters(model) == 4


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="'nonsense'"):
        choose_device("nonsense")
    with pytest.raises(TrainError, match="device cuda:99 cannot be used: "):
        choose_device("cuda:99")


LOSSES = {
    "default": nn.CrossEntropyLoss(),
    "ignored": nn.CrossEntropyLoss(ignore_index=-100),
    "ignored beyond the classes": nn.CrossEntropyLoss(ignore_index=255),
    "ignored class": nn.CrossEntropyLoss(ignore_index=1),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 3.0, 1.0, 0.0])),
    "weighted, smoothed, ignored class": nn.CrossEntropyLoss(
        weight=torch.tensor([0.2, 3.0, 1.0, 0.5]), label_smoothing=0.2, ignore_index=2
    ),
    "sum": nn.CrossEntropyLoss(reduction="sum", ignore_index=0),
    "weighted sum": nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([0.2, 3.0, 1.0, 0.5])),
    "function": lambda outputs, labels: nn.functional.cross_entropy(outputs, labels, ignore_index=77),
    "margin": nn.MultiMarginLoss(weight=torch.tensor([0.2, 3.0, 1.0, 0.5])),
}
IGNORED = {"default": -100, "ignored": -100, "ignored beyond the classes": 255, "function": 77}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("passing", [evaluate, train_one_epoch])
def test_the_loss_is_that_of_all_batches_in_one(name: str, passing: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(13, 4, generator=generator)
    labels = torch.randint(4, (13,), generator=generator)
    labels[[1, 2, 3, 8]] = IGNORED.get(name, 0)  # batches of 3, 3, 2, 4, 1 targets, or 1, 2, 2, 3, 1
    loss_function, counted = LOSSES[name], torch.ones(13, dtype=torch.bool)
    if not isinstance(loss_function, nn.MultiMarginLoss):
        counted = labels != getattr(loss_function, "ignore_index", IGNORED.get(name))
    whole = float(loss_function(rows, labels))
    if getattr(loss_function, "reduction", "mean") == "sum":
        weight = loss_function.weight
        whole /= float(weight[labels].sum() if weight is not None else counted.sum())
    sizes = [3, 3, 2, 4, 1]
    loader = list(zip(torch.arange(13.0).split(sizes), labels.split(sizes), strict=True))
    model = Fixed(rows.clone())
    more = [torch.optim.SGD(model.parameters(), lr=0.0)] if passing is train_one_epoch else []
    stats = passing(model, loader, *more, loss_function)
    assert stats.loss == pytest.approx(whole, rel=1e-5)
    right = (rows.argmax(1) == labels) & counted
    assert stats.accuracy == pytest.approx(int(right.sum()) / int(counted.sum()))
    assert stats.class_images == tuple(torch.bincount(labels[counted], minlength=4).tolist())
    assert stats.class_correct == tuple(torch.bincount(labels[right], minlength=4).tolist())
    assert (stats.images, stats.batches) == (13, 5)


def test_probabilities_of_classes_as_targets() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, labels = torch.randn(7, 4, generator=generator), torch.rand(7, 4, generator=generator).softmax(1)
    loader = list(zip(torch.arange(7.0).split(3), labels.split(3), strict=True))
    for loss_function in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]))):
        stats = evaluate(Fixed(rows), loader, loss_function)
        assert stats.loss == pytest.approx(float(loss_function(rows, labels)), rel=1e-5)
        assert stats.accuracy == pytest.approx(float((rows.argmax(1) == labels.argmax(1)).double().mean()))


def test_a_batch_of_ignored_targets_alone_changes_no_statistics() -> None:
    images, labels = linear_batches(1)[0]
    nothing = (images, torch.full_like(labels, -100))
    model = nn.Linear(5, 2)
    one, three = evaluate(model, [(images, labels)]), evaluate(model, [nothing, (images, labels), nothing])
    assert (three.loss, three.accuracy, three.class_images) == (one.loss, one.accuracy, one.class_images)
    assert (three.images, three.batches) == (24, 3)
    empty = evaluate(model, [nothing])
    assert math.isnan(empty.loss) and math.isnan(empty.accuracy) and math.isnan(empty.top5_accuracy)
    before = model.weight.detach().clone()
    train_one_epoch(model, [nothing], torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, before)


def test_small_integers_as_labels() -> None:
    images, labels = linear_batches(1)[0]
    model = nn.Linear(5, 2)
    assert evaluate(model, [(images, labels.to(torch.uint8))]).accuracy == evaluate(model, [(images, labels)]).accuracy


@pytest.mark.parametrize(("label", "loss"), [(2, nn.CrossEntropyLoss(ignore_index=3)), (-1, nn.CrossEntropyLoss())])
def test_labels_that_are_neither_a_class_nor_ignored_are_refused(label: int, loss: nn.Module) -> None:
    labels = torch.tensor([0, loss.ignore_index, label])
    with pytest.raises(TrainError, match=f"a label is {label}, but the model has 2 outputs"):
        evaluate(nn.Linear(5, 2), [(torch.zeros(3, 5), labels)], loss)


def test_what_is_no_classification_is_refused_before_a_step() -> None:
    images, labels = linear_batches(1)[0]
    model = nn.Linear(5, 2)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), model.weight.detach().clone()
    with pytest.raises(TrainError, match=r"loss_function: expected a scalar, got \[8\]"):
        train_one_epoch(model, [(images, labels)], optimizer, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(TrainError, match=r"labels: expected \[N\] or probabilities \[8, 2\], got \[8, 1\]"):
        train_one_epoch(model, [(images, labels[:, None])], optimizer)
    with pytest.raises(TrainError, match=r"model: expected outputs \[N, classes\], got \[8, 2, 1\]"):
        train_one_epoch(nn.Sequential(model, nn.Unflatten(1, (2, 1))), [(images, labels)], optimizer)
    assert torch.equal(model.weight, before)
