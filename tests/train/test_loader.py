import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobilenet_ext.train import ImageLoader, TrainError, TrainTransform, UnreadableImage
from mobilenet_ext.train.loader import EpochBatches, sample_generator


class Numbered(Dataset):
    """Image ``i`` has the label ``i``; the images in ``broken`` cannot be read."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise UnreadableImage(f"image {index}", "broken on purpose")
        pixels = torch.randint(256, (14, 13, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return pixels.permute(2, 0, 1), index


def epoch_of(loader: ImageLoader, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and torch.equal(i, j) for (x, i), (y, j) in pairs)


def make(workers: int = 0, seed: int = 3, broken: tuple[int, ...] = (), **options: object) -> ImageLoader:
    transform = TrainTransform((12, 14, 16), 10)
    settings = {"batch_size": 4, "seed": seed, "shuffle": True, "workers": workers, **options}
    return ImageLoader(Numbered(11, broken), transform, **settings)


def test_epoch_and_seed_determine_the_batches_whatever_the_workers() -> None:
    first, second = epoch_of(make(), 1), epoch_of(make(), 2)
    for workers in (1, 2):
        loader = make(workers)
        assert same(epoch_of(loader, 1), first)
        assert same(epoch_of(loader, 2), second)
    assert same(epoch_of(make(), 2), second)  # without the first epoch before it
    assert not same(first, second)
    assert not same(epoch_of(make(seed=4), 1), first)


def test_augmentation_differs_between_epochs_for_the_same_image() -> None:
    images = []
    for epoch in (1, 2):
        batches = epoch_of(make(batch_size=11), epoch)
        images.append(batches[0][0][batches[0][1].argsort()])
    assert all(not torch.equal(a, b) for a, b in zip(*images, strict=True))


def test_every_image_once_an_epoch_and_the_last_batch_smaller() -> None:
    loader = make()
    batches = epoch_of(loader, 1)
    labels = torch.cat([labels for _, labels in batches])
    assert [len(labels) for _, labels in batches] == [4, 4, 3] and len(loader) == 3
    assert sorted(labels.tolist()) == list(range(11)) and labels.tolist() != list(range(11))
    assert labels.dtype == torch.int64
    assert torch.cat([labels for _, labels in make(shuffle=False)]).tolist() == list(range(11))


def test_batches_are_channels_last_uint8() -> None:
    images, _ = next(iter(make()))
    assert images.shape == (4, 3, 10, 10) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_global_generator_is_left_alone() -> None:
    for workers in (0, 1):
        state = torch.get_rng_state()
        list(make(workers))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_named_once(workers: int) -> None:
    named: list[UnreadableImage] = []
    loader = make(workers, broken=(2, 7), on_unreadable=named.append)
    for epoch in (1, 2):
        labels = torch.cat([labels for _, labels in epoch_of(loader, epoch)])
        assert sorted(labels.tolist()) == [0, 1, 3, 4, 5, 6, 8, 9, 10]
    assert sorted(str(image) for image in named) == ["image 2 (broken on purpose)", "image 7 (broken on purpose)"]
    assert loader.skipped == {"image 2", "image 7"}


def test_a_batch_of_unreadable_images_is_left_out() -> None:
    loader = make(broken=(0, 1, 2, 3), shuffle=False)
    assert [labels.tolist() for _, labels in loader] == [[4, 5, 6, 7], [8, 9, 10]]


def test_no_readable_image_at_all_is_an_error() -> None:
    with pytest.raises(TrainError, match="none of the 11 images can be read"):
        list(make(broken=tuple(range(11))))


def test_workers_end_when_a_pass_is_broken_off() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("needs Linux's list of child processes")
    before = set(children.read_text().split())  # of other tests
    passing = iter(make(2))
    next(passing)
    assert len(set(children.read_text().split()) - before) >= 2
    passing.close()
    assert not set(children.read_text().split()) - before


def test_generators_of_samples_are_independent() -> None:
    seeds = {
        sample_generator(seed, epoch, index).initial_seed()
        for seed in (0, 1, 2**62)
        for epoch in range(1, 6)
        for index in range(-1, 40)
    }
    assert len(seeds) == 3 * 5 * 41


def test_batch_sampler_length() -> None:
    for images, batches in ((1, 1), (4, 1), (5, 2), (8, 2)):
        sampler = EpochBatches(images, 4, 0, shuffle=True)
        assert len(sampler) == batches == len(list(sampler))
