"""What a training run computes: every setting that changes its numbers, and the defaults for each kind of data.

Where a run computes (device, backend, workers) is not here: see ``run.RunOptions``. Nor is the file of weights that it
may start from, which a resumed run does not need: see ``run.run_training``.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

from mobilenet_ext.models import libraries
from mobilenet_ext.train.errors import RecipeError

AMP_MODES = ("off", "bf16", "fp16")

MOBILENET_V1 = "mobilenet_v1"
_MODEL = re.compile(rf"{MOBILENET_V1}|(torchvision|timm):[\w.-]+")

# Below this the last feature map of MobileNetV1 is 1x1, where BatchNorm cannot train on a last batch of one image.
# What other models need is tried before they are trained: ``model.check_trainable``.
SMALLEST_RESOLUTION = 33
LARGEST_RESOLUTION = 4096


def _plain(value: Any) -> Any:
    """Numbers and sequences in Python's own types, which JSON and checkpoints can hold; NumPy's are not among them."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_tuple(value: Any, of_type: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(of_type, value))


# What the fields of a recipe may hold, by their annotations.
_TYPES = {
    "str": (lambda value: isinstance(value, str), "text"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (_is_integer, "an integer"),
    "float": (_is_number, "a number"),
    "tuple[int, ...]": (lambda value: _is_tuple(value, _is_integer), "integers"),
    "tuple[float, float, float]": (lambda value: _is_tuple(value, _is_number) and len(value) == 3, "three numbers"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training recipe. The defaults are those for Imagenette and image folders; ``default_recipe`` knows the digits'.

    Attributes:
        data: ``"digits"``, ``"imagenette"``, or the path of a folder with ``train/`` and ``val/``, a folder per class.
        model: ``"mobilenet_v1"``, or a network of another library, ``"torchvision:NAME"`` or ``"timm:NAME"``.
        width: width multiplier of ``MobileNetV1``; 1 for other models.
        resolution: side of the square images the network sees (the resolution multiplier of the MobileNet paper).
        base_resolution: the resolution for which ``resize`` and ``val_resize`` are meant; other ones scale them.
        epochs: passes over the training images.
        batch_size: images in a step; the last batch of an epoch may be smaller.
        lr: learning rate of the first epoch; falls along a cosine, epoch by epoch, towards ``lr * lr_floor``.
        lr_floor: the end of the cosine, as a fraction of ``lr``.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        label_smoothing: of the cross entropy, in training and in validation, so that the two curves compare.
        resize: sizes of the shorter side; each training image is resized to one of them, chosen at random.
        rotation: largest angle of the random rotation, in degrees, either way.
        flip: whether training images are flipped horizontally, half of them.
        val_resize: size of the shorter side before the centre crop, in validation.
        mean, std: per channel, of pixel values between 0 and 1.
        seed: of the initial weights, the order of the images and their augmentation.
        amp: ``"off"`` (float32), ``"bf16"`` or ``"fp16"`` (autocast; fp16 with a gradient scaler).
    """

    data: str
    model: str = MOBILENET_V1
    width: float = 1.0
    resolution: int = 224
    base_resolution: int = 224
    epochs: int = 150
    batch_size: int = 128
    lr: float = 0.01
    lr_floor: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.1
    resize: tuple[int, ...] = (256, 296, 384)
    rotation: float = 10.0
    flip: bool = True
    val_resize: int = 256
    mean: tuple[float, float, float] = (0.4625, 0.4580, 0.4295)
    std: tuple[float, float, float] = (0.2452, 0.2390, 0.2469)
    seed: int = 0
    amp: str = "off"

    def __post_init__(self) -> None:
        def check(name: str, good: bool, accepted: str) -> None:
            if not good:
                raise RecipeError(f"--{name.replace('_', '-')} must be {accepted}, not {getattr(self, name)}")

        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
            of_type, accepted = _TYPES[field.type]
            check(field.name, of_type(getattr(self, field.name)), accepted)
        own = self.model == MOBILENET_V1
        check("model", _MODEL.fullmatch(self.model) is not None, f"{MOBILENET_V1}, torchvision:NAME or timm:NAME")
        check("width", own or self.width == 1, f"left out with --model {self.model}")
        check("width", math.isfinite(self.width) and self.width > 0, "greater than 0")
        check("width", int(32 * self.width) >= 1, "at least 1/32 (less leaves the first layer no channels)")
        smallest, largest = SMALLEST_RESOLUTION if own else 1, LARGEST_RESOLUTION
        check("resolution", smallest <= self.resolution <= largest, f"between {smallest} and {largest}")
        check("base_resolution", self.base_resolution >= 1, "1 or more")
        check("epochs", self.epochs >= 1, "1 or more")
        check("batch_size", self.batch_size >= 1, "1 or more")
        check("lr", math.isfinite(self.lr) and self.lr > 0, "greater than 0")
        check("lr_floor", 0 <= self.lr_floor <= 1, "between 0 and 1")
        check("momentum", 0 <= self.momentum < 1, "0 or more and less than 1")
        check("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more")
        check("label_smoothing", 0 <= self.label_smoothing < 1, "0 or more and less than 1")
        check("resize", len(self.resize) > 0 and min(map(self.scaled, self.resize)) >= 1, "sizes of 1 pixel or more")
        check("rotation", math.isfinite(self.rotation), "finite")
        check("val_resize", self.scaled(self.val_resize) >= 1, "1 pixel or more")
        check("mean", all(map(math.isfinite, self.mean)), "finite")
        check("std", all(math.isfinite(value) and value > 0 for value in self.std), "greater than 0")
        check("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        check("amp", self.amp in AMP_MODES, f"one of {', '.join(AMP_MODES)}")

    @property
    def network(self) -> str:
        """The model in words: ``MobileNetV1`` with its width, others by their names."""
        return f"MobileNetV1 {self.width:g}" if self.model == MOBILENET_V1 else self.model

    def scaled(self, size: int) -> int:
        """``size``, given for ``base_resolution``, at this recipe's resolution."""
        return round(size * self.resolution / self.base_resolution)

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain types, as ``config.json`` and checkpoints hold it."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of ``to_dict``.

        Raises:
            RecipeError: a setting is unknown, missing or out of range.
        """
        if not isinstance(values, dict):
            raise RecipeError(f"this is not a recipe: {type(values).__name__} where a dict was expected")
        try:
            return cls(**values)
        except TypeError as error:
            raise RecipeError(f"this is not a recipe: {error}") from error


# The digits are 8x8 pixels enlarged to 64x64. 56 keeps a margin around the digit, 72 cuts at most half a pixel of the
# original from each side. A mirrored digit is another sign, so there is no flip.
DIGITS = {
    "width": 0.25,
    "resolution": 64,
    "base_resolution": 64,
    "epochs": 12,
    "batch_size": 32,
    "lr": 0.1,
    "resize": (56, 64, 72),
    "flip": False,
    "val_resize": 64,
    "mean": (0.306, 0.306, 0.306),
    "std": (0.325, 0.325, 0.325),
}


def default_recipe(data: str = "digits", **settings: Any) -> Recipe:
    """The recipe for a kind of data, with some settings replaced.

    Args:
        data: as ``Recipe.data``.
        settings: fields of ``Recipe``; None stands for the default.

    Raises:
        RecipeError: a setting is unknown or out of range; the model's library is not installed, or has no such model.
    """
    defaults: dict[str, Any] = dict(DIGITS) if data == "digits" else {}
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get("model", MOBILENET_V1) != MOBILENET_V1:
        defaults.pop("width", None)
    try:
        recipe = Recipe(data=data, **{**defaults, **given})
    except TypeError as error:
        raise RecipeError(f"this is not a recipe: {error}") from error
    if recipe.model != MOBILENET_V1:
        try:
            libraries.check(recipe.model)
        except ValueError as error:
            raise RecipeError(f"--model {error}") from error
    return recipe
