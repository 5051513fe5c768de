"""Decoded images of different sizes in one block of memory, which costs a worker process one file descriptor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilenet_ext.train.decoding import UnreadableImage, decode_image, image_size


class PackedImages(Sequence[Tensor]):
    """Images that lie one after the other in one tensor; each item is a view of it, ``[3, H, W]``, channels last.

    Args:
        pixels: uint8, flat: the images' pixels, ``[H, W, 3]`` each.
        layout: int64 ``[N, 3]``: first byte, height and width of each image. No tensor: each tensor that is pickled for
            a worker process is a file descriptor.
    """

    def __init__(self, pixels: Tensor, layout: np.ndarray) -> None:
        self.pixels, self.layout = pixels, layout

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        start, height, width = self.layout[index].tolist()
        return self.pixels[start : start + 3 * height * width].view(height, width, 3).permute(2, 0, 1)


def read_images(paths: Sequence[str]) -> tuple[PackedImages, list[UnreadableImage], list[int]]:
    """Decodes image files on all cores, each to its place in the block, so that no more than the block is held.

    Returns:
        The images that could be decoded, what is wrong with the others, and the indices of the former in ``paths``.
    """
    layout = np.zeros((len(paths), 3), np.int64)

    def measure(index: int) -> UnreadableImage | None:
        try:
            layout[index, 1:] = image_size(paths[index])
        except UnreadableImage as error:
            return error
        return None

    def decode(index: int) -> UnreadableImage | None:
        try:
            image = decode_image(paths[index])
        except UnreadableImage as error:
            return error
        if image.numel() != 3 * layout[index, 1:].prod():
            return UnreadableImage(paths[index], "another size than its header says")
        layout[index, 1:] = image.shape[1:]  # of a TIFF that is turned when it is decoded
        images[index].copy_(image)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter lock
        errors = list(pool.map(measure, range(len(paths))))
        sizes = 3 * layout[:, 1] * layout[:, 2]
        layout[:, 0] = np.cumsum(sizes) - sizes
        images = PackedImages(torch.empty(int(sizes.sum()), dtype=torch.uint8), layout)
        errors = list(pool.map(lambda index: errors[index] or decode(index), range(len(paths))))
    kept = [index for index, error in enumerate(errors) if error is None]
    return PackedImages(images.pixels, layout[kept]), [error for error in errors if error is not None], kept
