import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import run_process
from torch import Tensor

from mobilenet_ext.train import EvalTransform, Normalise, RandomResize, TrainTransform
from mobilenet_ext.train.transforms import resize_shorter_side, rotate_crop


def smooth_image(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [3, H, W], channels last in memory, as decoded images are."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(2, 0, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (80, 60), (41, 97), (50, 50)])
@pytest.mark.parametrize("size", [30, 50, 75])
def test_resize_is_torchvisions(height: int, width: int, size: int) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="the reference")
    image = smooth_image(height, width)
    ours = resize_shorter_side(image, size)
    theirs = v2.resize(image, [size], antialias=True)
    assert ours.shape == theirs.shape and ours.dtype == torch.uint8
    assert torch.equal(ours, theirs)


def test_resize_of_a_pil_image() -> None:
    pil = pytest.importorskip("PIL.Image", reason="makes the image")
    image = pil.fromarray(np.zeros((60, 80, 3), np.uint8))
    assert resize_shorter_side(image, 30).size == (40, 30)


def test_resize_keeps_type_layout_and_batch_dimensions() -> None:
    batch = torch.rand(2, 5, 3, 20, 30)
    assert resize_shorter_side(batch, 10).shape == (2, 5, 3, 10, 15)
    image = smooth_image(20, 30)
    assert resize_shorter_side(image, 20) is image
    resized = resize_shorter_side(image, 10)
    assert resized.stride() == smooth_image(10, 15).stride()


@pytest.mark.parametrize("bad", ["image", np.zeros((3, 4, 4)), None])
def test_resize_refuses_other_types(bad: object) -> None:
    with pytest.raises(TypeError, match=type(bad).__name__):
        resize_shorter_side(bad, 10)


def test_resize_refuses_empty_images_and_sizes() -> None:
    with pytest.raises(ValueError, match="not empty"):
        resize_shorter_side(torch.zeros(3, 0, 4), 10)
    with pytest.raises(ValueError, match="size must be 1 or more, not 0"):
        resize_shorter_side(torch.zeros(3, 4, 4), 0)


@pytest.mark.parametrize("size", [(20000, 1), (1, 65535), (5, 501)])
def test_resize_refuses_a_line_of_pixels(size: tuple[int, int]) -> None:
    """It would become gigabytes, whether it comes as a tensor or from PIL."""
    pil = pytest.importorskip("PIL.Image", reason="makes the image")
    said = f"image: expected one side at most 100 times the other, got {size[0]}x{size[1]} pixels"
    for image in (torch.zeros(3, size[1], size[0], dtype=torch.uint8), pil.new("RGB", size)):
        for resize in (RandomResize((256,)), lambda image: resize_shorter_side(image, 64)):
            with pytest.raises(ValueError, match=said):
                resize(image)
    assert resize_shorter_side(torch.zeros(3, 5, 500), 10).shape == (3, 10, 1000)


def test_random_resize_draws_every_size_from_the_generator() -> None:
    resize, image, numbers = RandomResize((8, 12, 16)), smooth_image(20, 20), generator()
    sizes = [resize(image, generator=numbers).shape[-1] for _ in range(300)]
    assert all(60 < sizes.count(size) < 140 for size in (8, 12, 16)) and len(set(sizes)) == 3
    numbers = generator()
    assert sizes == [resize(image, generator=numbers).shape[-1] for _ in range(300)]


def test_random_resize_refuses_empty_sizes() -> None:
    with pytest.raises(ValueError, match="sizes"):
        RandomResize(())


def test_random_resize_stands_in_a_torchvision_pipeline() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="the pipeline")
    pipeline = v2.Compose([RandomResize((16,)), v2.RandomCrop(12), v2.ToDtype(torch.float32, scale=True)])
    assert pipeline(smooth_image(20, 24)).shape == (3, 12, 12)


