"""From a recipe to its model, and whether that can be trained on the recipe's images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobilenet_ext.fusing import fuse, plain
from mobilenet_ext.models import MobileNetV1, libraries
from mobilenet_ext.train.errors import TrainError, reason
from mobilenet_ext.train.process_state import random_state, torch_defaults
from mobilenet_ext.train.recipe import MOBILENET_V1, Recipe

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(recipe: Recipe, classes: int, device: torch.device) -> nn.Module:
    """The recipe's model on the fused kernels, initialised from its seed, channels last, on the device.

    Raises:
        TrainError: the model's library is not installed, or has no such model.
    """
    with torch_defaults(), random_state(recipe.seed):
        if recipe.model == MOBILENET_V1:
            model: nn.Module = MobileNetV1(num_classes=classes, width_multiplier=recipe.width)
        else:
            try:
                model = fuse(libraries.create(recipe.model, classes))
            except ValueError as error:
                raise TrainError(str(error)) from error
    return model.to(device, memory_format=torch.channels_last)


def check_trainable(model: nn.Module, recipe: Recipe, classes: int, images: int, device: torch.device) -> None:
    """Tries a model of another library on the recipe's smallest batch, in training and in evaluation mode.

    Some networks give more than logits in training, some take images of one size alone, and BatchNorm after pooling
    cannot train on a last batch of one image. The model and the random numbers stay as they are.

    Args:
        model: of ``build_model``.
        recipe: the one that it was built for.
        classes: logits that are expected for an image.
        images: training images in an epoch.
        device: of the model.

    Raises:
        TrainError: the model does not run, or its output is something else than logits ``[N, classes]``.
    """
    batch = min(2, images % recipe.batch_size or recipe.batch_size)
    size = (batch, 3, recipe.resolution, recipe.resolution)
    zeros = torch.zeros(size, device=device).contiguous(memory_format=torch.channels_last)
    amp_dtype = AMP_DTYPES[recipe.amp]
    twin = plain(model)  # a copy, whose statistics may change; kernels are not compiled for a batch that never comes
    for mode in ("training", "evaluation"):
        where = f"in {mode}, on {batch} image{'s' * (batch > 1)} of {recipe.resolution}x{recipe.resolution}"
        autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
        try:
            with torch.no_grad(), random_state(recipe.seed, device), autocast:
                outputs = twin.train(mode == "training")(zeros)
        except Exception as error:  # every network has its own way to say what it does not take
            instead = "" if (advice := against_single_values(error)) is None else f"; {advice}"
            raise TrainError(f"{recipe.model} does not run {where}: {reason(error)}{instead}") from error
        if not isinstance(outputs, Tensor) or outputs.shape != (batch, classes):
            got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TrainError(f"{recipe.model} gives {got} {where}; logits {[batch, classes]} are needed")


def against_single_values(error: BaseException) -> str | None:
    """What to change where PyTorch refuses to normalise one value per channel in training; None for other errors."""
    if not isinstance(error, ValueError) or "Expected more than 1 value per channel" not in str(error):
        return None
    return "try a --batch-size that leaves no batch with one image, or a larger --resolution"
