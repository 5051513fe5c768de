"""Batches whose content depends on (seed, epoch, sample index) and on nothing else.

The sampler hands ``(epoch, index)`` to the data set, so that a worker process knows the epoch without being told, and
each image gets a generator of its own: neither the number of workers nor what was loaded before changes a pixel.
"""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mobilenet_ext.train.decoding import UnreadableImage
from mobilenet_ext.train.errors import TrainError


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one sample in one epoch."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, epoch, index), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of ``(epoch, index)``; in training shuffled anew, by (seed, epoch), every epoch.

    Args:
        images: length of the data set.
        batch_size: images in a batch; the last one may be smaller.
        seed: of the order.
        shuffle: False for the order of the data set.
    """

    def __init__(self, images: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.images, self.batch_size, self.seed, self.shuffle = images, batch_size, seed, shuffle
        self.epoch = 1

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.shuffle:
            # Sample index -1 is no image's: the order's random numbers are nobody else's.
            order = torch.randperm(self.images, generator=sample_generator(self.seed, self.epoch, -1)).tolist()
        else:
            order = list(range(self.images))
        for start in range(0, self.images, self.batch_size):
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


class _SeededSamples(Dataset):
    """Looks up ``(epoch, index)`` and transforms the image with that sample's generator."""

    def __init__(self, dataset: Dataset, transform: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | UnreadableImage:
        epoch, index = key
        try:
            image, label = self.dataset[index]
        except UnreadableImage as error:
            return error
        return self.transform(image, sample_generator(self.seed, epoch, index)), label


class _Batch(NamedTuple):
    images: Tensor | None
    labels: Tensor | None
    unreadable: list[tuple[str, str]]


def _collate(samples: list[tuple[Tensor, int] | UnreadableImage]) -> _Batch:
    good = [sample for sample in samples if not isinstance(sample, UnreadableImage)]
    bad = [(sample.path, sample.why) for sample in samples if isinstance(sample, UnreadableImage)]
    if not good:
        return _Batch(None, None, bad)
    # Stacked as NHWC, the images' order in memory: no transposition, and channels_last comes for nothing.
    images = torch.stack([image.permute(1, 2, 0) for image, _ in good]).permute(0, 3, 1, 2)
    return _Batch(images, torch.tensor([label for _, label in good]), bad)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ImageLoader:
    """Iterates over ``(images, labels)`` batches of one epoch: uint8 ``[N, 3, H, W]`` channels last, int64 ``[N]``.

    Images that cannot be decoded are left out of their batch. Worker processes ignore Ctrl-C: the main process ends
    them. They live for one pass.

    Args:
        dataset: map-style, of ``(image uint8 [3, H, W], label)``; see ``data``.
        transform: called with each image and its generator; all results have one shape.
        batch_size, seed, shuffle: as ``EpochBatches``.
        workers: processes that load; 0 loads in this one.
        pin_memory: for copies to a GPU that overlap with its work.
        on_unreadable: called with an ``UnreadableImage`` the first time that its file is left out.

    Attributes:
        skipped: paths of the images left out so far.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Tensor, torch.Generator], Tensor],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
        on_unreadable: Callable[[UnreadableImage], None] | None = None,
    ) -> None:
        self.batches = EpochBatches(len(dataset), batch_size, seed, shuffle)  # type: ignore[arg-type]
        # Forked workers share the images in memory, and inherit a Ctrl-C handler that does nothing in a child.
        context: Any = "fork" if workers and sys.platform == "linux" else None
        self.loader = DataLoader(
            _SeededSamples(dataset, transform, seed),
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_interrupts,
            multiprocessing_context=context,
            # Without one the loader would draw its base seed from the global generator, and change its state.
            generator=torch.Generator().manual_seed(0),
        )
        self.on_unreadable = on_unreadable
        self.skipped: set[str] = set()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counted from 1, that the next pass draws its order and augmentation for."""
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        empty = True
        try:
            for images, labels, unreadable in self.loader:
                for path, why in unreadable:
                    if path not in self.skipped:
                        self.skipped.add(path)
                        if self.on_unreadable is not None:
                            self.on_unreadable(UnreadableImage(path, why))
                if images is not None:
                    empty = False
                    yield images, labels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainError(f"a data loading process died: {error}; fewer --workers need less memory") from error
        if empty:
            raise TrainError(f"none of the {self.batches.images} images can be read")


def default_workers(data: str) -> int:
    """Loading processes for a kind of data: the digits are loaded faster than a process starts."""
    return 0 if data == "digits" else min(os.cpu_count() or 1, 16)
