"""Augmentation and preparation of images, in plain PyTorch.

Every random draw comes from the ``torch.Generator`` that the caller hands over (or from PyTorch's global one), so that
an image's augmentation can be made a function of (seed, epoch, sample index) alone. The results are those of the
torchvision operations of the same names; they are written here because the same numbers must come out where
torchvision is not installed, and because rotation and crop in one pass touch only the pixels that are kept.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobilenet_ext.train.decoding import MAX_ASPECT
from mobilenet_ext.train.errors import require


def resize_shorter_side(image: Any, size: int) -> Any:
    """Resizes so that the shorter side is ``size``, bilinear with antialiasing, as ``torchvision`` ``Resize(size)``.

    Args:
        image: tensor ``[..., C, H, W]``, any real dtype and memory layout; a ``PIL.Image``; or one of torchvision's
            ``tv_tensors``, masks and bounding boxes included.
        size: pixels, 1 or more.

    Returns:
        What came in, resized: the same type, dtype and, for tensors, memory layout.

    Raises:
        TypeError: ``image`` is neither.
        ValueError: ``size`` is less than 1, the image is empty, or one of its sides is more than ``MAX_ASPECT`` times
            the other: a line of pixels would become gigabytes, of which a crop throws nearly all away.
    """
    if size < 1:
        raise ValueError(f"size must be 1 or more, not {size}")
    if _is_tv_tensor(image):
        return _v2().functional.resize(image, [size], antialias=True)
    if isinstance(image, Tensor):
        if image.dim() < 3 or 0 in image.shape:
            raise ValueError(f"image must be [..., C, H, W] and not empty, not {list(image.shape)}")
        height, width = image.shape[-2:]
    elif hasattr(image, "getbands"):  # a PIL image, without importing PIL
        width, height = image.size
    else:
        raise TypeError(f"image must be a tensor [..., C, H, W] or a PIL image, not {type(image).__name__}")
    if min(height, width) == size:
        return image
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"image: expected one side at most {MAX_ASPECT} times the other, got {width}x{height} pixels")
    longer = int(size * max(height, width) / min(height, width))
    new_height, new_width = (size, longer) if height <= width else (longer, size)
    if not isinstance(image, Tensor):
        return image.resize((new_width, new_height), resample=2)  # 2: PIL's BILINEAR, which antialiases
    if image.dtype not in (torch.uint8, torch.float32, torch.float64):  # those that PyTorch interpolates everywhere
        out = resize_shorter_side(image.float(), size)
        return (out if image.is_floating_point() else out.round_()).to(image.dtype)
    # A dimension added in front of HWC pixels gets a stride that PyTorch recognises as channels last; in front of CHW
    # it does not, and the result would be laid out anew.
    if image.dim() == 3:
        batch = image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)
    else:
        batch = image.reshape(-1, *image.shape[-3:])
    out = nn.functional.interpolate(batch, size=(new_height, new_width), mode="bilinear", antialias=True)
    return out.reshape(*image.shape[:-2], new_height, new_width)


def _is_tv_tensor(value: Any) -> bool:
    tv_tensors = sys.modules.get("torchvision.tv_tensors")  # where nobody has loaded it, there are none
    return tv_tensors is not None and isinstance(value, tv_tensors.TVTensor)


def _v2() -> Any:
    return require("torchvision.transforms.v2", "resizing a sample of several parts", "torchvision")


class RandomResize(nn.Module):
    """Resizes the shorter side to one of a few sizes, chosen at random with equal chances.

    It can stand in an ``nn.Sequential`` and among ``torchvision.transforms.v2``, in whose ``Compose`` it takes samples
    of any structure: ``(image, label)``, a dictionary, ``tv_tensors`` with masks, bounding boxes and key points. Which
    parts are resized and which pass is decided by ``v2.Resize``.

    Args:
        sizes: of the shorter side, in pixels.

    Raises:
        TypeError: ``sizes`` is no sequence of integers.
        ValueError: ``sizes`` is empty or holds a size below 1.
    """

    def __init__(self, sizes: Sequence[int] = (256, 296, 384)) -> None:
        super().__init__()
        try:
            self.sizes = tuple(map(operator.index, sizes))
        except TypeError as error:
            raise TypeError(f"sizes: expected a sequence of integers, got {sizes!r}") from error
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes must be one or more sizes of at least 1, not {self.sizes}")

    def forward(self, *inputs: Any, generator: torch.Generator | None = None) -> Any:
        """Resizes a sample.

        Args:
            inputs: an image (see ``resize_shorter_side``), or the parts of a sample as torchvision's transforms take
                them.
            generator: draws the size; None for PyTorch's global one.

        Returns:
            What came in, its images and what belongs to them resized to the same size; several inputs as a tuple.

        Raises:
            TypeError: the only input is no image.
            TrainError: it is a sample of several parts, and torchvision is not installed.
        """
        size = self.draw(generator)
        if len(inputs) == 1 and not isinstance(inputs[0], (tuple, list, dict)):
            return resize_shorter_side(inputs[0], size)
        return _v2().Resize([size], antialias=True)(*inputs)

    def draw(self, generator: torch.Generator | None = None) -> int:
        """One of the sizes."""
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


def rotate_crop(image: Tensor, angle: float, top: int, left: int, size: int, flip: bool = False) -> Tensor:
    """Rotates about the centre, then cuts out a square window, then maybe mirrors it, in one pass over the window.

    Args:
        image: ``[C, H, W]``, any dtype, any memory layout.
        angle: degrees, counter-clockwise; nearest neighbour, as ``torchvision``'s ``rotate``.
        top, left: the window's corner; the window may reach outside the image.
        size: the window's side, in pixels.
        flip: mirror the window left to right.

    Returns:
        ``[C, size, size]``, channels last in memory; 0 where there is no image.
    """
    channels, height, width = image.shape
    y = torch.arange(top, top + size, dtype=torch.float32) + (0.5 - height / 2)
    x = torch.arange(left, left + size, dtype=torch.float32) + (0.5 - width / 2)
    if flip:
        x = x.flip(0)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    source_x = ((x * cos)[None, :] - (y * sin)[:, None] + (width / 2 - 0.5)).round_().to(torch.int32)
    source_y = ((x * sin)[None, :] + (y * cos)[:, None] + (height / 2 - 0.5)).round_().to(torch.int32)
    outside = (source_x < 0) | (source_x >= width) | (source_y < 0) | (source_y >= height)
    index = (source_y * width + source_x).masked_fill_(outside, 0)
    pixels = image.permute(1, 2, 0).reshape(height * width, channels)
    window = pixels.index_select(0, index.reshape(-1)).masked_fill_(outside.reshape(-1, 1), 0)
    return window.reshape(size, size, channels).permute(2, 0, 1)


class TrainTransform:
    """Random resize, rotation, crop and flip of one training image.

    Args:
        sizes: as ``RandomResize``.
        crop: side of the window, in pixels; where the resized image is smaller, the window is filled up with 0.
        rotation: largest angle in degrees, either way.
        flip: mirror half of the images.
    """

    def __init__(self, sizes: Sequence[int], crop: int, rotation: float = 10.0, flip: bool = True) -> None:
        self.resize = RandomResize(sizes)
        self.crop, self.rotation, self.flip = crop, rotation, flip

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``image`` uint8 ``[3, H, W]`` -> uint8 ``[3, crop, crop]``, everything random drawn from ``generator``."""
        _check_generator(generator)
        image = resize_shorter_side(image, self.resize.draw(generator))
        turn, down, right, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        angle = (2 * turn - 1) * self.rotation
        top = _corner(image.shape[-2] - self.crop, down)
        left = _corner(image.shape[-1] - self.crop, right)
        return rotate_crop(image, angle, top, left, self.crop, self.flip and mirror < 0.5)


