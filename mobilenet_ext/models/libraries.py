"""Networks of torchvision and timm by name, for the command line."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from torch import nn


def create(name: str, num_classes: int) -> nn.Module:
    """A classifier of another library, with its own initial weights.

    Args:
        name: ``torchvision:NAME`` or ``timm:NAME``, for instance ``torchvision:mobilenet_v2``; which there are,
            ``torchvision.models.list_models()`` and ``timm.list_models()`` say.
        num_classes: outputs of its last layer.

    Returns:
        A module from images ``[N, 3, H, W]`` to logits ``[N, num_classes]``.

    Raises:
        ValueError: as ``check``.
    """
    check(name)
    library, _, model = name.partition(":")
    if library == "torchvision":
        return _import(library, name).models.get_model(model, weights=None, num_classes=num_classes)
    return _import(library, name).create_model(model, num_classes=num_classes)


def check(name: str) -> None:
    """Whether ``create`` knows the classifier; makes none.

    Raises:
        ValueError: the name is not of this form, its library is not installed or has no such classifier.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        models = _import(library, name).models
        _check_known(model, models.list_models(module=models), name)
    elif library == "timm":
        _check_known(model, _import(library, name).list_models(), name)
    else:
        raise ValueError(f"{name}: expected torchvision:NAME or timm:NAME, for instance torchvision:mobilenet_v2")


def _import(library: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # the second: a torchvision that was built for another torch
        raise ValueError(f"{name}: {library} cannot be imported ({error}); `pip install {library}`") from error


def _check_known(model: str, known: list[str], name: str) -> None:
    if model not in known:
        near = difflib.get_close_matches(model, known, 3)
        raise ValueError(f"{name}: no such classifier" + (f"; did you mean {' or '.join(near)}?" if near else ""))
