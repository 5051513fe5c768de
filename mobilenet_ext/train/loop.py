"""One epoch of training, and evaluation: plain functions for the recipe here and for anybody's own loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mobilenet_ext.train.errors import TrainError
from mobilenet_ext.train.step_graph import StepGraph

TOP_K = 5
NO_LABEL = -100  # what PyTorch's losses ignore if nothing else is said


@dataclasses.dataclass(frozen=True)
class EpochStats:
    """What one pass over a loader gave.

    Attributes:
        loss: mean over the targets, weighted as the loss function weights them; what it gives for all batches in one.
        accuracy: fraction of the targets that are a class and whose best class is right. A target that the loss
            function ignores does not count; where a target is the probabilities of classes, its best one does.
        top5_accuracy: fraction whose class is among the best five (among all, where there are fewer).
        images: how many there were, those with ignored targets included.
        batches: how many batches they came in.
        seconds: wall-clock time of the pass.
        complete: False where ``should_stop`` ended the pass.
        class_correct, class_images: per class, images whose best class is right, and images that count.
    """

    loss: float
    accuracy: float
    top5_accuracy: float
    images: int
    batches: int
    seconds: float
    complete: bool
    class_correct: tuple[int, ...]
    class_images: tuple[int, ...]

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class RunningStats:
    """Sums over the batches so far, kept on the device, so that adding to them never waits for it.

    Args:
        loss_function: what the losses come from. Of a module its ``reduction``, ``ignore_index`` and class weights are
            obeyed; anything else is taken to give the mean over the targets that are a class.
    """

    def __init__(self, loss_function: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.images = self.batches = 0
        self._summed = getattr(loss_function, "reduction", "mean") == "sum"
        self._ignored = getattr(loss_function, "ignore_index", NO_LABEL)
        # Of these alone a mean over weighted classes is divided by the weights, not by the number of targets.
        weighted = isinstance(loss_function, (nn.CrossEntropyLoss, nn.NLLLoss))
        self._class_weights = loss_function.weight if weighted else None
        self._sums: Tensor | None = None  # [2]: losses, and the weights that they are divided by
        self._hits: Tensor | None = None  # [3, classes]: right at first, right among the best five, targets
        self._start = time.perf_counter()

    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Adds a batch: its loss, ``outputs [N, classes]`` and ``labels``, ``[N]`` or the probabilities
        ``[N, classes]``."""
        self.add_measured(self.measure(loss, outputs, labels), len(labels))

    def measure(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of a batch, for ``add_measured``, as new tensors; nothing else changes."""
        outputs, classes = outputs.detach(), outputs.shape[1]
        if labels.is_floating_point():
            labels, counted = labels.argmax(dim=1), torch.ones(len(labels), dtype=torch.bool, device=labels.device)
            weight = counted.sum().double()
        else:
            # A target that is no class has passed the loss function, which therefore ignores it.
            counted = (labels >= 0) & (labels < classes) & (labels != self._ignored)
            labels = labels.long().masked_fill(~counted, 0)
            weight = (counted if self._class_weights is None else self._class_weights[labels] * counted).sum().double()
        total = loss.detach().double() * (1 if self._summed else weight)
        # Of no targets the mean is NaN, which says nothing about the others.
        sums = torch.stack([total.masked_fill(weight == 0, 0), weight])
        best = outputs.topk(min(TOP_K, classes), dim=1).indices
        right = (best == labels[:, None]) & counted[:, None]
        rows = torch.stack([right[:, 0], right.any(dim=1), counted])
        # Integers, so the order in which scatter adds them does not matter.
        hits = torch.zeros(3, classes, dtype=torch.int64, device=outputs.device)
        return sums, hits.scatter_add_(1, labels.expand(3, -1), rows.long())

    def add_measured(self, measured: tuple[Tensor, Tensor], images: int) -> None:
        """Adds a batch of so many images."""
        if self._sums is None:
            self._sums, self._hits = (each.clone() for each in measured)
        else:
            self._sums += measured[0]
            self._hits += measured[1]
        self.images += images
        self.batches += 1

    @property
    def loss(self) -> float:
        """Mean loss so far (waits for the device)."""
        return _ratio(*self._sums.tolist()) if self._sums is not None else float("nan")

    @property
    def accuracy(self) -> float:
        """Accuracy so far (waits for the device)."""
        if self._hits is None:
            return float("nan")
        right, _, counted = self._hits.sum(dim=1).tolist()
        return _ratio(right, counted)

    @property
    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self._start)

    def finish(self, complete: bool) -> EpochStats:
        loss = self.loss  # waits for the device, so the time below is that of the work
        hits = self._hits.tolist() if self._hits is not None else [[], [], []]
        right, among_best, counted = map(sum, hits)
        return EpochStats(
            loss=loss,
            accuracy=_ratio(right, counted),
            top5_accuracy=_ratio(among_best, counted),
            images=self.images,
            batches=self.batches,
            seconds=time.perf_counter() - self._start,
            complete=complete,
            class_correct=tuple(hits[0]),
            class_images=tuple(hits[2]),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    prepare: Callable[[Tensor], Tensor] | None = None,
    amp_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    step_graph: StepGraph | None = None,
    on_batch: Callable[[RunningStats], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> EpochStats:
    """Trains for one pass over a loader.

    Args:
        model: on ``device``; put into training mode. ``model(images)`` gives ``[N, classes]``.
        loader: gives batches ``(images, labels)``: what ``prepare`` (or the model) takes, and int64 ``[N]`` or, where
            the loss function takes them, probabilities ``[N, classes]``.
        optimizer: over the model's parameters.
        loss_function: ``(outputs, labels) -> scalar``; ``nn.CrossEntropyLoss()`` if None. It may be a mean or a sum,
            ignore targets and weight classes, see ``RunningStats``.
        device: where the batches go.
        prepare: makes the model's input of the loader's images, for example ``Normalise``; they go to the device
            unchanged if None.
        amp_dtype: autocast to this dtype; None for none.
        scaler: scales the loss for float16; None for none.
        step_graph: replays the steps on a GPU from CUDA graphs, see ``StepGraph``; one for all passes of a training.
            None, or with a ``scaler``, which decides on the host: every step runs as it is.
        on_batch: called after each batch.
        should_stop: asked before each batch; True ends the pass there.

    Returns:
        The statistics of the pass. Loss and accuracy are those of the training batches as they came, with the
        weights of that moment.

    Raises:
        TrainError: a batch holds a label that the model has no output for; the outputs are not ``[N, classes]``, or the
            loss is no scalar.
    """
    loss_function = loss_function or nn.functional.cross_entropy  # the same one in every pass, for ``step_graph``
    model.train()
    running, complete = RunningStats(loss_function), True

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs, loss = _forward(model, images, labels, loss_function, amp_dtype)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return running.measure(loss, outputs, labels)

    for images, labels in loader:
        if should_stop is not None and should_stop():
            complete = False
            break
        images, labels = _to_device(images, labels, device, prepare)
        if step_graph is None or scaler is not None:
            optimizer.zero_grad(set_to_none=True)
            measured = compute(images, labels)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        else:
            modules = [each for each in (model, loss_function) if isinstance(each, nn.Module)]
            measured = step_graph.step(
                compute, optimizer, images, labels, modules=modules, others=(loss_function, amp_dtype)
            )
        running.add_measured(measured, len(labels))
        if on_batch is not None:
            on_batch(running)
    return running.finish(complete)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    prepare: Callable[[Tensor], Tensor] | None = None,
    amp_dtype: torch.dtype | None = None,
    on_batch: Callable[[RunningStats], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> EpochStats:
    """Measures loss and accuracy over a loader, in evaluation mode and without gradients.

    The arguments, the result and the errors are those of ``train_one_epoch``; the model is left in evaluation mode.
    """
    loss_function = loss_function or nn.CrossEntropyLoss()
    model.eval()
    running, complete = RunningStats(loss_function), True
    for images, labels in loader:
        if should_stop is not None and should_stop():
            complete = False
            break
        images, labels = _to_device(images, labels, device, prepare)
        outputs, loss = _forward(model, images, labels, loss_function, amp_dtype)
        running.add(loss, outputs, labels)
        if on_batch is not None:
            on_batch(running)
    return running.finish(complete)


def _to_device(
    images: Tensor, labels: Tensor, device: torch.device | str, prepare: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    images = prepare(images) if prepare is not None else images.to(device, non_blocking=True)
    return images, labels.to(device, non_blocking=True)


def _forward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    amp_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        outputs = model(images)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TrainError(f"model: expected outputs [N, classes], got {got}")
        if labels.shape != (outputs.shape if labels.is_floating_point() else outputs.shape[:1]):
            raise TrainError(
                f"labels: expected [N] or probabilities {list(outputs.shape)}, got {list(labels.shape)}, {labels.dtype}"
            )
        try:
            loss = loss_function(outputs, labels)
        except IndexError as error:  # which labels are accepted is the loss function's to say; on a CPU it does so thus
            classes = outputs.shape[1]
            wrong = labels[
                ((labels < 0) | (labels >= classes)) & (labels != getattr(loss_function, "ignore_index", NO_LABEL))
            ]
            if not len(wrong):
                raise
            raise TrainError(f"a label is {int(wrong[0])}, but the model has {classes} outputs") from error
    if loss.dim():
        raise TrainError(f"loss_function: expected a scalar, got {list(loss.shape)}; reduction must be 'mean' or 'sum'")
    return outputs, loss


def count_trainable_parameters(model: nn.Module) -> int:
    """The number of values in the parameters that have ``requires_grad``; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on.

    Args:
        name: ``"auto"`` for the GPU if PyTorch can use one and the CPU otherwise, or a device such as ``"cpu"``,
            ``"cuda"`` or ``"cuda:1"``.

    Raises:
        TrainError: it is a GPU that PyTorch cannot use.
        ValueError: ``name`` is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            without = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
            raise TrainError(f"device {name} cannot be used: this PyTorch {without}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise TrainError(f"device {name} cannot be used: there are {torch.cuda.device_count()} GPUs")
    return device
