from pathlib import Path

import pytest
import torch
from tiny import write_image

from mobilenet_ext.train import Digits, ImageFolder, InMemoryImagenette, TrainError, UnreadableImage
from mobilenet_ext.train.data import find_imagenette
from mobilenet_ext.train.recipe import default_recipe


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_digits_split_is_fixed_and_disjoint() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="holds the digits")
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    assert train[0][0].shape == (3, 64, 64) and train[0][0].dtype == torch.uint8
    assert val.labels[:12] == Digits("val").labels[:12]
    counts = torch.bincount(torch.tensor(train.labels + val.labels))
    assert counts.tolist() == torch.bincount(torch.tensor(datasets.load_digits().target)).tolist()
    # The 1,797 originals are all different, and so are their enlargements: the splits share none.
    unique = {image.numpy().tobytes() for image in torch.cat([train.images, val.images])}
    assert len(unique) == 1797


def test_the_recipes_statistics_are_those_of_the_training_digits() -> None:
    pytest.importorskip("sklearn", reason="holds the digits")
    pixels, recipe = Digits("train").images.double() / 255, default_recipe("digits")
    assert recipe.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-3)
    assert recipe.std[0] == pytest.approx(float(pixels.std()), abs=1e-3)


def test_image_folder(images: Path) -> None:
    folder = ImageFolder(images / "train")
    assert folder.classes == ["dark", "light"] and len(folder) == 24
    image, label = folder[0]
    assert image.shape == (3, 40, 48) and image.dtype == torch.uint8 and label == 0
    assert float(folder[23][0].float().mean()) > 120 and folder[23][1] == 1
    assert ImageFolder(images / "train", transform=lambda image: image.sum())[0][0] == image.sum()


def test_unreadable_images_are_named_with_the_reason(images: Path) -> None:
    truncated, text, empty = (images / "train" / "dark" / f"{number:02}.jpg" for number in (0, 2, 4))
    truncate(truncated)
    text.write_text("not an image")
    empty.write_bytes(b"")
    folder = ImageFolder(images / "train")
    for index, (path, why) in enumerate([(truncated, "truncated"), (text, "not an image"), (empty, "empty file")]):
        with pytest.raises(UnreadableImage, match=why) as caught:
            folder[index]
        assert caught.value.path == str(path)
    assert [error.path for error in folder.unreadable()] == [str(truncated), str(text), str(empty)]
    empty.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        folder[2]


def test_an_empty_class_folder_is_refused(images: Path) -> None:
    (images / "train" / "zebra").mkdir()
    (images / "train" / "zebra" / "notes.txt").write_text("none yet")
    with pytest.raises(TrainError, match=r"class folder without images: .*zebra"):
        ImageFolder(images / "train")


def test_missing_folders_and_other_classes_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no-such-folder: No such file"):
        ImageFolder(tmp_path / "no-such-folder")
    with pytest.raises(TrainError, match="no class folders"):
        ImageFolder(images / "train" / "dark")
    with pytest.raises(TrainError, match="other classes than expected: light, zebra"):
        ImageFolder(images / "val", classes=["dark", "zebra"])


@pytest.fixture
def imagenette(tmp_path: Path) -> Path:
    """Imagenette's published layout with two of its classes."""
    for number in range(6):
        wnid = ("n01440764", "n03888257")[number % 2]
        for split in ("train", "val"):
            write_image(tmp_path / "imagenette2-320" / split / wnid / f"{wnid}_{number}.JPEG", number)
    return tmp_path


def test_imagenette_in_memory(imagenette: Path) -> None:
    dataset = InMemoryImagenette(imagenette, "val")
    assert dataset.classes == ["tench", "parachute"] and len(dataset) == 6
    assert [label for _, label in (dataset[i] for i in range(6))] == [0, 0, 0, 1, 1, 1]
    for path in (imagenette / "imagenette2-320" / "val").glob("*/*"):
        path.unlink()  # from memory, not from the disk
    assert dataset[5][0].shape == (3, 40, 48)
    assert find_imagenette(imagenette) == "320px"


def test_imagenette_leaves_out_unreadable_images(imagenette: Path) -> None:
    broken = imagenette / "imagenette2-320" / "train" / "n01440764" / "n01440764_2.JPEG"
    truncate(broken)
    dataset = InMemoryImagenette(imagenette, "train")
    assert len(dataset) == 5 and [error.path for error in dataset.unreadable] == [str(broken)]
    assert dataset.labels == [0, 0, 1, 1, 1]


def test_imagenette_refuses_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split"):
        InMemoryImagenette(tmp_path, "test")
    with pytest.raises(ValueError, match="size"):
        InMemoryImagenette(tmp_path, "val", "640px")
    with pytest.raises(TrainError, match="imagenette2 is missing"):
        InMemoryImagenette(tmp_path, "val", "full")


def test_a_failed_download_is_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="does the download")

    def broken(root: str, size: str, download: bool) -> None:
        Path(root, "imagenette2-320", "train").mkdir(parents=True)
        raise OSError("the line is down")

    monkeypatch.setattr(datasets, "Imagenette", broken)
    with pytest.raises(TrainError, match=r"cannot be downloaded: the line is down; unpack https://.*imagenette2-320"):
        InMemoryImagenette(tmp_path, "train", download=True)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_put_in_place(imagenette: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="does the download")
    target = tmp_path / "elsewhere"

    def fetch(root: str, size: str, download: bool) -> None:
        (imagenette / "imagenette2-320").rename(Path(root, "imagenette2-320"))

    monkeypatch.setattr(datasets, "Imagenette", fetch)
    assert len(InMemoryImagenette(target, "train", download=True)) == 6
    assert [path.name for path in target.iterdir()] == ["imagenette2-320"]
