"""Images in one block of memory, and what worker processes make of it."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import truncate
from tiny import PEAK, run_process, write_image
from torch.utils.data import DataLoader

from mobilenet_ext.train import Digits, EvalTransform, InMemoryImagenette, TrainError
from mobilenet_ext.train.decoding import decode_image

FOLDER = "imagenette2-320/train/n01440764"

# A process that may open as few files as it has images, and loads them with workers.
LOAD = """
import resource, sys, torch
from torch.utils.data import DataLoader
from mobilenet_ext.train import EvalTransform, InMemoryImagenette

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    torch.set_num_threads(1)
    method, workers = sys.argv[2], int(sys.argv[3])
    images = InMemoryImagenette(sys.argv[1], transform=EvalTransform(8, 8))
    loader = DataLoader(images, batch_size=100, num_workers=workers,
                        multiprocessing_context=method if workers else None, persistent_workers=workers > 0)
    expected = torch.stack([images[i][0] for i in range(len(images))])
    assert torch.equal(torch.cat([batch for batch, _ in loader]), expected)
    if workers:
        images.images.pixels.fill_(7)
        batches = torch.cat([batch for batch, _ in loader])
        print("shared" if bool((batches == 7).all()) else "apart")
    print(len(expected))
"""


@pytest.fixture
def imagenette(tmp_path: Path) -> Path:
    """Five images of different sizes, one of them unreadable."""
    for number in range(5):
        write_image(tmp_path / FOLDER / f"{number}.png", number, size=(20 + number, 30 - 2 * number))
    truncate(tmp_path / FOLDER / "2.png")
    return tmp_path


def test_images_are_what_their_files_hold(imagenette: Path) -> None:
    dataset = InMemoryImagenette(imagenette)
    expected = [decode_image(imagenette / FOLDER / f"{number}.png") for number in (0, 1, 3, 4)]
    assert len(dataset) == len(dataset.images) == 4
    for images in ([dataset[i][0] for i in range(4)], list(dataset.images), dataset.images[:]):
        assert all(map(torch.equal, images, expected))
        assert [image.stride() for image in images] == [image.stride() for image in expected]
    assert torch.equal(dataset.images[-1], expected[-1]) and torch.equal(dataset[np.int64(2)][0], expected[2])
    with pytest.raises(IndexError):
        dataset.images[4]


def test_a_tiff_that_is_turned_when_it_is_decoded(imagenette: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    turned = pil.Exif()
    turned[0x0112] = 6
    pil.new("RGB", (20, 31)).save(imagenette / FOLDER / "9.tif", exif=turned)
    expected = decode_image(imagenette / FOLDER / "9.tif")
    assert torch.equal(InMemoryImagenette(imagenette).images[-1], expected)


def test_none_that_can_be_read_is_an_error(imagenette: Path) -> None:
    for number in (0, 1, 3, 4):
        truncate(imagenette / FOLDER / f"{number}.png")
    with pytest.raises(TrainError, match="none of the 5 images"):
        InMemoryImagenette(imagenette)


def test_an_image_takes_its_own_memory_along_and_no_more(imagenette: Path) -> None:
    """It may be sent to another process, saved, or written into."""
    dataset = InMemoryImagenette(imagenette)
    image = dataset[0][0]
    assert image.untyped_storage().nbytes() == image.numel()
    image.zero_()
    assert int(dataset[0][0].max()) > 0
    pytest.importorskip("sklearn", reason="holds the digits")
    digit = Digits("val")[3][0]
    assert digit.untyped_storage().nbytes() == digit.numel()
    assert digit.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize(
    ("method", "workers"),
    [("none", 0), ("fork", 2), pytest.param("forkserver", 2, marks=pytest.mark.slow), ("spawn", 2)],
)
def test_few_open_files_are_enough_for_many_images(tmp_path: Path, method: str, workers: int) -> None:
    for number in range(400):
        write_image(tmp_path / FOLDER / f"{number}.png", number, size=(9, 8))
    (tmp_path / "load.py").write_text(LOAD)
    result = run_process([sys.executable, "load.py", ".", method, str(workers)], tmp_path)
    shared = [] if not workers else ["apart" if method == "fork" else "shared"]  # forked ones share until one writes
    assert result.stdout.split() == [*shared, "400"], result


def test_a_transform_that_cannot_be_pickled_is_pytorchs_error(imagenette: Path) -> None:
    dataset = InMemoryImagenette(imagenette, transform=lambda image: EvalTransform(8, 8)(image))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        next(iter(DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")))
    assert len(list(DataLoader(dataset, num_workers=1, multiprocessing_context="fork"))) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's figures of a process")
def test_reading_holds_the_block_and_little_more(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    (tmp_path / FOLDER).mkdir(parents=True)
    for number in range(60):
        pil.new("RGB", (1000, 1200), (number, 0, 0)).save(tmp_path / FOLDER / f"{number}.png", compress_level=1)
    script = PEAK + (
        "from mobilenet_ext.train import InMemoryImagenette\n"
        "before = peak(); images = InMemoryImagenette('.'); print((peak() - before) / images.images.pixels.numel())"
    )
    result = run_process([sys.executable, "-c", script], tmp_path)
    assert 1 <= float(result.stdout) < 1.4, result
