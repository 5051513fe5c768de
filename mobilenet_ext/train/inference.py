"""What a checkpoint is good for: measuring it on validation images, and classifying image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mobilenet_ext.train.checkpoint import load_checkpoint, load_weights
from mobilenet_ext.train.decoding import decode_image
from mobilenet_ext.train.interrupt import Interrupt
from mobilenet_ext.train.loader import default_workers
from mobilenet_ext.train.loop import EpochStats, evaluate
from mobilenet_ext.train.model import AMP_DTYPES, build_model
from mobilenet_ext.train.recipe import Recipe
from mobilenet_ext.train.report import Progress
from mobilenet_ext.train.run import RunOptions
from mobilenet_ext.train.sources import make_loader, make_transform, open_sources
from mobilenet_ext.train.transforms import Normalise


def load_model(
    checkpoint: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[nn.Module, Recipe, list[str]]:
    """Builds the model of a checkpoint.

    Returns:
        The model in evaluation mode on ``device``, the recipe it was trained with, and its class names.

    Raises:
        TrainError: the checkpoint is missing, damaged, or something else; the library of its model is not installed.
    """
    content = load_checkpoint(checkpoint)
    recipe, classes = content["config"], content["classes"]
    model = build_model(recipe, len(classes), torch.device(device))
    load_weights(model, content, checkpoint)
    return model.eval(), recipe, classes


def evaluate_checkpoint(
    checkpoint: str | os.PathLike[str], options: RunOptions, *, data: str | None = None, batch_size: int | None = None
) -> tuple[EpochStats, float, list[str]]:
    """Measures a checkpoint on validation images, at the resolution and precision it was trained with.

    Args:
        checkpoint: the file.
        options: where and how.
        data: other data than it was trained on, as ``Recipe.data``; the classes must be the same.
        batch_size: other than in training.

    Returns:
        The statistics, the label smoothing of their loss (the recipe's, as in training), and the class names.

    Raises:
        TrainError: the checkpoint or the data cannot be used.
        KeyboardInterrupt: Ctrl-C.
    """
    model, recipe, classes = load_model(checkpoint, options.device)
    changed: dict[str, Any] = {"data": data, "batch_size": batch_size}
    recipe = Recipe.from_dict(
        {**recipe.to_dict(), **{key: value for key, value in changed.items() if value is not None}}
    )
    (source,) = open_sources(recipe, ["val"], data_dir=options.data_dir, corrupt=options.corrupt, classes=classes)
    workers = default_workers(recipe.data) if options.workers is None else options.workers
    loader = make_loader(recipe, source, "val", workers=workers, pin_memory=options.device.type == "cuda")
    with Interrupt() as interrupt, Progress("eval", len(loader)) as bar:
        stats = evaluate(
            model,
            loader,
            nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
            device=options.device,
            prepare=Normalise(recipe.mean, recipe.std, options.device),
            amp_dtype=AMP_DTYPES[recipe.amp],
            on_batch=bar,
            should_stop=interrupt,
        )
    if not stats.complete:
        raise KeyboardInterrupt
    return stats, recipe.label_smoothing, classes


class Classifier:
    """Classifies image files with a checkpoint.

    Args:
        checkpoint: the file.
        device: where to compute.

    Raises:
        TrainError: the checkpoint cannot be used.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.model, recipe, self.classes = load_model(checkpoint, device)
        self._transform = make_transform(recipe, "val")
        self._prepare = Normalise(recipe.mean, recipe.std, device)
        self._device = torch.device(device)
        self._amp_dtype = AMP_DTYPES[recipe.amp]

    @torch.no_grad()
    def best_classes(self, path: str | os.PathLike[str], top: int = 5) -> Sequence[tuple[str, float]]:
        """The best classes of an image file and their probabilities, best first.

        Raises:
            UnreadableImage: the file cannot be decoded.
            TrainError: Pillow is not installed.
        """
        images = self._prepare(self._transform(decode_image(path)).unsqueeze(0))
        with torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None):
            outputs = self.model(images)
        best = outputs.float().softmax(dim=1)[0].topk(min(top, len(self.classes)))
        return [
            (self.classes[index], chance)
            for chance, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
