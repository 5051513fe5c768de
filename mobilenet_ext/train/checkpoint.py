"""Checkpoints: written whole or not at all, and read without running code from the file."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobilenet_ext.train.errors import RecipeError, TrainError, reason
from mobilenet_ext.train.recipe import Recipe

FORMAT = "mobilenet_ext checkpoint 1"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that, whatever happens, ``path`` holds either what it held before or all of ``content``.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and nothing is left beside it.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    # The new name is on the disk only when its folder is. Some file systems cannot sync a folder; they lose nothing
    # that they had promised.
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: the file.
        content: tensors and plain types only, so that ``torch.load(weights_only=True)`` reads it.

    Raises:
        TrainError: it cannot be written, for example because the disk is full; an older ``path`` is still there.
    """
    # Serialised in memory first: a failing disk then fails one write, with the operating system's own reason.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        kept = f"; {path} is still the one of before" if os.path.exists(path) else ""
        raise TrainError(f"cannot write the checkpoint {path}: {reason(error)}{kept}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Returns:
        What ``save_checkpoint`` was given, with ``config`` turned into a ``Recipe``.

    Raises:
        TrainError: the file is missing, truncated, or something else than a checkpoint of this package.
    """
    try:
        with open(path, "rb") as file:
            raw = io.BytesIO(file.read())
    except OSError as error:
        raise TrainError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    try:
        content = torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and PyTorch each have their own ways to say it
        raise TrainError(f"{path} is not a checkpoint, or is truncated or damaged") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainError(f"{path} is not a checkpoint of mobilenet-ext train")
    try:
        content["config"] = Recipe.from_dict(content["config"])
    except (KeyError, RecipeError) as error:
        raise TrainError(f"{path} holds a recipe that this version cannot use: {reason(error)}") from error
    return content


def load_weights(model: nn.Module, content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Loads a checkpoint's weights into the model that its recipe describes.

    Raises:
        TrainError: they do not fit; ``path`` names the checkpoint in the message.
    """
    try:
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError) as error:
        width = content["config"].width
        first = (str(error).splitlines() + [""])[1].strip()  # the headline says only that there are errors
        raise TrainError(f"the weights in {path} do not fit MobileNetV1 of width {width:g}: {first}") from error
