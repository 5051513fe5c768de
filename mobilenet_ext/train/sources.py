"""From a recipe to the loaders of its training and validation images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mobilenet_ext.train.data import (
    IMAGENETTE_FOLDERS,
    Digits,
    ImageFolder,
    InMemoryImagenette,
    find_imagenette,
)
from mobilenet_ext.train.decoding import UnreadableImage
from mobilenet_ext.train.errors import TrainError, listed, require
from mobilenet_ext.train.loader import ImageLoader
from mobilenet_ext.train.recipe import Recipe
from mobilenet_ext.train.report import note, unreadable_noter
from mobilenet_ext.train.transforms import EvalTransform, TrainTransform

CORRUPT_POLICIES = ("skip", "refuse")
IMAGENETTE_DOWNLOAD = "320px"


@dataclasses.dataclass
class Source:
    """One split of a data set.

    Attributes:
        dataset: of ``(image uint8 [3, H, W], label)``.
        name: what it is, whatever folder it lies in; a resumed run must find the same.
        classes: class names in the order of the labels.
        unreadable: images that were found unreadable while it was opened, and left out.
    """

    dataset: Dataset
    name: str
    classes: list[str]
    unreadable: list[UnreadableImage]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def open_sources(
    recipe: Recipe,
    splits: Sequence[str] = ("train", "val"),
    *,
    data_dir: str | os.PathLike[str] = "data",
    corrupt: str = "skip",
    classes: list[str] | None = None,
) -> list[Source]:
    """Opens the recipe's data, all splits with the same classes.

    Args:
        recipe: ``data`` and ``resolution`` are used.
        splits: ``"train"``, ``"val"`` or both.
        data_dir: where Imagenette lies, or is to be put.
        corrupt: ``"skip"``: images that cannot be read are named and left out; ``"refuse"``: every image is decoded
            first, and none may be unreadable.
        classes: the class names expected; None for those of the first split.

    Raises:
        TrainError: the data is missing or broken, or holds unreadable images and they are refused, those of all splits
            in one message.
    """
    sources: list[Source] = []
    for split in splits:
        sources.append(_open(recipe, split, data_dir, classes))
        classes = sources[0].classes
    if corrupt == "refuse":
        for source in sources:
            if isinstance(source.dataset, ImageFolder):
                source.unreadable = source.dataset.unreadable()
        unreadable = [image for source in sources for image in source.unreadable]
        if unreadable:
            raise TrainError(
                f"unreadable images in {recipe.data}: {len(unreadable)}: {listed(unreadable)}; "
                "--corrupt skip leaves them out"
            )
    for split, source in zip(splits, sources, strict=True):
        for image in source.unreadable:
            unreadable_noter(split)(image)
    return sources


def _open(recipe: Recipe, split: str, data_dir: str | os.PathLike[str], classes: list[str] | None) -> Source:
    if recipe.data == "digits":
        digits = Digits(split, recipe.resolution)
        return Source(digits, "digits", digits.classes, [])
    require("PIL.Image", "reading image files", "pillow")  # here, not in a worker process in the middle of an epoch
    if recipe.data == "imagenette":
        found = find_imagenette(data_dir)
        size = found or IMAGENETTE_DOWNLOAD
        if found:
            note(f"reading Imagenette ({split}) into memory from {Path(data_dir) / IMAGENETTE_FOLDERS[size]}")
        images = InMemoryImagenette(data_dir, split, size, download=True)
        if classes is not None and images.classes != classes:
            raise TrainError(f"Imagenette in {data_dir} has other classes than expected: {', '.join(images.classes)}")
        return Source(images, IMAGENETTE_FOLDERS[size], images.classes, images.unreadable)
    root = Path(recipe.data)
    if not os.path.isdir(root):  # False, too, where nobody may look, or for a name that is too long
        raise TrainError(f"--data must be digits, imagenette or a folder with train/ and val/: no folder {root}")
    folder = ImageFolder(root / split, classes=classes)
    return Source(folder, "folder", folder.classes, [])


def make_transform(recipe: Recipe, split: str) -> Callable[..., Any]:
    """The recipe's augmentation for ``"train"``, its plain preparation for ``"val"``."""
    if split == "train":
        sizes = [recipe.scaled(size) for size in recipe.resize]
        return TrainTransform(sizes, recipe.resolution, recipe.rotation, recipe.flip)
    return EvalTransform(recipe.scaled(recipe.val_resize), recipe.resolution)


def make_loader(
    recipe: Recipe, source: Source, split: str, *, workers: int = 0, pin_memory: bool = False
) -> ImageLoader:
    """A loader over ``source`` with the recipe's transform, batch size and seed; training images are shuffled."""
    return ImageLoader(
        source.dataset,
        make_transform(recipe, split),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        shuffle=split == "train",
        workers=workers,
        pin_memory=pin_memory,
        on_unreadable=unreadable_noter(split),
    )
