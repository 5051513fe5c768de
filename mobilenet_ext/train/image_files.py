"""Which image files lie in a folder of classes, and the class of each.

Links are followed, but looked at: an image is never given a class by way of a link that another class has it by, and
no link leads round in circles.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mobilenet_ext.train.errors import TrainError, listed, reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


def class_names(root: Path) -> list[str]:
    """The names of the class folders in ``root``, sorted; hidden ones are left out.

    Raises:
        TrainError: ``root`` cannot be read, or a link in it leads nowhere.
    """
    return sorted(entry.name for entry in _entries(str(root)) if not _hidden(entry) and _is_folder(entry))


def labelled_images(root: Path, classes: list[str]) -> list[tuple[str, int]]:
    """The path and the label of every image file in the class folders of ``root`` and their subfolders, sorted.

    A file belongs here by its name alone; what is in it shows when it is decoded.

    Raises:
        TrainError: a folder cannot be read, a link leads nowhere; a folder is reached twice, by links; a file is an
            image of two classes, by links; or a class holds no image.
    """
    real_root = Path(os.path.realpath(root))
    reached = {str(folder): str(folder) for folder in (real_root, *real_root.parents)}
    samples: list[tuple[str, int]] = []
    empty: list[str] = []
    twice: list[str] = []
    first_of: dict[int, tuple[str, int]] = {}
    for label, name in enumerate(classes):
        files = sorted(_image_files(str(root / name), reached), key=lambda entry: entry.path)
        if not files:
            empty.append(str(root / name))
        for entry in files:
            sample = (entry.path, label)
            samples.append(sample)
            inode = _inode(entry)
            if inode is None:
                continue
            other, other_label = first_of.setdefault(inode, sample)
            # Numbers are unique in one file system only.
            if other_label != label and os.path.samefile(other, entry.path):
                twice.append(f"{other} and {entry.path}")
    if empty:
        raise TrainError(f"class folder without images: {', '.join(empty)}")
    if twice:
        raise TrainError(f"one file in two classes, by links: {listed(twice)}")
    return samples


def _image_files(folder: str, reached: dict[str, str]) -> Iterator[os.DirEntry[str]]:
    """The image files in a folder and below, in no order; ``reached`` holds the real paths of folders seen so far."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in reached:
            raise TrainError(
                f"{folder} and {reached[real]} are one folder, by links: its images would count twice or in two classes"
            )
        reached[real] = folder
        for entry in _entries(folder):
            image = entry.name.lower().endswith(IMAGE_SUFFIXES) and not _hidden(entry)
            # An image's broken link is an unreadable image, named as such when it is decoded.
            if _is_folder(entry, may_be_broken=image or _hidden(entry)):
                waiting.append(entry.path)
            elif image:
                yield entry


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise TrainError(f"cannot read the image folder {folder}: {reason(error)}") from error


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str], may_be_broken: bool = False) -> bool:
    """Whether an entry is a folder or a link to one; of a broken link nobody knows, so it is refused."""
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError as error:
        if may_be_broken:
            return False
        raise TrainError(f"cannot follow the link {entry.path}: {reason(error)}") from error


def _inode(entry: os.DirEntry[str]) -> int | None:
    """The number of a file in its file system; None for a broken link."""
    try:
        return entry.stat().st_ino if entry.is_symlink() else entry.inode()
    except OSError:
        return None