def sample(structure: str) -> tuple:
    """Inputs of torchvision's transforms."""
    tv = pytest.importorskip("torchvision.tv_tensors", reason="makes the sample")
    pil = pytest.importorskip("PIL.Image", reason="makes the image")
    image = tv.Image(smooth_image(20, 24))
    boxes = tv.BoundingBoxes([[0, 0, 8, 6], [3, 4, 20, 19]], format="XYXY", canvas_size=(20, 24))
    mask = tv.Mask(torch.arange(480).reshape(1, 20, 24) % 7)
    label = torch.tensor([1.0, 2.0, 3.0])
    return {
        "pair": (smooth_image(20, 24), 3),
        "pair with a tensor": (smooth_image(20, 24), label),
        "pair with text": (smooth_image(20, 24), "cat"),
        "label first": (3, smooth_image(20, 24)),
        "two plain tensors": (smooth_image(20, 24), smooth_image(20, 24, seed=1)),
        "pil and target": (pil.fromarray(np.zeros((20, 24, 3), np.uint8)), {"boxes": boxes, "labels": label}),
        "tv_tensor": (image,),
        "detection": (image, {"boxes": boxes, "masks": mask, "labels": label, "name": "cat"}),
        "dictionary": ({"image": image, "mask": mask, "label": 3},),
        "nested": ([image, (mask, None)],),
        "video": (tv.Video(torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8)), 3),
    }[structure]


def leaves(value: object) -> list[object]:
    return torch.utils._pytree.tree_flatten(value)[0]


@pytest.mark.parametrize(
    "structure",
    ["pair", "pair with a tensor", "pair with text", "label first", "two plain tensors", "pil and target", "tv_tensor",
     "detection", "dictionary", "nested", "video"],
)  # fmt: skip
def test_random_resize_takes_what_torchvisions_transforms_take(structure: str) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="the reference")
    inputs = sample(structure)
    ours = v2.Compose([RandomResize((10,)), v2.Identity()])(*inputs)
    theirs = v2.Compose([v2.Resize(10), v2.Identity()])(*inputs)
    assert torch.utils._pytree.tree_flatten(ours)[1] == torch.utils._pytree.tree_flatten(theirs)[1]
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert type(one) is type(other)
        if isinstance(other, Tensor):
            assert torch.equal(one, other)
            assert getattr(one, "canvas_size", None) == getattr(other, "canvas_size", None)
        elif hasattr(other, "getbands"):
            assert one.size == other.size and one.tobytes() == other.tobytes()
        else:
            assert one == other


def test_all_parts_of_a_sample_get_the_same_size() -> None:
    resize, (image, target) = RandomResize((8, 12, 16)), sample("detection")
    sizes = set()
    for _ in range(30):
        resized, parts = resize(image, target, generator=None)
        assert resized.shape[-2:] == parts["masks"].shape[-2:] == parts["boxes"].canvas_size
        sizes.add(resized.shape[-2])
    assert sizes == {8, 12, 16}


def test_without_torchvision_images_are_resized_and_samples_refused() -> None:
    code = """
import sys
sys.modules["torchvision"] = None
import torch
from mobilenet_ext.train import RandomResize, TrainError
resize, image = RandomResize((8,)), torch.zeros(3, 16, 20)
assert resize(image).shape == (3, 8, 10)
try:
    resize(image, 3)
except TrainError as error:
    assert "needs torchvision" in str(error) and "pip install torchvision" in str(error)
    print("refused")
"""
    result = run_process([sys.executable, "-c", code], Path.cwd())
    assert result.stdout == "refused\n", result


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.bfloat16, torch.float16])
def test_resize_of_other_dtypes_is_torchvisions(dtype: torch.dtype) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="the reference")
    image = (torch.rand(3, 20, 30) * 1000).to(dtype)
    ours, theirs = resize_shorter_side(image, 10), v2.resize(image, [10], antialias=True)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [256, None, (8.5,), "8"])
def test_random_resize_refuses_what_are_no_sizes(bad: object) -> None:
    with pytest.raises(TypeError, match="sizes: expected a sequence of integers, got"):
        RandomResize(bad)


@pytest.mark.parametrize("transform", [TrainTransform((16,), 12), EvalTransform(16, 12)])
def test_transforms_of_an_image_alone_do_not_lose_a_label(transform: object) -> None:
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, got int"):
        transform(smooth_image(20, 24), 3)


