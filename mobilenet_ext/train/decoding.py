"""Reading one image file, which may be anything: damaged, huge, a pipe, samples that no byte holds."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilenet_ext.train.errors import reason, require

MAX_ASPECT = 100  # longer side to shorter; a resized image costs as many times the memory of a square one
MAX_FILE_BYTES = 512 * 2**20  # what 16-bit RGB takes uncompressed at Pillow's own limit of pixels

# Rows that are converted at once: the whole image twice over would be the largest part of the memory.
STRIP_ROWS = 512

KINDS_OF_FILES = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_WHITE_IS_ZERO = 258, 262, 0


class UnreadableImage(Exception):
    """An image file that cannot be used. ``path`` names it, ``why`` says what is wrong with it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{self.path} ({self.why})"


def decode_image(path: str | os.PathLike[str]) -> Tensor:
    """Reads an image file, of any format that Pillow reads by itself.

    The pixels are those of Pillow's ``convert("RGB")``, as in torchvision's ``ImageFolder``: grey becomes three equal
    channels, transparency is dropped, the EXIF orientation is not applied (Pillow applies that of a TIFF), and of an
    animation or a file of several pages the first image is taken. Of samples of 16 bits the high byte is taken, also
    of grey images, which Pillow would clip.

    Memory is bounded, at seven bytes a pixel and the size of the file: refused before they are decoded are images of
    more than ``PIL.Image.MAX_IMAGE_PIXELS`` (89 million, unless changed; None for no limit), those with one side more
    than ``MAX_ASPECT`` times the other, and files larger than ``MAX_FILE_BYTES``.

    Returns:
        uint8 ``[3, H, W]``, RGB, channels last in memory.

    Raises:
        UnreadableImage: the file is missing, truncated, corrupt, not an image, not a regular file, or beyond the
            limits; or its samples have 32 bits, of which nothing says which value is white.
        MemoryError: it does not fit; the message names the file.
        TrainError: Pillow is not installed.
    """
    with _opened(path) as image:
        image.load()
        grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if image.mode in ("I", "F") and not grey16:
            raise ValueError(f"samples of 32 bits (mode {image.mode}): expected 8 or 16")
        width, height = image.size
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, STRIP_ROWS):
            bottom = min(top + STRIP_ROWS, height)
            strip = image.crop((0, top, width, bottom))
            if grey16:
                pixels[top:bottom] = _high_byte(strip, image)[:, :, None]
            else:
                pixels[top:bottom] = strip if strip.mode == "RGB" else strip.convert("RGB")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image file in pixels, from its header. Raises as ``decode_image``."""
    with _opened(path) as image:
        return image.height, image.width


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file as a ``PIL.Image`` whose header was read and accepted; what goes wrong is named after the file."""
    pillow = require("PIL.Image", "reading image files", "pillow")
    try:
        _check_file(os.stat(path))
        with pillow.open(path) as image:
            _check_header(image, pillow.MAX_IMAGE_PIXELS)
            image.info.pop("transparency", None)  # dropped in any case, but with a warning for some palettes
            yield image
    except MemoryError as error:
        raise MemoryError(f"not enough memory to decode {path}") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        why = reason(error)
        if "cannot identify image file" in why:  # the message repeats the path
            why = "not an image, or its header is damaged"
        raise UnreadableImage(str(path), why) from error


def _check_file(status: os.stat_result) -> None:
    """Raises ``ValueError`` for what must not be opened: a FIFO waits for a writer, a device may have no end."""
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS_OF_FILES.get(stat.S_IFMT(status.st_mode), "special file")
        raise ValueError(f"not a file but a {kind}")
    if status.st_size == 0:
        raise ValueError("empty file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"a file of {status.st_size:,} bytes: expected at most {MAX_FILE_BYTES:,}")


def _check_header(image: Any, max_pixels: int | None) -> None:
    """Raises ``ValueError`` for what must not be decoded."""
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"{width}x{height} pixels: expected at most {max_pixels:,} (PIL.Image.MAX_IMAGE_PIXELS)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels: expected one side at most {MAX_ASPECT} times the other")
    if image.format == "EPS":
        raise ValueError("an EPS file, which another program would have to draw")


def _high_byte(strip: Any, image: Any) -> np.ndarray:
    """The most significant 8 bits of the grey samples in a strip of ``image``, as uint8 ``[rows, width]``."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0]
    grey = (np.asarray(strip) >> (bits - 8)).astype(np.uint8)
    return ~grey if tags.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO else grey  # Pillow leaves these as they are
