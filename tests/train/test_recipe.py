import dataclasses

import pytest

from mobilenet_ext.train import Recipe, RecipeError, default_recipe


def test_the_defaults_for_images_are_the_published_recipe() -> None:
    assert dataclasses.asdict(default_recipe("imagenette")) == {
        "data": "imagenette",
        "model": "mobilenet_v1",
        "width": 1.0,
        "resolution": 224,
        "base_resolution": 224,
        "epochs": 150,
        "batch_size": 128,
        "lr": 0.01,
        "lr_floor": 0.01,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "label_smoothing": 0.1,
        "resize": (256, 296, 384),
        "rotation": 10.0,
        "flip": True,
        "val_resize": 256,
        "mean": (0.4625, 0.4580, 0.4295),
        "std": (0.2452, 0.2390, 0.2469),
        "seed": 0,
        "amp": "off",
    }


def test_digits_are_not_flipped_and_are_the_default() -> None:
    recipe = default_recipe()
    assert (recipe.data, recipe.width, recipe.resolution, recipe.flip) == ("digits", 0.25, 64, False)


def test_other_resolutions_scale_the_resizing() -> None:
    recipe = default_recipe("imagenette", resolution=112)
    assert [recipe.scaled(size) for size in recipe.resize] == [128, 148, 192]
    assert recipe.scaled(recipe.val_resize) == 128


def test_dict_round_trip() -> None:
    recipe = default_recipe("some/folder", width=0.5, amp="bf16")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 0.0),
        ("width", -1.0),
        ("width", float("nan")),
        ("width", float("inf")),
        ("width", 0.03),
        ("resolution", 32),
        ("resolution", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
        ("seed", -1),
        ("amp", "fp8"),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"^--{name.replace('_', '-')} must be .*, not {value}$"):
        default_recipe(**{name: value})


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match="colour"):
        default_recipe(colour="red")
