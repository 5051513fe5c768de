"""Which files of a folder of classes are its images, whatever links it holds."""

import os
from pathlib import Path

import pytest
from tiny import write_image

from mobilenet_ext.train import ImageFolder, TrainError, UnreadableImage

pytestmark = pytest.mark.usefixtures("deadline")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of the classes a and b, two images each, and the folder ``elsewhere`` beside it."""
    for number in range(2):
        for folder in ("root/a", "root/b", "elsewhere/more"):
            write_image(tmp_path / folder / f"{number}.png", number)
    return tmp_path / "root"


def names(folder: ImageFolder) -> list[tuple[str, int]]:
    return [(os.path.relpath(path, folder.root), label) for path, label in folder.samples]


def test_links_to_other_places_are_followed(root: Path) -> None:
    (root / "c").symlink_to("../elsewhere")
    (root / "a" / "link.png").symlink_to("../../elsewhere.png")
    (root.parent / "elsewhere.png").symlink_to(root / "a" / "0.png")
    assert names(ImageFolder(root)) == [
        *[("a/0.png", 0), ("a/1.png", 0), ("a/link.png", 0)],  # twice in one class is twice as often
        *[("b/0.png", 1), ("b/1.png", 1)],
        *[("c/more/0.png", 2), ("c/more/1.png", 2)],
    ]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a/loop", ".."),  # the images of b as images of a
        ("a/loop", "../.."),
        ("a/loop", "/"),
        ("a/self", "."),
        ("a/other", "../b"),
        ("c", "b"),
        ("c", "."),
        ("c", ".."),
    ],
)
def test_a_link_to_a_folder_that_is_there_already_is_refused(root: Path, link: str, target: str) -> None:
    (root / link).symlink_to(target)
    with pytest.raises(TrainError, match="are one folder, by links") as caught:
        ImageFolder(root)
    assert str(root / link) in str(caught.value)


def test_two_links_that_lead_round_in_circles_end(root: Path) -> None:
    for name in ("x", "y"):
        (root / "a" / name).symlink_to(".")
    with pytest.raises(TrainError, match=r"a/[xy] and \S+/a are one folder"):
        ImageFolder(root)


def test_links_of_two_folders_to_each_other_end(root: Path) -> None:
    for here, there in (("p", "q"), ("q", "p")):
        (root / "a" / here).mkdir()
        (root / "a" / here / "link").symlink_to(f"../{there}")
    with pytest.raises(TrainError, match="are one folder"):
        ImageFolder(root)


def test_a_class_inside_of_another_is_refused(root: Path) -> None:
    write_image(root / "a" / "part" / "0.png", 0)
    (root / "c").symlink_to("a/part")
    with pytest.raises(TrainError, match=r"root/c and \S+/a/part are one folder"):
        ImageFolder(root)


def test_a_place_that_two_classes_link_to_is_refused(root: Path) -> None:
    (root / "a" / "all").symlink_to(root.parent / "elsewhere")
    (root / "b" / "some").symlink_to(root.parent / "elsewhere" / "more")
    with pytest.raises(TrainError, match=r"b/some and \S+/a/all/more are one folder"):
        ImageFolder(root)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_file_with_two_classes_is_refused(root: Path, kind: str) -> None:
    if kind == "symbolic":
        (root / "b" / "also.png").symlink_to("../a/1.png")
    else:
        os.link(root / "a" / "1.png", root / "b" / "also.png")
    with pytest.raises(TrainError, match=r"one file in two classes, by links: \S+/a/1\.png and \S+/b/also\.png"):
        ImageFolder(root)


def test_many_files_with_two_classes_are_counted(root: Path) -> None:
    for number in range(12):
        write_image(root / "a" / f"more-{number}.png", number)
        (root / "b" / f"more-{number}.png").symlink_to(root / "a" / f"more-{number}.png")
    with pytest.raises(TrainError, match="and 2 more$"):
        ImageFolder(root)


def test_broken_links_to_images_are_unreadable_images(root: Path) -> None:
    (root / "a" / "gone.png").symlink_to("/no/such/file.png")
    (root / "b" / "gone.png").symlink_to("/no/such/file.png")
    (root / "b" / "x.png").symlink_to("y.png")
    (root / "b" / "y.png").symlink_to("x.png")
    folder = ImageFolder(root)
    assert len(folder) == 8
    assert [os.path.relpath(error.path, root) for error in folder.unreadable()] == [
        *["a/gone.png", "b/gone.png", "b/x.png", "b/y.png"]
    ]
    with pytest.raises(UnreadableImage, match="b/y.png .Too many levels of symbolic links"):
        folder[7]


@pytest.mark.parametrize("link", ["zebra", "a/subset"])
def test_a_broken_link_that_may_have_been_a_folder_is_refused(root: Path, link: str) -> None:
    """Without it labels would shift, or a class would lose images, in silence."""
    (root / link).symlink_to("/not/mounted")
    with pytest.raises(TrainError, match=f"cannot follow the link {root / link}: No such file"):
        ImageFolder(root)


@pytest.mark.parametrize("folder", ["", "a/"])
def test_links_to_each_other_are_refused(root: Path, folder: str) -> None:
    (root / f"{folder}x").symlink_to("y")
    (root / f"{folder}y").symlink_to("x")
    with pytest.raises(TrainError, match=r"cannot follow the link \S+/[xy]: Too many levels"):
        ImageFolder(root)


def test_hidden_broken_links_are_left_alone(root: Path) -> None:
    (root / ".#lock").symlink_to("user@host.1234")
    (root / "a" / ".#lock.png").symlink_to("user@host.1234")
    assert len(ImageFolder(root)) == 4


def test_a_folder_that_is_named_like_an_image_is_a_folder(root: Path) -> None:
    write_image(root / "a" / "x.png" / "inside.png", 0)
    assert names(ImageFolder(root))[2] == ("a/x.png/inside.png", 0)
    assert not ImageFolder(root).unreadable()


def test_a_closed_folder_is_refused(root: Path, request: pytest.FixtureRequest) -> None:
    """Its images would be missing, in silence."""
    write_image(root / "a" / "closed" / "0.png", 0)
    (root / "a" / "closed").chmod(0)
    request.getfixturevalue("not_root")
    with pytest.raises(TrainError, match="cannot read the image folder root/a/closed: Permission denied"):
        ImageFolder(root.name)


def test_the_order_is_that_of_the_paths(root: Path) -> None:
    for name in ("a-b/0.png", "a/z/0.png", "a.png", "Z.PNG"):
        write_image(root / "a" / name, 0)
    paths = [path for path, label in ImageFolder(root).samples if label == 0]
    assert len(paths) == 6 and paths == sorted(paths)
