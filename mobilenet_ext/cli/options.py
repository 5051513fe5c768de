"""Options that several subcommands share, and what they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mobilenet_ext.train.errors import RecipeError, TrainError, reason
from mobilenet_ext.train.loop import choose_device
from mobilenet_ext.train.recipe import AMP_MODES
from mobilenet_ext.train.run import RunOptions
from mobilenet_ext.train.sources import CORRUPT_POLICIES

# Options that are settings of the recipe, by the same name. ``--model`` and ``--width`` are the train command's own.
RECIPE_OPTIONS = (
    "data",
    "resolution",
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "seed",
    "amp",
)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``RECIPE_OPTIONS``. Those not given are None: the default depends on the data."""
    group = parser.add_argument_group("recipe (the defaults in brackets: images / digits)")
    group.add_argument(
        "--data",
        metavar="imagenette|digits|PATH",
        help="Imagenette, scikit-learn's digits (default), or an image folder with train/ and val/, each with one "
        "folder per class",
    )
    group.add_argument("--resolution", type=int, metavar="N", help="side of the images, e.g. 192, 160, 128 [224 / 64]")
    group.add_argument("--epochs", type=int, metavar="N", help="[150 / 12]")
    group.add_argument("--batch-size", type=int, metavar="N", help="[128 / 32]")
    group.add_argument("--lr", type=float, help="learning rate, falls to a hundredth along a cosine [0.01 / 0.1]")
    group.add_argument("--momentum", type=float, help="[0.9]")
    group.add_argument("--weight-decay", type=float, help="[0]")
    group.add_argument("--label-smoothing", type=float, help="[0.1]")
    group.add_argument("--amp", choices=AMP_MODES, help="mixed precision [off]")
    group.add_argument("--seed", type=int, metavar="N", help="of the weights, the order and the augmentation [0]")


def given_settings(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The settings of the recipe that were given on the command line."""
    values = {name: getattr(args, name) for name in (*RECIPE_OPTIONS, *more)}
    return {name: value for name, value in values.items() if value is not None}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that ``run_options`` reads."""
    group = parser.add_argument_group("where and how (not part of the recipe)")
    add_device_options(group)
    group.add_argument("--workers", type=int, metavar="N", help="processes that load images [a core each; digits: 0]")
    group.add_argument("--data-dir", default="data", metavar="DIR", help="where Imagenette lies or is put [data]")
    group.add_argument(
        "--corrupt",
        choices=CORRUPT_POLICIES,
        default="skip",
        help="images that cannot be read: name them and go on without (skip), or decode every image before the start "
        "and refuse to start (refuse) [skip]",
    )
    group.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="replay training steps from CUDA graphs, which saves time on the host and keeps the memory of a step "
        "[on a GPU, but not with --amp fp16]",
    )


def add_device_options(group: argparse._ActionsContainer) -> None:
    """Adds ``--device`` and ``--backend``."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto: the GPU if there is one]")
    group.add_argument("--backend", metavar="NAME", help="kernels to use; `mobilenet-ext doctor` lists them [auto]")


def run_options(args: argparse.Namespace) -> RunOptions:
    """What ``add_run_options`` read.

    Raises:
        TrainError: a value that cannot be used.
    """
    if args.workers is not None and args.workers < 0:
        raise RecipeError(f"--workers must be 0 or more, not {args.workers}")
    return RunOptions(device_of(args), args.backend, args.workers, args.data_dir, args.corrupt, args.cuda_graph)


def device_of(args: argparse.Namespace) -> Any:
    """The device of ``--device``.

    Raises:
        TrainError: it cannot be used.
    """
    try:
        return choose_device(args.device)
    except (ValueError, TrainError) as error:
        raise TrainError(f"--{error}") from error


def free_folder(name: str) -> Path:
    """Makes ``runs/NAME``, or the first of ``runs/NAME-2``, ``runs/NAME-3``, ... that was not there yet.

    Raises:
        TrainError: it cannot be made.
    """
    folder, number = Path("runs") / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            # Not where it is `runs` that is there, as a link to nowhere: then no number would be free.
            if not isinstance(error, FileExistsError) or not folder.parent.is_dir():
                raise TrainError(f"cannot make the output folder {folder}: {reason(error)}") from error
            number += 1  # it was there, or another process has just made it
            folder = Path("runs") / f"{name}-{number}"


def require_out(args: argparse.Namespace) -> None:
    """Raises ``TrainError`` where ``--resume`` was given without saying what."""
    if args.resume and args.out is None:
        raise TrainError("--resume needs --out, the folder to go on with")


def data_name(data: str) -> str:
    """A short name for the data, to name a folder after."""
    return data if data in ("digits", "imagenette") else Path(data).resolve().name or "images"
