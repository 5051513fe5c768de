"""From a recipe to the loaders of its training and validation images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
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


def open_source(
    recipe: Recipe,
    split: str,
    *,
    data_dir: str | os.PathLike[str] = "data",
    corrupt: str = "skip",
    classes: list[str] | None = None,
) -> Source:
    """Opens the recipe's data.

    Args:
        recipe: ``data`` and ``resolution`` are used.
        split: ``"train"`` or ``"val"``.
        data_dir: where Imagenette lies, or is to be put.
        corrupt: ``"skip"``: images that cannot be read are named and left out; ``"refuse"``: every image is decoded
            first, and none may be unreadable.
        classes: the class names expected.

    Raises:
        TrainError: the data is missing or broken, or holds unreadable images and they are refused.
    """
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
        source = Source(images, IMAGENETTE_FOLDERS[size], images.classes, images.unreadable)
        if classes is not None and images.classes != classes:
            raise TrainError(f"Imagenette in {data_dir} has other classes than expected: {', '.join(images.classes)}")
    else:
        root = Path(recipe.data)
        if not root.is_dir():
            raise TrainError(f"--data must be digits, imagenette or a folder with train/ and val/: no folder {root}")
        folder = ImageFolder(root / split, classes=classes)
        source = Source(folder, "folder", folder.classes, folder.unreadable() if corrupt == "refuse" else [])
    if source.unreadable and corrupt == "refuse":
        raise TrainError(
            f"unreadable images in {recipe.data}: {len(source.unreadable)}: {listed(source.unreadable)}; "
            "--corrupt skip leaves them out"
        )
    for image in source.unreadable:
        unreadable_noter(split)(image)
    return source


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