@pytest.mark.parametrize("angle", [0.0, 7.3, -10.0, 90.0])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (5, 17), (28, 56)])
def test_rotate_crop_is_torchvisions_rotate_and_crop(angle: float, top: int, left: int) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="the reference")
    image = smooth_image(60, 88)
    ours = rotate_crop(image, angle, top, left, 32)
    theirs = v2.crop(v2.rotate(image, angle), top, left, 32, 32)
    # Both round source positions computed in float32 to the nearest pixel; ties may fall either way.
    assert (ours != theirs).any(dim=0).float().mean() < 0.005


def test_rotation_by_ninety_degrees_is_exact() -> None:
    image = smooth_image(16, 16)
    assert torch.equal(rotate_crop(image, 90.0, 0, 0, 16), image.rot90(1, (1, 2)))


def test_flip_mirrors_the_window() -> None:
    image = smooth_image(30, 40)
    window = rotate_crop(image, 5.0, 3, 4, 20)
    assert torch.equal(rotate_crop(image, 5.0, 3, 4, 20, flip=True), window.flip(2))


def test_outside_of_the_image_is_zero() -> None:
    image = torch.full((3, 10, 10), 9, dtype=torch.uint8)
    window = rotate_crop(image, 0.0, -2, -3, 16)
    assert torch.equal(window[:, 2:12, 3:13], image)
    assert int(window.sum()) == int(image.sum())


def test_train_transform_depends_on_its_generator_alone() -> None:
    transform, image = TrainTransform((24, 28, 32), 20), smooth_image(40, 50)
    torch.manual_seed(1)
    first = transform(image, generator(5))
    state = torch.get_rng_state()
    assert torch.equal(transform(image, generator(5)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(transform(image, generator(6)), first)
    assert first.shape == (3, 20, 20) and first.dtype == torch.uint8


def test_train_transform_reaches_every_corner_and_only_those() -> None:
    """Without rotation and flip, the window is one of the (12 - 10 + 1)**2 that lie inside."""
    transform, image = TrainTransform((12,), 10, rotation=0.0, flip=False), smooth_image(12, 12)
    corners = [(top, left) for top in range(3) for left in range(3)]
    windows = {image[:, top : top + 10, left : left + 10].numpy().tobytes() for top, left in corners}
    numbers = generator()
    assert {transform(image, numbers).numpy().tobytes() for _ in range(200)} == windows


def test_train_transform_flips_half_of_the_images_or_none() -> None:
    image = smooth_image(8, 8)
    for flip, low, high in ((True, 70, 130), (False, 0, 0)):
        transform, numbers = TrainTransform((8,), 8, rotation=0.0, flip=flip), generator()
        flipped = sum(torch.equal(transform(image, numbers), image.flip(2)) for _ in range(200))
        assert low <= flipped <= high


def test_rotation_stays_within_its_limit() -> None:
    """A bright dot far from the centre moves by the angle: on average by half of the limit, at most by all of it."""
    image = torch.zeros(3, 201, 201, dtype=torch.uint8)
    image[:, 98:103, 188:193] = 255
    transform, numbers, angles = TrainTransform((201,), 201, rotation=10.0, flip=False), generator(), []
    for _ in range(100):
        rows, columns = transform(image, numbers)[0].nonzero().float().mean(dim=0).tolist()
        angles.append(math.degrees(math.atan2(100 - rows, columns - 100)))
    assert max(angles) <= 10.3 and min(angles) >= -10.3
    assert max(angles) > 8 and min(angles) < -8


@pytest.mark.parametrize(("height", "width"), [(60, 80), (81, 60), (64, 64)])
def test_eval_transform_is_torchvisions_resize_and_centre_crop(height: int, width: int) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2.functional", reason="the reference")
    image = smooth_image(height, width)
    for size, crop in ((32, 28), (64, 56), (33, 33), (20, 24)):
        theirs = v2.center_crop(v2.resize(image, [size], antialias=True), [crop, crop])
        assert torch.equal(EvalTransform(size, crop)(image), theirs)


def test_normalise() -> None:
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    out = Normalise(mean, std)(images)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_normalise_leaves_its_argument_alone() -> None:
    images = torch.ones(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    Normalise((0.5,) * 3, (0.5,) * 3)(images)
    assert torch.equal(images, torch.ones(1, 3, 2, 2))
