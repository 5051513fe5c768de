"""The data sets: scikit-learn's digits, image folders, and Imagenette held in memory.

Each is a map-style data set of ``(image, label)`` for any ``torch.utils.data.DataLoader``: the image is a uint8 tensor
``[3, H, W]``, channels last in memory, or what ``transform`` makes of it; the label an int. ``classes`` holds the
class names in the order of the labels.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobilenet_ext.files import locked
from mobilenet_ext.train.decoding import UnreadableImage, decode_image
from mobilenet_ext.train.errors import TrainError, reason, require
from mobilenet_ext.train.image_files import class_names, labelled_images
from mobilenet_ext.train.packed import read_images

# The ten classes of Imagenette by their WordNet numbers, which are the names of its folders.
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
IMAGENETTE_FOLDERS = {"320px": "imagenette2-320", "full": "imagenette2", "160px": "imagenette2-160"}

DIGITS_VALIDATION_IMAGES = 360


class ImageFolder(Dataset):
    """Images on disk, a folder per class, decoded when they are asked for (see ``decoding.decode_image``).

    Args:
        root: folder with one folder per class; their sorted names are the classes. Images may lie in subfolders.
            Links are followed.
        transform: called with each image.
        classes: the classes expected (those of the training images, for a validation folder).

    Raises:
        TrainError: ``root`` is missing or has no class folder, a folder cannot be read, a class folder holds no image,
            or the classes are not those expected; or by links a folder is reached twice or one file has two classes.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Tensor], Any] | None = None,
        classes: list[str] | None = None,
    ) -> None:
        self.root, self.transform = Path(root), transform
        self.classes = class_names(self.root)
        if not self.classes:
            raise TrainError(f"{self.root} has no class folders: it needs one folder of images per class")
        if classes is not None and self.classes != classes:
            different = sorted(set(self.classes) ^ set(classes))
            raise TrainError(f"{self.root} has other classes than expected: {', '.join(different)}")
        self.samples = labelled_images(self.root, self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns ``(image, label)``; raises ``UnreadableImage`` where the file cannot be decoded."""
        path, label = self.samples[index]
        image = decode_image(path)
        return (self.transform(image) if self.transform else image), label

    def unreadable(self) -> list[UnreadableImage]:
        """Decodes every image, on all cores, and returns what could not be decoded."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            checked = pool.map(_decoding_error, [path for path, _ in self.samples])
            return [error for error in checked if error is not None]


def _decoding_error(path: str) -> UnreadableImage | None:
    try:
        decode_image(path)
    except UnreadableImage as error:
        return error
    return None


class InMemoryImagenette(Dataset):
    """Imagenette (ten ImageNet classes; 9,469 training, 3,925 validation images), decoded once and kept in memory.

    Decoding JPEGs takes longer than augmenting them, so an epoch from memory is faster; it costs three bytes a pixel,
    in one block, which all worker processes share: forked ones as it is; for others PyTorch moves it to shared memory
    when the first one starts, and has it twice for that moment.

    Args:
        root: the folder that holds Imagenette in its published layout (``imagenette2-320/train/n01440764/...``).
        split: ``"train"`` or ``"val"``.
        size: ``"320px"``, ``"full"`` or ``"160px"``, the published variants.
        download: fetch it with torchvision if it is not in ``root``.
        transform: called with each image.

    Attributes:
        classes: names in English, in the order of the labels.
        images: the decoded images, a sequence of views of the block.
        labels: of the images.
        unreadable: the files that could not be decoded; they are left out.

    Raises:
        TrainError: it is not there and was not to be, or could not be, downloaded; its layout is broken.
        ValueError: ``split`` or ``size`` is none of the above.

    Source: https://github.com/fastai/imagenette
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        size: str = "320px",
        *,
        download: bool = False,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', not {split!r}")
        if size not in IMAGENETTE_FOLDERS:
            raise ValueError(f"size must be one of {', '.join(IMAGENETTE_FOLDERS)}, not {size!r}")
        folder = Path(root) / IMAGENETTE_FOLDERS[size]
        if not os.path.isdir(folder):
            if not download:
                raise TrainError(f"Imagenette is not there: {folder} is missing")
            _download_imagenette(Path(root), size)
        files = ImageFolder(folder / split)
        self.transform = transform
        self.classes = [IMAGENETTE_CLASSES.get(name, name) for name in files.classes]
        self.images, self.unreadable, kept = read_images([path for path, _ in files.samples])
        self.labels: list[int] = [files.samples[index][1] for index in kept]
        if not self.images:
            raise TrainError(f"none of the {len(files)} images in {folder / split} can be read")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns ``(image, label)``."""
        image = self.images[index].clone()  # a view would take all images along wherever it is sent or saved
        return (self.transform(image) if self.transform else image), self.labels[index]


def find_imagenette(root: str | os.PathLike[str]) -> str | None:
    """The size of the first published variant of Imagenette that lies in ``root``, or None."""
    for size, folder in IMAGENETTE_FOLDERS.items():
        if os.path.isdir(Path(root) / folder):
            return size
    return None


def _download_imagenette(root: Path, size: str) -> None:
    """Puts Imagenette into ``root``, whole or not at all; waits for another process that is at it."""
    if os.path.exists(root) and not os.path.isdir(root):
        raise TrainError(f"--data-dir must be a folder, and {root} is none")
    datasets = require("torchvision.datasets", "downloading Imagenette", "torchvision")
    folder = IMAGENETTE_FOLDERS[size]
    try:
        root.mkdir(parents=True, exist_ok=True)
        print(f"downloading Imagenette into {root}, once no other process is at it", file=sys.stderr, flush=True)
        with locked(root / ".download.lock", wait=True) as alone:
            for unfinished in root.glob(".download-*") if alone else ():  # of a process that was killed
                shutil.rmtree(unfinished)
            if (root / folder).is_dir():
                return
            # An interrupted download or extraction must not look like a data set the next time.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as unfinished:
                datasets.Imagenette(unfinished, size=size, download=True)
                os.rename(os.path.join(unfinished, folder), root / folder)
    except (OSError, RuntimeError, EOFError) as error:
        url = f"https://s3.amazonaws.com/fast-ai-imageclas/{folder}.tgz"
        raise TrainError(
            f"Imagenette is not in {root} and cannot be downloaded: {reason(error)}; unpack {url} there, "
            "or name its folder with --data-dir"
        ) from error


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8x8 pixels), enlarged; fixed split of 1,437 to train, 360 to validate.

    Args:
        split: ``"train"`` or ``"val"``.
        resolution: side of the enlarged images, in pixels.
        transform: called with each image.

    Raises:
        TrainError: scikit-learn is not installed.
        ValueError: ``split`` is neither.
    """

    def __init__(
        self, split: str = "train", resolution: int = 64, transform: Callable[[Tensor], Any] | None = None
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', not {split!r}")
        digits = require("sklearn.datasets", "the digits data set", "scikit-learn").load_digits()
        # NumPy guarantees this generator's stream for ever, so the split is the same everywhere.
        order = np.random.RandomState(0).permutation(len(digits.target))
        chosen = order[:DIGITS_VALIDATION_IMAGES] if split == "val" else order[DIGITS_VALIDATION_IMAGES:]
        small = torch.from_numpy(digits.images[chosen]).to(torch.float32).unsqueeze(1) * (255 / 16)
        large = torch.nn.functional.interpolate(small, size=(resolution, resolution), mode="bilinear")
        grey = large.round_().to(torch.uint8).squeeze(1)
        self.images = grey.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)
        self.labels: list[int] = digits.target[chosen].tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns ``(image, label)``."""
        image = self.images[index].clone()  # a view would take all images along wherever it is sent or saved
        return (self.transform(image) if self.transform else image), self.labels[index]
