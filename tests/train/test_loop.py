import math

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
