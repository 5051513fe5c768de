"""What training refuses, each as one message that a user can act on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType


class TrainError(RuntimeError):
    """Training, evaluation or prediction cannot go on; the message is complete and needs no traceback.

    The command line prints it on stderr as it stands and exits with status 1.
    """


class RecipeError(TrainError, ValueError):
    """A setting of the recipe has a value that cannot be trained with; the message names it and what is accepted."""


def require(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: the module's name, as in ``import``.
        purpose: what it is needed for; begins the message when it is missing.
        package: what to ``pip install``, where that differs from the module's top-level name.

    Raises:
        TrainError: the module, or something it imports itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise TrainError(f"{purpose} needs {package} ({error}): pip install {package}") from error


def reason(error: BaseException) -> str:
    """The error in a few words: the operating system's own where there are any, without a repeated file name."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__


def listed(items: Sequence[object], at_most: int = 10) -> str:
    """The items with commas between them; of many only the first, and how many more there are."""
    more = len(items) - at_most
    return ", ".join(map(str, items[:at_most])) + (f" and {more} more" if more > 0 else "")