def _check_generator(generator: torch.Generator | None) -> None:
    # In a pipeline that hands (image, label) from step to step, the label would come here, and be lost.
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {got}: this transform takes an image alone"
        )


def _corner(slack: int, draw: float) -> int:
    """A corner of the window between 0 and ``slack`` (both included; a negative slack lies outside the image)."""
    return min(slack, 0) + int(draw * (abs(slack) + 1))


class EvalTransform:
    """Resize of the shorter side and centre crop.

    Args:
        size: of the shorter side, in pixels.
        crop: side of the window, in pixels.
    """

    def __init__(self, size: int, crop: int) -> None:
        self.size, self.crop = size, crop

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``image`` uint8 ``[3, H, W]`` -> uint8 ``[3, crop, crop]``. Nothing is random; ``generator`` is not used."""
        _check_generator(generator)
        image = resize_shorter_side(image, self.size)
        top, left = (int(round((side - self.crop) / 2)) for side in image.shape[-2:])
        if top < 0 or left < 0:
            return rotate_crop(image, 0.0, top, left, self.crop)
        return image[:, top : top + self.crop, left : left + self.crop]


class Normalise:
    """Turns batches of uint8 images into the network's input, on the device where the network is.

    Args:
        mean, std: per channel, of pixel values between 0 and 1.
        device: where the results live.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` uint8 ``[N, 3, H, W]`` -> float32, the same shape, channels last in memory, on the device."""
        images = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
        return images.div(255).sub_(self.mean).div_(self.std)
